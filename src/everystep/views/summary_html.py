"""A run in a few lines for a notebook: the facts, and a small picture of the loss."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import polars
from numpy.typing import NDArray

from everystep.recording.recorded_run import RecordedRun
from everystep.views.facts_text import facts_in_order, state_data
from everystep.views.formatting import number
from everystep.views.loss_table import rendered
from everystep.views.reduction import reduce

__all__ = ["Sparkline", "sparkline", "summary_html"]

#: The picture's size in CSS pixels, and the room it leaves at its edges.
WIDTH, HEIGHT, MARGIN = 320, 72, 5
#: The loss is drawn on a log axis if its largest value is so many times its smallest.
DECADES = 100.0


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


def summary_html(run: RecordedRun) -> str:
    """Return a run as a small table of facts and a picture of the loss: a piece of HTML, no scripts."""
    facts, losses = run.facts, run.losses
    ends = [losses["loss"].item(0), losses["loss"].item(-1)] if len(losses) else []
    return rendered(
        "summary.html",
        name=run.name,
        damage=run.damage,
        **state_data(run, facts, run.status, len(losses)),
        ends=[(number(loss), str(loss)) for loss in ends],
        rows=facts_in_order(facts),
        line=sparkline(losses),
    )


def sparkline(losses: polars.DataFrame) -> Sparkline:
    """Return the picture of the losses, one point or two to a pixel.

    Args:
        losses: columns step and loss, in order of the steps.
    """
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
