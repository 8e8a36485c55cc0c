"""Tensors that a loop uses from outside its parts and its batch, kept by content."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["OutsideTensors", "Versions", "version_of", "versions_by_name", "versions_of"]

#: Of each tensor of a state, by name: its id, how often it was changed, and its address.
Versions = dict[str, tuple[int, int | None, int]]


@dataclass
class OutsideTensors:
    """Bytes of storages from outside, copied once while they stay the same.

    A storage is identified by its weak reference, and the version of the observed tensor.

    copied: total bytes.
    """

    copied: int = 0
    _copies: dict[int, tuple[Any, int, Tensor]] = field(default_factory=dict)

    def of(self, tensor: Tensor) -> Tensor:
        """Return a copy, on the CPU, of all bytes of a tensor's storage."""
        storage, version = tensor.untyped_storage(), version_of(tensor)
        known = self._copies.get(storage._cdata)
        with torch._C._DisableTorchDispatch():
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            if (
                known is not None
                and known[1] == version
                and not known[0].expired()
                # NumPy changes memory of the CPU, and torch does not count that.
                and (tensor.device.type != "cpu" or torch.equal(whole, known[2]))
            ):
                return known[2]
            copy = whole.cpu().clone()
        self.copied += copy.nbytes
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


def versions_of(tensors: Iterable[Tensor | None]) -> list[int | None]:
    """Return how often each tensor was changed, None if torch does not count."""
    tensors = list(tensors)
    try:
        return [None if tensor is None else tensor._version for tensor in tensors]
    except RuntimeError:
        return [*map(version_of, tensors)]


def versions_by_name(state: Mapping[str, Tensor]) -> Versions:
    """Return keys that change with the values of a tensor; `tensor.data = ...` counts nothing."""
    tensors = [*state.values()]
    addresses = [tensor.data_ptr() for tensor in tensors]
    keys = zip(map(id, tensors), versions_of(tensors), addresses, strict=True)
    return dict(zip(state, keys, strict=True))


def version_of(tensor: Tensor | None) -> int | None:
    """Return how often a tensor was changed, None if torch does not count."""
    return None if tensor is None or tensor.is_inference() else tensor._version
