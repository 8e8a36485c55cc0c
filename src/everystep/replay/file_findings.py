"""File findings: what is missing, altered or unreadable among the files next to the database."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from everystep.errors import EverystepError, RunError
from everystep.recording.blocks import BLOCK
from everystep.recording.contents import FOLDER as BATCHES
from everystep.recording.contents import Given, inputs_of, read_contents
from everystep.recording.database import FILE_NAME, Database, SnapshotRow, reading
from everystep.recording.facts import Facts
from everystep.recording.files import program_file
from everystep.recording.health import Finding
from everystep.recording.run import RecordedRun
from everystep.recording.snapshots import check_snapshot
from everystep.replay.recorded_steps import read_program

__all__ = ["MOST_NAMED", "checked_files", "file_findings"]

#: Findings of a kind that are named one by one.
MOST_NAMED = 20
_RESTORE = "restore it from a copy of the run"


def file_findings(run: RecordedRun, facts: Facts) -> Iterator[Finding]:
    """Yield what is wrong with states, data, programs, experiments, changes and batches."""
    try:
        rows = run.snapshot_rows()
    except RunError as error:
        yield Finding(f"{FILE_NAME}, snapshots", str(error))
        rows = []
    yield from _state_findings(run, rows, is_begun=bool(rows) or facts.trained is not None)
    if facts.trained is None:
        return
    yield from _stretch_findings(run)
    for name in run.change_files().values():
        yield from _checked(name, partial(run.change, name), _RESTORE)
    yield from _batch_findings(run)


def checked_files(run: RecordedRun, facts: Facts) -> Iterator[str]:
    """Yield which files `file_findings` compares with their digests, in words."""
    yield "states"
    if facts.trained is None:
        return
    stretches = [stretch.facts for stretch in run.stretches]
    if any(each.data_file is not None and each.data_file.stored for each in stretches):
        yield "data"
    if any(each.experiment_digest is not None for each in stretches):
        yield "experiment"
    if any(each.programs for each in stretches):
        yield "programs"
    if run.change_files():
        yield "changes between steps"
    if any(each.loop is not None for each in stretches):
        yield "batches"


def _state_findings(run: RecordedRun, rows: list[SnapshotRow], *, is_begun: bool) -> Iterator[Finding]:
    """Yield which states are missing or altered, and which steps have no state to open from."""
    problems = {
        row: [*_checked(row.directory, partial(check_snapshot, run.directory, row), "")] for row in rows
    }
    sound = [row.step for row, found in problems.items() if not found]
    for row, found in problems.items():
        if any(step < row.step for step in sound):
            cure = f"{_RESTORE}; until then, steps after it open from the state before it"
        else:
            cure = f"{_RESTORE}; without it, {_unopened(run, row.step, sound)}"
        yield from (finding._replace(cure=cure) for finding in found)
    if is_begun and 0 not in {row.step for row in rows}:
        problem = f"the state before the first step is missing: {_unopened(run, 0, sound)}"
        yield Finding("snapshots", problem, _RESTORE)


def _unopened(run: RecordedRun, state: int, sound: list[int]) -> str:
    """Return which steps have no state to open from, where none up to `state` is sound."""
    newest, trained = run.newest_step(), run.facts.trained
    last = min((step for step in sound if step > state), default=newest)
    # A step drops the gradients of the one before, which only the state of a loop has.
    last += trained is None or trained.loop is None
    which = "no step" if last >= newest else f"none of steps 1 to {last:,}"
    return f"{which} can be opened, and the run cannot be verified"


def _stretch_findings(run: RecordedRun) -> Iterator[Finding]:
    """Yield what is wrong with the data, programs and experiment of each stretch."""
    for stretch in run.stretches:
        training = stretch.facts
        data = training.data_file
        if data is not None and data.stored:
            yield from _checked(data.file, partial(run.data, data), _RESTORE)
        for number in dict.fromkeys(training.programs):
            yield from _checked(program_file(number), partial(read_program, run, number), _RESTORE)
        name = training.experiment_file or "experiment.toml"
        yield from _checked(name, partial(run.experiment, training), _RESTORE)


def _checked(place: str, read: Callable[[], object], cure: str) -> Iterator[Finding]:
    """Yield what is wrong with a file, as reading it says."""
    try:
        read()
    except (EverystepError, OSError) as error:
        yield Finding(place, str(error), cure)


def _batch_findings(run: RecordedRun) -> Iterator[Finding]:
    """Yield which files of batches are not as they were recorded, by the digests of their rows."""
    altered: set[int] = set()
    cure = f"{_RESTORE}; without it, steps that need it cannot be replayed"
    with reading(run.directory / FILE_NAME) as database:
        try:
            for given in _given(database):
                places = database.contents(given.digests)
                file = next((place[0] for place in places.values()), 0)
                if file not in altered and len(altered) < MOST_NAMED:
                    read = partial(read_contents, run.directory, places, given)
                    for finding in _checked(f"{BATCHES}/{file}.bin", read, cure):
                        altered.add(file)
                        yield finding
        except RunError as error:
            yield Finding(f"{FILE_NAME}, repeats", str(error))


def _given(database: Database) -> Iterator[Given]:
    """Yield what steps were given, row by row, each once."""
    seen: set[bytes] = set()
    step = 0
    while rows := database.repeats_after(step, BLOCK):
        for row in rows:
            for given in inputs_of(row.inputs, f"the input of step {row.step}").given.values():
                for digest in given.digests:
                    if digest not in seen:
                        seen.add(digest)
                        shape = given.shape if len(given.digests) == 1 else (1, *given.shape[1:])
                        yield Given(given.dtype, shape, (digest,))
        step = rows[-1].last
