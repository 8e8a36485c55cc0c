"""Batch memory: where a bound program reads its batch, either in place or from memory of its own.

A batch may be any part of more data, at any place of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from everystep.errors import ProgramError
from everystep.program.memory import ALIGNMENT, copy_into
from everystep.program.program import Program

__all__ = ["Anchor", "BatchMemory", "anchors_in_place"]


class Anchor(NamedTuple):
    """Where a storage of a program begins (in bytes) on a storage of torch, perhaps before it."""

    storage: torch.UntypedStorage
    start: int = 0


def anchors_in_place(
    program: Program, fixed: Mapping[str, Tensor], device: torch.device
) -> dict[str, Anchor]:
    """Return where tensors of a batch are that a program can read where they are, by storage."""
    written = {program.tensors[name].storage for op in program.operations for name in op.changed()}
    found = {}
    for name, tensor in fixed.items():
        spec = program.tensors[name]
        begin = spec.offset * tensor.itemsize
        others = [t for n, t in program.tensors.items() if t.storage == spec.storage and n != name]
        is_alone = all(begin <= t.offset * t.torch_dtype.itemsize and t.end <= spec.end for t in others)
        place = torch.device("cpu") if program.storages[spec.storage].host else device
        geometry = tensor.dtype, tuple(tensor.shape), tuple(tensor.stride())
        lies_so = geometry == (spec.torch_dtype, spec.shape, spec.stride)
        # Where kernels meet other boundaries of memory, they may add up in another order.
        is_aligned = (tensor.data_ptr() - begin) % ALIGNMENT == 0
        is_here = tensor.device.type == place.type and tensor.layout == torch.strided
        if is_alone and lies_so and is_aligned and is_here and spec.storage not in written:
            start = int(tensor.storage_offset()) * tensor.itemsize - begin
            found[spec.storage] = Anchor(tensor.untyped_storage(), start)
    return found


class BatchMemory:
    """Memory for the batch of each step.

    Args:
        program: the program.
        names: the tensors of the batch that the program has.
        device: where it runs.

    anchors: of this memory, by storage.

    Raises:
        ProgramError: the program reads memory around the tensors of the batch.
    """

    def __init__(self, program: Program, names: Sequence[str], device: torch.device) -> None:
        self.anchors: dict[str, Anchor] = {}
        self._names = names
        self._whole: list[str] = []
        self._each: list[str] = []
        self._tensors: dict[str, Tensor] = {}
        on: dict[str, list[str]] = {}
        for name in names:
            on.setdefault(program.tensors[name].storage, []).append(name)
        for storage, mine in on.items():
            extents = [_extent(program, name) for name in mine]
            begin, end = min(b for b, _ in extents), max(e for _, e in extents)
            begin -= begin % ALIGNMENT
            others = [n for n, t in program.tensors.items() if t.storage == storage and n not in names]
            if any(not begin <= b <= e <= end for b, e in (_extent(program, n) for n in others)):
                raise ProgramError("the step reads memory around its batch")
            place = torch.device("cpu") if program.storages[storage].host else device
            memory = torch.empty(end - begin, dtype=torch.uint8, device=place).untyped_storage()
            self.anchors[storage] = Anchor(memory, -begin)
            if others:  # views of the batch, perhaps of what lies between the numbers of a tensor
                self._whole += mine
            else:
                self._each += mine

    def bind(self, tensor: Callable[[str], Tensor]) -> None:
        """Note where the tensors are. tensor: returns one of the program's, by name."""
        self._tensors = {name: tensor(name) for name in self._names}

    def load(self, batch: Mapping[str, Tensor]) -> None:
        """Copy a batch."""
        for name in self._each:
            copy_into(self._tensors[name], batch[name])
        for name in self._whole:
            _bytes_of(self._tensors[name]).copy_(_bytes_of(batch[name]))


def _bytes_of(tensor: Tensor) -> Tensor:
    """Return all memory between the first and the last number of a tensor."""
    begin = int(tensor.storage_offset()) * tensor.itemsize
    count = sum((s - 1) * d for s, d in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    size = count * tensor.itemsize if tensor.numel() else 0
    whole = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return whole.set_(tensor.untyped_storage(), begin, (size,), (1,))


def _extent(program: Program, name: str) -> tuple[int, int]:
    """Return the first and the last byte (excluded) of a tensor in its storage."""
    spec = program.tensors[name]
    return spec.offset * spec.torch_dtype.itemsize, spec.end
