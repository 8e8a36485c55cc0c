"""Trace: which operation of a step wrote a number, through views, slices and transposes.

A tensor is a layout on a storage. So a number is a place on a storage, and what made it is the last
operation before it was read that wrote this place.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from everystep.program.operation import TensorSpec, usual_geometry
from everystep.replay.step import Step
from everystep.step.check import same_bits

__all__ = [
    "Before",
    "Halves",
    "Part",
    "Spot",
    "Trace",
    "Written",
    "index_at",
    "is_finite",
    "same_number_bits",
]


@dataclass(frozen=True)
class Spot:
    """A number as it was read: of which tensor, at which index, after how many operations.

    half: of a complex number, 0 for its real part, 1 for its imaginary part, None for both.
    """

    name: str
    index: tuple[int, ...]
    after: int
    half: int | None = None


class Part(NamedTuple):
    """Bytes of an element that are read as a number of another dtype. offset: of the first of them."""

    offset: int
    dtype: torch.dtype

    def half_of(self, element: torch.dtype) -> int | None:
        """Return which part of a complex number it is (see `Spot`), None if it is neither."""
        is_half = element.is_complex and element.to_real() == self.dtype
        return self.offset // self.dtype.itemsize if is_half else None

    def of(self, element: Tensor) -> Tensor:
        """Return the number (0-dimensional) that these bytes of an element are."""
        content = element.resolve_conj().reshape(1).clone().view(torch.uint8)
        return content[self.offset : self.offset + self.dtype.itemsize].clone().view(self.dtype)[0]


@dataclass(frozen=True)
class Written:
    """An operation wrote the number.

    operation: its number in the step; place: of the tensor among its results; name, index: the tensor
    that it wrote, and where in it; part: of the element there, None if it was read as it was written.
    """

    operation: int
    place: int
    name: str
    index: tuple[int, ...]
    part: Part | None = None


@dataclass(frozen=True)
class Before:
    """The number was there before the step.

    kind: of its storage, as `Storage` has it; part: as `Written` has it.
    """

    kind: str
    name: str
    index: tuple[int, ...]
    part: Part | None = None


@dataclass(frozen=True)
class Halves:
    """The real and the imaginary part of a complex number were written one by one."""

    real: Spot
    imaginary: Spot


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
        #: The sizes of the numbers on each storage, in bytes.
        self._sizes: dict[str, set[int]] = defaultdict(set)
        for name in (*step.places.tensors, *step.state):
            spec = self.spec(name)
            self._sizes[spec.storage].add(spec.torch_dtype.itemsize)
            if "~" not in name:
                self._whole[spec.storage].append(name)

    def outputs(self, number: int) -> list[str | None]:
        """Return the tensors that an operation wrote: its results, then the arguments it wrote into."""
        seen = self.step.operations[number]
        outputs: list[str | None] = [*seen.operation.results]
        known = {*filter(None, outputs)}
        return outputs + [name for name in seen.operation.written() if name not in known]

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

    def origin(self, spot: Spot) -> Written | Before | Halves:
        """Return what wrote a number, or what it was before the step."""
        spec = self.spec(spot.name)
        begin, dtype = _byte(spec, spot.index), spec.torch_dtype
        if spot.half is not None:
            dtype = dtype.to_real()
            begin += spot.half * dtype.itemsize
        found = self._origin(spot, begin, dtype)
        if dtype.is_complex and self._sizes[spec.storage] != {dtype.itemsize}:
            halves = replace(spot, half=0), replace(spot, half=1)
            elements = [_element(self.origin(each)) for each in halves]
            if elements[0] != elements[1]:
                return Halves(*halves)
        return found

    def _origin(self, spot: Spot, begin: int, dtype: torch.dtype) -> Written | Before:
        """Return where the first byte of a number is from."""
        spec = self.spec(spot.name)
        for number, place, name in reversed(self._writes.get(spec.storage, [])):
            if number < spot.after:
                index = index_at(self.spec(name), begin)
                if index is not None:
                    return Written(number, place, name, index, self._part(name, index, begin, dtype))
        before = self.before(spot.name, begin, dtype)
        half = self._part(spot.name, spot.index, begin, dtype)
        return before or Before(self._kind(spec), spot.name, spot.index, half)

    def before(self, name: str, byte: int, dtype: torch.dtype | None = None) -> Before | None:
        """Return what a byte of a tensor's storage belonged to before the step, if that has a name.

        dtype: that it is read as; default: that of the tensor.
        """
        spec = self.spec(name)
        for whole in self._whole.get(spec.storage, []):
            index = index_at(self.spec(whole), byte)
            if index is not None:
                part = self._part(whole, index, byte, dtype or spec.torch_dtype)
                return Before(self._kind(spec), whole, index, part)
        return None

    def _part(self, name: str, index: tuple[int, ...], byte: int, dtype: torch.dtype) -> Part | None:
        spec = self.spec(name)
        return None if spec.torch_dtype == dtype else Part(byte - _byte(spec, index), dtype)

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
        tensor = tensors.get(written.name)
        if tensor is None and self._is_last(written):
            tensor = self.step.end.get(written.name)
        return None if tensor is None else _read(tensor[written.index], written.part)

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
        return _read(known[before.index], before.part) if known is not None and is_same else None


def _element(origin: Written | Before | Halves) -> Written | Before | Halves:
    return origin if isinstance(origin, Halves) else replace(origin, part=None)


def _read(element: Tensor, part: Part | None) -> Tensor:
    return element if part is None else part.of(element)


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
