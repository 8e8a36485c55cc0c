"""A run from which steps and states are opened."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from everystep.errors import StepError, UsageError
from everystep.recording.run import RecordedRun

if TYPE_CHECKING:
    from torch import Tensor

    from everystep.replay.processes import Opener
    from everystep.replay.step import Step
    from everystep.training.objects import Objects

__all__ = ["OpenedRun", "Steps"]


class OpenedRun(RecordedRun):
    """A recorded run, and its steps: opened when you access them, and kept open as memory allows."""

    def __init__(self, directory: str | Path, objects: Objects | None = None) -> None:
        super().__init__(directory)
        self._objects = objects
        self._own_opener: Opener | None = None
        #: The step that was opened last, and as it was returned: it keeps what was computed from it.
        self._last_opened: tuple[Step, Step] | None = None

    def __len__(self) -> int:
        return self.newest_step()

    @overload
    def __getitem__(self, step: int) -> Step: ...

    @overload
    def __getitem__(self, step: slice) -> Steps: ...

    def __getitem__(self, step: int | slice) -> Step | Steps:
        if isinstance(step, slice):
            count = len(self)
            begin = 1 if step.start is None and (step.step or 1) > 0 else step.start
            first, *others = slice(begin, step.stop, step.step).indices(count + 1)
            return Steps(self, [number for number in range(first, *others) if number > 0])
        number = self._number(step)
        opened = self._opener.step(number + len(self) + 1 if number < 0 else number)
        if self._last_opened is not None and self._last_opened[0] is opened:
            return self._last_opened[1]
        from everystep.views.answers import RunView

        shown = replace(opened, view=RunView(self), earlier=self.__getitem__)
        self._last_opened = opened, shown
        return shown

    def __iter__(self) -> Iterator[Step]:
        return iter(self[:])

    @property
    def note(self) -> str | None:
        """Your own words on the run, in one line; None if there are none.

        Set it to a text of up to 1,000 characters (line breaks become spaces), or to None to remove it.

        Raises:
            UsageError: the text is too long.
            RunError: the run is still being trained, or another process is adding to it.
            RecordingError: it cannot be written to.
        """
        return self.facts.note

    @note.setter
    def note(self, text: str | None) -> None:
        from everystep.recording.lock import write_note

        if not isinstance(text, str | None):
            raise UsageError(f"a note is a text, or None to remove it; this is {type(text).__name__}")
        write_note(self.directory, text)

    @property
    def problems(self) -> list[str]:
        """Problems found while opening steps, such as an unreadable snapshot."""
        return self._own_opener.problems if self._own_opener else []

    def parameters(self, step: int) -> dict[str, Tensor]:
        """Return the model's state_dict after `step` (0: before the first step).

        Negative steps count from the newest: -1 is the newest state.

        Raises:
            StepError: the run has no such step.
            RunError: a needed file is missing or unreadable.
        """
        number = self._number(step)
        return self._opener.state(number + len(self) + 1 if number < 0 else number).parameters

    def _number(self, step: Any) -> int:
        try:
            return operator.index(step)
        except TypeError:
            raise StepError(f"a step of {self.name} must be an integer, not {step!r:.80}") from None

    @property
    def _opener(self) -> Opener:
        from everystep.replay.processes import Opener

        if self._own_opener is None:
            self._own_opener = Opener(self, self._objects)
        return self._own_opener


class Steps(Sequence["Step"]):
    """A sequence of steps of a run; each opens when you access it."""

    def __init__(self, run: OpenedRun, numbers: list[int]) -> None:
        self._run = run
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, place: int) -> Step: ...

    @overload
    def __getitem__(self, place: slice) -> Steps: ...

    def __getitem__(self, place: int | slice) -> Step | Steps:
        if isinstance(place, slice):
            return Steps(self._run, self._numbers[place])
        return self._run[self._numbers[place]]

    def __repr__(self) -> str:
        ends = f"{self._numbers[0]} to {self._numbers[-1]}" if self._numbers else "none"
        return f"<steps of {self._run.name}: {ends}>"
