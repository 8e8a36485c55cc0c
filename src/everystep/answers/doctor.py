"""Doctor: damage of a run, what can still be read, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from everystep.errors import EverystepError, RunError
from everystep.recording.blocks import BLOCK
from everystep.recording.contents import Given, inputs_of, read_pieces, runs_of
from everystep.recording.database import FILE_NAME, Database, reading
from everystep.recording.directories import is_run, name_of
from everystep.recording.facts import Facts
from everystep.recording.files import batch_file, files_in, program_file
from everystep.recording.health import Finding, number_findings
from everystep.recording.recorded_run import EXPERIMENT_FILE, RecordedRun
from everystep.recording.snapshots import SnapshotRow, read_snapshot
from everystep.replay.recorded_steps import read_program
from everystep.replay.shown import Shown

__all__ = ["Diagnosis", "doctor"]

#: Findings of a kind that are named one by one.
MOST_NAMED = 20
_RESTORE = "restore it from a copy of the run"
#: Kinds of files that are compared with their digests, as a diagnosis lists them.
_KINDS = ("data", "experiment", "programs", "changes between steps")


@dataclass(frozen=True)
class Diagnosis(Shown):
    """What is wrong with a run.

    findings: each with its place and a cure; readable: what can still be read, as texts; checked: what
    was compared with its digest.
    """

    name: str
    findings: tuple[Finding, ...]
    readable: tuple[str, ...]
    checked: tuple[str, ...] = ()

    @property
    def is_healthy(self) -> bool:
        """Whether the checks found nothing wrong."""
        return not self.findings

    def __repr__(self) -> str:
        found = "; ".join(map(str, self.findings)) or "the checks found nothing wrong"
        return f"<diagnosis of {self.name}: {found}>"


def doctor(directory: Path) -> Diagnosis:
    """Check all files of a run; writes nothing, and replays nothing (`verify` does).

    Raises:
        RunError: there is no such run.
    """
    if not (directory / FILE_NAME).exists() and not directory.is_dir():
        raise RunError(f"{directory} is not a run: {FILE_NAME} is missing")
    own = _own(directory)
    with suppress(RunError):
        run, top = RecordedRun(directory), directory.resolve()
        known = [run.places_of_ranks(place) for place in range(len(run.stretches))]
        ranks = {place: rank for each in known for rank, place in enumerate(each) if place != top}
        for place, rank in ranks.items() if all(each[0] == top for each in known) else ():
            missing = Finding("run", f"the run of rank {rank} is missing", _RESTORE)
            found = _own(place).findings if is_run(place) else (missing,)
            name = str(place.relative_to(top))
            named = tuple(each._replace(place=f"{name}/{each.place}") for each in found)
            own = replace(own, findings=own.findings + named)
    return own


def _own(directory: Path) -> Diagnosis:
    """Check the files of a run, without those of other ranks."""
    name = name_of(directory)
    found = [*_link_findings(directory)]
    try:
        run = RecordedRun(directory)
        facts = run.facts
    except RunError as error:
        found.append(Finding(FILE_NAME, str(error)))
        return Diagnosis(name, tuple(found), (*_states_without_database(directory),))
    checked: list[str] = []
    if run.status != "running":
        found += run.database_findings()
        try:
            found += run.findings()
        except RunError as error:
            found.append(Finding(FILE_NAME, str(error)))
        checked += ["losses", "measurements", "facts"]
    states: dict[SnapshotRow, str | None] = {}
    try:
        rows = run.own_snapshot_rows()
        states = {row: _problem(partial(read_snapshot, directory, row)) for row in rows}
    except RunError as error:
        found.append(Finding(f"{FILE_NAME}, snapshots", str(error)))
    found += _state_findings(run, states)
    checked.append("states")
    if facts.trained is not None:
        files = [*_files(run)]
        # Reading is checking: what is read is compared with its digest.
        problems = ((place, _problem(read)) for _, place, read in files)
        found += [Finding(place, each, _RESTORE) for place, each in problems if each is not None]
        found += _batch_findings(run)
        checked += [kind for kind in _KINDS if any(each == kind for each, *_ in files)]
        checked += ["batches"] * any(stretch.facts.loop is not None for stretch in run.stretches)
    return Diagnosis(name, tuple(found), (*_readable(run, facts, states),), tuple(checked))


def _problem(read: Callable[[], object]) -> str | None:
    try:
        read()
    except (EverystepError, OSError) as error:
        return str(error)
    return None


def _link_findings(directory: Path) -> Iterator[Finding]:
    for path, _ in files_in(directory):
        if path.is_symlink():
            place = str(path.relative_to(directory))
            yield Finding(place, "it is a link, which everystep did not make", "replace it by the file")


def _state_findings(run: RecordedRun, states: dict[SnapshotRow, str | None]) -> Iterator[Finding]:
    """Yield which states are missing or altered, and which steps have no state to open from.

    states: the problem of each, None if it has none.
    """
    sound = [row.step for row, problem in states.items() if problem is None]
    for row, problem in states.items():
        if any(step < row.step for step in sound):
            cure = f"{_RESTORE}; until then, steps after it open from the state before it"
        else:
            cure = f"{_RESTORE}; without it, {_unopened(run, row.step, sound)}"
        if problem is not None:
            yield Finding(row.directory, problem, cure)
    is_begun = bool(states) or run.facts.trained is not None
    if is_begun and 0 not in {row.step for row in states}:
        problem = f"the state before the first step is missing: {_unopened(run, 0, sound)}"
        yield Finding("snapshots", problem, _RESTORE)


def _unopened(run: RecordedRun, state: int, sound: list[int]) -> str:
    """Return which steps have no state to open from, if none up to `state` is sound."""
    newest, trained = run.newest_step(), run.facts.trained
    last = min((step for step in sound if step > state), default=newest)
    # A step drops the gradients of the one before, which only the state of a loop has.
    last += trained is None or trained.loop is None
    which = "no step" if last >= newest else f"none of steps 1 to {last:,}"
    return f"{which} can be opened, and the run cannot be verified"


def _files(run: RecordedRun) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Yield the files of a run except states and batches: kind, place, and a function that reads it."""
    for stretch in run.stretches:
        training = stretch.facts
        data = training.data_file
        if data is not None and data.stored:
            yield "data", data.file, partial(run.data, data)
        for number in dict.fromkeys(training.programs):
            yield "programs", program_file(number), partial(read_program, run, number)
        name = training.experiment_file or EXPERIMENT_FILE
        if run.files(name):
            yield "experiment", name, partial(run.experiment, training)
    for name in run.change_files().values():
        yield "changes between steps", name, partial(run.change, name)


