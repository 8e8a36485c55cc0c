"""Entries: the paths of the steps that were watched, as a tree.

An entry is one call of the dispatcher, or something else that a step does. Arguments stand in it as
tokens, tensors by the order in which the step met them:

    ("r", k)                       the tensor k, the same object on the same memory
    ("a", k, place, geometry)      another tensor on memory that the step knows; it becomes k
    ("x", k, bytes, geometry)      the first tensor on memory from elsewhere; it becomes k
    ("c", value)                   a constant
    ("n", type)                    a slot: the number belongs to the step
    ("l", tokens)                  a list
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from everystep.step.path import Marks, Path, Tables

__all__ = ["Ending", "Entry", "Learned", "flattened", "geometry"]


class Learned(NamedTuple):
    """What a watch noted of a whole step; places: the storage of each tensor that the step met."""

    tables: Tables
    places: tuple[int | None, ...]


class Ending(NamedTuple):
    """How a step ended.

    names, bound: of the state afterwards, and the token of each tensor; changes: how often each was
    changed; loss: the token of the logged tensor, or the place of the number that was read, or None.
    """

    path: Path
    names: tuple[str, ...]
    bound: tuple[Any, ...]
    changes: tuple[int | None, ...]
    loss: Any


class Entry:
    """What a step does at one point.

    key: the kind, and what is compared; func, where: the operator of a call, and the modules in which it
    runs; check: makes the call if it is this one, else returns MISS; met: the number of tensors that the
    step has met after it; marks: the position of the watch after it; contents: arguments that brought
    memory from elsewhere, by their place, and its storage; draws: whether it draws random numbers;
    shaped: whether the call does not determine the shapes or dtypes of its results; kept: results with
    memory that is met again without them, by their place and number; jump: of a backward pass that can
    run unwatched, the entry after it, its numbers, and the numbers before it.
    """

    __slots__ = (
        *("check", "children", "contents", "draws", "ending", "func", "jump", "kept", "key", "learned"),
        *("marks", "met", "next", "parent", "shaped", "where"),
    )

    def __init__(self, key: Any, parent: Entry | None, marks: Marks, met: int) -> None:
        self.key, self.parent, self.marks, self.met = key, parent, marks, met
        self.func: Any = None
        self.where: Any = None
        self.check: Callable[..., Any] | None = None
        self.next: Entry | None = None
        self.children: dict[Any, Entry] = {}
        self.contents: tuple[tuple[int, int], ...] = ()
        self.draws = self.shaped = False
        self.kept: tuple[tuple[int, int], ...] = ()
        self.learned: Learned | None = None
        self.ending: Ending | None = None
        self.jump: Any = None


def geometry(tensor: Tensor) -> tuple[Any, ...]:
    """Return where a tensor lies in its memory."""
    return tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset()


def flattened(value: Any) -> list[Any]:
    """Return the items of a result or of arguments, those of lists included."""
    if isinstance(value, Tensor):
        return [value]
    found: list[Any] = []
    for item in value if isinstance(value, list | tuple) else [] if value is None else [value]:
        found += item if isinstance(item, list | tuple) else [item]
    return found
