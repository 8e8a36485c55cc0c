"""Check plan: at which steps a program is compared with Python."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["CheckPlan"]

#: Checks may take this share of the time.
CHECK_SHARE = 0.01
#: Where a user vouches for the steps, a check of fewer seconds may take more at steps 4, 8, 16, ... and
#: at the last one: unlike torch's, such code may change what it does as a training begins or ends.
LIGHT_SECONDS = 0.03


@dataclass
class CheckPlan:
    """When a program was checked, and when it will be: ever more rarely from `start` on.

    is_vouched: whether a user vouches for the steps.
    """

    start: int = 0
    is_vouched: bool = False
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

    @property
    def is_light(self) -> bool:
        """Whether a check may take more than its share."""
        return self.is_vouched and self._seconds < LIGHT_SECONDS

    def until(self, last: int | None) -> int:
        """Return the next step to check; the last step of a training is checked if that is cheap."""
        if last is None:
            return self.next
        since = last - (self.checked[-1] if self.checked else self.start)
        allowed = since * self._step_seconds * CHECK_SHARE
        is_cheap = self.is_light or allowed >= self._seconds
        return min(self.next, last if is_cheap else last + 1)

    def passed(self, step: int, seconds: float) -> None:
        """Note that a check passed at a step, and its time."""
        self.checked.append(step)
        self._seconds = seconds
        # A check runs a step twice, and at the first check no step was timed alone.
        allowed = (self._step_seconds or seconds / 2) * CHECK_SHARE
        interval = 1
        while interval * allowed < seconds and (interval < step - self.start or not self.is_light):
            interval *= 2
        self.next = step + interval
