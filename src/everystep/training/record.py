"""Record: records a user's own loop step by step while it runs, without changing it."""

from __future__ import annotations

import shutil
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from everystep.errors import RecordingError, RunError, UsageError, kind_text, say, short_text
from everystep.program.operation import path_faults
from everystep.recording.facts import check_measurement_names
from everystep.recording.recorded_run import RecordedRun
from everystep.signature import checked
from everystep.step.calling_code import users_frame
from everystep.step.cursor import Cursor
from everystep.step.parts import Parts, check_parts, with_inner
from everystep.training.agreement import ranks_here
from everystep.training.batch import PutTensors, unnested
from everystep.training.conditions import LoopConditions
from everystep.training.interrupt import REASONS, Interrupt
from everystep.training.loader_position import LoaderPosition
from everystep.training.loop_iterator import LoopIterator
from everystep.training.loop_start import LoopStart
from everystep.training.loop_variables import LoopVariables
from everystep.training.loop_writer import LoopWriter
from everystep.training.step_under_way import StepUnderWay

__all__ = ["Recording"]

#: What a run is opened as.
R = TypeVar("R", bound=RecordedRun)

#: The public face of a recording, which the reference describes: `dir(recording)`.
_PUBLIC = [
    *("run", "steps", "step", "epochs", "step_count", "is_resuming", "is_stopping"),
    *("log", "paused", "flush", "stop", "begin_step", "add_batch", "end_step"),
]

#: What a call after the end raises.
_OVER = "the recording has ended; create another with everystep.record(...)"


