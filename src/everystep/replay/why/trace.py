"""Trace: which operation of a step wrote a number, through views, slices and transposes.

A tensor is a layout on a storage. So a number is a place on a storage, and what made it is the last
operation before it was read that wrote this place.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everystep.program.execute import Observed
from everystep.program.operation import TensorSpec, usual_geometry
from everystep.replay.step import Step
from everystep.step.check import same_bits

__all__ = [
    "Before",
    "Spot",
    "Trace",
    "Written",
    "index_at",
    "is_finite",
    "is_optimizer_step",
    "same_number_bits",
]


@dataclass(frozen=True)
class Spot:
    """A number as it was read: of which tensor, at which index, after how many operations."""

    name: str
    index: tuple[int, ...]
    after: int


@dataclass(frozen=True)
class Written:
    """An operation wrote the number.

    operation: its number in the step; place: of the tensor among its results; name, index: the tensor
    that it wrote, and where in it.
    """

    operation: int
    place: int
    name: str
    index: tuple[int, ...]


@dataclass(frozen=True)
class Before:
    """The number was there before the step. kind: of its storage, as `Storage` has it."""

    kind: str
    name: str
    index: tuple[int, ...]


class Trace:
    """The writes of a step.

    Args:
        step: the opened step.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self._specs: dict[str, TensorSpec] = {}
        self._writes: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
        for number in range(len(step.operations)):
            for place, name in enumerate(self.outputs(number)):
                if name is not None:
                    self._writes[self.spec(name).storage].append((number, place, name))
        self._whole: dict[str, list[str]] = defaultdict(list)
        for name in (*step.places.tensors, *step.state):
            if "~" not in name:
                self._whole[self.spec(name).storage].append(name)

    def outputs(self, number: int) -> list[str | None]:
        """Return the tensors that an operation wrote: its results, then the arguments it wrote into."""
        seen = self.step.operations[number]
        if is_optimizer_step(seen):
            written = (name for name in self.step.end if name.startswith("optimizer/"))
            return [*seen.results, *written]
        try:
            written_into = seen.operation.written()
        except ValueError:  # an eager step may contain any operator
            written_into = []
        outputs: list[str | None] = [*seen.operation.results]
        known = {*filter(None, outputs)}
        return outputs + [name for name in written_into if name not in known]

    def spec(self, name: str) -> TensorSpec:
        """Return the layout of a tensor; one that no operation names has a storage of its own."""
        if name not in self._specs:
            known = self.step.places.tensors.get(name)
            self._specs[name] = known or self._own_layout(name)
        return self._specs[name]

    def _own_layout(self, name: str) -> TensorSpec:
        tensor = self.step.state[name] if name in self.step.state else self.step.end[name]
        shape = tuple(tensor.shape)
        dtype = str(tensor.dtype).removeprefix("torch.")
        return TensorSpec(dtype=dtype, shape=shape, **usual_geometry(name, shape))

    def origin(self, spot: Spot) -> Written | Before:
        """Return what wrote a number, or what it was before the step."""
        spec = self.spec(spot.name)
        begin = _byte(spec, spot.index)
        for number, place, name in reversed(self._writes.get(spec.storage, [])):
            if number < spot.after:
                index = index_at(self.spec(name), begin)
                if index is not None:
                    return Written(number, place, name, index)
        return self.before(spot.name, begin) or Before(self._kind(spec), spot.name, spot.index)

    def before(self, name: str, byte: int) -> Before | None:
        """Return what a byte of a tensor's storage belonged to before the step, if that has a name."""
        spec = self.spec(name)
        for whole in self._whole.get(spec.storage, []):
            index = index_at(self.spec(whole), byte)
            if index is not None:
                return Before(self._kind(spec), whole, index)
        return None

    def is_written(self, name: str, before: int) -> bool:
        """Tell whether one of the first operations wrote on the storage of a tensor."""
        writes = self._writes.get(self.spec(name).storage, [])
        return bool(writes) and writes[0][0] < before

    def _kind(self, spec: TensorSpec) -> str:
        storage = self.step.places.storages.get(spec.storage)
        return "state" if storage is None else storage.kind

    def after(self, written: Written) -> Tensor | None:
        """Return the number (0-dimensional) that an operation wrote, None if nobody looked at it."""
        seen = self.step.operations[written.operation]
        tensors = seen.results
        if is_optimizer_step(seen):
            tensors = {**self.step.end, **seen.results}
        tensor = tensors.get(written.name)
        if tensor is None and self._is_last(written):
            tensor = self.step.end.get(written.name)
        return None if tensor is None else tensor[written.index]

    def _is_last(self, written: Written) -> bool:
        writes = self._writes[self.spec(written.name).storage]
        return writes[-1][0] == written.operation

    def at_first(self, before: Before) -> Tensor | None:
        """Return a number before the step, None if nobody looked at it."""
        name = before.name.removeprefix("batch/")
        known = self.step.state.get(before.name)
        if known is None and before.kind == "input":
            known = self.step.batch.tensors.get(name)
        spec = self.spec(before.name)
        is_same = known is not None and tuple(known.shape) == spec.shape
        return known[before.index] if known is not None and is_same else None


