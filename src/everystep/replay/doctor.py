"""Doctor: what is wrong with a run, what can still be read, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from everystep.errors import EverystepError, RunError
from everystep.program.program import Program
from everystep.recording.changes import change_files, read_change
from everystep.recording.contents import FOLDER as BATCHES
from everystep.recording.data import read_data
from everystep.recording.database import FILE_NAME, Database, SnapshotRow, reading
from everystep.recording.facts import EAGERLY, Facts
from everystep.recording.files import own_path
from everystep.recording.health import Finding, number_findings
from everystep.recording.run import RecordedRun
from everystep.recording.snapshots import check_snapshot
from everystep.replay.repair import Repaired, repair
from everystep.replay.shown import Shown

__all__ = ["Diagnosis", "doctor"]

_RESTORE = "restore it from a copy of the run"
#: Findings of a kind that are named one by one.
_MOST_NAMED = 20


@dataclass(frozen=True)
class Diagnosis(Shown):
    """What is wrong with a run.

    findings: each with its place and a cure; readable: what can still be read, in words; repaired: the
    copy that was written, if one was asked for.
    """

    name: str
    findings: tuple[Finding, ...]
    readable: tuple[str, ...]
    repaired: Repaired | None = None

    @property
    def is_healthy(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings

    def __repr__(self) -> str:
        found = "; ".join(map(str, self.findings)) or "nothing is wrong"
        return f"<diagnosis of {self.name}: {found}>"


def doctor(
    directory: Path, target: Path | None = None, on_progress: Callable[[int], None] = lambda steps: None
) -> Diagnosis:
    """Look at everything that a run consists of; replays nothing (`verify` does).

    Args:
        directory: of the run.
        target: where to write a repaired copy, if wanted.
        on_progress: called with the number of lost steps just taken again.

    Raises:
        RunError: there is no such run; or, with `target`, nothing can be read, or `target` exists.
        RecordingError: the copy cannot be written.
    """
    found = _diagnosed(directory)
    repaired = None if target is None else repair(directory, target, on_progress)
    return replace(found, repaired=repaired)


def _diagnosed(directory: Path) -> Diagnosis:
    if not (directory / FILE_NAME).exists() and not directory.is_dir():
        raise RunError(f"{directory} is not a run: {FILE_NAME} is missing")
    name = directory.resolve().name.encode("utf-8", "replace").decode()
    links = [*_link_findings(directory)]
    try:
        run = RecordedRun(directory, may_be_cut=True)
        facts = run.facts
    except RunError as error:
        finding = Finding(
            FILE_NAME, str(error), "restore it from a copy of the run, or try --repair DIR"
        )
        return Diagnosis(name, (*links, finding), (*_states_without_database(directory),))
    numbers = [] if run.status == "running" else [*_database_findings(run)]
    found = [*links, *numbers, *_file_findings(run, facts)]
    return Diagnosis(name, tuple(found), tuple(_readable(run, facts)))


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


def _file_findings(run: RecordedRun, facts: Facts) -> Iterator[Finding]:
    """Yield what is wrong with states, data, programs, experiments, changes and batches."""
    try:
        rows = run.snapshot_rows()
    except RunError as error:
        yield Finding(f"{FILE_NAME}, snapshots", str(error))
        rows = []
    for row in rows:
        cure = "steps after it open from the state before it; " + Finding._field_defaults["cure"]
        yield from _checked(row.directory, partial(check_snapshot, run.directory, row), cure)
    is_begun = bool(rows) or facts.trained is not None
    if is_begun and 0 not in {row.step for row in rows}:
        yield Finding("snapshots", "the state before the first step is missing", _RESTORE)
    if facts.trained is None:
        return
    for stretch in run.stretches:
        training = stretch.facts
        data, engine = training.data_file, training.engine or EAGERLY
        if data is not None and data.stored:
            yield from _checked(data.file, partial(read_data, run.directory, data), _RESTORE)
        files = [program.file for program in engine.programs]
        if training.loop is not None:
            files += [f"programs/{number + 1}.json" for number in range(training.loop.programs)]
        for file in dict.fromkeys(files):
            yield from _checked(file, partial(_read_program, run.directory, file), _RESTORE)
        name = training.experiment_file or "experiment.toml"
        yield from _checked(name, partial(run.experiment_file, training), _RESTORE)
    for name in change_files(run.directory).values():
        yield from _checked(name, partial(read_change, run.directory, name), _RESTORE)
    yield from _batch_findings(run)


def _checked(place: str, read: Callable[[], object], cure: str) -> Iterator[Finding]:
    """Yield what is wrong with a file, as reading it says."""
    try:
        read()
    except (EverystepError, OSError) as error:
        yield Finding(place, str(error), cure)


def _read_program(directory: Path, file: str) -> Program:
    return Program.from_json(own_path(directory, file).read_bytes())


def _batch_findings(run: RecordedRun) -> Iterator[Finding]:
    """Yield which files of batches are too short for what the database says is in them."""
    with reading(run.directory / FILE_NAME) as database:
        try:
            rows = database.all_contents()
        except RunError as error:
            yield Finding(f"{FILE_NAME}, contents", str(error))
            return
    ends: dict[int, int] = {}
    for _, file, place, size in rows:
        ends[file] = max(ends.get(file, 0), place + size)
    for file, end in sorted(ends.items())[:_MOST_NAMED]:
        name = f"{BATCHES}/{file}.bin"
        path = own_path(run.directory, name)
        size = path.stat().st_size if path.is_file() else -1
        if size < end:
            problem = "it is missing" if size < 0 else f"it has {size:,} of {end:,} bytes"
            yield Finding(name, f"{problem}: steps that need it cannot be replayed", _RESTORE)


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
        names = ", ".join(path.parent.name for path in found[:_MOST_NAMED])
        yield f"parameters of states {names}: snapshots/STEP/parameters.safetensors"