class Recording(Generic[R]):
    """A recording in progress: `steps` or `step` mark the steps, `log` records their losses.

    Use it as a context manager; `everystep.record` creates it.
    """

    def __init__(
        self,
        parts: dict[str, Any],
        start: LoopStart,
        open_run: Callable[[Path], R],
        conditions: LoopConditions,
    ) -> None:
        check_parts(parts)
        self._parts = Parts(with_inner(parts))
        self._start = start
        self._place = LoaderPosition(self._parts.device, self._settle)
        self._open_run = open_run
        self._stopped: str | None = None
        self._conditions = conditions
        self._is_stopping = False
        self._writer: LoopWriter | None = None
        #: Of the run, once the recording has ended.
        self._directory: Path | None = None
        #: The names of measurements that the run has, or will have.
        self._measured: set[str] = set()
        self._left_at: int | None = None
        #: What was raised as the loop was left by `break`.
        self._at_break: BaseException | None = None
        #: Of the last call of `steps`. A weak reference: `break` ends a step, since nothing else has it.
        self._iterator: Callable[[], LoopIterator | None] = lambda: None
        #: Where loops are written that need no further check.
        self._checked: set[Any] = set()
        #: Of a loop that continues and marks its steps, as it began the first.
        self._variables: LoopVariables | None = None
        self._has_begun = False
        self._put = PutTensors()
        self._was_count_read = False
        self._is_writing = False
        self._thread = 0
        # Ctrl-C ends a step at once, as in any loop, unless it is being written; SIGTERM waits.
        self._interrupt = Interrupt(
            self._terminated, lambda number: number == signal.SIGTERM or self._is_writing
        )

    @property
    def run(self) -> R:
        """The run, during the recording and afterwards.

        Raises:
            UsageError: the recording has not started.
        """
        directory = self._directory
        if directory is None:
            directory = self._begun().recorder.directory
        return self._open_run(directory)

    @property
    def writer(self) -> LoopWriter:
        """What writes the run.

        Raises:
            UsageError: the recording has not started, or has ended.
        """
        if self._directory is None:
            writer = self._begun()
            if self.is_open:
                return writer
        raise UsageError(_OVER)

    def _begun(self) -> LoopWriter:
        if self._writer is None:
            raise UsageError(
                "the recording has not started; write: with everystep.record(...) as recording:"
            )
        return self._writer

    @property
    def is_open(self) -> bool:
        """Whether the recording has started and not ended."""
        return self in _recording

    def __dir__(self) -> list[str]:
        return _PUBLIC

    def __enter__(self) -> Self:
        with _beginning:
            self._begin()
        return self

    def _begin(self) -> None:
        if self._writer is not None or self._directory is not None:
            raise UsageError(
                "this recording has already started; create another with everystep.record(...)"
            )
        if _recording:
            raise UsageError(
                f"another recording is in progress ({_recording[-1].run.name}); end it first: everystep "
                "records one loop at a time"
            )
        # Before the run is created, so that a loop that is refused leaves no directory.
        self._parts.check()
        self._conditions.check(self._parts)
        earlier = self._start.earlier
        before = () if earlier is None else earlier.measurement_names
        self._measured = {*before, *self._parts.rates(), *self._conditions.mark}
        check_measurement_names(self._measured)
        self._thread = threading.get_ident()
        self._interrupt.__enter__()
        # A signal waits until the run can be closed; not for other ranks, which may take long.
        self._is_writing = ranks_here() is None
        try:
            self._writer = writer = self._start.begin(self._parts, self._place)
            # A condition may read `previous.loss` in the first step of a resumed loop.
            for loss in earlier.losses_between(writer.step, writer.step) if earlier is not None else ():
                self._conditions.note_loss(loss)
            writer.watched.gradient_copies = self._conditions.gradient_copies
            writer.watched.follow()
            _recording.append(self)
        finally:
            self._is_writing = False
            if not self.is_open:
                self._interrupt.__exit__()
        if self._interrupt:
            error = KeyboardInterrupt() if self._interrupt.is_by_user else SystemExit(_TERMINATED)
            self.__exit__(type(error), error, None)
            raise error

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self.is_open:
            return
        writer = self.writer
        error = self._at_break if error is None else error
        try:
            if self._under_way is not None and error is None:
                self.end_step()  # the loop took its last batch by `next`, and asked for no other
            elif self._under_way is not None:
                self.drop_step()
            # `steps` took the exception for a `break`, which Python shows in the same way.
            elif error is not None and self._left_at == writer.step:
                writer.take_back()
        except BaseException as problem:  # the run is closed in any case
            error = problem if error is None else error
            self.drop_step()
        self._is_writing = True  # and a signal waits for that
        writer.watched.finish()
        _recording.remove(self)
        if not writer.step and error is None:
            say(
                "no step was recorded: there was no batch, or nothing marks the steps; iterate over "
                "recording.steps(loader), or put each step into `with recording.step(batch):`"
            )
        elif not writer.has_loss and error is None and writer.function is None:
            say(
                "no loss was recorded; record it in each step, recording.log(loss=loss); in Lightning, "
                "return it from training_step"
            )
        if error is None and self._start.is_accepted and writer.step == writer.recorder.recorded:
            say(
                f"no step was added: the recorded loop took its last batch at step {writer.step:,}, "
                "and batches without a length, such as those of a generator, end there again with "
                "force; resume without force, or pass a list or a DataLoader"
            )
        if error is None and (names := self._conditions.never_logged):
            say(f"a condition reads {', '.join(names)}, but the loop never logged it")
        reason = self._interrupt.reason or self._stopped
        at = None if self._start.fork is None else self._start.fork[1]
        if at is not None and error is None and reason is None and writer.step < at:
            error = RunError(f"the loop ends after step {writer.step}, before the fork at step {at}")
        recorded = writer.recorder.recorded
        if error is None and reason is None and writer.step < recorded:
            say(
                f"the loop ended after step {writer.step:,}, and the run has {recorded:,}: the parts "
                "are not as after its last step; let the loop take at least as many steps"
            )
        is_failed = error is not None
        try:
            # A loop that does not leave by itself is ended with an error.
            is_left = self._is_stopping and isinstance(error, UsageError)
            writer.finish(*_status(None if is_left else error, reason))
        except (RecordingError, RunError):
            is_failed = True
            if error is None:
                raise
        finally:
            self._is_writing = False
            self._interrupt.__exit__()
            self._place.let_go()
            directory = self._directory = writer.recorder.directory
            self._start.note_end(directory, writer, self._place)
            # What holds the recording, such as a trainer that is a part, would form a cycle with it.
            self._writer, self._parts, self._conditions = None, Parts({}), LoopConditions((), ())
            with suppress(RunError):  # a fork without a step of its own is removed
                if is_failed and at is not None and RecordedRun(directory).newest_step() <= at:
                    shutil.rmtree(directory, ignore_errors=True)
        if kind is None and error is not None:
            raise error
        # Ctrl-C waited until the run was written; now it ends the program.
        if error is None and self._interrupt.is_by_user:
            raise KeyboardInterrupt

    @checked
    def steps(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Return an iterator over batches; each is a step, from one batch to the next.

        `break` ends a step; an exception discards it. The iterator ends after a step at which a
        condition of `stop_when` holds. Its length, for a progress bar, is that of the batches, if they
        have one.

        Args:
            batches: any iterable: a DataLoader, a list, a generator.

        Raises:
            UsageError: the recording has not started, or has ended.
            RecordingError: writing the run failed.
        """
        _ = self.writer
        steps = self._marked(self._steps(batches), batches, "steps")
        # Weak, since `break` shows only once nothing holds the iterator.
        self._iterator = weakref.ref(steps)
        return steps

    def _marked(self, items: Iterator[Any], of: Any, name: str) -> LoopIterator:
        # That of the user's code, which calls `steps` or `epochs`, and between them the check of their
        # arguments: at one instruction in all epochs.
        frame = sys._getframe(3)
        line, notices = (frame.f_code, frame.f_lasti), self.writer.watched.notices
        return LoopIterator(items, of, name, line, self._checked, self._place, self._parts, notices)

    def _steps(self, batches: Iterable[Any]) -> Iterator[Any]:
        if self._is_stopping:
            return
        for batch in self.drawn(batches):
            self._begin_step(batch, is_still=self._place.is_still)
            try:
                yield batch
            except GeneratorExit:  # `break` or an exception left the loop: __exit__ knows which
                if not self.is_open:  # the recording ended with an error in the loop
                    raise
                self._end_at_break()
                raise
            self.end_step()
            if self._is_stopping:
                break
        self.writer.rests()

    def _end_at_break(self) -> None:
        """End a step that the loop leaves; Python only prints an error raised there, so note it."""
        is_untouched = self._under_way is not None and self._under_way.is_untouched
        try:
            if is_untouched:  # `break` before anything was done with the batch
                self.writer.watched.close()
            else:
                self.end_step()
                self._left_at = self.writer.step
            self._place.leave(is_untouched=is_untouched)
            self.writer.rests(is_untouched=is_untouched)
        except BaseException as error:
            self._at_break = error

    @property
    def step_count(self) -> int:
        """How many steps the run has; those that a resumed loop takes again do not count yet."""
        # Who reads it while the loop resumes begins to count there: see `_settle`.
        self._was_count_read |= self.is_resuming
        return self.writer.step

    def _settle(self) -> None:
        """Bring the parts to the snapshot again, at the place from which the loop continues.

        Raise UsageError if something around `steps` counts the batches, and begins again.
        """
        if (steps := self._iterator()) is not None:
            taken, count = self._place.taken, self.writer.step
            # A loop counts from 0 or 1, or as many more as the epochs before had; one that accounts for
            # what is past has read `step_count`.
            firsts = {0, 1, count - taken, count - taken + 1}
            resumed = {taken, count} - (set() if self._was_count_read else firsts)
            steps.continue_after(taken, firsts, resumed)
        self.writer.settle()

    @checked
    def epochs(self, count: int | None = None) -> Iterator[int]:
        """Yield the numbers of epochs, from 0; each has its loop over `steps`, and code around it.

        A resumed loop does not enter the epochs that are past, and begins with the one that it was in:
        `steps` continues in the middle, and the code after it runs with what the parts held then.

        Args:
            count: of epochs; None: without end.

        Raises:
            UsageError: the recording has not started, or has ended.
            RunError: the resumed loop was recorded without `epochs`.
        """
        _ = self.writer
        return self._marked(self._epochs(count), None if count is None else range(count), "epochs")

    def _epochs(self, count: int | None) -> Iterator[int]:
        if self._is_stopping:
            return
        for epoch in self._place.epochs(count):
            self.writer.rests()
            yield epoch
            if self._is_stopping:
                return
        self.writer.rests()

    @property
    def is_resuming(self) -> bool:
        """Whether a resumed loop has not reached the place yet from which it continues.

        Until then, `steps` yields nothing, and code around it runs for epochs that are past, unless the
        loop uses `epochs`.
        """
        return self._place.goal is not None

    @property
    def is_stopping(self) -> bool:
        """Whether a condition of `stop_when` holds, so that no other step may begin.

        A loop that marks its steps with `step` or `begin_step` leaves then; `steps` and `epochs` end.
        """
        return self._is_stopping

    def drawn(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield batches without making steps of them; of a resumed loop, from its place on."""
        items, writer = self._place.draw(batches), self.writer
        follower = writer.watched.follower
        # A batch that a model has computed, such as what a policy does, changes as the model does.
        while True:
            follower.is_computed = False
            try:
                batch = next(items)
            except StopIteration:
                return
            finally:
                writer.has_computed_batches |= bool(follower.is_computed)
                follower.is_computed = None
            yield batch

    @property
    def _under_way(self) -> StepUnderWay[Cursor] | None:
        return None if self._writer is None else self._writer.watched.under_way

    @contextmanager
    def step(self, batch: Any = None) -> Iterator[None]:
        """Record the body of the `with` statement as a step.

        Args:
            batch: the batch of the step, if it has one.
        """
        self.begin_step(batch)
        try:
            yield
        except BaseException:
            self.drop_step()
            raise
        self.end_step()

    def log(self, values: Mapping[str, Any] | None = None, /, **named: Any) -> None:
        """Record numbers of the current step, by name. `loss` is the loss of the step.

        After a step, such as after an epoch, they belong to the last step, and `loss` is not among them.

        Args:
            values, named: numbers, or tensors with one element, in a dict or by name; they are detached
                and copied.

        Raises:
            UsageError: no step was recorded yet, a value is not one number, or a name is too long, or
                one of too many.
        """
        if values is not None and not isinstance(values, Mapping):
            raise UsageError(f"log takes numbers by name, log(loss=loss), not {short_text(values)}")
        step, values = self._under_way, dict(values or {}) | named
        if step is None:
            self._check_after(values)
        new = values.keys() - self._measured - {"loss"}
        if new:
            check_measurement_names(self._measured | new)
            self._measured |= new
        if step is None:
            numbers = {name: _number(name, value) for name, value in values.items()}
            if not self.is_resuming:  # the run has what was logged then
                self.writer.log_after(numbers)
                if names := self._conditions.note(numbers):
                    self._judge(names)
            return
        with self._aside(values.values()):
            for name, value in values.items():
                tensor = value if isinstance(value, Tensor) else None
                # A number of Python's is of no interest to the step, unless it takes a tensor's place.
                if name != "loss" and (tensor is not None or name in step.logged):
                    step.watch.logged(name, tensor)
                step.logged[name] = _number(name, value)
        if "loss" in values:
            step.has_loss(values["loss"])

    def _check_after(self, values: Collection[str]) -> None:
        """Raise UsageError if these numbers cannot be logged outside of a step."""
        if "loss" in values:
            raise UsageError(
                "log(loss=...) is called outside of a step; call it in the body of the loop over "
                "recording.steps(...), or inside recording.step(batch); the loss of a validation needs "
                "another name, such as log(val_loss=...)"
            )
        if not self.writer.step and not self.is_resuming:
            raise UsageError(
                "log is called before the first step; numbers that are logged outside of a step belong "
                "to the last one"
            )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the body of the `with` statement from the step, such as an evaluation.

        No step shows how it changes what the loop carries; the run keeps the changed tensors.
        """
        with self._writer.watched.paused() if self._writer is not None else nullcontext():
            yield

    def _aside(self, values: Iterable[Any]) -> AbstractContextManager[Any]:
        """Return a context in which what everystep computes from some values is not part of the step.

        A class of one's own needs torch's dispatcher; with plain tensors, Python need not see each call.
        """
        is_plain = all(type(v) in _PLAIN or not isinstance(v, Tensor) for v in values)
        return torch._C._DisableTorchDispatch() if is_plain else self.paused()

    def begin_step(self, batch: Any = None) -> None:
        """Begin a step if you can use neither `steps` nor `step`; `end_step` ends it.

        Args:
            batch: the batch of the step, if already known; else pass it to `add_batch`.

        Raises:
            UsageError: a step is already in progress, or the recording has not started or has ended.
            RecordingError: writing the run failed.
        """
        self._compare_variables(batch)
        self._begin_step(batch, is_still=False)

    def _compare_variables(self, batch: Any) -> None:
        """Report the variables that a loop that continues changes from its first step to the second."""
        before, is_first = self._variables, not self._has_begun
        if before is None and not is_first:
            return
        frame, self._variables, self._has_begun = users_frame(), None, True
        if frame is not None and before is not None:
            self.writer.watched.notices.begun_again("steps", before.changed(frame, set()))
        elif frame is not None and self.writer.step:
            self._variables = LoopVariables(frame, self._parts, batch)

    def _begin_step(self, batch: Any, *, is_still: bool) -> None:
        """Begin a step. is_still: no code of the user's has run since the last one."""
        writer = self.writer
        # What one thread computes is not seen in another, and the losses would be those of other steps.
        if threading.get_ident() != self._thread:
            raise UsageError(
                "a step begins in another thread than the recording, which would not see what it "
                "computes; what reads ahead belongs inside: recording.steps(ahead(loader))"
            )
        if writer.watched.under_way is not None:
            raise UsageError("a step is already in progress; a recording has one loop at a time")
        if self._is_stopping:
            raise UsageError(f"{self._stopped}: leave the loop once recording.is_stopping")
        # Until what waits to be written is small again: a slow disk must not fill the memory.
        writer.recorder.wait()
        # If no code has run since the last step, the state need not be looked up or compared.
        state = writer.watched.state if is_still else None
        if state is None:
            state = self._parts.state()
            writer.note_changes(state)
        if self._conditions:
            self._conditions.begin(state)
        writer.watched.begin(state)
        if batch is not None:
            try:
                self.add_batch(batch)
            except BaseException:
                # If the step stayed open, every later one would be refused as a second one.
                writer.watched.close()
                raise

    def add_batch(self, batch: Any) -> None:
        """Set the batch of the current step before the step uses it; call it again to add another batch.

        Without it, the step has the same tensors, but they are not known as its batch.

        Raises:
            UsageError: no step is in progress.
        """
        step = self._under_way
        if step is None:
            raise UsageError("add_batch is called outside of a step")
        path = str(len(step.nesting)) if step.nesting else ""
        tensors, nesting = unnested(batch, path)
        if faults := [*path_faults(tensors)]:
            raise UsageError(faults, "the batch")
        step.nesting.append(nesting)
        step.batches.append((batch, path, tensors))
        tensors = self._put.without(tensors)
        # Copied now, since the step may write into its batch.
        with self._aside(tensors.values()):
            step.batch |= self.writer.watched.copies.of(tensors)
            step.watch.add_batch(tensors, step.batch)

    def end_step(self) -> None:
        """End the step that `begin_step` began, and record it."""
        writer = self.writer
        writer.watched.finish_calls(self._parts.state)
        step = writer.watched.close()
        if step is not None:
            for batch in step.batches:
                self._put.note(*batch)
            numbers, after = step.logged | step.rates, self._parts.state()
            self._is_writing = True  # Ctrl-C and SIGTERM wait: a step is recorded as a whole
            try:
                writer.add(step, after)
                if self._conditions:
                    self._conditions.end(writer.step, numbers, after, writer.watched.last_program)
                    self._judge()
            finally:
                self._is_writing = False
            # A signal may have come in the step, or while it was recorded.
            if self._interrupt.is_by_user:
                raise KeyboardInterrupt
            if self._interrupt:
                raise SystemExit(_TERMINATED)

    def _judge(self, names: Collection[str] = ()) -> None:
        """Mark the last step, or end the loop, where conditions hold; not again as a step is repeated.

        names: of the numbers that were logged after it, if this is the reason to ask.
        """
        step = self.writer.step
        # The run has the marks of a step that a resumed loop repeats.
        earlier = self._start.earlier if step <= self.writer.recorder.recorded else None
        if earlier is not None and all(step in earlier.values_of(name) for name in names):
            return
        ends, marks = self._conditions.holding(names)
        for text in marks:
            self.writer.log_after({text: 1.0})
            self.writer.watched.notices.marked(step, text)
        for text in ends:
            self._stopped, self._is_stopping = f"{text} at step {step:,}", True
            self.writer.keep()
            say(f"{self._stopped}; the loop ends")

    @checked
    def stop(self, reason: str) -> None:
        """Set the reason why the loop ends before its last step; the run gets the status `stopped`.

        Raises:
            UsageError: the recording has ended.
        """
        if self._directory is not None:
            raise UsageError(_OVER)
        self._stopped = reason

    def flush(self) -> None:
        """Write everything recorded so far to disk, and wait for it.

        It is also written several times a second, and nothing waits for that.

        Raises:
            RecordingError: writing the run failed.
        """
        self.writer.flush()
        self.writer.recorder.drain()

    def drop_step(self) -> None:
        """Discard the step in progress, if any: record neither it nor a snapshot of its state."""
        if self._under_way is None:
            return
        self.writer.watched.close()
        # Its writes are in the parts, which no recorded step has made.
        self.writer.watched.forget_versions()

    def _terminated(self) -> None:
        """On SIGTERM: end the loop after the step in progress, or at once between two steps."""
        if self._under_way is None and not self._is_writing:
            raise SystemExit(_TERMINATED)


_PLAIN = (Tensor, torch.nn.Parameter)
#: `float` reads texts, and takes the real part of NumPy's complex numbers.
_NO_NUMBERS = (str, bytes, np.complexfloating)
#: The exit status of a process that SIGTERM ended.
_TERMINATED = 128 + 15
#: Recordings under way in this process.
_recording: list[Recording[Any]] = []
#: Two threads cannot begin one at the same time; what the parts do as one begins may begin another.
_beginning = threading.RLock()


def _status(error: BaseException | None, stopped: str | None) -> tuple[str, str | None]:
    """Return how a recording ended, and why. stopped: the argument of `stop`."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped", REASONS[signal.SIGINT]
    if isinstance(error, Exception):
        return "failed", str(error).strip() or type(error).__name__
    if error is not None and stopped is None:  # such as that of `sys.exit`
        stopped = f"by {type(error).__name__}: {error}".rstrip(": ")
    return ("finished", None) if stopped is None else ("stopped", stopped)


def _number(name: str, value: Any) -> float | Tensor:
    """Return a number; of a device's tensor with one element a copy, since to read it means to wait.

    Raise UsageError if the value is neither.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            kind = f"shape {tuple(value.shape)} and dtype {str(value.dtype).removeprefix('torch.')}"
            raise UsageError(f"log: {name} has {kind}; log one real number, such as its mean")
        return value.item() if value.is_cpu else value.detach().reshape(()).clone()
    with suppress(TypeError, ValueError, OverflowError):
        if not isinstance(value, _NO_NUMBERS):
            return float(value)
    raise UsageError(f"log: {name} is {kind_text(value)}; log a number, or a tensor with one element")
