"""The labels of the memory of a step, as its operations write it."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from everystep.ops.labels import MIXED, SHARED, SUM, Reason, Tracked, compressed
from everystep.program.operation import TensorSpec
from everystep.replay.step import Step

__all__ = ["Memory"]

_OTHER_DTYPE = Reason("memory is read as numbers of another size")
_OUTSIDE = Reason("a tensor that the step reads may come from operations that are kept as numbers only")
_SHARED = Reason("rows of the batch share memory")


class _Written(NamedTuple):
    spec: TensorSpec
    tracked: Tracked


class Memory:
    """What was written to the storages of a step, and which rows it belongs to.

    What no operation has written belongs to no row, except the batch, with a row of it along the first
    axis of each tensor.
    """

    def __init__(self, step: Step, rows: int) -> None:
        self.places = step.places
        phases = [seen.operation.phase for seen in step.operations]
        #: The operations before the last of backward; all, without backward.
        self.last_backward = max(
            (i for i, p in enumerate(phases) if p == "backward"), default=len(phases)
        )
        #: Why the loss is not a sum of losses of single rows; None: nothing speaks against it.
        self.mixed: Reason | None = None
        self._written: dict[str, list[_Written]] = {}
        self._begin(step, rows)

    def _begin(self, step: Step, rows: int) -> None:
        given: dict[str, dict[str, Tracked]] = {}
        for name, tensor in step.batch.tensors.items():
            spec = self.places.tensors.get(name)
            if spec is not None and spec.shape == tuple(tensor.shape):
                labels = torch.full((), SHARED, dtype=torch.int32)
                if tensor.dim():
                    labels = torch.arange(rows, dtype=torch.int32).reshape(-1, *[1] * (tensor.dim() - 1))
                tracked = Tracked(tensor, labels.expand(spec.shape), is_data=True)
                given.setdefault(spec.storage, {})[name] = tracked
        for name, spec in self.places.tensors.items():
            storage = self.places.storages.get(spec.storage)
            if storage is None or storage.kind != "input":
                continue
            here = given.get(spec.storage, {})
            if not here and (prod(spec.shape) <= 1 or not self.places.has_unseen):
                continue  # from elsewhere, and of no row, such as the weights of classes
            if not here or not self._agree(here):
                labels = torch.full((), MIXED, dtype=torch.int32).expand(spec.shape)
                self.write(name, Tracked(torch.empty(0), labels, reason=_SHARED if here else _OUTSIDE))
            elif name in here:
                self.write(name, here[name])

    def _agree(self, tracked: dict[str, Tracked]) -> bool:
        """Tell whether no number on a storage belongs to two rows."""
        specs = [self.places.tensors[name] for name in tracked]
        flat = torch.full((max(map(_end, specs)),), MIXED, dtype=torch.int32)
        for spec, each in zip(specs, tracked.values(), strict=True):
            if any(
                not stride and size > 1 for size, stride in zip(spec.shape, spec.stride, strict=True)
            ):
                return False
            here = _on(flat, spec)
            if bool(((here != MIXED) & (here != each.labels)).any()):
                return False
            here.copy_(each.labels)
        return True

    def write(self, name: str, tracked: Tracked) -> None:
        """Note what a tensor holds from now on."""
        spec = self.places.tensors[name]
        before = self._written.get(spec.storage, [])
        kept = [each for each in before if not _covers(spec, each.spec)]
        tracked = tracked._replace(labels=compressed(tracked.labels))
        self._written[spec.storage] = [*kept, _Written(spec, tracked)]

    def read(self, name: str, value: Tensor) -> Tracked:
        """Return the tensor with its labels; value: what it holds."""
        spec = self.places.tensors[name]
        written = self._written.get(spec.storage, [])
        if not written:
            shared = torch.full((), SHARED, dtype=torch.int32).expand(spec.shape)
            is_data = self.places.storages[spec.storage].kind != "state"
            return Tracked(value, shared.to(value.device), is_data=is_data)
        last = written[-1]
        if _same_place(last.spec, spec):
            labels = last.tracked.labels.to(value.device)
            return last.tracked._replace(value=value, labels=labels)
        reason = Reason.first(each.tracked.reason for each in written)
        sizes = {each.spec.torch_dtype.itemsize for each in written} | {spec.torch_dtype.itemsize}
        if len(sizes) > 1:
            labels = torch.full((), MIXED, dtype=torch.int32).expand(spec.shape)
            return Tracked(value, labels, reason=reason or _OTHER_DTYPE)
        size = max(_end(each) for each in (spec, *(w.spec for w in written)))
        flat = torch.full((size,), SHARED, dtype=torch.int32)
        for each in written:
            _on(flat, each.spec).copy_(each.tracked.labels)
        labels = compressed(_on(flat, spec)).to(value.device)
        terms = _terms(written, spec, size, value) if bool((labels == SUM).any()) else None
        is_mean = all(w.tracked.is_mean for w in written if w.tracked.terms)
        is_data = all(each.tracked.is_data for each in written)
        summed = Reason.first(w.tracked.summed for w in written if w.tracked.has(SUM))
        return Tracked(value, labels, terms, is_mean, reason, is_data, summed)

    def is_written(self, name: str) -> bool:
        """Tell whether an operation wrote to the memory of a tensor."""
        return bool(self._written.get(self.places.tensors[name].storage))

    def value(self, name: str) -> Tensor:
        """Return what a tensor holds, as operations wrote it."""
        spec = self.places.tensors[name]
        written = self._written[spec.storage]
        size = max(_end(each) for each in (spec, *(w.spec for w in written)))
        flat = torch.zeros(size, dtype=spec.torch_dtype, device=written[-1].tracked.value.device)
        for each in written:
            _on(flat, each.spec).copy_(each.tracked.value)
        return _on(flat, spec)


def _terms(
    written: list[_Written], spec: TensorSpec, size: int, value: Tensor
) -> Callable[[int], Tensor]:
    def terms(row: int) -> Tensor:
        flat = torch.zeros(size, dtype=value.dtype, device=value.device)
        for each in written:
            if each.tracked.terms is not None:
                _on(flat, each.spec).copy_(each.tracked.terms(row).reshape(each.spec.shape))
        return _on(flat, spec)

    return terms


def _end(spec: TensorSpec) -> int:
    return spec.end // spec.torch_dtype.itemsize


def _on(flat: Tensor, spec: TensorSpec) -> Tensor:
    return flat.as_strided(spec.shape, spec.stride, spec.offset)


def _same_place(one: TensorSpec, other: TensorSpec) -> bool:
    """Tell whether two tensors are the same numbers in the same shape; strides along size 1 are moot."""
    if one.shape != other.shape or one.offset != other.offset or one.dtype != other.dtype:
        return False
    return all(a == b or n == 1 for n, a, b in zip(one.shape, one.stride, other.stride, strict=True))


def _covers(new: TensorSpec, old: TensorSpec) -> bool:
    """Tell whether a tensor overwrites another for sure: the same place, or all of a dense range."""
    if _same_place(new, old):
        return True
    numbers = 1
    for size in new.shape:
        numbers *= size
    is_dense = _end(new) - new.offset == numbers and _is_injective(new)
    inside = new.offset <= old.offset and new.end >= old.end
    return is_dense and inside and new.torch_dtype.itemsize == old.torch_dtype.itemsize


def _is_injective(spec: TensorSpec) -> bool:
    """Tell whether no two indices mean the same number, if the range is as long as the tensor."""
    expected = 1
    for size, stride in sorted(zip(spec.shape, spec.stride, strict=True), key=lambda each: each[1]):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
