"""Fewer points with the same look: the smallest and the largest value of every bucket of steps.

And the smallest picture of a loss that is made of them.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import polars
from numpy.typing import NDArray

from everystep.recording.recorded_run import RecordedRun

__all__ = ["Sparkline", "curve_of", "extremes", "reduce", "sparkline"]

#: The picture's size in CSS pixels, and the room it leaves at its edges.
WIDTH, HEIGHT, MARGIN = 320, 72, 5
#: The loss is drawn on a log axis if its largest value is so many times its smallest.
DECADES = 100.0


def curve_of(run: RecordedRun) -> polars.DataFrame:
    """Return the losses to draw: those of every step, none of a loop that logs none."""
    return run.losses if run.facts.has_loss else run.losses.clear()


def reduce(frame: polars.DataFrame, buckets: int, value: str = "loss") -> polars.DataFrame:
    """Return the rows of `frame` that a plot needs so that no spike is lost.

    The range of steps is divided into buckets of equal width. For each bucket, it keeps the first row
    with its smallest and with its largest finite value and its first row that is not finite; and the
    first and the last row of all. Rows are returned unchanged, with all their columns, in order.

    frame: in ascending order of the column `step`; a missing value counts as NaN; buckets: their number,
    at least 1: a frame of up to twice as many rows is returned unchanged; of a longer one, at most three
    rows per bucket and two more are kept; value: the column of the values, numbers.
    """
    assert buckets >= 1
    if len(frame) <= 2 * buckets:
        return frame
    steps = frame["step"].to_numpy()
    width = int(steps[-1] - steps[0]) + 1
    # Rounded up (by `- -`), so that step s is in bucket (s - first) * buckets // width.
    return _extremes(frame, steps[0] - -np.arange(buckets) * width // buckets, value)


def extremes(frame: polars.DataFrame, width: int, value: str = "loss") -> polars.DataFrame:
    """Return the rows that `reduce` keeps, with buckets of steps 1 to `width`, and so on."""
    return _extremes(frame, np.arange(1, frame["step"].item(-1) + 1, width), value)


def _extremes(frame: polars.DataFrame, begins: NDArray[np.int64], value: str) -> polars.DataFrame:
    """Return the rows to keep of a frame in buckets that begin at these steps.

    A frame of up to two rows for each bucket is returned unchanged.
    """
    # A bucket without rows, such as steps without a measurement, begins where the next one does.
    starts = np.unique(np.searchsorted(frame["step"].to_numpy(), begins))
    if len(frame) <= 2 * len(starts):
        return frame
    values = frame[value].to_numpy()
    # The ends hold the axes in place, whatever their values.
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


class Sparkline(NamedTuple):
    """A small picture of the loss for SVG.

    path: of the finite losses; dot: x and y of the last of them, or None if there is none;
    marks: x of losses that are not finite; is_log: whether the axis is logarithmic.
    """

    path: str
    dot: tuple[float, float] | None
    marks: list[float]
    is_log: bool
    width: int = WIDTH
    height: int = HEIGHT


def sparkline(losses: polars.DataFrame) -> Sparkline:
    """Return the picture of the losses (step, loss; in order), one point or two to a pixel."""
    points = reduce(losses, WIDTH // 2)
    steps = points["step"].to_numpy().astype(np.float64)
    values = points["loss"].to_numpy().astype(np.float64)
    finite = np.isfinite(values)
    shown = values[finite]
    is_log = bool(len(shown) and shown.min() > 0 and shown.max() >= DECADES * shown.min())
    x = _scaled(steps, MARGIN, WIDTH - MARGIN)
    y = _scaled(np.log10(shown) if is_log else shown, HEIGHT - MARGIN, MARGIN)
    pairs = list(zip(x[finite].tolist(), y.tolist(), strict=True))
    # A loss that is not finite breaks the line.
    starts = np.diff(np.flatnonzero(finite), prepend=-2) > 1
    path = "".join(
        f"{'M' if is_start else 'L'}{px:.1f} {py:.1f}"
        for is_start, (px, py) in zip(starts.tolist(), pairs, strict=True)
    )
    return Sparkline(path, pairs[-1] if pairs else None, x[~finite].tolist(), is_log)


def _scaled(values: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    """Return values with their smallest at `low` and their largest at `high`."""
    if not len(values):
        return values
    smallest, largest = values.min(), values.max()
    if smallest == largest:
        return np.full_like(values, (low + high) / 2)
    scaled: NDArray[np.float64] = np.interp(values, [smallest, largest], [low, high])
    return scaled
