"""Rows of an array, in memory or in a file, that are prepared when they are taken."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everystep.bounded import open_regular, parse_json

__all__ = ["Prepare", "PreparedRows", "Reading", "SourceArray", "mapped_safetensors", "rows_at_once"]

#: Bytes of rows that are taken at once where all are looked at.
_PIECE = 64_000_000
#: Bytes of mapped files that this process may hold before it gives them back: they count as its memory,
#: and for a row the operating system may map the 2 MB around it.
_RELEASED = 500_000_000
#: Rows that are gathered before these bytes are counted again.
_GROUP = 128
#: Types of numbers in a safetensors file that NumPy has, too.
_TYPES = {
    **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "BOOL": "?", "I8": "i1", "U8": "u1"},
    **{"I16": "<i2", "I32": "<i4", "I64": "<i8", "U16": "<u2", "U32": "<u4", "U64": "<u8"},
}


#: Called with how much has been read, of how much, and in which unit, if not in rows.
Reading = Callable[..., None]
#: Makes what is trained on of rows (n, ...), each on its own.
Prepare = Callable[[np.ndarray], np.ndarray]


class SourceArray:
    """An array (N, ...) in memory, or mapped from a file that has its rows one after the other.

    The operating system reads the pages that are used, and forgets them when it needs memory.

    unit: the divisor of numbers when they are taken, in float32.
    """

    def __init__(self, array: np.ndarray, unit: int | None = None) -> None:
        self._unit = unit
        # Only of a memory map can pages be given back to the system.
        self._map: Any = array.base if isinstance(array.base, mmap.mmap) else None
        self.array = array.view(np.ndarray)

    def __len__(self) -> int:
        return len(self.array)

    @property
    def stays_in_file(self) -> bool:
        """Whether the rows are taken from a file, where they lie one after the other."""
        return self._map is not None and self.array.flags.c_contiguous

    def take(self, rows: Any) -> np.ndarray:
        """Return rows: a slice, or their numbers. Those of a file are copied."""
        found = self._taken(rows)
        return found if self._unit is None else found / np.float32(self._unit)

    def _taken(self, rows: Any) -> np.ndarray:
        if self._map is None:
            return np.asarray(self.array[rows])
        if isinstance(rows, slice):
            self._advise("MADV_NORMAL")
            found = np.array(self.array[rows])
            self._release()
            return found
        self._advise("MADV_RANDOM")  # else the system reads a megabyte around each row
        found = np.empty((len(rows), *self.array.shape[1:]), self.array.dtype)
        for begin in range(0, len(rows), _GROUP):
            group = slice(begin, begin + _GROUP)
            found[group] = self.array[rows[group]]
            self._release()
        return found

    def _advise(self, advice: str) -> None:
        with suppress(AttributeError):  # not every system takes advice
            self._map.madvise(getattr(mmap, advice))

    def _release(self) -> None:
        if _mapped_bytes() > _RELEASED:
            self._advise("MADV_DONTNEED")

    def parts(self, rows: np.ndarray | None, progress: Reading) -> Iterator[np.ndarray]:
        """Yield ascending rows, or all, some at a time. progress: called with how many, and of all."""
        size = rows_at_once(self.array[:1].nbytes)
        for begin in range(0, len(self), size):
            end = min(begin + size, len(self))
            found = self.take(slice(begin, end))  # in one go, which a disk is faster with
            if rows is not None:
                first, last = np.searchsorted(rows, (begin, end))
                found = found[rows[first:last] - begin]
            if len(found):
                yield found
            progress(end, len(self))


def rows_at_once(size: int) -> int:
    """Return how many rows of so many bytes are quick to take."""
    return max(1, _PIECE // max(1, size))


def _mapped_bytes() -> int:
    """Return how many bytes of files this process holds in memory; 0 if that is unknown."""
    try:
        # The third number: pages that are shared with files (proc(5)).
        pages = int(Path("/proc/self/statm").read_bytes().split()[2])
    except OSError:
        return 0
    return pages * mmap.PAGESIZE


def mapped_safetensors(path: Path, wanted: Collection[str]) -> Mapping[str, np.ndarray | None]:
    """Return arrays of a safetensors file, by name, without reading them; None where not wanted.

    Raises:
        OSError, ValueError: the file is unreadable, or has numbers that NumPy does not know.
        SafetensorError: it is cut off, or not of this format.
    """
    from safetensors import safe_open

    with safe_open(path, framework="numpy"):  # checks all of the header
        pass
    with open_regular(path) as file:
        size = int.from_bytes(file.read(8), "little")
        header = parse_json(file.read(size))
    header.pop("__metadata__", None)
    found = dict[str, np.ndarray | None].fromkeys(header)
    for name in {*wanted} & {*header}:
        about = header[name]
        if about["dtype"] not in _TYPES:
            raise ValueError(f"array {name!r} is {about['dtype']}, which NumPy does not have")
        shape, begin = tuple(about["shape"]), about["data_offsets"][0]
        dtype = np.dtype(_TYPES[about["dtype"]])
        if 0 in shape:  # which cannot be mapped
            found[name] = np.empty(shape, dtype)
        else:
            found[name] = np.memmap(path, dtype, "r", 8 + size + begin, shape)
    return found


class PreparedRows:
    """Rows of an array that are prepared when they are taken, in place of a tensor (N, ...).

    Args:
        source: the array (M, ...).
        rows: the numbers of the rows in it (N, int64, ascending), None for all.
        prepare: makes what is trained on of rows, each on its own.
        conversion: of the tensor that this makes.
    """

    def __init__(
        self,
        source: SourceArray,
        rows: np.ndarray | None,
        prepare: Prepare,
        conversion: Callable[[Tensor], Tensor] = lambda rows: rows,
    ) -> None:
        self._source, self._rows = source, rows
        self._prepare, self._conversion = prepare, conversion
        # One row shows the shape and the dtype that the preparation makes.
        first = self[:1]
        count = len(source) if rows is None else len(rows)
        # Attributes of a tensor, since code that takes data takes both.
        self.shape = torch.Size((count, *first.shape[1:]))
        self.ndim, self.dtype, self.device = first.ndim, first.dtype, first.device

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, places: slice) -> Tensor:
        """Return rows by their places."""
        rows = places if self._rows is None else self._rows[places]
        return self._made(self._source.take(rows))

    def index_select(self, dimension: int, places: Tensor) -> Tensor:
        """Return rows by their places, as of a tensor."""
        assert dimension == 0
        rows = places.numpy()
        return self._made(self._source.take(rows if self._rows is None else self._rows[rows]))

    def _made(self, taken: np.ndarray) -> Tensor:
        return self._conversion(torch.from_numpy(np.ascontiguousarray(self._prepare(taken))))

    def split(self, size: int) -> Iterator[Tensor]:
        """Yield all rows, so many at a time."""
        for begin in range(0, len(self), size):
            yield self[begin : begin + size]

    def in_memory(self) -> Tensor:
        """Return all rows as a tensor."""
        found, end = self[:1].new_empty(self.shape), 0
        # Preparing takes several arrays of twice as many bytes.
        for piece in self.split(rows_at_once(max(self._source.array[:1].nbytes, 4 * found[:1].nbytes))):
            begin, end = end, end + len(piece)
            found[begin:end] = piece
        return found

    def to(self, device: torch.device) -> PreparedRows:
        """Return the rows for a device."""
        return self.converted(lambda rows: rows.to(device))

    def converted(self, conversion: Callable[[Tensor], Tensor]) -> PreparedRows:
        """Return the rows with a further conversion of each batch."""
        before = self._conversion
        return PreparedRows(
            self._source, self._rows, self._prepare, lambda rows: conversion(before(rows))
        )
