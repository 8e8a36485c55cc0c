"""Output for the terminal: quiet, aligned, in the order of the chapter."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from everystep.recording.facts import (
    Facts,
    ForkFacts,
    FunctionFacts,
    ResumeFacts,
    TrainingFacts,
)
from everystep.recording.run import RecordedRun
from everystep.recording.texts import (
    loss_text,
    model_text,
    optimizers_text,
    schedule_text,
    shortest,
)

__all__ = [
    "closing",
    "engine_text",
    "header",
    "header_rows",
    "json_number",
    "losses_text",
    "number",
    "shortest",
    "shortest_name",
]

_LABEL_WIDTH = 8


def number(value: float | None) -> str:
    """Return a number in four significant digits, as every view shows it."""
    return "" if value is None else f"{value:.4g}"


def header(facts: Facts) -> str:
    """Return what a run is, in the chapter's order, as text."""
    return "\n".join(_labelled(label, text) for label, text in header_rows(facts))


def header_rows(facts: Facts) -> list[tuple[str, str]]:
    """Return what a run is as (label, text), in the chapter's order: device, data, model, loss, update.

    Raises:
        RunError: the run does not say how it was trained.
    """
    training = facts.training
    numerics = training.numerics
    threads = f"{numerics.threads} thread{'s' if numerics.threads != 1 else ''}"
    return [
        ("device", f"{training.device} ({numerics.processor}, {threads})"),
        ("data", _data_text(training)),
        ("model", f"{model_text(training.modules)}\n{training.parameters:,} parameters"),
        ("loss", loss_text(training.loss)),
        ("update", _update_text(training)),
        ("steps", _steps_text(facts.steps or 0, training)),
        *([("fork of", _fork_text(facts.fork))] if facts.fork else []),
        *([("resumed", _resumed_text(facts.resumed))] if facts.resumed else []),
    ]


def closing(directory: Path, reason: str | None) -> str:
    """Return the final message of a training: how it ended, where the run is, what to type next."""
    run = RecordedRun(directory)
    summary = run.summary()
    facts = run.facts
    seconds = "" if facts.seconds is None else f" in {facts.seconds:.3g} s"
    lines = [] if reason is None else [f"stopped: {reason}", ""]
    measured = "".join(
        f", {name} {number(value)}" for name, value in _latest_measurements(run).items() if name != "lr"
    )
    has_loss = summary.first_loss is not None
    loss = f", loss {number(summary.first_loss)} to {number(summary.last_loss)}" if has_loss else ""
    taken = _counted(summary.steps, "step")
    if summary.parent is not None:
        at = summary.parent[1]
        taken = f"{_counted(summary.steps - at, 'step')} after the parent's {at:,},"
    lines.append(f"{taken}{seconds}{loss}{measured}")
    lines.append(engine_text(facts) if summary.steps else "only the initial state, state 0, is recorded")
    lines.append(f"recorded in {directory}")
    argument = shlex.quote(shortest_name(directory))
    lines += [
        "",
        "next:",
        f"  everystep view {argument}",
    ]
    if summary.steps:
        lines += [
            f"  everystep step {argument} {summary.steps}",
            f"  everystep table {argument} -o losses.html",
            f"  everystep plot {argument} -o loss.png",
            f"  everystep report {argument} -o report.html",
        ]
    else:
        lines.append(f"  everystep fork {argument} --at 0 --steps 500")
    return "\n".join(lines)


def engine_text(facts: Facts) -> str:
    """Return how the steps of a run ran, and what backs that."""
    loop, engine = facts.training.loop, facts.training.engine
    if loop is not None:
        lost = facts.batches_lost_to
        missing = (
            f"; the batches of steps up to {lost:,} were dropped to stay within the budget"
            if lost
            else ""
        )
        kept = f"its operations are in {_counted(loop.programs, 'program')}{missing}"
        if loop.function is None:
            return f"by your own loop; {kept}"
        return f"by your own step; {kept}; {_function_text(loop.function, facts.steps or 0)}"
    if engine is None:
        return "by Python"
    if engine.eager_from == 1 or (engine.eager_from is not None and not engine.programs):
        return f"by Python: {engine.reason}"
    if engine.stands_behind == "alone":
        return "by program alone, without the objects that trained it; not checked against Python"
    checks = (
        f"checked against Python {_counted(engine.checks, 'time')}, last at step {engine.verified_to:,}"
    )
    vouched = ', which you vouched for (engine="program")' if engine.stands_behind == "vouched" else ""
    found = f"by program{vouched}; {checks}"
    if engine.eager_from is None:
        return found
    return f"{found}; by Python from step {engine.eager_from:,}: {engine.reason}"


