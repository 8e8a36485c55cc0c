"""Repair: writes what is sound of a damaged run into a copy, and takes lost steps again by replay."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from everystep.bounded import MEMORY
from everystep.errors import EverystepError, RecordingError, RunError
from everystep.recording.changes import FOLDER as CHANGES
from everystep.recording.contents import FOLDER as BATCHES
from everystep.recording.database import FILE_NAME, Database, SnapshotRow
from everystep.recording.fact_rows import read_facts
from everystep.recording.facts import Facts, RepairFacts
from everystep.recording.files import own_path, read_own, row_of_file, take_file
from everystep.recording.lock import locked, writer_here
from everystep.recording.recorder import create_directory
from everystep.recording.run import RecordedRun
from everystep.recording.salvage import Salvaged, salvage
from everystep.recording.snapshots import PARAMETERS, REST, read_snapshot
from everystep.replay.file_findings import file_findings
from everystep.replay.processes import Opener
from everystep.replay.replay import Replay, same_number
from everystep.step.check import state_differences

__all__ = ["Repaired", "repair"]

#: Steps that are taken again before they are compared and written.
STRIDE = 256
#: Steps that are taken again where nothing on disk says that they were taken.
MOST_UNKNOWN = 1_000_000
_FOLDERS = ("programs", CHANGES, BATCHES)


@dataclass(frozen=True)
class Repaired:
    """A repaired copy of a run.

    directory: of the copy; steps, planned: that it has, and that the run had, as far as is known;
    again: first and last of the steps that were taken again; problems: what was not brought back, and
    why, in words; notes: what the damaged run had instead, in words.
    """

    directory: Path
    steps: int
    planned: int
    again: tuple[tuple[int, int], ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether the copy has everything that the run had, as far as digests tell."""
        return self.steps == self.planned and not self.problems


def repair(
    directory: Path, target: Path, on_progress: Callable[[int], None] = lambda steps: None
) -> Repaired:
    """Write what is sound of a run into a new directory, with lost steps taken again.

    A step that is taken again is computed from the state before it. It is kept if the replay agrees with
    every sound loss, and with every sound state after it.

    Args:
        directory: of the damaged run, which is not changed.
        target: of the copy, which must not exist.
        on_progress: called with the number of steps just taken again.

    Raises:
        RunError: nothing can be read, or `target` exists.
        RecordingError: the copy cannot be written.
    """
    found = salvage(directory / FILE_NAME)
    facts = read_facts(found.facts, directory / FILE_NAME)
    create_directory(target, "", Path())
    try:
        return _Copy(directory, target, found, facts).complete(on_progress)
    except OSError as error:
        raise RecordingError(f"{target} cannot be written: {error.strerror}") from None


