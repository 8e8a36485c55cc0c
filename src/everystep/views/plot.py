"""The loss as the chapter plots it: points of loss against iteration, by plotnine's ggplot."""

from __future__ import annotations

import io
import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
import pandas as pd
import plotnine as p9
import polars as pl

from everystep.errors import UsageError, did_you_mean
from everystep.recording.recorded_run import RecordedRun
from everystep.views.output_file import write_file
from everystep.views.reduction import curve_of, reduce

__all__ = ["curves_plot", "loss_plot", "save_plot", "sweep_plot"]

#: For a series of more than MOST points: the number of evenly spaced points to draw, and of buckets with
#: their extremes, which alone would look like two bands.
MOST, SPREAD, BUCKETS = 6000, 4000, 1000
#: More marks than this look the same.
MARKS = 1000
#: Of one run: ink for the loss, and colours for measurements. Of several: colours for each run. They
#: are used again where there are more.
INK = "#1c1d20"
ALARM = "#b3261e"
COLOURS = ["#2a5db0", "#c2570c", "#1a7a5a", "#8a4bc4", "#a83264", "#6b6f78", "#8a6d0a", "#0b7f93"]
LINES = ["solid", "dashed", "dotted", "dashdot"]
SUFFIXES = (".png", ".svg", ".pdf")
DOTS_PER_INCH = 150
#: Lines of the caption about the runs of a sweep, and characters of a line.
MOST_NOTES = 4
_CAPTION_WIDTH = 120


def loss_plot(
    runs: Sequence[RecordedRun], log: bool = False, measurements: Sequence[str] = ()
) -> p9.ggplot:
    """Return the losses of one run or several as points, and measurements as lines.

    For a long run, it draws a few thousand points, among them the extremes of every stretch.
    Losses that are not finite are marked at the bottom, and counted in the caption.

    Colors distinguish several runs, and the ranks of one, which are all drawn. A run that is there twice
    is drawn once, one without a measurement without it. A log axis omits values that are not positive,
    with a note in the caption.

    Raises:
        UsageError: one is not a run, or none of them has a measurement.
    """
    if wrong := [run for run in runs if not isinstance(run, RecordedRun)]:
        raise UsageError(f"expected runs to draw, not {wrong[0]!r:.80}")
    # By directory, since a run may be named twice, by different paths.
    runs = [*{rank.directory.resolve(): rank for run in runs for rank in run.shown_ranks}.values()]
    count = Counter(run.name for run in runs)
    # Runs of two directories may have one name; curves of one name would be one curve.
    names = [_plain(run.name if count[run.name] == 1 else str(run.directory)) for run in runs]
    curves = dict(zip(names, map(curve_of, runs), strict=True))
    damage = [_plain("\n".join(wrap(run.damage, _CAPTION_WIDTH))) for run in runs if run.damage]
    return _plot(curves, runs, measurements, log, damage)


def curves_plot(curves: Mapping[str, pl.DataFrame], log: bool = False) -> p9.ggplot:
    """Return several losses over each other as points, by name: columns step and loss.

    log: as in `loss_plot`.
    """
    return _plot({_plain(name): frame for name, frame in curves.items()}, (), (), log, [])


