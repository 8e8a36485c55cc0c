"""Trace: which operation of a step wrote a number, through views, slices and transposes.

A tensor is a layout on a storage. So a number is a place on a storage, and what made it is the last
operation before it was read that wrote this place.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from everystep.errors import UsageError
from everystep.ops.call import Call, Piece
from everystep.program.operation import TensorSpec, usual_geometry
from everystep.replay.opened_step import Step
from everystep.step.state import same_bits

__all__ = ["Origin", "Part", "Spot", "Trace", "same_number_bits"]


@dataclass(frozen=True)
# Why places, not names: e.g. operation 3 writes `mm` (8, 4), and operation 5 reads `mm~1`, its
# transpose, at [2, 7]. Both lie on one storage: the byte of mm~1[2, 7] is that of mm[7, 2], and the last
# write of that byte before operation 5 is by operation 3.
class Spot:
    """A number at the time it was read: its tensor, its index, the number of operations before.

    half: of a complex number, 0 for its real part, 1 for its imaginary part, None for both.
    """

    name: str
    index: tuple[int, ...]
    after: int
    half: int | None = None

    @property
    def halves(self) -> tuple[Spot, Spot]:
        """Its real and its imaginary part."""
        return replace(self, half=0), replace(self, half=1)


class Part(NamedTuple):
    """Bytes of an element that are read as a number of another dtype. offset: of the first of them."""

    offset: int
    dtype: torch.dtype

    def half_of(self, element: torch.dtype) -> int | None:
        """Return which part of a complex number it is (see `Spot`), None if it is not one."""
        is_half = element.is_complex and element.to_real() == self.dtype
        return self.offset // self.dtype.itemsize if is_half else None


@dataclass(frozen=True)
class Origin:
    """The origin of a number: an operation, or the state before the step.

    name, index: the tensor that was written, and where in it; part: of the element there, None if it was
    read with the dtype in which it was written; operation: its number in the step, None if the number
    was there before the step; place: of the tensor among its results.
    """

    name: str
    index: tuple[int, ...]
    part: Part | None = None
    operation: int | None = None
    place: int = 0

    def read(self, tensor: Tensor) -> Tensor:
        """Return the number (0-dimensional) from the tensor."""
        element = tensor[self.index]
        if self.part is None:
            return element
        offset, dtype = self.part
        if dtype.itemsize > element.itemsize and tensor.dim() == 1:
            # `copy.deepcopy` copies the memory of a tensor as bytes, so it lies in several of these.
            count = dtype.itemsize // element.itemsize
            element = tensor[self.index[0] : self.index[0] + count]
        content = element.resolve_conj().reshape(-1).clone().view(torch.uint8)
        return content[offset : offset + dtype.itemsize].clone().view(dtype)[0]


class _Write(NamedTuple):
    operation: int
    place: int
    name: str


class Trace:
    """The writes of an opened step."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self._specs: dict[str, TensorSpec] = {}
        #: Of each storage: its content before the step, as if operation -1 had written it, and the
        #: writes of operations.
        self._writes: dict[str, list[_Write]] = defaultdict(list)
        #: The sizes of the numbers on each storage, in bytes.
        self._sizes: dict[str, set[int]] = defaultdict(set)
        # In reverse, since a look from the end must find the first names first.
        for name in reversed([*step.places.tensors, *step.state]):
            spec = self.spec(name)
            self._sizes[spec.storage].add(spec.torch_dtype.itemsize)
            # A name with `~` is a view of another tensor on the storage.
            if "~" not in name:
                self._writes[spec.storage].append(_Write(-1, 0, name))
        for number in range(len(step.operations)):
            for place, made in enumerate(self.outputs(number)):
                if made is not None:
                    self._writes[self.storage(made)].append(_Write(number, place, made))
        self._origins: dict[Spot, Origin | None] = {}

    def outputs(self, number: int) -> list[str | None]:
        """Return the tensors that an operation wrote: its results, then the arguments it wrote into."""
        operation = self.step.operations[number].operation
        outputs: list[str | None] = [*operation.results]
        return outputs + [name for name in operation.written() if name not in outputs]

    def spec(self, name: str) -> TensorSpec:
        """Return the layout of a tensor; one that no operation names has its own storage."""
        if name not in self._specs:
            known = self.step.places.tensors.get(name)
            self._specs[name] = known or self._own_layout(name)
        return self._specs[name]

    def _own_layout(self, name: str) -> TensorSpec:
        tensor = self.step.state[name] if name in self.step.state else self.step.end[name]
        shape = tuple(tensor.shape)
        dtype = str(tensor.dtype).removeprefix("torch.")
        return TensorSpec(dtype=dtype, shape=shape, **usual_geometry(name, shape))

    def storage(self, name: str) -> str:
        """Return the storage of a tensor."""
        return self.spec(name).storage

    def writers(self, name: str) -> list[int]:
        """Return the operations that wrote on the storage of a tensor, by their numbers in order."""
        writes = self._writes.get(self.storage(name), [])
        return [write.operation for write in writes if write.operation >= 0]

    def kind(self, name: str) -> str:
        """Return the kind of the storage of a tensor."""
        storage = self.step.places.storages.get(self.storage(name))
        return "state" if storage is None else storage.kind

    def origin(self, spot: Spot) -> Origin | None:
        """Return what wrote a number, None if the parts of a complex one were written one by one."""
        if spot not in self._origins:
            self._origins[spot] = self._origin(spot)
        return self._origins[spot]

    def _origin(self, spot: Spot) -> Origin | None:
        spec = self.spec(spot.name)
        begin, dtype = _byte(spec, spot.index), spec.torch_dtype
        if spot.half is not None:
            dtype = dtype.to_real()
            # The real part lies first, then the imaginary part.
            begin += spot.half * dtype.itemsize
        # Only where numbers of other sizes lie can its parts come from different operations.
        if dtype.is_complex and self._sizes[spec.storage] != {dtype.itemsize}:
            real, imaginary = (self.origin(each) for each in spot.halves)
            assert real is not None and imaginary is not None
            # Two operations wrote the two parts, e.g. through `view_as_real`.
            if replace(real, part=None) != replace(imaginary, part=None):
                return None
        # The latest first: what it wrote there hides what was written before.
        for write in reversed(self._writes.get(spec.storage, [])):
            if write.operation < spot.after:
                index = index_at(self.spec(write.name), begin)
                if index is not None:
                    part = self._part(write.name, index, begin, dtype)
                    operation = None if write.operation < 0 else write.operation
                    return Origin(write.name, index, part, operation, write.place)
        return Origin(spot.name, spot.index, self._part(spot.name, spot.index, begin, dtype))

    def _part(self, name: str, index: tuple[int, ...], byte: int, dtype: torch.dtype) -> Part | None:
        spec = self.spec(name)
        return None if spec.torch_dtype == dtype else Part(byte - _byte(spec, index), dtype)

    def read(self, spot: Spot) -> Tensor:
        """Return a number (0-dimensional).

        Raises:
            UsageError: it was not observed.
        """
        origin = self.origin(spot)
        if origin is None:
            return torch.complex(*(self.read(each) for each in spot.halves))
        found = self.written(origin)
        if found is not None:
            half = self.half(origin)
            if half == 0 or not self.is_conjugate(spot, origin):
                return found
            return -found if half else found.conj().resolve_conj()
        for number, seen in enumerate(self.step.operations):
            # What was not seen when it was written may have been seen when it was read.
            if spot.name in seen.inputs and self.origin(replace(spot, after=number)) == origin:
                element = seen.inputs[spot.name][spot.index]
                return element if spot.half is None else torch.view_as_real(element)[spot.half]
        raise UsageError(
            f"nothing in step {self.step.number} reads {spot.name}, so its numbers are not known"
        )

    def is_conjugate(self, spot: Spot, origin: Origin) -> bool:
        """Return whether imaginary parts are read with another sign than they were written with."""
        return self.spec(spot.name).is_conjugated is not self.spec(origin.name).is_conjugated

    def half(self, origin: Origin) -> int | None:
        """Return which part of a complex number was read (see `Spot`), None if it is not one."""
        part = origin.part
        return None if part is None else part.half_of(self.spec(origin.name).torch_dtype)

    def written(self, origin: Origin) -> Tensor | None:
        """Return a number (0-dimensional) as it was written, None if it was not observed then."""
        step, name = self.step, origin.name
        if origin.operation is not None:
            seen = step.operations[origin.operation]
            tensor = (seen.results | seen.written).get(name)
            return None if tensor is None else origin.read(tensor)
        tensor = step.state.get(name)
        if tensor is None and self.kind(name) == "input":
            # What an operation that no program holds has made of a parameter is given from outside, too.
            ends = (step.end[end] for end, place in step.places.ends.items() if place == name)
            tensor = step.batch.tensors.get(name.removeprefix("batch/"), next(ends, None))
        is_same = tensor is not None and tuple(tensor.shape) == self.spec(name).shape
        return origin.read(tensor) if tensor is not None and is_same else None

    def call(self, origin: Origin) -> Call:
        """Return the operation that made a number, for its rule."""
        assert origin.operation is not None
        seen = self.step.operations[origin.operation]
        results = {**seen.results, **seen.written}
        outputs = self.outputs(origin.operation)
        return Call(seen.operation, seen.inputs, results, outputs, origin.place, origin.index)

    def row(self, origin: Origin) -> int | None:
        """Return the place in the batch of the row that a number of a tensor of the batch belongs to."""
        tensor = self.step.batch.tensors.get(origin.name.removeprefix("batch/"))
        has_rows = tensor is not None and origin.index and len(tensor) == self.step.batch.count
        return origin.index[0] if has_rows else None

    def rows(self, piece: Piece) -> set[int]:
        """Return the rows of the numbers of a piece, if it is of the batch."""
        if self.kind(piece.name) != "input":
            return set()
        half = 0 if self.spec(piece.name).torch_dtype.is_complex else None
        spots = (Spot(piece.name, piece.at(k), 0, half) for k in range(piece.size))
        found = {self.row(origin) for spot in spots if (origin := self.origin(spot)) is not None}
        return {row for row in found if row is not None}


