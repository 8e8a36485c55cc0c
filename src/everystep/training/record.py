"""Record: records a user's own loop step by step while it runs, without changing it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor

from everystep.errors import RecordingError, UsageError
from everystep.recording.recorder import create_directory
from everystep.recording.run import RecordedRun
from everystep.step.elsewhere import Elsewhere
from everystep.step.follow import Follower
from everystep.step.parts import Parts
from everystep.step.purity.step_reader import StrictWatch
from everystep.step.recognition.memory import Memory
from everystep.step.step_watch import StepWatch
from everystep.training.batch import BatchCopies, tensors_of, text_of
from everystep.training.loop_writer import AnyWatch, LoopWriter, StepUnderWay
from everystep.training.notices import say

__all__ = ["Recording"]

#: What a run is opened as.
R = TypeVar("R", bound=RecordedRun)


class Recording(Generic[R]):
    """A recording in progress: `steps` or `step` mark the steps, `log` records their losses.

    Use it as a context manager; `everystep.record` creates it.
    """

    def __init__(
        self,
        parts: dict[str, Any],
        directory: Path | None,
        runs: Path,
        snapshot_budget: int,
        batch_budget: float,
        open_run: Callable[[Path], R],
        advanced: Callable[[int, Sequence[float]], None] | None = None,
    ) -> None:
        self._parts = Parts(parts)
        self._open_run = open_run
        self._advanced = advanced
        self._stopped: str | None = None
        self._place = directory, runs
        self._budgets = snapshot_budget, batch_budget
        self._directory: Path | None = None
        self._writer: LoopWriter | None = None
        self._optimizer_names = self._parts.optimizer_names()
        self._follower = Follower(
            self._parts.module_paths(),
            self._optimizer_names,
            self._module_done,
            self._optimizer_begins,
            self._optimizer_ends,
        )
        self._elsewhere = Elsewhere()
        self._memory = Memory()
        self._copies = BatchCopies()
        self._under_way: StepUnderWay[StepWatch | StrictWatch] | None = None
        self._names: dict[Tensor, str] = {}
        self._left_at: int | None = None
        self._last: AnyWatch | None = None

    @property
    def run(self) -> R:
        """The run, during the recording and afterwards.

        Raises:
            UsageError: the recording has not started.
        """
        if self._directory is None:
            raise _not_begun()
        return self._open_run(self._directory)

    @property
    def is_open(self) -> bool:
        """Whether the recording has started and not ended."""
        return self in _recording

    def __enter__(self) -> Self:
        if self._directory is not None:
            raise UsageError(
                "this recording has already started; create another with everystep.record(...)"
            )
        _check_alone()
        self._parts.check()
        directory = create_directory(self._place[0], "loop", self._place[1])
        self._writer = LoopWriter(directory, self._parts, *self._budgets, self._advanced)
        self._directory = directory
        self._follower.begin()
        _recording.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self.is_open:
            return
        writer = self._open()
        try:
            if self._under_way is not None and error is None:
                self.end_step()  # `next` asked for the batch, and not for another
            elif self._under_way is not None:
                self._abandon()
            elif error is not None and self._left_at == writer.step:
                writer.take_back()
        finally:
            self._follower.finish()
            _recording.remove(self)
        try:
            writer.finish(*_status(error, self._stopped))
        except RecordingError:
            if error is None:
                raise

    def steps(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield batches; each iteration of the loop is a step, from one batch to the next.

        `break` ends a step; an exception discards it.

        Args:
            batches: any iterable: a DataLoader, a list, a generator.

        Raises:
            UsageError: the recording has not started, or has ended.
            RecordingError: writing the run failed.
        """
        self._open()
        count = 0
        for batch in batches:
            count += 1
            self.begin_step(batch)
            try:
                yield batch
            except GeneratorExit:  # `break` or an exception left the loop: __exit__ knows which
                if self._under_way is not None and self._under_way.is_untouched:
                    self._close()  # `zip` asked for it, but another iterable had ended
                else:
                    self.end_step()
                    self._left_at = self._open().step
                raise
            self.end_step()
        if not count:
            say("there were no batches, so no step was recorded")

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
            self._abandon()
            raise
        self.end_step()

    def log(self, **values: Any) -> None:
        """Record numbers of the current step, by name. `loss` is the loss of the step.

        Args:
            values: numbers, or tensors with one element; they are detached and copied.

        Raises:
            UsageError: no step is in progress, or a value is not one number.
        """
        step = self._under_way
        if step is None:
            raise UsageError(
                "log is called outside of a step; call it in the body of the loop over "
                "recording.steps(...), or inside recording.step(batch)"
            )
        with self.paused():
            for name, value in values.items():
                step.logged[name] = _number(name, value)
                if name != "loss" and isinstance(value, Tensor):
                    step.watch.logged(name, value)
        if "loss" in values:
            step.loss = values["loss"]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the body of the `with` statement from the step, such as an evaluation.

        It must not change anything that the loop carries; otherwise replays differ from there on.
        """
        watch = self._under_way.watch if self._under_way is not None else None
        if watch is None or watch.is_paused:
            yield
            return
        watch.is_paused = True
        try:
            yield
        finally:
            watch.is_paused = False

    def begin_step(self, batch: Any = None) -> None:
        """Begin a step if you can use neither `steps` nor `step`; `end_step` ends it.

        Args:
            batch: the batch of the step, if already known; otherwise pass it to `add_batch`.

        Raises:
            UsageError: a step is already in progress, or the recording has not started or has ended.
            RecordingError: writing the run failed.
        """
        writer = self._open()
        if self._under_way is not None:
            raise UsageError("a step is already in progress; a recording has one loop at a time")
        writer.wait()
        state = self._parts.state()
        writer.note_changes(state)
        watch = StepWatch(
            writer.step + 1, self._memory, self._parts.device, self._follower, self._elsewhere
        )
        self._begin(watch, state, batch)

    def _begin(self, watch: StepWatch | StrictWatch, state: dict[str, Tensor], batch: Any) -> None:
        self._names = self._parts.parameter_names()
        watch.begin(state)
        self._follower.step_begins()
        watch.__enter__()
        self._under_way = StepUnderWay(watch)
        if batch is not None:
            try:
                self.add_batch(batch)
            except BaseException:
                self._close()
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
        tensors = tensors_of(batch, path)
        step.nesting.append(text_of(batch, path))
        with self.paused():
            step.batch |= self._copies.of(tensors)
            step.watch.add_batch(tensors)

    def end_step(self) -> None:
        """End the step that `begin_step` began, and record it."""
        step = self._close()
        if step is not None:
            self._last = step.watch
            if step.is_compiled:
                self._memory.given_up = "torch.compile is in use"
            self._open().add(step, self._elsewhere.copied, self._parts.state())
            self._elsewhere.clean()

    def stop(self, reason: str) -> None:
        """Set the reason why the loop ends before its last step; the run gets the status `stopped`."""
        self._stopped = reason

    def flush(self) -> None:
        """Write everything recorded so far to disk; this also happens several times a second."""
        self._open().flush()

    def _close(self) -> StepUnderWay[StepWatch | StrictWatch] | None:
        """End the current step without recording it; return it."""
        step, self._under_way = self._under_way, None
        if step is not None:
            step.watch.__exit__(None, None, None)
        return step

    def _abandon(self) -> None:
        """Discard an incomplete step: record neither it nor a snapshot of its state."""
        self._close()
        self._open().forget_versions()

    def _module_done(self, path: str, outputs: list[Tensor]) -> None:
        if self._under_way is not None and not self._under_way.watch.is_paused:
            self._under_way.watch.module_done(path, outputs)

    def _optimizer_begins(self, optimizer: torch.optim.Optimizer, has_arguments: bool) -> None:
        if self._under_way is not None:
            name = self._optimizer_names.get(id(optimizer))
            with self.paused():
                self._under_way.watch.optimizer_begins(
                    optimizer, name, has_arguments, lambda: self._gradients_of(optimizer)
                )

    def _optimizer_ends(self, optimizer: torch.optim.Optimizer) -> None:
        if self._under_way is not None:
            name = self._optimizer_names.get(id(optimizer))
            with self.paused():
                self._under_way.watch.optimizer_ends(name, lambda: self._gradients_of(optimizer))

    def _gradients_of(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        names = self._names
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        return {names[p]: p.grad for p in parameters if p.grad is not None and p in names}

    def _open(self) -> LoopWriter:
        """Return the writer.

        Raises:
            UsageError: the recording has not started, or has ended.
        """
        if self._writer is None:
            raise _not_begun()
        if not self.is_open:
            raise UsageError("the recording has ended; create another with everystep.record(...)")
        return self._writer


#: Recordings under way in this process.
_recording: list[Recording[Any]] = []


def _not_begun() -> UsageError:
    return UsageError("the recording has not started; write: with everystep.record(...) as recording:")


def _check_alone() -> None:
    if _recording:
        raise UsageError(
            f"another recording is in progress ({_recording[-1].run.name}); end it first: everystep "
            "records one loop at a time"
        )


def _status(error: BaseException | None, stopped: str | None) -> tuple[str, str | None]:
    """Return how a recording ended, and why. stopped: the argument of `stop`."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped", "by the user (Ctrl-C)"
    if isinstance(error, Exception):
        return "failed", str(error).strip() or type(error).__name__
    return ("finished", None) if stopped is None else ("stopped", stopped)


def _number(name: str, value: Any) -> float | Tensor:
    """Return a number, or a copy of a tensor with one element.

    Raises:
        UsageError: the value is neither.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            raise UsageError(
                f"log: {name} has shape {tuple(value.shape)}; log one number, such as its mean"
            )
        return value.detach().reshape(()).clone()
    with suppress(TypeError, ValueError):
        if not isinstance(value, str):
            return float(value)
    raise UsageError(
        f"log: {name} is a {type(value).__name__}; log a number, or a tensor with one element"
    )
