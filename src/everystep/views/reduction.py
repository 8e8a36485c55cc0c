"""Fewer points with the same look: the smallest and the largest value of every bucket of steps."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import polars
from numpy.typing import NDArray

__all__ = ["extremes", "reduce"]


def reduce(frame: polars.DataFrame, buckets: int, value: str = "loss") -> polars.DataFrame:
    """Return the rows of `frame` that a plot needs so that no spike is lost.

    The range of steps is divided into buckets of equal width. For each bucket, it keeps the first row
    with its smallest and with its largest finite value and its first row that is not finite; and the
    first and the last row of all. Rows are returned unchanged, with all their columns, in order.

    Args:
        frame: in ascending order of the column `step`; a missing value counts as NaN.
        buckets: their number, at least 1. A frame of up to twice as many rows is returned unchanged; of
            a longer one, at most three rows per bucket and two more are kept.
        value: the column of the values, numbers.
    """
    assert buckets >= 1
    if len(frame) <= 2 * buckets:
        return frame
    steps = frame["step"].to_numpy()
    width = int(steps[-1] - steps[0]) + 1
    return _extremes(frame, steps[0] - -np.arange(buckets) * width // buckets, value)


def extremes(frame: polars.DataFrame, width: int, value: str = "loss") -> polars.DataFrame:
    """Return the rows that `reduce` keeps, with buckets of steps 1 to `width`, and so on."""
    return _extremes(frame, np.arange(1, frame["step"].item(-1) + 1, width), value)


def _extremes(frame: polars.DataFrame, begins: NDArray[np.int64], value: str) -> polars.DataFrame:
    """Return the rows to keep of a frame in buckets that begin at these steps.

    A frame of up to two rows for each bucket is returned unchanged.
    """
    starts = np.unique(np.searchsorted(frame["step"].to_numpy(), begins))
    if len(frame) <= 2 * len(starts):
        return frame
    values = frame[value].to_numpy()
    kept = [0, len(values) - 1]
    # A bucket fits into the processor's cache; arrays of all rows do not.
    for begin, end in pairwise([*starts.tolist(), len(values)]):
        bucket = values[begin:end]
        rows = np.flatnonzero(np.isfinite(bucket))
        if len(rows) < len(bucket):
            kept.append(begin + int(np.isfinite(bucket).argmin()))
        if len(rows):
            among = bucket[rows]
            kept += [begin + int(rows[among.argmin()]), begin + int(rows[among.argmax()])]
    return frame[np.unique(kept)]
