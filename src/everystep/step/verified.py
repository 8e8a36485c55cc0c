"""Verified: when programs are compared with Python, and the last state that was found right."""

from __future__ import annotations

from dataclasses import dataclass, field

from everystep.errors import TrainingError
from everystep.step.eager import Training
from everystep.step.state import State

__all__ = ["CheckPlan", "WayBack"]

#: Checks may take this share of the time, once the steps 2, 4, 8, ... are far enough apart. A check that
#: takes longer than so many seconds must keep to it from the first one on, also at the last step.
CHECK_SHARE = 0.01
LIGHT_SECONDS = 0.03


@dataclass
class CheckPlan:
    """When a program was checked, and when it will be: ever more rarely from `start` on."""

    start: int = 0
    checked: list[int] = field(default_factory=list)
    next: int = 0
    _step_seconds: float = 0.0
    _seconds: float = 0.0

    def __post_init__(self) -> None:
        self.next = self.start + 2

    def timed(self, steps: int, seconds: float) -> None:
        """Note the time of steps by program."""
        self._step_seconds = seconds / steps if steps > 0 else 0.0

    def captured(self, step: int, seconds: float) -> None:
        """Note that a program was captured at a step and passed, and the time of comparing the two."""
        if step >= self.next:
            self.passed(step, 2 * seconds)  # a check also runs the step in Python
        else:
            self.checked.append(step)

    def is_due(self, step: int, last: int | None) -> bool:
        """Return whether to check at a step; the last step of a training is checked if that is cheap."""
        return step >= self.next or (step == last and self._is_cheap(step))

    def until(self, last: int) -> int:
        """Return the next step to check, or the one after the last."""
        ends = last if self._is_cheap(last) else last + 1
        return min(self.next, ends)

    def _is_cheap(self, step: int) -> bool:
        since = step - (self.checked[-1] if self.checked else self.start)
        allowed = since * self._step_seconds * CHECK_SHARE
        return self.is_light(self._seconds) or allowed >= self._seconds

    def is_light(self, seconds: float) -> bool:
        """Return whether something takes too little time to matter."""
        return seconds < LIGHT_SECONDS

    def passed(self, step: int, seconds: float) -> None:
        """Note that a check passed at a step, and its time."""
        self.checked.append(step)
        self._seconds = seconds
        # A check runs a step twice, and at the first check no step was timed alone.
        allowed = (self._step_seconds or seconds / 2) * CHECK_SHARE
        is_light = self.is_light(seconds)
        interval = 1
        while interval * allowed < seconds and (interval < step - self.start or not is_light):
            interval *= 2
        self.next = step + interval


class WayBack:
    """The last verified state, which training can go back to unless that is closed.

    step: the step after which it is.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self._state: State | None = None

    def keep(self, training: Training, step: int) -> None:
        """Keep a copy of the verified state."""
        self.step, self._state = step, training.snapshot(step)

    def close(self) -> None:
        """Close the way back: unknown code has run, and cannot be undone."""
        self._state = None

    def go(self, training: Training, number: int, reason: str) -> None:
        """Restore the last verified state, because step `number` cannot be trusted.

        Raises:
            TrainingError: training cannot go back.
        """
        if self._state is None:
            raise TrainingError(
                f"step {number} cannot be trusted: {reason}. Your code has run since the last check, "
                f"at step {self.step}, so training cannot go back. Steps up to {self.step} are "
                'verified, later ones are not; engine="eager" trains without programs'
            )
        training.restore(self._state)
