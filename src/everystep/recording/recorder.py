"""Writes a run during training, in the background."""

from __future__ import annotations

import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial, wraps
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

from everystep import clock
from everystep.bounded import MOST_STEPS
from everystep.errors import RecordingError, RunError, say
from everystep.recording.connection import SPARE_NAME
from everystep.recording.contents import DEFAULT_BATCH_BUDGET
from everystep.recording.continuation import Continuation, inherit, tidy
from everystep.recording.database import FILE_NAME, Database, Repeat, cut
from everystep.recording.directories import GoneError, Home
from everystep.recording.facts import EarlierFacts, Facts, NotKeptFacts
from everystep.recording.files import (
    DATA_FILE,
    DATA_LIMIT,
    PROGRAMS,
    SNAPSHOTS,
    program_file,
    remove,
    row_of_file,
    state_folder,
    write_change,
    write_data,
    write_whole,
)
from everystep.recording.input_writer import Repeats, Taken
from everystep.recording.keep import Ahead, Keep, Outlook, is_kept
from everystep.recording.lock import locked, writer_here
from everystep.recording.recorded_run import RecordedRun
from everystep.recording.snapshots import LARGE_BYTES, SnapshotPlan, read_snapshot, write_snapshot
from everystep.recording.texts import processes_text

if TYPE_CHECKING:
    from torch import Tensor

    from everystep.step.state import State

__all__ = ["Recorder"]

#: Seconds that one write takes, or that the training waits for the disk, before it is reported.
LATE_SECONDS = 10.0
#: Bytes of batches that may wait to be written, before the training waits.
MOST_WAITING = 512_000_000
#: Bytes that a run keeps while it is written: several times what its last facts take.
_SPARE = 65_536


P = ParamSpec("P")


def _in_thread(
    method: Callable[Concatenate[Any, P], None],
) -> Callable[Concatenate[Any, P], None]:
    """Let the thread of a recorder run a method, after those that were called before."""

    @wraps(method)
    def put(recorder: Any, /, *arguments: P.args, **options: P.kwargs) -> None:
        recorder._put(partial(method, recorder, *arguments, **options))

    return put