def _byte(spec: TensorSpec, index: tuple[int, ...]) -> int:
    offset = spec.offset + sum(i * s for i, s in zip(index, spec.stride, strict=True))
    return offset * spec.torch_dtype.itemsize


def index_at(spec: TensorSpec, byte: int) -> tuple[int, ...] | None:
    """Return the index of the element that holds a byte of its storage, None if none does."""
    dims = range(len(spec.shape))
    # Along other dimensions, nothing moves: their index is 0.
    moving = [dim for dim in dims if spec.shape[dim] > 1 and spec.stride[dim]]
    moving.sort(key=lambda dim: spec.stride[dim], reverse=True)
    rest = byte // spec.torch_dtype.itemsize - spec.offset
    found = None if 0 in spec.shape else _indices(spec, moving, rest)
    return None if found is None else tuple(found.get(dim, 0) for dim in dims)


def _indices(spec: TensorSpec, moving: list[int], rest: int) -> dict[int, int] | None:
    """Return the indices by dimension with which some dimensions reach a number of elements further."""
    if not moving:
        return None if rest else {}
    dim, *later = moving
    stride, reach = spec.stride[dim], sum((spec.shape[each] - 1) * spec.stride[each] for each in later)
    # More than one index is possible only if dimensions are interleaved.
    most, least = min(rest // stride, spec.shape[dim] - 1), max(-((reach - rest) // stride), 0)
    for index in range(most, least - 1, -1):
        found = _indices(spec, later, rest - index * stride)
        if found is not None:
            return {dim: index, **found}
    return None


def same_number_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two numbers have the same bits; NaN is the same as any NaN."""
    if one.dtype != other.dtype:
        return False
    if one.is_floating_point() and bool(torch.isnan(one)) and bool(torch.isnan(other)):
        return True
    return same_bits(one.reshape(1), other.reshape(1))