class _Copy:
    """A copy that is being written: first what is sound, then step by step what comes back."""

    def __init__(self, source: Path, target: Path, found: Salvaged, facts: Facts) -> None:
        self._source, self._target = source, target
        self._found, self._facts = found, facts
        self._problems = [*found.problems]
        self._notes: list[str] = []
        self._again: list[tuple[int, int]] = []
        self._steps = 0

    def complete(self, on_progress: Callable[[int], None]) -> Repaired:
        """Write everything; return what came back."""
        lock = locked(self._target)
        database = Database.create(self._target / FILE_NAME)
        try:
            self._copy_files()
            rows = [row for row in self._found.snapshots if self._copy_snapshot(row)]
            unknown = self._unknown_states({row.step for row in rows})
            planned = self._planned([row.step for row in rows] + [*unknown])
            with database.transaction():
                self._write_rows(database, rows)
            states = {row.step: row for row in rows} | unknown
            self._write_losses(database, planned, states, on_progress)
            with database.transaction():
                self._write_states(database, unknown)
            copy = RecordedRun(self._target, may_be_cut=True)
            self._problems += [str(each) for each in file_findings(copy, copy.facts)]
            with database.transaction():
                self._write_facts(database, planned)
        finally:
            database.close()
            lock.release()
        problems = tuple(dict.fromkeys(self._problems))
        again, notes = tuple(self._again), tuple(self._notes)
        return Repaired(self._target, self._steps, planned, again, problems, notes)

    def _copy_files(self) -> None:
        """Copy the files besides states and the database: regular files only."""
        names = [path.name for path in self._source.iterdir()]
        chosen = [n for n in names if n.endswith((".safetensors", ".toml"))]
        for folder in _FOLDERS:
            with suppress(RunError):
                place = own_path(self._source, folder)
                chosen += [f"{folder}/{path.name}" for path in place.glob("*")]
        known = {row.name for row in self._found.files}
        for name in chosen:
            with suppress(RunError):  # a link, for example; the copy reports what it misses
                take_file(self._source, name, self._target, may_share=False)
                if name not in known and not name.endswith((".toml", ".bin")):
                    self._found.files.append(row_of_file(name, read_own(self._target, name, MEMORY)))
                    self._problems.append(f"{name} has no digest, and is taken over as it is")

    def _copy_snapshot(self, row: SnapshotRow) -> bool:
        """Copy a state with the recorded digest; return whether it has."""
        name = f"snapshots/{row.step:06d}"
        try:
            read_snapshot(self._source, row)
            for file in (PARAMETERS, REST):
                given = f"{row.directory}/{file}"
                take_file(self._source, given, self._target, f"{name}/{file}", may_share=False)
        except RunError as error:
            self._problems.append(str(error))
            return False
        return True

    def _unknown_states(self, known: set[int]) -> dict[int, SnapshotRow]:
        """Return the readable states on disk that the database does not know, by step."""
        found = {}
        for path in (self._source / "snapshots").glob("*"):
            if not (path.name.isdecimal() and len(path.name) < 18) or int(path.name) in known:
                continue
            row = _row_of(self._source, int(path.name), f"snapshots/{path.name}")
            if row is not None and row.step not in {each.step for each in self._found.snapshots}:
                found[row.step] = row
        return found

    def _planned(self, states: list[int]) -> int:
        newest = max([*self._found.losses, *self._found.doubtful, *states], default=0)
        if self._facts.status == "finished" and self._facts.steps is not None:
            return min(self._facts.steps, newest + MOST_UNKNOWN)
        return newest

    def _write_rows(self, database: Database, snapshots: list[SnapshotRow]) -> None:
        facts = self._facts.rows() | {"status": "stopped", "writer": writer_here()}
        database.write_facts(facts)
        database.write_measurements(self._found.measurements)
        for row in snapshots:
            database.add_snapshot(row._replace(directory=f"snapshots/{row.step:06d}"))
        database.write_files(self._found.files)
        database.write_repeats(self._found.repeats)
        database.write_contents(self._found.contents)

    def _write_losses(
        self,
        database: Database,
        planned: int,
        states: Mapping[int, SnapshotRow],
        on_progress: Callable[[int], None],
    ) -> None:
        """Write sound losses, and those of steps that are taken again, up to the first that is lost."""
        known = self._found.losses
        for first, last, is_lost in _spans(known, planned):
            if not is_lost:
                with database.transaction():
                    database.write_losses(first, [known[step] for step in range(first, last + 1)])
                self._steps = last
                continue
            # Up to the next state on disk, which shows that the steps are right.
            until = min((s for s in states if s >= last), default=last)
            losses = self._taken_again(first, last, min(until, planned), states)
            on_progress(len(losses))
            with database.transaction():
                database.write_losses(first, losses)
            self._steps = first + len(losses) - 1
            if losses:
                self._again.append((first, self._steps))
                self._compare_doubtful(first, losses)
            if self._steps < last:
                later = sum(step > last for step in known)
                more = f", so that {later:,} sound losses of later steps are left out" if later else ""
                self._problems.append(
                    f"steps {self._steps + 1:,} to {planned:,} could not be brought back{more}"
                )
                return

    def _taken_again(
        self, first: int, last: int, until: int, states: Mapping[int, SnapshotRow]
    ) -> list[float]:
        """Return the losses of steps `first` to `last`, as far as a replay gives them."""
        try:
            opener = Opener(RecordedRun(self._target, may_be_cut=True))
            known = {
                s: self._found.losses[s] for s in range(first, until + 1) if s in self._found.losses
            }
            wanted = [row for step, row in sorted(states.items()) if first <= step <= until]
            losses, problem = opener.call(_take, first, last, until, known, self._source, wanted)
        except EverystepError as error:
            losses, problem = [], str(error)
        if problem is not None:
            self._problems.append(problem)
        return losses

    def _compare_doubtful(self, first: int, losses: list[float]) -> None:
        numbers = {
            step: math.nan if loss is None else loss for step, loss in self._found.doubtful.items()
        }
        other = [
            s for s, loss in enumerate(losses, first) if not same_number(numbers.get(s, loss), loss)
        ]
        if other:
            was, now = numbers[other[0]], losses[other[0] - first]
            self._notes.append(
                f"the damaged run had other losses in {len(other):,} of the steps taken again, first in "
                f"step {other[0]:,}: {was!r} instead of {now!r}"
            )

    def _write_states(self, database: Database, unknown: Mapping[int, SnapshotRow]) -> None:
        """Write the states that a replay has confirmed; remove those after the last step."""
        taken = {step for first, last in self._again for step in range(first, last + 1)}
        for step, row in unknown.items():
            if step in taken and step <= self._steps and self._copy_snapshot(row):
                database.add_snapshot(row._replace(directory=f"snapshots/{step:06d}"))
        later = [row.step for row in database.snapshots() if row.step > self._steps]
        database.remove_snapshots(later)
        for step in later:
            shutil.rmtree(self._target / f"snapshots/{step:06d}")
        for name in database.forget_after(self._steps):
            (self._target / name).unlink(missing_ok=True)

    def _write_facts(self, database: Database, planned: int) -> None:
        """Write what the copy is, and the digests."""
        repaired = RepairFacts(
            run=str(self._source), again=tuple(self._again), problems=tuple(self._problems)
        )
        is_whole = self._steps == planned and self._facts.status != "running"
        status = self._facts.status if is_whole else "stopped"
        database.write_facts({"status": status, "repaired": repaired})


