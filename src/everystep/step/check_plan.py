"""Check plan: at which steps a program is compared with Python."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["CheckPlan"]

#: Checks may take this share of the time, once the steps 2, 4, 8, ... are that far apart. A check that
#: takes longer than so many seconds may not take more before either, nor at the last step.
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

    def until(self, last: int | None) -> int:
        """Return the next step to check; the last step of a training is checked if that is cheap."""
        if last is None:
            return self.next
        since = last - (self.checked[-1] if self.checked else self.start)
        allowed = since * self._step_seconds * CHECK_SHARE
        is_cheap = self._seconds < LIGHT_SECONDS or allowed >= self._seconds
        return min(self.next, last if is_cheap else last + 1)

    def passed(self, step: int, seconds: float) -> None:
        """Note that a check passed at a step, and its time."""
        self.checked.append(step)
        self._seconds = seconds
        # A check runs a step twice, and at the first check no step was timed alone.
        allowed = (self._step_seconds or seconds / 2) * CHECK_SHARE
        interval, is_light = 1, seconds < LIGHT_SECONDS
        while interval * allowed < seconds and (interval < step - self.start or not is_light):
            interval *= 2
        self.next = step + interval
