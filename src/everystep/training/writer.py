"""The writer of a run while it is trained: of a loop, of a step function, or of a model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from torch import Tensor

from everystep import clock
from everystep.recording.directories import name_of
from everystep.recording.facts import Facts
from everystep.recording.input_writer import Taken
from everystep.recording.recorder import Recorder
from everystep.step.state import State

__all__ = ["RunWriter", "Unwritten", "now"]

#: Seconds from one time that the recording is passed to the writing thread to the next.
FLUSH_SECONDS = 0.2
#: Steps that are timed, one by one, before the snapshots' interval is chosen.
TIMED_STEPS = 8
#: Steps run in stretches of about so many seconds; Ctrl-C takes effect after one.
STRETCH_SECONDS = 0.1


def now() -> datetime:
    """Return the time with its zone, to the millisecond."""
    time = datetime.now(UTC)
    return time.replace(microsecond=time.microsecond // 1000 * 1000)


class Unwritten:
    """What is known of the last steps, and not written yet.

    step: the last one; taken: their rows; losses: numbers or tensors, None of a step without one;
    measured: (name, step, value); rates: the numbers of the optimizers, noted when they change.
    """

    #: What is to write it, if anything.
    recorder: Recorder | None = None

    def __init__(self, step: int = 0) -> None:
        self.step = step
        self.rates: dict[str, float] = {}
        self.clear()

    def clear(self) -> None:
        """Note that all was written, or is not needed."""
        self.taken: list[Taken] = []
        self.losses: list[Any] = []
        self.measured: list[tuple[str, int, Any]] = []

    def note_rates(self, step: int, rates: dict[str, float]) -> None:
        """Keep the numbers of a step's optimizers that have changed; NaN of those that are gone."""
        # Without an end, the last number of one that is gone would seem to be that of later steps.
        now = dict.fromkeys(self.rates, math.nan) | rates
        changed = ((name, step, rate) for name, rate in now.items() if self.rates.get(name) != rate)
        self.measured += changed
        self.rates = rates

    def go_back(self, step: int) -> None:
        """Discard what is known of later steps: the training continues after this one."""
        taken = (row for row in self.taken if row.step <= step)
        self.taken = [row._replace(count=min(row.count, step - row.step + 1)) for row in taken]
        # A flush may have passed some on, so the list may be shorter.
        self.losses = self.losses[: max(0, len(self.losses) - self.step + step)]
        self.measured = [row for row in self.measured if row[1] <= step]
        self.step = step