def sweep_plot(
    runs: Sequence[RecordedRun], settings: Sequence[Mapping[str, Any]], log: bool = False
) -> p9.ggplot:
    """Return the losses of runs as lines, by their settings.

    Colors distinguish the values of the first setting that varies, panels those of the second, and
    seeds neither, unless nothing else varies.

    settings: of each run; log: as in `loss_plot`.

    Raises:
        UsageError: there are no runs.
    """
    if not runs:
        raise UsageError("nothing to plot; no run has begun")
    paths = dict.fromkeys(path for each in settings for path in each)
    # As text: settings may be lists, which no set can hold.
    varied = [path for path in paths if len({str(each.get(path)) for each in settings}) > 1]
    # Seeds last: they show the scatter within a setting.
    varied.sort(key=lambda path: path == "seed")
    colour, panel = [*varied, "", ""][:2]
    panel = "" if panel == "seed" else panel
    notes: list[str] = []
    lines = []
    for run, each in zip(runs, settings, strict=True):
        losses = _drawable(curve_of(run), run.name, "loss", log, notes)
        # Of all runs together, about as many as of one.
        line = _pandas(reduce(losses, max(BUCKETS // len(runs), 100)), run.name, "loss")
        texts = {name: _plain(str(each.get(name, ""))) for name in (colour, panel)}
        lines.append(line.assign(colour=texts[colour], panel=f"{panel} {texts[panel]}"))
    frame = pd.concat(lines)
    for name in ("colour", "panel"):  # in the order of the settings
        frame[name] = pd.Categorical(frame[name], [*dict.fromkeys(frame[name])])
    plot = p9.ggplot(frame, p9.aes("step", "value", colour="colour", group="run"))
    plot += p9.geom_line(size=0.5, alpha=0.8, show_legend=bool(colour))
    if panel:
        plot += p9.facet_wrap("panel")
    plot += p9.scale_colour_manual(COLOURS * len(runs))
    return plot + _finish(log, "loss", _plain(colour), notes[:MOST_NOTES])


def _plot(
    curves: Mapping[str, pl.DataFrame],
    runs: Sequence[RecordedRun],
    measurements: Sequence[str],
    log: bool,
    notes: list[str],
) -> p9.ggplot:
    """Return the plot of losses by name; runs: that have the measurements."""
    names = list(curves)
    measurements = [measurements] if isinstance(measurements, str) else measurements
    points, marks = [], []
    for name, curve in curves.items():
        drawn = _drawable(curve, name, "loss", log, notes)
        points.append(_pandas(_thinned(drawn, "loss"), name, "loss").dropna())
        wrong = curve.filter(~pl.col("loss").is_finite())
        # Rounded up, so that no more than MARKS are drawn.
        few = wrong.gather_every(max(1, -(-len(wrong) // MARKS)))
        marks.append(_pandas(few, name, "loss"))
    lines = _measured(runs, names, measurements, log, notes)
    frame, rug, several = pd.concat(points), pd.concat(marks), len(names) > 1
    dots = {"size": 1.4 if len(frame) <= MOST / 2 else 0.9, "stroke": 0}
    if several:  # colour distinguishes runs, or else measurements
        by = p9.aes(colour="run", linetype="measurement", group="run + measurement")
        layers = [p9.geom_point(p9.aes(colour="run"), **dots)]
    else:
        by, layers = p9.aes(colour="measurement"), [p9.geom_point(colour=INK, **dots)]
    if len(lines):
        layers.append(p9.geom_line(by, data=lines, size=0.7))
    if len(lines) and several:
        layers.append(p9.scale_linetype_manual(LINES * lines["measurement"].nunique()))
    elif len(lines):
        layers.append(p9.scale_colour_manual(COLOURS * len(measurements)))
    elif several:
        layers.append(p9.guides(colour=p9.guide_legend(override_aes={"size": 3})))
    if several:
        layers.append(p9.scale_colour_manual(COLOURS * len(names), breaks=names, limits=names))
    if len(rug):
        by = p9.aes(x="step")
        layers.append(p9.geom_rug(by, data=rug, inherit_aes=False, sides="b", colour=ALARM))
    others = [name for name in dict.fromkeys(measurements) if not name.endswith("loss")]
    # plotnine refuses a log axis without any point.
    log = log and any(len(each.dropna()) for each in [*points, lines])
    y = ", ".join(["loss", *map(_plain, others)])
    layers += _finish(log, y, "" if several else names[0], notes)
    return p9.ggplot(frame, p9.aes("step", "value")) + layers


def save_plot(plot: p9.ggplot, path: str | Path) -> None:
    """Write a plot as .png, .svg or .pdf, by the path's suffix.

    Raises:
        UsageError: the suffix is unknown, or the file cannot be written.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"{path}: plots are saved as {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    # In memory first, so that a failure leaves no half of a file.
    content = io.BytesIO()
    # A later plot may replace it: see `default_output`.
    mark = {"metadata": {"Software": "everystep"}} if suffix == ".png" else {}
    with _quiet():
        plot.save(content, format=suffix[1:], dpi=DOTS_PER_INCH, verbose=False, **mark)
    write_file(path, content.getvalue())


def _drawable(frame: pl.DataFrame, name: str, column: str, log: bool, notes: list[str]) -> pl.DataFrame:
    """Return values with NaN where nothing can be drawn, which notes count."""
    value = pl.col(column)
    wrong = frame.filter(~value.is_finite())
    if len(wrong):
        notes.append(
            f"{name}: the {column} is not finite at {len(wrong):,} of {len(frame):,} steps, "
            f"first {wrong[column].item(0)} at step {wrong['step'].item(0):,}"
        )
    is_low = value.is_finite() & (value <= 0) if log else pl.lit(False)
    if left_out := len(frame.filter(is_low)):
        what = "losses" if column == "loss" else "values"
        notes.append(f"{name}: the log axis omits {left_out:,} {what} of 0 or less")
    # Not left out: a line has a gap there. plotnine fails on a line of gaps alone.
    shown = frame.with_columns(pl.when(value.is_finite() & ~is_low).then(value).otherwise(math.nan))
    return shown if shown[column].is_not_nan().any() else shown.clear()


def _thinned(frame: pl.DataFrame, column: str) -> pl.DataFrame:
    if len(frame) <= MOST:
        return frame
    # Extremes so that no spike is lost, and evenly spaced points so that the density stays visible.
    extremes = reduce(frame, BUCKETS, value=column)
    spread = frame.gather_every(len(frame) // SPREAD)
    return pl.concat([extremes, spread]).unique("step").sort("step")


def _measured(
    runs: Sequence[RecordedRun],
    names: Sequence[str],
    measurements: Sequence[str],
    log: bool,
    notes: list[str],
) -> pd.DataFrame:
    if not measurements:
        return pd.DataFrame()
    frames = [run.measurements for run in runs]
    known = sorted(set(pl.concat(frame["name"] for frame in frames)))
    lines = []
    for wanted in dict.fromkeys(measurements):
        if wanted not in known:
            cure = did_you_mean(wanted, known) if known else "the runs recorded only losses"
            raise UsageError(f"no measurement {wanted!r}; {cure}")
        for run, frame, name in zip(runs, frames, names, strict=True):
            of_run = frame.filter(pl.col("name") == wanted)
            # A learning rate is recorded where it changes; a line from change to change would be a
            # slope.
            if run.facts.is_setting(wanted) and len(of_run):
                of_run = _held(of_run, run.newest_step())
            drawn = _drawable(of_run, f"{name}, {_plain(wanted)}", "value", log, notes)
            line = _pandas(_thinned(drawn, "value"), name, "value")
            lines.append(line.assign(measurement=_plain(wanted)))
    return pd.concat(lines)


def _held(frame: pl.DataFrame, last: int) -> pl.DataFrame:
    """Return a number that is recorded where it changes as a line: level up to the next change."""
    ends = pl.concat([frame["step"][1:] - 1, pl.Series([last])])
    levels = pl.DataFrame({"step": ends, "value": frame["value"]})
    both = pl.concat([frame.select("step", "value"), levels])
    return both.unique("step", keep="first", maintain_order=True).sort("step")


def _pandas(frame: pl.DataFrame, name: str, column: str) -> pd.DataFrame:
    values = {"step": frame["step"].to_numpy(), "value": frame[column].to_numpy().astype(np.float64)}
    return pd.DataFrame(values).assign(run=name)


def _finish(log: bool, y: str, title: str, notes: Sequence[str]) -> list[Any]:
    """Return axes and labels, and a quiet look: white, thin lines, text lighter than the points."""
    quiet = p9.element_text(colour="#5c6068")
    look = p9.theme(
        figure_size=(8, 5),
        plot_margin=0.02,
        plot_background=p9.element_rect(fill="white", colour="white"),
        plot_title=p9.element_text(colour=INK, size=13, ha="left"),
        plot_caption=p9.element_text(colour="#5c6068", size=8, ha="left"),
        axis_text=quiet,
        axis_title=quiet,
        legend_title=p9.element_blank(),
        panel_grid_minor=p9.element_blank(),
        panel_grid_major=p9.element_line(colour="#e3e4e8", size=0.5),
    )
    return [
        *([p9.scale_y_log10(minor_breaks=False)] if log else []),
        p9.scale_x_continuous(labels=_thousands),
        p9.labs(x="iteration", y=y, title=title, caption="\n".join(notes)),
        p9.theme_minimal(base_size=11) + look,
    ]


def _plain(text: str) -> str:
    """Return text that matplotlib draws literally: a dollar sign would start a formula."""
    return text.replace("$", r"\$")


def _thousands(ticks: Sequence[float]) -> list[str]:
    return [f"{tick:,.0f}" if tick == round(tick) else f"{tick:g}" for tick in ticks]


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide warnings of plotnine and matplotlib from the user: the caption reports what matters."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)
