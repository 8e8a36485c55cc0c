"""Checks SQLite's write-ahead log, which holds the newest steps of a run that was killed.

SQLite reads the log up to the first page with a wrong checksum, and ignores the rest without a word. The
log of a killed process ends there; where more pages follow, the log was damaged. The format is that of
SQLite's file format, section 4; the checksums are of 4.2.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

__all__ = ["drop_uncommitted", "log_problem"]

_HEADER, _FRAME_HEADER = 32, 24
_MAGIC = 0x377F0682  # its last bit: checksums are of big-endian words
_MASK = 0xFFFFFFFF
#: Bytes of a log that are checked; SQLite empties a log of 4 MB at the next occasion.
_LARGEST = 256_000_000


def log_problem(path: Path) -> str | None:
    """Return what is wrong with the log of a database, in words; None if nothing, or if it has none."""
    try:
        if path.stat().st_size > _LARGEST:
            return None
        content = path.read_bytes()
    except OSError:
        return None
    if not content:
        return None
    words = [int.from_bytes(content[place : place + 4], "big") for place in range(0, _HEADER, 4)]
    if len(content) < _HEADER or words[0] & ~1 != _MAGIC:
        return "its header was changed, so that none of it is read"
    order = ">u4" if words[0] & 1 else "<u4"
    page, salts = words[2], content[16:24]
    sums = _checksum(content[:24], (0, 0), order)
    if sums != (words[6], words[7]) or not 512 <= page <= 65_536:
        return "its header was changed, so that none of it is read"
    return _frames_problem(content, page, salts, sums, order)


def drop_uncommitted(path: Path) -> None:
    """Cut off what follows the last transaction of a log: the writer had no place for the rest.

    Only the one writer may call this, outside of a transaction. SQLite never reads that part; it takes
    space, and looks like damage.

    Raises:
        OSError: the log cannot be read or cut.
    """
    if not 0 < path.stat().st_size <= _LARGEST:
        return
    content = path.read_bytes()
    words = [int.from_bytes(content[place : place + 4], "big") for place in range(0, _HEADER, 4)]
    if len(content) < _HEADER or words[0] & ~1 != _MAGIC or not 512 <= words[2] <= 65_536:
        return
    order, size = ">u4" if words[0] & 1 else "<u4", _FRAME_HEADER + words[2]
    frames = [content[at : at + size] for at in range(_HEADER, len(content), size)]
    sums, matrix, end = (words[6], words[7]), _power(size // 8 - 2), 0
    for place, part in enumerate(_summands(frames, size, order)):
        frame = frames[place]
        sums = _advanced(sums, part, matrix)
        stated = tuple(int.from_bytes(frame[at : at + 4], "big") for at in (16, 20))
        if frame[8:16] != content[16:24] or sums != stated:
            break
        if any(frame[4:8]):  # the size of the database, in the last page of a transaction
            end = place + 1
    os.truncate(path, _HEADER + end * size)


def _frames_problem(
    content: bytes, page: int, salts: bytes, sums: tuple[int, int], order: str
) -> str | None:
    """Return what is wrong with the pages of a log. salts: what a page of this log begins with."""
    size = _FRAME_HEADER + page
    frames = [content[at : at + size] for at in range(_HEADER, len(content), size)]
    parts = _summands(frames, size, order)
    matrix = _power(size // 8 - 2)
    for place, frame in enumerate(frames):
        own = frame[8:16]
        sums = _advanced(sums, parts[place], matrix) if len(frame) == size else (-1, -1)
        stated = tuple(int.from_bytes(frame[at : at + 4], "big") for at in (16, 20))
        if own == salts and sums == stated:
            continue
        later = any(each[8:16] == salts for each in frames[place + 1 :])
        # The page before it in an older log has the next smaller first salt, and another second one.
        is_torn = (own[:4] == salts[:4]) != (own[4:] == salts[4:])
        # A process is killed between the header of a page and the page, not within one.
        is_cut = own == salts and _FRAME_HEADER < len(frame) < size
        is_changed = own == salts and len(frame) == size
        if later or is_torn or is_cut or is_changed:
            return f"page {place + 1:,} of {len(frames):,} was changed, so that the rest is not read"
        return None
    return None


def _summands(frames: list[bytes], size: int, order: str) -> list[tuple[int, int]]:
    """Return what each whole page adds to the checksum of those before it."""
    import numpy as np

    pairs = size // 8 - 2
    weights = np.empty((4, pairs), np.uint32)
    power = (1, 0, 0, 1)
    for place in range(pairs - 1, -1, -1):
        # A pair (x, y) adds (x, x + y), times the matrix for each pair after it.
        weights[:, place] = (
            (power[0] + power[1]) & _MASK,
            power[1],
            (power[2] + power[3]) & _MASK,
            power[3],
        )
        power = _product(power, (1, 1, 1, 2))
    found = []
    for frame in frames:
        if len(frame) < size:
            break
        words = np.frombuffer(frame[:8] + frame[_FRAME_HEADER:], order).astype(np.uint32)
        first, second = words[0::2], words[1::2]
        one = (weights[0] * first + weights[1] * second).sum(dtype=np.uint32)
        two = (weights[2] * first + weights[3] * second).sum(dtype=np.uint32)
        found.append((int(one), int(two)))
    return found


def _checksum(content: bytes, sums: tuple[int, int], order: str) -> tuple[int, int]:
    endian: Literal["big", "little"] = "big" if order[0] == ">" else "little"
    one, two = sums
    for place in range(0, len(content), 8):
        one = (one + int.from_bytes(content[place : place + 4], endian) + two) & _MASK
        two = (two + int.from_bytes(content[place + 4 : place + 8], endian) + one) & _MASK
    return one, two


_Matrix = tuple[int, int, int, int]


def _advanced(sums: tuple[int, int], part: tuple[int, int], matrix: _Matrix) -> tuple[int, int]:
    one = matrix[0] * sums[0] + matrix[1] * sums[1] + part[0]
    two = matrix[2] * sums[0] + matrix[3] * sums[1] + part[1]
    return one & _MASK, two & _MASK


def _power(count: int) -> _Matrix:
    """Return what `count` pairs of zeros do to a checksum."""
    found: _Matrix = (1, 0, 0, 1)
    for _ in range(count):
        found = _product(found, (1, 1, 1, 2))
    return found


def _product(one: _Matrix, other: _Matrix) -> _Matrix:
    return (
        (one[0] * other[0] + one[1] * other[2]) & _MASK,
        (one[0] * other[1] + one[1] * other[3]) & _MASK,
        (one[2] * other[0] + one[3] * other[2]) & _MASK,
        (one[2] * other[1] + one[3] * other[3]) & _MASK,
    )