def _batch_findings(run: RecordedRun) -> Iterator[Finding]:
    """Yield the files of batches that differ from the recording, by the digests of their rows."""
    altered: set[int] = set()
    cure = f"{_RESTORE}; without it, steps that need it cannot be replayed"
    with reading(run.directory / FILE_NAME) as database:
        try:
            for given, new in _given(database):
                index = database.contents(new)
                files = {n: row.file for n in new if (row := index.of(n)) is not None}
                # One finding for each file is enough: the cure is the same.
                for file in sorted({*files.values()} - altered):
                    own = given._replace(runs=runs_of(n for n in new if files.get(n) == file))
                    problem = _problem(partial(read_pieces, run.directory, index, own))
                    if problem is not None and len(altered) < MOST_NAMED:
                        altered.add(file)
                        yield Finding(batch_file(file), problem, cure)
        except RunError as error:
            yield Finding(f"{FILE_NAME}, repeats", str(error))


def _given(database: Database) -> Iterator[tuple[Given, list[int]]]:
    """Yield the inputs of steps, and the numbers of their pieces that no earlier one has, in order."""
    seen: set[int] = set()
    step = 0
    # A long run has more rows than the memory should hold.
    while rows := database.repeats(step + 1, most=BLOCK):
        for row in rows:
            for given in inputs_of(row.inputs, f"the input of step {row.step}").given.values():
                new = sorted({*given.numbers()} - seen)
                # Each piece is read once, by the first step that has it.
                seen.update(new)
                yield given, new
        step = rows[-1].last


def _readable(run: RecordedRun, facts: Facts, states: dict[SnapshotRow, str | None]) -> Iterator[str]:
    with reading(run.directory / FILE_NAME) as database, suppress(RunError):
        newest, altered = database.newest_step(), number_findings(database)
        planned = f" of {facts.steps:,}" if facts.steps and facts.steps != newest else ""
        yield f"losses: {newest:,}{planned}" + (", except those named above" if altered else "")
    if states:
        good = [row.step for row, problem in states.items() if problem is None]
        ends = f": {good[0]:,} to {good[-1]:,}" if len(good) > 1 else f": {good[0]:,}" if good else ""
        yield f"states: {len(good):,} of {len(states):,}{ends}"


def _states_without_database(directory: Path) -> Iterator[str]:
    """Yield which states can be loaded by safetensors alone."""
    found = sorted(directory.glob("snapshots/[0-9]*/parameters.safetensors"))
    if found:
        names = ", ".join(path.parent.name for path in found[:MOST_NAMED])
        yield f"parameters of states {names}: snapshots/STEP/parameters.safetensors"