def is_optimizer_step(seen: Observed) -> bool:
    """Tell whether an operation is the step of an optimizer as a whole."""
    return seen.operation.operator.startswith("torch.optim.")


def _byte(spec: TensorSpec, index: tuple[int, ...]) -> int:
    offset = spec.offset + sum(i * s for i, s in zip(index, spec.stride, strict=True))
    return offset * spec.torch_dtype.itemsize


def index_at(spec: TensorSpec, byte: int) -> tuple[int, ...] | None:
    """Return the index of the element that holds a byte of its storage, None if none does."""
    if 0 in spec.shape:
        return None
    rest = byte // spec.torch_dtype.itemsize - spec.offset
    if rest < 0:
        return None
    wanted = rest
    index = [0] * len(spec.shape)
    for dim in sorted(range(len(spec.shape)), key=lambda d: spec.stride[d], reverse=True):
        if spec.shape[dim] > 1 and spec.stride[dim]:
            index[dim] = min(rest // spec.stride[dim], spec.shape[dim] - 1)
            rest -= index[dim] * spec.stride[dim]
    if not rest:
        return tuple(index)
    return _searched(spec, wanted) if _overlaps(spec) else None


def _overlaps(spec: TensorSpec) -> bool:
    """Tell whether dimensions of a tensor are interleaved, so that division finds no place."""
    reached = 0
    for stride, size in sorted(zip(spec.stride, spec.shape, strict=True)):
        if size > 1 and stride:
            if stride <= reached:
                return True
            reached += stride * (size - 1)
    return False


def _searched(spec: TensorSpec, wanted: int) -> tuple[int, ...] | None:
    offsets = np.zeros((), dtype=np.int64)
    for stride, size in zip(spec.stride, spec.shape, strict=True):
        offsets = np.add.outer(offsets, np.arange(size, dtype=np.int64) * stride)
    found = np.argwhere(offsets == wanted)
    return tuple(map(int, found[0])) if len(found) else None


def same_number_bits(one: Tensor, other: Tensor) -> bool:
    """Tell whether two numbers have the same bits; NaN is the same as any NaN."""
    if one.dtype != other.dtype:
        return False
    if one.is_floating_point() and bool(torch.isnan(one)) and bool(torch.isnan(other)):
        return True
    return same_bits(one.reshape(1), other.reshape(1))


def is_finite(value: Any) -> bool:
    """Tell whether a number is neither NaN nor infinite."""
    if isinstance(value, complex):
        return math.isfinite(value.real) and math.isfinite(value.imag)
    return math.isfinite(value)