def _function_text(function: FunctionFacts, steps: int) -> str:
    """Return how the steps of a vouched step function ran."""
    if not function.by_program:
        reason = f": {function.reason}" if function.reason else ""
        return f"Python ran every step, although you vouched for them{reason}"
    since = f" after step {function.after:,}" if function.after else ""
    return (
        f'a program, which you vouched for (engine="program"), ran {function.by_program:,} of '
        f"{steps - function.after:,} steps{since}, checked against Python "
        f"{_counted(function.checks, 'time')}, last at step {function.verified_to:,}"
    )


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def losses_text(table: Mapping[str, Any], style: Literal["plain", "json"]) -> str:
    """Return a table of losses and measurements as text, every number in full precision.

    table: `RecordedRun.table_columns`.
    """
    columns = {name: c if isinstance(c, list) else c.tolist() for name, c in table.items()}
    if style == "json":
        values = [[json_number(value) for value in column] for column in columns.values()]
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


def _fork_text(fork: ForkFacts) -> str:
    changed = ", ".join(f"{path} = {value}" for path, value in fork.changed.items())
    return f"{fork.parent}, with its steps up to {fork.at:,}" + (
        f"; from there on {changed}" if changed else ""
    )


def _resumed_text(resumed: Sequence[ResumeFacts]) -> str:
    newest = resumed[-1]
    times = f" (the last of {len(resumed)} times)" if len(resumed) > 1 else ""
    began = newest.began.astimezone().strftime("%Y-%m-%d %H:%M")
    lines = [f"after step {newest.at:,}, {began}{times}"]
    return "\n".join(lines + [f"changed: {each}" for each in newest.changed])


def _labelled(label: str, text: str) -> str:
    first, *rest = text.splitlines() or [""]
    indent = " " * _LABEL_WIDTH
    return "\n".join([f"{label:<{_LABEL_WIDTH}}{first}", *(indent + line for line in rest)])


def _data_text(training: TrainingFacts) -> str:
    if training.loop is not None:
        return "the batches of your own loop"
    data = training.data
    what = data.name or Path(data.path or data.source).name
    shapes = f"{data.rows} rows" if data.x is None else f"x {data.x}, y {data.y}"
    kept_out = data.validation_rows
    return f"{what}: {shapes}" + (f"; {kept_out} rows for validation" if kept_out else "")


def _update_text(training: TrainingFacts) -> str:
    limit, schedule = training.clip_norm, schedule_text(training.schedules)
    clipping = [] if limit is None else [f"gradients clipped to norm {limit:g}"]
    following = [schedule] if schedule else []
    return "\n".join([*clipping, optimizers_text(training.optimizers), *following])


def _steps_text(steps: int, training: TrainingFacts) -> str:
    batches = training.batches
    if training.loop is not None or not steps:
        return f"{steps:,}"
    if batches.batch_size is None:
        return f"{steps:,}, each with all {training.data.rows:,} rows"
    return f"{steps:,}, {batches.batch_size} rows each, {batches.steps_per_epoch:,} to an epoch"


def json_number(value: float | None) -> float | int | str | None:
    """Return what JSON can hold: it has no nan and no infinity."""
    return str(value) if value is not None and not math.isfinite(value) else value


def _latest_measurements(run: RecordedRun) -> dict[str, float]:
    later = run.facts.measured
    return {name: value for name, value in run.latest_measurements.items() if name not in later}


def shortest_name(directory: Path) -> str:
    """Return what a user need type: the bare name of a run in runs/."""
    return directory.name if directory.parent == Path("runs") else str(directory)
