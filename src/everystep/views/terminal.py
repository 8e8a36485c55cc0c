"""What the terminal shows: quiet, aligned, in the order of the chapter."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from everystep.recording.run import RecordedRun, Summary

if TYPE_CHECKING:
    import polars

__all__ = [
    "Silent",
    "TerminalProgress",
    "closing",
    "engine_text",
    "header",
    "losses_text",
    "number",
    "runs_json",
    "runs_table",
    "shortest",
]

_LABEL_WIDTH = 8


def number(value: float | None) -> str:
    """Return a number in four significant digits, as every view shows it."""
    return "" if value is None else f"{value:.4g}"


def header(facts: dict[str, Any]) -> str:
    """Return what a run is, in the chapter's order: device, data, model, loss, update."""
    numerics = facts["numerics"]
    threads = f"{numerics['threads']} thread{'s' if numerics['threads'] != 1 else ''}"
    lines = [
        ("device", f"{facts['device']} ({numerics['processor']}, {threads})"),
        ("data", _data_text(facts)),
        ("model", facts["model"]["text"]),
        ("", f"{facts['model']['parameters']:,} parameters"),
        ("loss", facts["loss"]["text"]),
        ("update", _update_text(facts)),
        ("steps", _steps_text(facts)),
    ]
    return "\n".join(_labelled(label, text) for label, text in lines)


class Silent:
    """Watches a training without a word, but for what the user should know."""

    def reading(self, done: int, total: int) -> None:
        """Say nothing."""

    def begin(self, directory: Path, facts: dict[str, Any]) -> None:
        """Say nothing."""

    def advance(self, first_step: int, losses: Sequence[float]) -> None:
        """Say nothing."""

    def notice(self, message: str) -> None:
        """Tell the user on stderr."""
        print(f"everystep: {message}", file=sys.stderr)

    def end(self) -> None:
        """Say nothing."""