class RunWriter(Unwritten):
    """Collects the data of steps, passes it to the recorder, and closes the run.

    Args:
        start: the state that the training begins with.
        facts: known as it begins.
        notice: shows a message to the user.
        advanced: called with a step that was written, and the losses from it on.
        earlier: the facts of the run that is continued, or that this one is a fork of.

    step_seconds: the time of a step.
    """

    recorder: Recorder

    #: The beginning and the end of the notice of a loss that is not finite.
    advice = "", ""

    def __init__(
        self,
        recorder: Recorder,
        start: int,
        facts: Facts,
        notice: Callable[[str], None],
        advanced: Callable[[int, Sequence[float]], None] | None,
        earlier: Facts | None = None,
    ) -> None:
        super().__init__(start)
        self.recorder, self.start = recorder, start
        self.step_seconds = math.inf
        self._waited = self._chosen_for = 0.0
        self._notice = notice
        self._advanced = advanced
        #: The first step with a loss that is not finite, if any.
        self._nonfinite = None if earlier is None else earlier.up_to(start)["nonfinite_step"]
        self._lost_to = recorder.plan.lost_to
        #: How long the training took before it was resumed; None if unknown.
        self._seconds_before = facts.resumed[-1].seconds if facts.resumed else 0.0
        self._started = time.perf_counter()
        self._flush_at = 0.0

    @property
    def has_timed_steps(self) -> bool:
        """Whether enough steps were timed to choose the snapshots' interval."""
        return self.step >= self.start + TIMED_STEPS

    def go_back(self, step: int) -> None:
        """Discard later steps, also those that were written."""
        super().go_back(step)
        if self._nonfinite is not None and self._nonfinite > step:
            self._nonfinite = None
        self.recorder.forget_after(step)

    def timed(self, began: float, state: Callable[[], dict[str, Tensor]], count: int = 1) -> None:
        """Note the time of `count` steps that just ran, and choose the snapshots' interval from it.

        It is chosen again once steps take half of the time, since those before had to be learned.

        began: when, on the clock; state: returns the live tensors that the training carries.
        """
        # The fastest so far: anything may slow down single steps, and an average would keep that.
        self.step_seconds = min(self.step_seconds, (clock.now() - began) / count)
        is_faster = self.step_seconds < self._chosen_for / 2  # the first steps take longest
        if self.has_timed_steps and (is_faster or not self.recorder.has_interval):
            self._chosen_for = self.step_seconds
            size = sum(tensor.nbytes for tensor in state().values())
            self.recorder.choose_interval(self.step_seconds, size, self._waited)

    def waiting_for(self, snapshot: Callable[[], State]) -> State:
        """Take a snapshot, and note how long the training waits for it."""
        began = clock.worked()
        state = snapshot()
        self._waited = clock.worked() - began
        return state

    def next_stop(self, last: int, *, one_by_one: bool, every: int | None = None) -> int:
        """Return the step up to which steps may run without a look at signals and snapshots.

        last: the last step of the training; one_by_one: look after each step; every: look after the
        multiples of this, too.
        """
        step, recorder = self.step, self.recorder
        if one_by_one or not self.has_timed_steps:
            return step + 1
        # A resumed training is compared with its newest recorded state.
        stops = [last, *([recorder.recorded] if step < recorder.recorded else [])]
        stops.append(step + max(1, int(STRETCH_SECONDS / self.step_seconds)))
        stops += [(step // each + 1) * each for each in (every, recorder.plan.taken) if each]
        return min(stops)

    def is_snapshot_due(self) -> bool:
        """Return whether the current state should be kept."""
        recorder, before = self.recorder, self._lost_to
        self._lost_to = recorder.plan.lost_to
        # On a slow disk, snapshots that wait in memory would only add up.
        is_due = recorder.plan.is_due(self.step) and not recorder.is_behind
        is_due |= self._lost_to > before  # batches were dropped: all from here must open without them
        return is_due or self.step == recorder.recorded or self.step in recorder.plan.pinned

    def flush_if_due(self) -> None:
        """Flush if the last time is long enough ago."""
        if time.perf_counter() >= self._flush_at:
            self.flush()
            self._flush_at = time.perf_counter() + FLUSH_SECONDS

    def flush(self) -> None:
        """Pass everything recorded so far to the recorder; this also happens several times a second."""
        losses, facts = self._collected()
        if self.taken:
            first = self.taken[0].step
            facts |= self._nonfinite_in(first, losses)
            numbers = [math.nan if loss is None else loss for loss in losses]
            # Ctrl-C may end this anywhere: one call passes everything on, or nothing.
            self.recorder.losses(first, numbers, self.measured, facts, self.taken)
        elif self.measured:  # after a step that was passed on already
            self.recorder.losses(self.step + 1, (), self.measured)
        self.clear()
        self.show_written()

    def _collected(self) -> tuple[Sequence[float | None], dict[str, Any]]:
        """Return the losses of the steps in `taken`, None if the training logs none, and their facts."""
        return self.losses, {}

    def show_written(self) -> None:
        """Show the losses that are on disk, so that no shown loss can be lost."""
        for first, losses in self.recorder.written():
            if self._advanced is not None:
                self._advanced(first, losses)

    def close(self, status: str, reason: str | None, facts: dict[str, Any]) -> None:
        """Write the remaining data, and how the training ended, and close the run.

        Raises:
            RecordingError: writing failed; earlier data is kept.
        """
        seconds = time.perf_counter() - self._started
        in_all = None if self._seconds_before is None else self._seconds_before + seconds
        ends = {"status": status, "reason": reason, "finished": now(), "seconds": in_all}
        self.recorder.finish(facts | ends)
        self.show_written()

    def close_failed(self, error: BaseException) -> None:
        """Close the run of a training that raised; what the training raised comes first."""
        reason = str(error).strip() or type(error).__name__
        with suppress(Exception):  # the disk may be what failed
            self.recorder.finish({"status": "failed", "reason": reason, "finished": now()})

    def _nonfinite_in(self, first: int, losses: Sequence[float | None]) -> dict[str, Any]:
        """Return the fact about the first loss that is not finite, and print it; {} if there is none."""
        for step, loss in enumerate(losses, start=first) if self._nonfinite is None else ():
            if loss is not None and not math.isfinite(loss):
                self._nonfinite = step
                before, after = self.advice
                self._notice(
                    f"the loss is {loss} at step {step}; {before}everystep "
                    f"first-nonfinite {name_of(self.recorder.directory)} finds where it came from{after}"
                )
                return {"nonfinite_step": step}
        return {}
