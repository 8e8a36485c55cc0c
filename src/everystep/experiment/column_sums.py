"""Sums over more rows than memory holds, with the bits of NumPy's sum of all of them at once.

NumPy adds the rows of several columns one after the other, and a single column by halves (pairwise
summation; Higham, The Accuracy of Floating Point Summation, 1993).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

__all__ = ["ColumnSums"]

#: Numbers of a single column that are added by one call.
_LEAF = 2**17


class ColumnSums:
    """The sum of each column of `count` rows (N, K) of float64 that come in parts, N above 0."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._rows: np.ndarray | None = None
        #: Of a single column: the sums of the numbers of a leaf each, and what is in none yet.
        self._leaves: list[np.ndarray] = []
        self._sizes = _leaf_sizes(count)
        self._size = next(self._sizes)
        self._rest = np.empty((0, 1))

    def add(self, part: np.ndarray) -> None:
        """Add rows; they may be overwritten."""
        if len(part) == self._count:  # its layout decides about the order, too
            self._rows = np.add.reduce(part, axis=0)
        elif part.shape[1] == 1:
            rest = np.concatenate([self._rest, part])
            while self._size and len(rest) >= self._size:
                self._leaves.append(np.add.reduce(rest[: self._size], axis=0))
                rest, self._size = rest[self._size :], next(self._sizes, 0)
            self._rest = rest
        elif len(part):
            if self._rows is not None:
                part[0] += self._rows
            self._rows = np.add.reduce(part, axis=0)

    @property
    def total(self) -> np.ndarray:
        """The sums (K), once all rows were added."""
        if self._rows is not None:
            return self._rows
        return _joined_leaves(self._count, iter(self._leaves))


def _halves(count: int) -> tuple[int, int]:
    half = count // 2
    half -= half % 8
    return half, count - half


def _leaf_sizes(count: int) -> Iterator[int]:
    if count <= _LEAF:
        yield count
        return
    for half in _halves(count):
        yield from _leaf_sizes(half)


def _joined_leaves(count: int, leaves: Iterator[np.ndarray]) -> np.ndarray:
    if count <= _LEAF:
        return next(leaves)
    one, two = (_joined_leaves(half, leaves) for half in _halves(count))
    total: np.ndarray = one + two
    return total
