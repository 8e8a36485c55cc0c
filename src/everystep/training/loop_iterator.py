"""The iterators that a recording gives to a loop, and what begins again in a loop that is resumed.

A resumed loop continues in the middle, but what counts around its iterator begins again. An `enumerate`
is advanced to its place; all else is refused as the loop begins, not after a training was killed. So do
its variables that are in no part (`loop_variables.py`).
"""

from __future__ import annotations

import dis
import gc
import inspect
import itertools
import sys
from collections.abc import Collection, Iterator
from types import CodeType, FrameType, GeneratorType
from typing import Any, Self

from everystep.errors import UsageError
from everystep.step.parts import Parts
from everystep.training.loader_position import LoaderPosition
from everystep.training.loop_variables import LoopVariables
from everystep.training.notices import Notices

__all__ = ["LoopIterator"]

#: They count what they iterate over, or iterate over something else besides.
_COUNTING = (enumerate, zip, itertools.islice, itertools.zip_longest)
#: They hold other iterators, and have no place of their own.
_HOLDING = (tuple, map, filter, itertools.chain)
#: Of iterators around iterators, as many as anybody nests: to find each takes as long as a collection.
_DEEPEST = 6
#: What a `for` does with what it iterates over, before it begins; None where Python has no such step.
_GET_ITER = dis.opmap.get("GET_ITER")
#: Where in the code a loop asked for its iterator.
_Line = tuple[CodeType, int]


class LoopIterator(Iterator[Any]):
    """Iterates over the steps of some batches, or over epochs.

    of: what has as many items as it yields, if their number is known; name: of what has made it, such as
    `steps`; line: where the loop asked for it; checked: the lines that need no further check; place,
    parts, notices: of the recording.
    """

    def __init__(
        self,
        items: Iterator[Any],
        of: Any,
        name: str,
        line: _Line,
        checked: set[_Line],
        place: LoaderPosition,
        parts: Parts,
        notices: Notices,
    ) -> None:
        self._items, self._of, self._name, self._line, self._checked = items, of, name, line, checked
        self._place, self._parts, self._notices = place, parts, notices
        #: Whether a resumed loop can advance an `enumerate` around it.
        self._is_counted = name == "steps"
        self._is_skipping = False
        #: The loop's variables as a resumed loop got its first item.
        self._variables: LoopVariables | None = None
        #: Whether a `for` iterates over it directly, and no generator passes on what it yields.
        self._is_alone = False

    def __iter__(self) -> Self:
        # `for x in steps` asks by GET_ITER, `enumerate(steps)` by a call; a generator passes items on.
        frame = sys._getframe(1)
        code = frame.f_code
        is_for = code.co_code[frame.f_lasti] == _GET_ITER
        self._is_alone = is_for and not code.co_flags & inspect.CO_GENERATOR
        return self

    def __next__(self) -> Any:
        if self._line not in self._checked:
            # To look for what is around it takes as long as a hundred small steps.
            if not self._is_alone:
                self._counting()
            self._checked.add(self._line)
        if self._is_skipping:
            return None
        if self._variables is not None:
            changed = self._variables.changed(self._asking()[1], self._place.sources)
            self._notices.begun_again(self._name, changed)
            self._variables = None
        item = next(self._items)
        if self._place.has_skipped:
            self._variables = LoopVariables(self._asking()[1], self._parts, item)
        return item

    def __len__(self) -> int:
        return len(self._of)

    def continue_after(self, count: int, firsts: Collection[int], resumed: Collection[int]) -> None:
        """Let an `enumerate` around it continue after so many items.

        firsts: numbers with which it may begin in a loop that was not resumed; resumed: those with which
        it begins if the loop accounts for what is past.

        Raises:
            UsageError: it begins with another number, or something else around it begins again.
        """
        # An `enumerate` shows its number only as it is pickled: (enumerate, (iterator, number)).
        counting = None if self._is_alone else self._counting()
        number = None if counting is None else int(counting.__reduce__()[1][1])
        if counting is None or number in resumed:
            return
        if number not in firsts:
            raise UsageError(
                f"the loop continues after {count:,} batches, but enumerate(...) around recording."
                f"{self._name}(...) begins with {number:,}; {self._cure('enumerate')}"
            )
        self._is_skipping = True
        for _ in range(count):  # it has asked for the item that follows them
            next(counting)
        self._is_skipping = False

    def _counting(self) -> enumerate[Any] | None:
        """Return the `enumerate` directly around it; refuse all else that would begin again."""
        # From the inside out: what refers to this iterator, then what refers to that, and so on.
        found, frames = None, self._asking()[0]
        inner: list[Any] = [self, *frames]
        for _ in range(_DEEPEST):
            around = gc.get_referrers(*inner) if inner else []
            for each in around:
                source = _source(each) if type(each) in _COUNTING else None
                if source is self and type(each) is enumerate and self._is_counted:
                    found = each
                elif source is not None and any(source is one for one in inner):
                    name = type(each).__name__
                    raise UsageError(
                        f"{name}(...) around recording.{self._name}(...) would begin again when the "
                        f"loop is resumed; {self._cure(name)}"
                    )
            inner = [
                each
                for each in around
                if type(each) in _HOLDING or each is found or _frame_of(each) in frames
            ]
        return found

    def _cure(self, name: str) -> str:
        if self._is_counted:
            return f"move it inside: recording.steps({name}(...))"
        return "use the numbers that recording.epochs yields, such as rates[epoch]"

    def _asking(self) -> tuple[list[FrameType], FrameType]:
        """Return the frame of the loop, after those of generators through which it asks, if any."""
        # Out of this class first, whichever of its methods has asked.
        frame = sys._getframe()
        while frame.f_code is not LoopIterator.__next__.__code__:
            assert frame.f_back is not None
            frame = frame.f_back
        found: list[FrameType] = []
        while (frame := frame.f_back or frame).f_code.co_flags & inspect.CO_GENERATOR:
            found.append(frame)
        return found, frame


def _source(counting: Any) -> Any:
    """Return what it takes from: the first object that it refers to; its last result comes later."""
    return next((each for each in gc.get_referents(counting) if not isinstance(each, type)), None)


def _frame_of(each: Any) -> Any:
    return each.gi_frame if type(each) is GeneratorType else None