# The order in which a step reaches the disk:
#   training   losses(first_step, losses, taken=...)  puts a job into the queue, and returns
#   recorder   1. contents of new inputs, and the rows that repeat the steps  (one transaction)
#              2. measurements, facts and losses                              (one transaction)
#              3. the losses go to `written`, to be shown; old steps are given up
#   training   check() raises what went wrong in the thread, at the next step
# Between the constructor and `finish`, only the recorder thread uses the database.
class Recorder:
    """The one writer of a run: takes losses, measurements and states, and writes them in a thread.

    directory: of the run; empty unless it is resumed; facts: what is known before the first step; for a
    fork, without inherited ones; budget: maximum bytes of snapshots; parent: the parent run, if this is
    a fork; at: the parent's state that it starts from; texts: content of text files by name, written
    before the database names them; beginning: that state as the fork has it: written together with the
    inherited data, all or nothing, because no other snapshot has the fork's settings; batch_budget:
    maximum bytes of batches and other inputs of steps; keep: which steps can be opened afterwards; None:
    all; is_resumed: the run exists, and its training continues from state `at`, which is on disk; steps
    that the run already has are compared, not written (see `Continuation`).

    plan: when to take snapshots; recorded: the newest step that the run had when it was resumed, 0 for a
    new run; is_estimated: whether what it will take was reported; program_count: how many programs the
    run has, those of before included.
    The next `check`, and `finish`, raise errors of the thread.
    """

    def __init__(
        self,
        directory: Path,
        facts: Facts,
        budget: float,
        parent: RecordedRun | None = None,
        at: int = 0,
        batch_budget: float = DEFAULT_BATCH_BUDGET,
        is_resumed: bool = False,
        texts: Mapping[str, str] = MappingProxyType({}),
        beginning: State | None = None,
        keep: Keep | None = None,
    ) -> None:
        self.recorded = self.program_count = 0
        self.is_estimated = False
        self._bytes_asked = self._bytes_written = 0
        self._home = Home(directory)
        self.plan = SnapshotPlan(budget, is_kept=self._is_kept)
        self._batch_budget, self._keep = batch_budget, keep
        self._not_kept: tuple[NotKeptFacts, ...] = ()
        self._given_up_to = 0
        self._earlier: tuple[EarlierFacts, ...] = ()
        #: The first step of the call of `steps` that a snapshot is in: a resume draws from there on.
        self._call_begins: dict[int, int] = {}
        if keep is not None and keep.newest is not None:
            # Steps are given up back to a snapshot, so these are about as many apart as are to stay.
            self.plan.longest = 2 ** math.ceil(math.log2(keep.newest))
        self._snapshot_seconds = 0.0
        self._snapshot_bytes = 0
        self._passed = at
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._written: queue.SimpleQueue[tuple[int, Sequence[float]]] = queue.SimpleQueue()
        self._snapshots_asked = self._snapshots_written = self._chosen_after = 0
        self._error: BaseException | None = None
        self._job_began: float | None = None
        self._is_late = False
        #: What compares steps with recorded ones, until the first new step.
        self._again: Continuation | None = None
        # If anything here fails, what has begun ends; `pop_all` keeps it for `finish`.
        with ExitStack() as closing:
            closing.callback(self._home.close)
            try:
                closing.enter_context(locked(self._home.here))
                closing.callback(self._remove_spare)
                # Room for the last facts on a full disk; no file system can compress random bytes.
                (self._home.here / SPARE_NAME).write_bytes(os.urandom(_SPARE))
                # A new run must not take over a directory with states of another.
                (self._home.here / SNAPSHOTS).mkdir(exist_ok=is_resumed)
                contents = {name: text.encode() for name, text in texts.items()}
                for name, content in contents.items():
                    write_whole(self._home.here / name, content)
                opened = Database.change if is_resumed else Database.create
                self._database = opened(self._home.here / FILE_NAME)
                closing.callback(self._database.close)
                with self._database.transaction():
                    self._database.enter([row_of_file(*each) for each in contents.items()])
                if is_resumed:
                    self._resume(facts)
                else:
                    self._begin(facts, parent, at, beginning)
                trained = self._database.facts().trained
                if trained is not None and trained.loop is not None:
                    self.plan.newest = 2  # a resume of a loop begins with the second newest
                # By their rows: one without its file keeps its number.
                programs = [Path(row.name).stem for row in self._database.files(f"{PROGRAMS}/*.json")]
                self.program_count = max((int(each) for each in programs if each.isdecimal()), default=0)
                given = batch_budget, self._last_step, keep, self._is_kept, self._resumed
                self._repeats = Repeats(self._database, *given)
                self.plan.lost_to = self._repeats.lost_to
                closing.callback(self._repeats.close)
            except OSError as error:
                raise self._translated(error, self.recorded, is_resumed) from error
            #: Ends the writing of the run, in any case.
            self._closing = closing.pop_all()
        self._thread = threading.Thread(target=self._work, name="everystep recorder", daemon=True)
        self._thread.start()

    @property
    def directory(self) -> Path:
        """The run's directory; it may be moved while it is written."""
        return self._home.directory

    def data(self, tensors: dict[str, Tensor], name: str = DATA_FILE) -> None:
        """Write the data set (CPU tensors) while it is small; else its size and digest."""
        if sum(tensor.nbytes for tensor in tensors.values()) <= DATA_LIMIT:
            # A step may change its batch in place before it is written.
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        self._write_data(tensors, name)

    def program(self, text: str) -> int:
        """Write the JSON of a program; return its number in the run."""
        self.program_count += 1
        self._write_program(self.program_count, text.encode())
        return self.program_count

    @_in_thread
    def change(self, step: int, tensors: dict[str, Tensor], gone: Sequence[str] = ()) -> None:
        """Write tensors (on the CPU) that code between two steps changed after `step`.

        gone: the names of removed tensors.
        """
        # A replay needs the change only to take the next step.
        if step >= self.recorded and self._is_kept(step + 1):
            row = write_change(self._home.here, step, tensors, [*gone])
            with self._database.transaction():
                self._database.enter([row])

    @_in_thread
    def forget_after(self, step: int) -> None:
        """Delete losses, measurements and snapshots of later steps, which will run again."""
        step = max(step, self.recorded)  # compare the resumed steps again
        later = [taken for taken in self.plan.kept if taken > step]
        for taken in later:
            del self.plan.kept[taken]
        changes = [file for changed, file in self._database.changes().items() if changed > step]
        with self._database.removing([*map(state_folder, later), *changes]):
            self._database.forget_after(step)
        self._passed = min(self._passed, step)

    @_in_thread
    def facts(self, facts: Mapping[str, Any]) -> None:
        """Write facts: values of fields of `Facts` and `TrainingFacts`, by name."""
        self._write_numbers((), facts)

    def losses(
        self,
        first_step: int,
        losses: Sequence[float],
        measured: Sequence[tuple[str, int, float]] = (),
        facts: Mapping[str, Any] = MappingProxyType({}),
        taken: Sequence[Taken] = (),
    ) -> None:
        """Write the losses of consecutive steps, if any, with measurements and facts: all or nothing.

        taken: the data that repeats the steps, if they were watched. Steps that were passed before are
        left out: Ctrl-C may come before the caller notes it.
        """
        # Before the job is in the queue: `wait` compares this with what is written.
        self._bytes_asked += sum(row.bytes for row in taken)
        self._write_steps(first_step, losses, measured, facts, taken)

    @_in_thread
    def estimate(self, ahead: Ahead) -> None:
        """Report, once, what the run is going to take, if that is much. ahead: the steps to come."""
        recent, sizes = self._repeats.recent, self.plan.kept
        if self.is_estimated or not recent or not sizes:
            return
        notice = Outlook(
            steps=self._last_step,
            batches=self._repeats.size,
            rate=sum(recent) / len(recent),
            state=sizes[max(sizes)],
            interval=self.plan.interval,
            snapshot_budget=self.plan.budget,
            batch_budget=self._batch_budget,
            keep=self._keep,
        ).notice(ahead)
        if notice is not None:
            self.is_estimated = True
            say(notice)

    def snapshot(self, state: State) -> None:
        """Write a state."""
        self._snapshots_asked += 1
        self._write_snapshot(state)

    def written(self) -> Iterator[tuple[int, Sequence[float]]]:
        """Yield the losses written since the last call, and the first step of each group."""
        while not self._written.empty():  # no other thread takes them
            yield self._written.get()

    def differs(self, step: int, problem: str) -> RunError:
        """Return the error of a resumed training in which a step is not as recorded."""
        assert self._again is not None
        return self._again.differs(step, problem)

    @property
    def _last_step(self) -> int:
        """The newest step on disk."""
        return max(self._passed, self.recorded)

    def wait(self) -> None:
        """Wait for the disk if too much is queued.

        Raises:
            RecordingError: writing the run failed.
        """
        self.check()
        began = time.monotonic()
        # Each number is changed by one thread only, so neither needs a lock.
        while (waiting := self._bytes_asked - self._bytes_written) > MOST_WAITING:
            time.sleep(0.001)
            self.check()
            if time.monotonic() - began > LATE_SECONDS:
                began = math.inf
                say(
                    f"{waiting / 1e6:,.0f} MB of batches wait to be written to {self.directory}, and "
                    "the training waits for the disk"
                )

    @property
    def has_interval(self) -> bool:
        """Whether the snapshot interval is chosen: the first step of a process is slow."""
        # The first two snapshots show what one takes, so the interval is chosen again after each.
        return self.plan.interval is not None and self._chosen_after >= min(self._snapshots_written, 2)

    def choose_interval(self, step_seconds: float, size: int, waited: float) -> None:
        """Choose the snapshot interval from the time of a step.

        size: bytes of the current state; waited: seconds for which the training waited for the newest
        snapshot, before it was passed on.
        """
        self._chosen_after = self._snapshots_written
        # The first snapshot has no optimizer state, so the next ones may take longer.
        growth = size / self._snapshot_bytes if self._snapshot_bytes > LARGE_BYTES else 1.0
        self.plan.choose_interval(step_seconds, (waited + self._snapshot_seconds) * max(1.0, growth))

    @property
    def is_behind(self) -> bool:
        """Whether a snapshot is still being written, so that the next one should wait."""
        return self._snapshots_asked > self._snapshots_written

    def check(self) -> None:
        """Raise RecordingError if writing has failed, RunError if a repeated step differs.

        Report a write that takes long.
        """
        # Read once: the thread may set it to None in between.
        began = self._job_began
        if began is not None and not self._is_late and time.monotonic() - began > LATE_SECONDS:
            self._is_late = True
            say(
                f"a write to {self.directory} takes more than {LATE_SECONDS:.0f} seconds (a slow disk, "
                f"a large state, or another program that has locked {FILE_NAME}); the training "
                "continues, and its steps wait in memory"
            )
        if isinstance(self._error, RunError | GoneError):
            raise self._error
        if self._error is not None:
            raise self._translated(self._error, self._last_step) from self._error

    def finish(self, facts: dict[str, Any]) -> None:
        """Write the remaining data and the last facts, and close the run.

        Raises:
            RecordingError: writing failed, now or before; the run is closed anyway.
        """
        self._put(partial(self._write_last_facts, facts))
        self._queue.put(None)
        self._thread.join(LATE_SECONDS)
        if self._thread.is_alive():
            say(f"the last steps are still being written to {self.directory}: the disk is slow")
            self._thread.join()
        # A repeated step that differs leaves the run as it was; a run that is gone takes no facts.
        if self._error is not None and not isinstance(self._error, RunError | GoneError):
            self._close_failed(self._error, facts)
        self._closing.close()
        self.check()

    def _close_failed(self, error: BaseException, facts: Mapping[str, Any]) -> None:
        """Write into the run that writing it failed, in the space that was kept for it."""
        reason = f"writing the run failed: {_reason(error)}"
        with suppress(Exception):
            self._follow()
            self._database.hurry()
            self._remove_spare()
            finished = facts.get("finished")
            self._write_last_facts({"status": "failed", "reason": reason, "finished": finished})

    def _remove_spare(self) -> None:
        remove(self._home.here / SPARE_NAME)

    def _begin(self, facts: Facts, parent: RecordedRun | None, at: int, beginning: State | None) -> None:
        """Write the facts from before the first step: all or nothing."""
        with self._database.transaction():
            here, database, inherited = self._home.here, self._database, dict[str, Any]()
            if parent is not None:
                inherited = inherit(database, self.plan, parent, at)
            # A fork of a loop may have inherited it.
            if beginning is not None and at not in self.plan.kept:
                row = write_snapshot(here, beginning)
                database.enter(row.files)
                self.plan.kept[row.step] = row.size
            first = {"status": "running", "writer": writer_here()}
            known = [*(() if parent is None else parent.facts.not_kept)]
            for each in inherited.get("earlier", ()):
                if each.training.processes != facts.training.processes:
                    # To repeat them needs the runs of the ranks that took them, which stay in place.
                    keep = f"those by {processes_text(facts.training.processes)}"
                    known.append(NotKeptFacts(first=1, last=each.last, keep=keep))
            kept = self._begin_keeping(known, at)
            database.write_facts(first | inherited | facts.rows() | kept)
            self._earlier = inherited.get("earlier", ())
            self._pin()

    def _resume(self, facts: Facts) -> None:
        """Continue with the data of the run, and remove files of unrecorded steps."""
        recorded, before = self._database.newest_step(), self._database.facts()
        is_changed = bool(facts.resumed and facts.resumed[-1].changed)
        if facts.resumed:  # later steps were discarded
            recorded = min(recorded, facts.resumed[-1].at)
        again = is_changed and before.training.loop is not None
        tidy(self._database, recorded, self._passed, changes_again=again)
        kept = self._begin_keeping(before.not_kept, recorded)
        self._again = Continuation(self._database, facts.rows() | kept)
        self.recorded = self._again.recorded
        self.plan.kept = {row.step: row.size for row in self._database.snapshots()}
        self._earlier = *before.earlier, *facts.earlier
        self._pin()
        with self._database.transaction():
            known = {"status": "running", "reason": None, "writer": writer_here()}
            given = {"config": facts.config, "tags": facts.tags}
            self._database.write_facts(known | {name: value for name, value in given.items() if value})

    def _begin_keeping(self, known: Sequence[NotKeptFacts], at: int) -> dict[str, Any]:
        """Note which steps after `at` are not kept, as far as known; return the facts of it by name."""
        keep = self._keep or Keep("all steps")
        self._not_kept = keep.not_kept(known, at)
        text = None if self._keep is None else keep.text
        return {"keep": text, "not_kept": self._not_kept} if text or self._not_kept else {}

    def _pin(self) -> None:
        """Keep the states with which a stretch begins, or steps that are kept."""
        self.plan.pinned = Facts(earlier=self._earlier, not_kept=self._not_kept).begins

    def _is_kept(self, step: int) -> bool:
        return is_kept(step, self._not_kept)

    def _give_up_old(self) -> None:
        """Give up the steps that are not to be kept, a chunk of them at a time.

        What a resume needs stays: the two newest snapshots, and the draws of the calls that they are in.
        """
        keep, last = self._keep, self._last_step
        if keep is None or self._again is not None:
            return
        if keep.newest is not None:  # up to a snapshot, with which the others begin
            last = max((step for step in self.plan.kept if step <= last - keep.newest), default=0)
        # Not at every step: it looks through all rows that are left, and removes files.
        if last - self._given_up_to < keep.chunk:
            return
        self._given_up_to = last
        if keep.newest is not None:
            self._not_kept = keep.without(self._not_kept, last)
            self._pin()
        states = self.plan.thin()
        resumed = self._resumed()
        known = self._database.changes().items()
        changes = [file for step, file in known if not self._is_kept(step + 1)]
        batches = self._repeats.drop(self._repeats.unneeded(resumed))
        with self._database.removing([*map(state_folder, states), *batches, *changes]):
            self._repeats.forget(self._not_kept, resumed)
            self._database.write_facts({"not_kept": self._not_kept})

    def _resumed(self) -> list[tuple[int, int]]:
        """Return the ranges of steps with draws that a resume may need."""
        # One begins with one of the two newest states; those of kept steps are for forks.
        states = self.plan.kept if self._keep is not None else sorted(self.plan.kept)[-2:]
        for row in self._database.snapshots():
            # Those from before a resume are not noted yet.
            if row.step in states and row.step not in self._call_begins:
                with suppress(RunError):
                    self._note_call(read_snapshot(self._home.here, row))
        # A resume draws again from where the call of `steps` began that the snapshot is in.
        resumed = [(self._call_begins.get(step, 1), step) for step in states]
        # The next snapshot may lie in the current call of `steps`: a resume from it needs these draws.
        return [*resumed, (max(states, default=0) + 1, MOST_STEPS)]

    def drain(self) -> None:
        """Wait until everything so far is on disk.

        Raises:
            RecordingError: writing the run failed.
        """
        written = threading.Event()
        self._put(written.set)
        while not written.wait(0.01):
            # After an error, the thread runs no job, and this would wait forever.
            self.check()

    def _put(self, job: Callable[[], None]) -> None:
        self._queue.put(job)

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            # Later data without the data that failed would leave a gap in the run.
            if self._error is not None:
                continue
            self._job_began = time.monotonic()
            try:
                self._follow()
                job()
            except BaseException as error:  # `check` raises it in the training thread
                self._error = error
            self._job_began = None

    def _follow(self) -> bool:
        """Continue in the run's directory after a move; return whether it has moved."""
        is_moved, path = self._home.follow(), self._home.here / FILE_NAME
        if not path.exists():  # SQLite would write into a file without a name
            raise GoneError(
                f"{path} was removed while it was being written, so the training stops; restore it from "
                "a copy of the run and resume, or train again"
            )
        if is_moved:
            self._database.move(path)
        return is_moved

    def _write_numbers(
        self,
        measured: Sequence[tuple[str, int, float]],
        facts: Mapping[str, Any],
        losses: Sequence[float] = (),
        first_step: int = 0,
    ) -> None:
        """Write measurements, facts and losses: all or nothing; keep them while no step is new."""
        if self._again is not None:
            first_step, losses = self._again.new_losses(first_step, losses)
            self._again.keep(measured, facts)
            if not losses:
                return
            measured, facts = self._again.new_measured(), self._again.facts
        with self._database.transaction():
            self._database.write_measurements(measured)
            self._database.write_facts(facts)
            self._database.write_losses(first_step, losses)
        self._again = None

    @_in_thread
    def _write_steps(
        self,
        first_step: int,
        losses: Sequence[float],
        measured: Sequence[tuple[str, int, float]],
        facts: Mapping[str, Any],
        taken: Sequence[Taken],
    ) -> None:
        first = max(first_step, self._passed + 1)
        last, losses = first_step + len(losses) - 1, losses[first - first_step :]

        def new(rows: Sequence[Repeat]) -> list[Repeat]:
            """Return the rows of steps that the run does not have."""
            rows = cut(rows, first, MOST_STEPS)
            return rows if self._again is None else self._again.new_repeats(rows)

        # Before the losses: a process that is killed in between leaves no loss that nothing repeats.
        if taken:
            self._repeats.write(taken, new)
            self.plan.lost_to = self._repeats.lost_to
        self._bytes_written += sum(row.bytes for row in taken)
        self._write_numbers(measured, facts, losses, first)
        self._passed = max(self._passed, last)
        # After the commit, so that no loss that was shown can be lost.
        # Repeated steps were shown when they were recorded.
        shown = max(first, self.recorded + 1)
        if losses[shown - first :]:
            self._written.put((shown, losses[shown - first :]))
        self._give_up_old()

    def _write_last_facts(self, facts: Mapping[str, Any]) -> None:
        measured, last = ((), facts) if self._again is None else self._again.at_end(facts)
        with self._database.transaction():
            self._database.write_measurements(measured)
            self._database.write_facts(last)

    @_in_thread
    def _write_program(self, number: int, text: bytes) -> None:
        (self._home.here / PROGRAMS).mkdir(exist_ok=True)
        file = program_file(number)
        write_whole(self._home.here / file, text)
        with self._database.transaction():
            self._database.enter([row_of_file(file, text)])

    @_in_thread
    def _write_data(self, tensors: dict[str, Tensor], name: str) -> None:
        fact, files = write_data(self._home.here, tensors, name)
        with self._database.transaction():
            self._database.enter(files)
            self._database.write_facts({"data_file": fact})

    @_in_thread
    def _write_snapshot(self, state: State) -> None:
        import safetensors.torch  # noqa: F401  # so that the first snapshot does not seem slow

        # Repeated steps had their states, which may have been thinned out since.
        is_missing = state.step >= self.recorded or state.step in self.plan.pinned
        if state.step in self.plan.kept:
            # That of the end of a loop, which is now longer, has it that no batch follows.
            is_missing = 0 < state.step == self.recorded and self._again is None
        if not is_missing:
            self._snapshots_written += 1
            return
        if self.plan.kept.pop(state.step, None) is not None:
            with self._database.removing([state_folder(state.step)]):
                pass
        started, began = clock.worked(), clock.now()
        # Large parameters that are still as in state 0 are not written again.
        first = next((row for row in self._database.snapshots() if row.step == 0), None)
        try:
            row = write_snapshot(self._home.here, state, first)
        except Exception:  # safetensors raises errors of its own
            # The run may have been moved while it was written; in its new place, it is tried once more.
            if not self._follow():
                raise
            row = write_snapshot(self._home.here, state, first)
        self._note_call(state)
        with self._database.removing(map(state_folder, self.plan.add(row.step, row.size))):
            self._database.enter(row.files)
        self._snapshot_seconds = clock.worked() - started
        if row.size > LARGE_BYTES:  # the system, which writes it out, takes time from the training too
            self._snapshot_seconds = clock.now() - began
        self._snapshot_bytes = state.size
        self._snapshots_written += 1

    def _note_call(self, state: State) -> None:
        # How many batches the current call of `steps` had drawn when the state was taken.
        taken = (state.settings.get("place") or {}).get("taken", 0)
        self._call_begins[state.step] = state.step - taken + 1

    def _translated(
        self, error: BaseException, last_step: int, is_resumed: bool = False
    ) -> RecordingError:
        if last_step or is_resumed:
            kept = f"steps 1 to {last_step} are saved" if last_step else "what it had is saved"
            cure = "Free some space, or copy the run to another place, and resume it"
        else:
            kept, cure = "no step is saved", "Free some space or choose another place, and train again"
        return RecordingError(
            f"writing the run {self.directory} failed: {_reason(error)}; {kept}. {cure}"
        )


def _reason(error: BaseException) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