class TerminalProgress(Silent):
    """Watches a training: the header, then a bar; lines of `step<TAB>loss` where piped.

    Data goes to stdout, everything else to stderr.
    """

    def __init__(self, *, show_header: bool, lines: TextIO | None) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._show_header = show_header
        self._lines = lines
        self._bar: Progress | None = None
        self._dtype = "float32"

    def reading(self, done: int, total: int) -> None:
        """Show how much of a Dataset has been read."""
        if self._bar is None:
            self._start("reading", total, "[dim]rows")
        self._update(done)
        if done >= total:
            self.end()

    def begin(self, directory: Path, facts: dict[str, Any]) -> None:
        """Show the header and start the bar."""
        if self._show_header:
            self._console.print(header(facts), markup=False)
            self._console.print()
        self._start("training", facts["steps"], "")

    def advance(self, first_step: int, losses: Sequence[float]) -> None:
        """Move the bar; write the lines."""
        if self._lines is not None:
            text = "".join(f"{step}\t{shortest(loss)}\n" for step, loss in enumerate(losses, first_step))
            try:
                self._lines.write(text)
                self._lines.flush()
            except BrokenPipeError:  # whoever read them has gone (`| head`); the training goes on
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._lines.fileno())
                self._lines = None
        self._update(first_step + len(losses) - 1, f"loss {number(losses[-1])}")

    def notice(self, message: str) -> None:
        """Tell the user, above the bar."""
        self._console.print(Text(f"everystep: {message}", style="yellow"))

    def end(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _start(self, what: str, total: int, text: str) -> None:
        if not (self._console.is_terminal or self._console.is_jupyter):
            return
        self._bar = Progress(
            TextColumn("{task.description:<8}"),
            BarColumn(bar_width=32),
            TextColumn("{task.completed:>{task.fields[width]}}/{task.total}"),
            TextColumn("{task.fields[text]:<14}"),
            _Speed(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self._console,
        )
        self._bar.add_task(what, total=total, text=text, width=len(str(total)))
        self._bar.start()

    def _update(self, completed: int, text: str | None = None) -> None:
        if self._bar is not None:
            fields = {} if text is None else {"text": text}
            self._bar.update(self._bar.task_ids[0], completed=completed, **fields)  # type: ignore[arg-type]


class _Speed(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        """Return the speed, or nothing before there is one."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f}/s" if speed else "", style="dim")


def closing(directory: Path, reason: str | None) -> str:
    """Return the last words of a training: how it ended, where the run is, what to type next."""
    run = RecordedRun(directory)
    summary = run.summary()
    seconds = run.facts.get("seconds", math.nan)
    lines = [] if reason is None else [f"stopped {reason}", ""]
    measured = "".join(
        f", {name} {number(value)}" for name, value in _latest_measurements(run).items() if name != "lr"
    )
    loss = f", loss {number(summary.first_loss)} to {number(summary.last_loss)}" if summary.steps else ""
    lines.append(f"{summary.steps:,} steps in {seconds:.3g} s{loss}{measured}")
    lines.append(engine_text(run.facts))
    lines.append(f"recorded in {directory}")
    argument = shlex.quote(_shortest_name(directory))
    lines += [
        "",
        "next:",
        f"  everystep losses {argument} --last 5",
        f"  everystep table {argument} -o losses.html",
        f"  everystep plot {argument} -o loss.png",
        f"  everystep report {argument} -o report.html",
    ]
    return "\n".join(lines)


def engine_text(facts: dict[str, Any]) -> str:
    """Return how the steps of a run were taken: by program, how often that was checked, or eagerly."""
    engine = facts.get("engine")
    if not isinstance(engine, dict):
        return "taken eagerly"
    eager_from, reason = engine["eager_from"], engine["reason"]
    folded = "folded program" if engine["folded"] else "program"
    by_program = (
        f"by {folded}, checked against the eager step {engine['checks']:,} times, "
        f"last at step {engine['verified_to']:,}"
    )
    if eager_from is None:
        return by_program
    eagerly = f"taken eagerly: {reason}"
    return eagerly if eager_from == 1 else f"{by_program}; from step {eager_from:,} {eagerly}"


def losses_text(frame: polars.DataFrame, style: Literal["plain", "csv", "json"]) -> str:
    """Return a table of losses and measurements as text, every number in full precision."""
    if style == "csv":
        return frame.write_csv(null_value="")
    columns = {name: frame[name].to_list() for name in frame.columns}
    if style == "json":
        values = [[_json_number(value) for value in column] for column in columns.values()]
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]
        return json.dumps(rows, indent=1) + "\n"
    cells = [
        [name, *("-" if v is None else str(v) if name == "step" else shortest(v) for v in column)]
        for name, column in columns.items()
    ]
    widths = [max(map(len, column)) for column in cells]
    rows_of_cells = zip(*cells, strict=True)
    return "".join(
        "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) + "\n"
        for row in rows_of_cells
    )


def runs_json(runs: Iterable[Summary]) -> str:
    """Return the runs as a JSON array."""
    return json.dumps(
        [
            {
                "name": run.name,
                "directory": str(run.directory),
                "status": run.status,
                "steps": run.steps,
                "planned_steps": run.planned,
                "first_loss": _json_number(run.first_loss),
                "last_loss": _json_number(run.last_loss),
                "started": run.started.isoformat(),
            }
            for run in runs
        ],
        indent=1,
    )


def shortest(loss: float) -> str:
    """Return the fewest digits that give this float32 (or else float64) back."""
    import numpy as np

    with np.errstate(over="ignore"):
        single = np.float32(loss)
    return str(single) if float(single) == loss or loss != loss else repr(loss)


def runs_table(runs: Iterable[Summary]) -> Table:
    """Return the runs as a table: name, status, steps, first and last loss, when."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("run")
    table.add_column("status")
    for heading in ("steps", "first loss", "last loss"):
        table.add_column(heading, justify="right")
    table.add_column("started")
    for run in runs:
        steps = str(run.steps) if run.steps == run.planned else f"{run.steps}/{run.planned}"
        style = {"finished": "", "running": "green"}.get(run.status, "yellow")
        table.add_row(
            Text(run.name),
            Text(run.status, style=style),
            steps,
            number(run.first_loss),
            number(run.last_loss),
            f"{run.started.astimezone():%Y-%m-%d %H:%M}",
        )
    return table


def _labelled(label: str, text: str) -> str:
    first, *rest = text.splitlines() or [""]
    indent = " " * _LABEL_WIDTH
    return "\n".join([f"{label:<{_LABEL_WIDTH}}{first}", *(indent + line for line in rest)])


def _data_text(facts: dict[str, Any]) -> str:
    data = facts["data"]
    what = data.get("name") or Path(data.get("path", data["source"])).name
    shapes = f"x {_shape(data['x'])}, y {_shape(data['y'])}" if "x" in data else f"{data['rows']} rows"
    kept_out = data.get("validation_rows")
    return f"{what}: {shapes}" + (f"; {kept_out} rows for validation" if kept_out else "")


def _update_text(facts: dict[str, Any]) -> str:
    parts = [facts["optimizer"]["text"]]
    if facts["clip_norm"] is not None:
        parts.insert(0, f"gradients clipped to norm {facts['clip_norm']:g}")
    if facts["schedule"]:
        parts.append(facts["schedule"])
    return "\n".join(parts)


def _steps_text(facts: dict[str, Any]) -> str:
    batches = facts["batches"]
    if batches["batch_size"] is None:
        return f"{facts['steps']:,}, each with all {facts['data']['rows']:,} rows"
    return (
        f"{facts['steps']:,}, {batches['batch_size']} rows each, "
        f"{batches['steps_per_epoch']:,} to an epoch"
    )


def _shape(sizes: list[int]) -> str:
    return str(tuple(sizes))


def _json_number(value: float | None) -> float | int | str | None:
    """Return what JSON can hold: it has no nan and no infinity."""
    return str(value) if value is not None and not math.isfinite(value) else value


def _latest_measurements(run: RecordedRun) -> dict[str, float]:
    return {name: value for name, _, value in run.measurements.iter_rows()}


def _shortest_name(directory: Path) -> str:
    """Return what a user need type: the bare name of a run in runs/."""
    return directory.name if directory.parent == Path("runs") else str(directory)
