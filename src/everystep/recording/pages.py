"""Reads losses from the pages of SQLite's file, some ten times faster than row by row.

The caller compares what it gets with the digests of blocks, and reads whatever differs, or is missing,
by SQL: the pages may be written at this moment, or come from a stranger. The layout is that of SQLite's
file format: pages of section 1.6, records of 2.1.
"""

from __future__ import annotations

import os
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["losses_in_pages"]

#: Pages that are read together: so many stay in the processor's cache.
_TOGETHER = 128
#: Levels of a table's tree; of SQLite's smallest pages, 2^28 rows have fewer.
_DEEPEST = 12
_INTERIOR, _LEAF = 5, 13
#: Steps from here on are left to SQL: a cell's number and header fill one word up to here.
_MOST = 2**28
#: Bytes of a value by its serial type: NULL, whole numbers, a float, 0 and 1.
_BYTES = np.array([0, 1, 2, 3, 4, 6, 8, 8, 0, 0])
_FLOAT = 7
#: Bytes behind a page that a read of a word at its end may touch.
_MARGIN = 16


def losses_in_pages(path: Path, root: int) -> NDArray[np.float64]:
    """Return the losses of steps 1 to N, as far as the pages have them as SQLite writes them.

    That may be none. path: of the database; root: the first page of the table `steps`.
    """
    parts = [np.empty(0)]
    with suppress(OSError, ValueError, IndexError), FileIO(path) as file:  # cut off, or no such tree
        size = int.from_bytes(file.read(18)[16:], "big")
        size = 65_536 if size == 1 else size
        if size < 512:
            raise ValueError("not a page size of SQLite")
        leaves, first = _leaves(file, size, root), 1
        for begin in range(0, len(leaves), _TOGETHER):
            content = _read(file, size, leaves[begin : begin + _TOGETHER])
            losses, is_whole = _losses(content, size, first)
            parts.append(losses)
            first += len(losses)
            if not is_whole:
                break
    return np.concatenate(parts)


def _leaves(file: FileIO, size: int, root: int) -> NDArray[np.int64]:
    """Return the numbers of a table's leaf pages, in order of its rows."""
    most = file.seek(0, os.SEEK_END) // size
    level = np.array([root])
    for _ in range(_DEEPEST):
        if _read(file, size, level[:1])[0] == _LEAF:
            return level
        children: list[NDArray[Any]] = []
        for number in range(len(level)):
            page = _read(file, size, level[number : number + 1])
            if page[0] != _INTERIOR:
                raise ValueError("not a page of a table")
            cells = page[12 : 12 + 2 * int(page[3:5].view(">u2")[0])].view(">u2")
            children += [_words(page, ">u4")[cells], page[8:12].view(">u4")]
        level = np.concatenate(children).astype(np.int64)
        if len(level) > most:
            raise ValueError("more pages than the file has")
    raise ValueError("too many levels")


def _read(file: FileIO, size: int, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return the bytes of pages by their numbers, and a margin."""
    content = np.zeros(len(numbers) * size + _MARGIN, np.uint8)
    begin = 0
    for consecutive in np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1):
        file.seek((int(consecutive[0]) - 1) * size)
        end = begin + len(consecutive) * size
        if file.readinto(content[begin:end].data) != end - begin:
            raise ValueError("the file is cut off")
        begin = end
    return content


def _words(content: NDArray[np.uint8], dtype: str) -> NDArray[Any]:
    """Return the words that begin at each byte."""
    bytes_of_word = np.dtype(dtype).itemsize
    return np.ndarray((len(content) - bytes_of_word + 1,), dtype, content.data, strides=(1,))


def _losses(content: NDArray[np.uint8], size: int, first: int) -> tuple[NDArray[np.float64], bool]:
    """Return the losses on leaf pages that begin with step `first`, and whether those are all.

    A cell is: bytes of the record, step, 3 (bytes of the header), 0 (NULL, for the step), type of the
    loss, loss. Byte counts and steps are varints.
    """
    pages = content[:-_MARGIN].reshape(-1, size)
    cells = pages[:, 3:5].copy().view(">u2").astype(np.int64)
    most = int(cells.max())
    if (pages[:, 0] != _LEAF).any() or 8 + 2 * most > size:
        raise ValueError("not a leaf of a table")
    places = pages[:, 8 : 8 + 2 * most].copy().view(">u2") + np.arange(0, pages.size, size)[:, None]
    places = places[np.arange(most) < cells]
    if first + len(places) > _MOST:
        raise ValueError("too many steps")
    number, length = _varints(np.arange(first, first + len(places)))
    bits = 8 * length
    cell = _words(content, ">i8")[places].astype(np.int64)
    kind = cell >> (32 - bits) & 0xFF
    is_sound = (cell >> (40 - bits)) & ((1 << (bits + 16)) - 1) == number << 16 | 0x0300
    is_sound &= (kind < len(_BYTES)) & (cell >> 56 == 3 + _BYTES[np.minimum(kind, len(_BYTES) - 1)])
    places += length + 4
    losses = _words(content, ">f8")[places].astype(np.float64)
    others = np.flatnonzero(is_sound & (kind != _FLOAT))
    losses[others] = _others(_words(content, ">i8")[places[others]], kind[others])
    count = len(losses) if is_sound.all() else int(is_sound.argmin())
    return losses[:count], count == len(losses)


def _varints(steps: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return steps, in ascending order, as varints of up to 4 bytes, and how many bytes each has."""
    number, length = steps & 127, np.ones_like(steps)
    for place in range(1, 4):
        high = steps >> (7 * place)
        if not len(high) or not high[-1]:
            break
        number |= np.where(high > 0, (high & 127 | 128) << (8 * place), 0)
        length += high > 0
    return number, length


def _others(words: NDArray[np.int64], kind: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return losses that SQLite did not write as floats: NaN, and whole numbers."""
    whole = words >> np.minimum(64 - 8 * _BYTES[kind], 63)
    return np.where(kind == 0, np.nan, np.where(kind > _FLOAT, kind - _FLOAT - 1, whole))
