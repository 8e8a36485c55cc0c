"""Doctor: what is wrong with a run, what can still be read, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from everystep.errors import RunError
from everystep.recording.database import FILE_NAME, Database, SnapshotRow, reading
from everystep.recording.facts import Facts
from everystep.recording.health import Finding, number_findings
from everystep.recording.run import RecordedRun
from everystep.recording.snapshots import check_snapshot
from everystep.replay.file_findings import MOST_NAMED, checked_files, file_findings
from everystep.replay.shown import Shown

__all__ = ["Diagnosis", "doctor"]


@dataclass(frozen=True)
class Diagnosis(Shown):
    """What is wrong with a run.

    findings: each with its place and a cure; readable: what can still be read, in words; checked: what
    was compared with its digest.
    """

    name: str
    findings: tuple[Finding, ...]
    readable: tuple[str, ...]
    checked: tuple[str, ...] = ()

    @property
    def is_healthy(self) -> bool:
        """Whether nothing is wrong in what was checked."""
        return not self.findings

    def __repr__(self) -> str:
        found = "; ".join(map(str, self.findings)) or "nothing is wrong in what was checked"
        return f"<diagnosis of {self.name}: {found}>"


def doctor(directory: Path) -> Diagnosis:
    """Look at everything that a run consists of; writes nothing, and replays nothing (`verify` does).

    Raises:
        RunError: there is no such run.
    """
    if not (directory / FILE_NAME).exists() and not directory.is_dir():
        raise RunError(f"{directory} is not a run: {FILE_NAME} is missing")
    name = directory.resolve().name.encode("utf-8", "replace").decode()
    links = [*_link_findings(directory)]
    try:
        run = RecordedRun(directory, may_be_cut=True)
        facts = run.facts
    except RunError as error:
        finding = Finding(FILE_NAME, str(error))
        return Diagnosis(name, (*links, finding), (*_states_without_database(directory),))
    numbers = [] if run.status == "running" else [*_database_findings(run)]
    found = [*links, *numbers, *file_findings(run, facts)]
    checked = [] if run.status == "running" else ["losses", "measurements", "facts"]
    return Diagnosis(
        name,
        tuple(found),
        tuple(_readable(run, facts)),
        (*checked, *checked_files(run, facts)),
    )


def _database_findings(run: RecordedRun) -> Iterator[Finding]:
    for problem in run.database_problems():
        yield Finding(FILE_NAME, problem.partition(": ")[2])
    try:
        yield from run.findings()
    except RunError as error:
        yield Finding(FILE_NAME, str(error))


def _link_findings(directory: Path) -> Iterator[Finding]:
    for path in sorted(directory.rglob("*")):
        if path.is_symlink():
            place = str(path.relative_to(directory))
            yield Finding(place, "it is a link, which everystep did not make", "replace it by the file")


def _readable(run: RecordedRun, facts: Facts) -> Iterator[str]:
    """Yield what can be read, in words."""
    with reading(run.directory / FILE_NAME) as database:
        yield from _readable_numbers(database, facts)
    good: list[int] = []
    rows: list[SnapshotRow] = []
    with suppress(RunError):
        rows = run.snapshot_rows()
    for row in rows:
        try:
            check_snapshot(run.directory, row)
        except RunError:
            continue
        good.append(row.step)
    if rows:
        ends = f": {good[0]:,} to {good[-1]:,}" if len(good) > 1 else f": {good[0]:,}" if good else ""
        yield f"states: {len(good):,} of {len(rows):,}{ends}"


def _readable_numbers(database: Database, facts: Facts) -> Iterator[str]:
    try:
        newest, altered = database.newest_step(), number_findings(database)
    except RunError:
        return
    planned = f" of {facts.steps:,}" if facts.steps and facts.steps != newest else ""
    yield f"losses: {newest:,}{planned}" + (", except those named above" if altered else "")


def _states_without_database(directory: Path) -> Iterator[str]:
    """Yield which states can be loaded by safetensors alone."""
    found = sorted(directory.glob("snapshots/[0-9]*/parameters.safetensors"))
    if found:
        names = ", ".join(path.parent.name for path in found[:MOST_NAMED])
        yield f"parameters of states {names}: snapshots/STEP/parameters.safetensors"
