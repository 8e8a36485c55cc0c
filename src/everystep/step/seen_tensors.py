"""Seen tensors: those that a step used, by number, and their memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from everystep.program.arguments import DTYPES
from everystep.program.memory import ALIGNMENT
from everystep.step.elsewhere import Elsewhere
from everystep.step.path import Marks, SeenTensor, StorageKind, Tables

__all__ = ["SeenTensors", "UnseenError", "is_plain"]

_PLAIN_TENSORS = (Tensor, nn.Parameter, nn.Buffer)
_DTYPES = frozenset(DTYPES.values())
_REAL = frozenset(dtype for dtype in _DTYPES if not dtype.is_complex)
#: Memory from elsewhere of more bytes than this is not kept; what is computed from it is.
MOST_BYTES = 100_000_000


class UnseenError(Exception):
    """An operation that a program cannot hold; the message gives the reason."""


@dataclass
class SeenStorage:
    """An observed storage. content: of one from outside, when it was first read."""

    kind: str
    bytes: int
    host: bool
    reference: StorageWeakRef
    content: Tensor | None = None


class SeenTensors:
    """The tensors that a step used, by number, and their storages, by place.

    Args:
        device: of the training.
        elsewhere: copies of what earlier steps used from elsewhere.

    names: as in arguments; tensors, by number; storages, by place.
    """

    def __init__(self, device: torch.device, elsewhere: Elsewhere) -> None:
        self.names: list[str] = []
        self.tensors: list[SeenTensor] = []
        self.storages: list[SeenStorage] = []
        self._is_elsewhere = device.type != "cpu"
        self._elsewhere = elsewhere
        self._number_of: dict[tuple[Any, ...], int] = {}
        self._place_of: dict[int, int] = {}
        self._extents: dict[int, list[tuple[int, int]]] = {}
        self._within: dict[int, bool] = {}
        self._has_complex = False

    def number(self, tensor: Tensor, kind: str = "input") -> int:
        """Return the number of a tensor; on memory not seen before, it is of that kind.

        Raises:
            UnseenError: it is an argument, and memory from elsewhere that is too large to be kept.
        """
        storage = tensor.untyped_storage()
        place = self._place_of.get(storage._cdata)
        if place is None:
            if kind == "argument":
                if storage.nbytes() > MOST_BYTES:
                    raise UnseenError(
                        f"uses a slice of {storage.nbytes() / 1e6:,.0f} MB that is not in any part"
                    )
                kind = "input"
            place = self._meet(tensor, storage, kind)
        seen = (place, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())
        number = self._number_of.get(seen)
        if number is None:
            number = self._number_of[seen] = len(self.tensors)
            self.names.append(f"%{number}")
            self.tensors.append(SeenTensor(place, seen[1], tuple(seen[2]), seen[3], int(seen[4])))
        return number

    def number_of_argument(self, tensor: Tensor) -> int:
        """Return the number of a tensor that an operation receives.

        Raises:
            UnseenError: a program cannot hold it; gives the reason.
        """
        if not self.is_plain(tensor):
            raise UnseenError(_what_is_special(tensor))
        number = self.number(tensor, "argument")
        place = self.tensors[number].storage
        if place in self._extents and not self._is_within(number, place):
            raise UnseenError("uses memory next to a tensor of the batch or the state")
        return number

    def keep_extent(self, number: int) -> None:
        """Note that a tensor is kept with the batch or the state: its memory, and none beside it."""
        seen = self.tensors[number]
        self._extents.setdefault(seen.storage, []).append(_extent(seen))

    def place_of(self, tensor: Tensor) -> int | None:
        """Return the place of a tensor's storage, None if it was not seen yet."""
        if tensor.layout is not torch.strided:
            return None
        return self._place_of.get(tensor.untyped_storage()._cdata)

    def is_input(self, number: int) -> bool:
        """Tell whether a tensor uses memory of the batch or from elsewhere."""
        return self.storages[self.tensors[number].storage].kind == "input"

    def is_plain(self, tensor: Tensor) -> bool:
        """Return what `is_plain` returns, faster: only complex tensors have negated views."""
        if type(tensor) not in _PLAIN_TENSORS or tensor.layout is not torch.strided:
            return False
        if tensor.dtype in _REAL and not self._has_complex:
            return not tensor.is_nested and not tensor._is_zerotensor()
        self._has_complex = True
        return is_plain(tensor)

    def note_written(self, place: int) -> None:
        """Note that the step has written memory from elsewhere: it is copied again."""
        self._elsewhere.forget(self.storages[place].reference.cdata)

    def note_changed_unseen(self, tensor: Tensor) -> None:
        """Note that a tensor was changed unseen: treat its memory as new."""
        place = tensor.untyped_storage()._cdata
        self._place_of.pop(place, None)
        self._elsewhere.forget(place)  # a kernel may not count its changes

    def forget_all_but_state(self) -> None:
        """Note that anything may have been changed unseen: treat all other memory as new."""
        for storage, place in [*self._place_of.items()]:
            if self.storages[place].kind != "state":
                del self._place_of[storage]
                self._elsewhere.forget(storage)

    def kinds(self) -> tuple[StorageKind, ...]:
        """Return the origin of each storage."""
        return tuple(StorageKind(s.kind, s.bytes, s.host) for s in self.storages)

    def with_batch_moved(
        self, named: Iterable[int]
    ) -> tuple[tuple[SeenTensor, ...], tuple[StorageKind, ...]]:
        """Return the tensors and storages, those of the batch as if they lay at the beginning of memory.

        A batch may be any part of more data. What remains of its place is its alignment.

        named: the numbers of the tensors of the state and of the batch.
        """
        storages = list(self.kinds())
        tensors = list(self.tensors)
        leaves = {tensors[n].storage for n in named if self.is_input(n)}
        for storage in leaves:
            own = [n for n, tensor in enumerate(tensors) if tensor.storage == storage]
            begin = min(tensors[n].offset * tensors[n].dtype.itemsize for n in own)
            begin -= begin % ALIGNMENT
            moved = [tensors[n].offset - begin // tensors[n].dtype.itemsize for n in own]
            for number, offset in zip(own, moved, strict=True):
                tensors[number] = tensors[number]._replace(offset=offset)
            ends = (_end_of(tensors[number]) for number in own)
            storages[storage] = storages[storage]._replace(bytes=max(ends))
        return tuple(tensors), tuple(storages)

    def resume(
        self,
        tables: Tables,
        marks: Marks,
        lying: Mapping[int, Tensor],
        contents: Mapping[int, Tensor],
        batch_offsets: Mapping[str, int],
    ) -> None:
        """Continue from a point in a step that another watch observed in full; as `Watch.resume`."""
        self.tensors = _with_batch_at(tables, batch_offsets, marks.tensors)
        self.names = [f"%{number}" for number in range(marks.tensors)]
        self._number_of = {
            (t.storage, t.dtype, t.shape, t.stride, t.offset): n for n, t in enumerate(self.tensors)
        }
        for place, kind in enumerate(tables.storages[: marks.storages]):
            reference: Any = None
            if place in lying:
                storage = lying[place].untyped_storage()
                reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                self._place_of[storage._cdata] = place
            self.storages.append(SeenStorage(*kind, reference, contents.get(place)))

    def _is_within(self, number: int, place: int) -> bool:
        """Tell whether a tensor lies within one that is kept with the batch or the state."""
        known = self._within.get(number)
        if known is None:
            begin, end = _extent(self.tensors[number])
            known = any(one <= begin and end <= two for one, two in self._extents[place])
            self._within[number] = known
        return known

    def _meet(self, tensor: Tensor, storage: torch.UntypedStorage, kind: str) -> int:
        """Note memory that was not seen before; return its place."""
        place = self._place_of[storage._cdata] = len(self.storages)
        host = self._is_elsewhere and tensor.device.type == "cpu"
        # As long as there is a reference, no other storage can have its place.
        reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        content = self._elsewhere.of(tensor) if kind == "input" else None
        # A batch is copied elsewhere, and so it is an input without content here.
        kind = "input" if kind == "batch" else kind
        self.storages.append(SeenStorage(kind, storage.nbytes(), host, reference, content))
        return place


def _with_batch_at(tables: Tables, offsets: Mapping[str, int], count: int) -> list[SeenTensor]:
    """Return the first tensors of a step, for another offset of the batch in its memory."""
    moved: dict[int, int] = {}
    for name, number in tables.named:
        if number >= count:
            continue
        if name in offsets and tables.storages[tables.tensors[number].storage].kind == "input":
            seen = tables.tensors[number]
            moved[seen.storage] = (offsets[name] - seen.offset) * seen.dtype.itemsize
    return [
        t._replace(offset=t.offset + moved[t.storage] // t.dtype.itemsize) if t.storage in moved else t
        for t in tables.tensors[:count]
    ]


def _extent(tensor: SeenTensor) -> tuple[int, int]:
    """Return the first byte of a tensor in its storage, and the one after its last."""
    return tensor.offset * tensor.dtype.itemsize, _end_of(tensor)


def _end_of(tensor: SeenTensor) -> int:
    """Return how many bytes of its storage a tensor needs."""
    if 0 in tensor.shape:
        return tensor.offset * tensor.dtype.itemsize
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride, strict=True))
    return (tensor.offset + last + 1) * tensor.dtype.itemsize


def is_plain(tensor: Tensor) -> bool:
    """Tell whether a program can hold a tensor: dense, not a subclass, with stored values."""
    return (
        type(tensor) in _PLAIN_TENSORS
        and tensor.layout == torch.strided
        and tensor.dtype in _DTYPES
        and tensor.device.type != "meta"
        and not tensor.is_nested
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and not tensor._is_zerotensor()
        and not tensor.is_neg()
        and not tensor.is_conj()
    )


def _what_is_special(tensor: Tensor) -> str:
    if tensor.layout != torch.strided:
        return "takes a sparse tensor"
    if type(tensor) not in _PLAIN_TENSORS:
        return f"takes a {type(tensor).__name__}, a tensor subclass"
    return f"takes a {tensor.dtype} tensor that is nested, conjugated or has no storage"