def _take(
    replay: Replay,
    first: int,
    last: int,
    until: int,
    known: Mapping[int, float | None],
    source: Path,
    states: list[SnapshotRow],
) -> tuple[list[float], str | None]:
    """Take steps `first` to `until` again; return the losses up to `last`, and what was wrong."""
    losses: list[float] = []
    confirmed = 0
    step = first - 1
    parts = {s.first - 1 for s in replay.stretches if first <= s.first - 1 < until}
    ends = sorted(
        {*range(first - 1 + STRIDE, until, STRIDE), *parts, *(row.step for row in states), until}
    )
    of_step = {row.step: row for row in states}
    problem = None
    for end in ends:
        at = replay.stretch_of(step + 1)
        with replay.in_force(step + 1):
            stepper = replay.go_to(step, at)
            if replay.diverged_at is not None and replay.diverged_at <= step:
                return [], (
                    f"steps from {first:,} on cannot be taken again: the replay gives another loss at "
                    f"step {replay.diverged_at:,}; what bits depend on may differ on this machine"
                )
            try:
                new = stepper.run(end).tolist()
            except RunError as error:
                return losses[:confirmed] if states else losses, str(error)
            state = stepper.capture() if end in of_step else None
        losses += new
        other = [s for s, loss in enumerate(new, step + 1) if s in known and not _agrees(loss, known[s])]
        if other:
            problem = (
                f"steps from {first:,} on, taken again, do not lead to the loss of step {other[0]:,}"
            )
            break
        if state is not None and end:
            # A fork may begin with another optimizer, or other random numbers.
            is_fork = replay.stretch_of(end + 1) != at
            recorded = read_snapshot(source, of_step[end])
            different = state_differences(recorded, state, only_model=is_fork)
            if different:
                problem = (
                    f"steps from {first:,} on, taken again, do not lead to the state after step {end:,}"
                )
                break
            confirmed = end - first + 1
        step = end
    if problem is not None:
        return losses[:confirmed], problem
    return losses[: last - first + 1], None


def _agrees(loss: float, known: float | None) -> bool:
    return same_number(loss, math.nan if known is None else known)


def _spans(known: Mapping[int, Any], planned: int) -> Iterator[tuple[int, int, bool]]:
    """Yield the steps from 1 to `planned` in spans: first, last, whether their losses are lost."""
    end = 0
    sound = enumerate(sorted(step for step in known if step <= planned))
    # Consecutive steps differ from their places by the same number.
    for _, group in groupby(sound, lambda pair: pair[1] - pair[0]):
        steps = [step for _, step in group]
        if steps[0] > end + 1:
            yield end + 1, steps[0] - 1, True
        yield steps[0], steps[-1], False
        end = steps[-1]
    if end < planned:
        yield end + 1, planned, True


def _row_of(run: Path, step: int, name: str) -> SnapshotRow | None:
    """Return the row of a state that the database does not know; None if it cannot be read as one."""
    try:
        contents = [read_own(run, f"{name}/{file}", MEMORY) for file in (PARAMETERS, REST)]
        joined = b"".join(contents)
        row = SnapshotRow(step, name, hashlib.sha256(joined).hexdigest(), len(joined))
        state = read_snapshot(run, row)
    except RunError:
        return None
    return row if state.settings.get("step", step) == step else None
