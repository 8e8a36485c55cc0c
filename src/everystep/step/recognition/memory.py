"""Memory: the steps of a loop that can be recognized, and when to watch a step in full."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from everystep.step.hooks import handles
from everystep.step.path import Marks, Path, Tables
from everystep.step.recognition.call import Reference
from everystep.step.recognition.optimizer_numbers import OptimizerNumbers
from everystep.step.verified import CHECK_SHARE, LIGHT_SECONDS

__all__ = ["Ending", "Learned", "Memory", "Node"]

Number = int | float
#: After so many steps in a row that were not recognized, it is tried less often.
_PATIENCE = 2
#: Steps that are learned after one that lacks a variant, until one of them is new, too.
_TRIES = 4
_LONGEST_REST = 512
#: Steps that are remembered; a loop in which each step differs would fill the memory.
_MOST_LEARNED = 200


class Learned(NamedTuple):
    """What a watch noted of a whole step, and the number of the storage of each of its tensors.

    places: by the number of the reference, None if unknown, or if it changes.
    """

    tables: Tables
    places: tuple[int | None, ...]


class Ending(NamedTuple):
    """How a step ended.

    names, bound: of the state afterwards, and the reference of each tensor, None for a gradient that the
    step made; changes: how often each was changed, None if it is new; loss: the reference of the logged
    tensor, or the place of the number that was read, or None; reads: the places of all numbers that were
    read.
    """

    path: Path
    names: tuple[str, ...]
    bound: tuple[Reference | None, ...]
    changes: tuple[int | None, ...]
    loss: Reference | int | None
    reads: tuple[int, ...]


@dataclass(slots=True, eq=False)
class Node:
    """What is known of a call at its place in a step.

    marks: the position of the watch after it; numbers: its numbers of the step; reads: whether it reads
    them from its argument; floats: which of them are its own float arguments, in order; way: how an
    optimizer steps, if it is one; draws: whether it draws random numbers; contents: tensors from
    elsewhere that it used first, and their storages; constants: the content of storages that it made;
    returns: references of its results; likeness: their properties, if the call does not determine them;
    variants: the same call with results of other properties, by these; changed: how
    often tensors were changed after it, if that differs from before it, by the number of the reference.
    """

    marks: Marks
    numbers: tuple[Number, ...] = ()
    reads: bool = False
    floats: tuple[int, ...] = ()
    way: str | None = None
    draws: bool = False
    contents: tuple[tuple[Reference, int], ...] = ()
    constants: dict[int, Tensor] = field(default_factory=dict)
    returns: tuple[Reference, ...] = ()
    likeness: tuple[Any, ...] | None = None
    changed: tuple[tuple[int, int], ...] = ()
    learned: Learned | None = None
    ending: Ending | None = None
    next: dict[Any, Node] = field(default_factory=dict)
    variants: dict[Any, Node] = field(default_factory=dict)

    @property
    def is_variable(self) -> bool:
        """Whether its numbers vary between steps."""
        return self.reads or bool(self.floats) or self.way is not None

    def variant(self, likeness: tuple[Any, ...] | None) -> Node | None:
        """Return the node of the call with results of such properties, None if it was not met."""
        return self if likeness == self.likeness else self.variants.get(likeness)

    def agrees(self, other: Node) -> bool:
        """Tell whether another node is the same call at the same place."""
        numbers = self.is_variable or list(map(repr, self.numbers)) == list(map(repr, other.numbers))
        mine = self.marks, self.reads, self.floats, self.way, self.draws, self.contents, self.returns
        return numbers and mine == (
            *(other.marks, other.reads, other.floats, other.way),
            *(other.draws, other.contents, other.returns),
        )


class Memory:
    """The steps of a recording that can be recognized.

    Some steps are watched in full to check whether what was learned still holds: steps 2, 4, 8, ..., as
    long as that is fast, or takes less than a hundredth of the time since the last of them.

    given_up: why it recognizes no more steps, in words, or None.
    """

    def __init__(self) -> None:
        self.optimizers = OptimizerNumbers()
        self.given_up: str | None = None
        self._roots: dict[Any, Node] = {}
        self._learned = 0
        self._failures = 0
        self._rest = 0
        self._next_rest = 1
        self._must_learn = 1
        self._handles: int | None = None
        self._next_watched = 1
        self._recognized_seconds: float | None = None

    def plan(self, step: int) -> str:
        """Return how a step is watched: `recognize`, `learn` (in full, and remembered) or `watch`."""
        if self.given_up is not None:
            return "watch"
        if self.is_watched(step):
            return "learn"
        if self._rest:
            self._rest -= 1
            return "watch"
        return "learn" if self._must_learn else "recognize"

    def is_watched(self, step: int) -> bool:
        """Tell whether a step is watched in full to see whether what was learned holds."""
        return step >= self._next_watched

    def compared(self, step: int) -> None:
        """A step is compared with a program, in all its bits: it need not be watched in full as well."""
        if self.is_watched(step):
            self._next_watched = 2 * step

    def timed(self, step: int, seconds: float, *, is_recognized: bool) -> None:
        """Note the time of a step that was recognized to its end, or watched in full."""
        if is_recognized:
            self._recognized_seconds = seconds
        elif self.is_watched(step):
            usual = self._recognized_seconds or seconds / 2
            extra, interval = seconds - usual, step
            while extra > LIGHT_SECONDS and extra > interval * usual * CHECK_SHARE:
                interval *= 2
            self._next_watched = step + interval

    def root(self, structure: Any) -> Node | None:
        """Return the start of the steps with a state of this structure."""
        return self._roots.get(structure)

    @property
    def is_quiet(self) -> bool:
        """Whether no hook was registered since the last check that none takes part."""
        return self._handles == handles()

    def found_no_hooks(self) -> None:
        """Note that no hook takes part in a step from here on, unless registered later."""
        self._handles = handles()

    def learned(self, structure: Any, root: Node, trail: list[tuple[Any, Node]]) -> bool:
        """Remember a step that was watched in full; return whether it agrees with what was known."""
        self._learned += 1
        if self._learned > _MOST_LEARNED:
            self._learned, self._roots = 1, {}
        node = self._roots.setdefault(structure, root)
        is_fine, is_new = node.agrees(root), node is root
        for signature, each in trail:
            first = node.next.setdefault(signature, each)
            known = first.variant(each.likeness)
            if known is None:
                known = first.variants[each.likeness] = each
            is_new |= known is each
            is_fine = is_fine and known.agrees(each)
            node = known
        self._must_learn = 0 if is_new else max(0, self._must_learn - 1)
        ending = trail[-1][1].ending if trail else root.ending
        if node.ending is None:
            node.ending = ending
        elif ending is not None:
            is_fine = is_fine and node.ending == ending
        return is_fine

    def recognized(self) -> None:
        """A step was recognized."""
        self._failures, self._next_rest = 0, 1

    def failed(self, *, lacks_variant: bool = False) -> None:
        """A step was not recognized, or never can be.

        lacks_variant: a call had results of other properties than before; there may be many such steps,
        and the next is not likely to be one of the same kind.
        """
        self._must_learn = _TRIES if lacks_variant else 1
        self.met_another()

    def met_another(self) -> None:
        """Note that a step began like none before: if all do, learning each is of little use."""
        self._failures += 1
        if self._failures > _PATIENCE:
            self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, _LONGEST_REST)
