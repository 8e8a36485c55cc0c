"""Paths: what the steps of a loop did, without their numbers and the content of their inputs.

A path is one observed step. An entry is one call of the dispatcher, or something else that a step does,
in the tree of all of them. Arguments stand in it as tokens, tensors by the order in which the step met
them:

    ("r", k)                       the tensor k, the same object on the same memory
    ("a", k, place, geometry)      another tensor on memory that the step knows; it becomes k
    ("x", k, bytes, geometry)      the first tensor on memory from outside; it becomes k
    ("c", value)                   a constant
    ("n", type)                    a slot: the number belongs to the step
    ("l", tokens)                  a list
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from everystep.program.number_slots import READ
from everystep.program.program import Phase

__all__ = [
    "FLOAT",
    "INT",
    "Ending",
    "Entry",
    "Learned",
    "Marks",
    "Path",
    "SeenOperation",
    "SeenTensor",
    "StorageKind",
    "Tables",
    "flattened",
    "geometry",
    "is_name",
]


class _Slot:
    """Stands in a path for a number that belongs to the step."""

    def __init__(self, kind: type) -> None:
        self.kind = kind


INT, FLOAT = _Slot(int), _Slot(float)


class SeenTensor(NamedTuple):
    """An observed tensor: its storage, and its geometry in elements."""

    storage: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class SeenOperation(NamedTuple):
    """An observed operation.

    arguments, keywords: tensors are `%3`, the number of a SeenTensor; numbers of the step are slots;
    results: numbers of tensors; writes: storages; numbers: how many of the step's numbers it uses.
    """

    phase: Phase
    module: str | None
    operator: Any
    arguments: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]
    results: tuple[str | None, ...]
    writes: tuple[int, ...]
    numbers: int

    def tensors_read(self) -> list[int]:
        """Return the numbers of the tensors among its arguments."""
        return _tensors_in((*self.arguments, *(value for _, value in self.keywords)))


def is_name(value: Any) -> bool:
    """Tell whether an argument of an observed operation is a tensor, or has one in it."""
    if isinstance(value, tuple):
        return any(map(is_name, value))
    return isinstance(value, str) and value.startswith("%")


class StorageKind(NamedTuple):
    """Where a storage comes from: `state`, `input` or `temporary`. host: in the CPU's memory."""

    kind: str
    bytes: int
    host: bool


class Marks(NamedTuple):
    """How far a watch has come: how many operations, tensors, ... it has noted."""

    operations: int
    tensors: int
    storages: int
    numbers: int
    draws: int
    unseen: int
    marked: int


class Tables(NamedTuple):
    """Everything that a watch noted about a step, so that another watch can continue from any point.

    marked: gradients, activations and logged values, by kind and name, in the order in which they were
    noted.
    """

    operations: tuple[SeenOperation, ...]
    tensors: tuple[SeenTensor, ...]
    storages: tuple[StorageKind, ...]
    named: tuple[tuple[str, int], ...]
    marked: tuple[tuple[str, str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Path:
    """What one step did, without its numbers and the content of its inputs.

    named: the tensors of the state and of the batch, by name; ends: the tensor of each state name after
    the step, if it is another; gone: names that no longer exist; gradients: as an optimizer found them;
    loss: the tensor logged as the loss; activations: the output of each module; logged: other logged
    tensors with one element.
    """

    operations: tuple[SeenOperation, ...]
    tensors: tuple[SeenTensor, ...]
    storages: tuple[StorageKind, ...]
    named: tuple[tuple[str, int], ...]
    ends: tuple[tuple[str, int], ...]
    gone: tuple[str, ...]
    gradients: tuple[tuple[str, int], ...]
    loss: int | None
    activations: tuple[tuple[str, tuple[int, ...]], ...]
    logged: tuple[tuple[str, int], ...] = ()

    @cached_property
    def _hash(self) -> int:
        parts = (self.operations, self.tensors, self.storages, self.named, self.ends, self.gone)
        return hash((*parts, self.gradients, self.loss, self.activations, self.logged))

    def __hash__(self) -> int:
        return self._hash

    def places_of_reads(self) -> Iterator[int]:
        """Yield the places, among the numbers of a step, of those that Python has read."""
        place = 0
        for operation in self.operations:
            if str(operation.operator) == READ:
                yield place
            place += operation.numbers

    def unused_gradients(self) -> set[str]:
        """Return the names of gradients from before the step that it neither reads nor writes.

        A loop that begins with zero_grad only drops them.
        """
        used: set[int] = set()
        for operation in self.operations:
            used.update(operation.writes)
            used.update(self.tensors[number].storage for number in operation.tensors_read())
        used.update(self.tensors[number].storage for _, number in self.ends)
        return {
            name
            for name, number in self.named
            if name.startswith("gradient/") and self.tensors[number].storage not in used
        }


def _tensors_in(value: Any) -> list[int]:
    """Return the numbers of the tensors in an argument."""
    if isinstance(value, str):
        return [int(value[1:])] if value.startswith("%") else []
    if isinstance(value, tuple):
        return [number for item in value for number in _tensors_in(item)]
    return []


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
