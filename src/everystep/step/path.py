"""Paths: one observed step of a loop, without its numbers and the content of its inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from everystep.program.number_slots import READ
from everystep.program.program import Phase

__all__ = [
    "FLOAT",
    "INT",
    "Marks",
    "Path",
    "SeenOperation",
    "SeenTensor",
    "StorageKind",
    "Tables",
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
