"""Tensors that a loop uses from outside its parts and its batch, kept by content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from everystep.program.memory import geometry, whole_memory
from everystep.program.operation import extent_of
from everystep.step.state import same_bits
from everystep.step.versions import version_of

__all__ = [
    "MOST_BYTES",
    "Brought",
    "Cut",
    "OutsideTensors",
    "places_read",
]

#: Memory from outside of more bytes than this is not kept; what is computed from it is.
MOST_BYTES = 100_000_000


class Cut(NamedTuple):
    """Where a step has cut an input out of data: in pieces of one size, laid side by side.

    source: all bytes of the data (bytes,) uint8, on the CPU; begins: the first byte of each piece.
    """

    source: Tensor
    begins: Sequence[int]


class Brought(NamedTuple):
    """What a step has brought from outside.

    content: all bytes of some memory, as first seen, on the CPU; cut: where they were cut out of data,
    if the run is to have that; rows: of how many rows they were joined, which other steps may use, too.
    """

    content: Tensor
    cut: Cut | None = None
    rows: int = 1


@dataclass
class _Data:
    """Data from outside that steps cut inputs out of.

    reference: to its storage; cut: the bytes that were cut out of it so far; copy: of all its bytes,
    once these are as many.
    """

    reference: Any
    cut: int = 0
    copy: Tensor | None = None


@dataclass
class OutsideTensors:
    """Bytes of storages from outside, copied once while they stay the same.

    A storage is identified by its weak reference, and the version of the observed tensor.

    copied: total bytes.
    """

    copied: int = 0
    _copies: dict[int, tuple[Any, int, Tensor]] = field(default_factory=dict)
    _data: dict[int, _Data] = field(default_factory=dict)

    def cut(self, tensor: Tensor, begins: Sequence[int], size: int) -> Cut | None:
        """Return where an input was cut out of data; None while its content costs less than the data.

        Data that changes is copied once, too; then what is cut has other bytes than the copy, or is at
        another place, and is kept by content.

        Args:
            tensor: on the memory of the data.
            begins: the first byte of each piece.
            size: bytes of the input.
        """
        storage = tensor.untyped_storage()
        known = self._data.get(storage._cdata)
        if known is None or known.reference.expired():
            reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            known = self._data[storage._cdata] = _Data(reference)
        known.cut += size
        # Before, the run would get all of the data for the few pieces that were cut out of it.
        if known.copy is None and storage.nbytes() <= min(known.cut, MOST_BYTES):
            with torch._C._DisableTorchDispatch():
                known.copy = whole_memory(tensor).cpu().clone()
        return None if known.copy is None else Cut(known.copy, begins)

    def of_part(self, tensor: Tensor, base: int) -> Tensor:
        """Return a copy, on the CPU, of the bytes of a tensor alone. base: where its memory begins."""
        begin, end = extent_of(geometry(tensor))
        with torch._C._DisableTorchDispatch():
            whole = whole_memory(tensor)
            # Up to the tensor, which begins as far from aligned memory as it does in the data.
            copy = torch.zeros(end - base, dtype=torch.uint8)
            copy[begin - base :] = whole[begin:end]
        self.copied += copy.nbytes
        return copy

    def of(self, tensor: Tensor) -> Tensor:
        """Return a copy, on the CPU, of all bytes of a tensor's storage."""
        storage, version = tensor.untyped_storage(), version_of(tensor)
        known = self._copies.get(storage._cdata)
        with torch._C._DisableTorchDispatch():
            whole = whole_memory(tensor)
            if (
                known is not None
                and known[1] == version
                and not known[0].expired()
                # NumPy changes memory of the CPU, and torch does not count that.
                and (tensor.device.type != "cpu" or same_bits(whole, known[2]))
            ):
                return known[2]
            copy = whole.cpu().clone()
        self.copied += copy.nbytes
        # Of a tensor without a count, nothing shows on a device that the copy is still right.
        if version is not None:
            reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            self._copies[storage._cdata] = reference, version, copy
        return copy

    def forget(self, place: int) -> None:
        """Copy a changed storage again at its next use."""
        self._copies.pop(place, None)

    def clean(self) -> None:
        """Drop the copies of deleted tensors."""
        self._copies = {place: known for place, known in self._copies.items() if not known[0].expired()}
        self._data = {p: known for p, known in self._data.items() if not known.reference.expired()}


def places_read(func: Any, arguments: Sequence[Any]) -> tuple[Tensor, list[int]] | None:
    """Return what an operation cuts out of data on the CPU: the data, and the first byte of each piece.

    None if the pieces are not contiguous, or not all of one size. `func` joins slices, or picks rows.
    """
    name, (given, *others) = func.overloadpacket.__name__, arguments
    if name in ("stack", "cat"):
        slices = [*given]
        shapes = {(each.untyped_storage()._cdata, each.shape) for each in slices}
        if len(shapes) != 1 or (others and others[0] != 0) or not all(t.is_contiguous() for t in slices):
            return None
        return slices[0], [t.storage_offset() * t.itemsize for t in slices]
    is_by_rows = len(others[0]) == 1 if name == "index" else name == "index_select" and others[0] == 0
    if is_by_rows:
        rows = others[0][0] if name == "index" else others[1]
        if rows.dtype != torch.int64 or not given[:1].is_contiguous():
            return None
        rows = torch.where(rows < 0, rows + len(given), rows).flatten()
        begins = (rows * given.stride(0) + given.storage_offset()) * given.itemsize
        return given, begins.tolist()
    return None
