"""The batch of a step in the terminal: its rows, tensors, classes and other values."""

from __future__ import annotations

from itertools import islice
from typing import Any

from everystep.recording.facts import TrainingFacts
from everystep.replay.step import Step
from everystep.views.batch import MOST_VALUES, classes_text, other_values, targets
from everystep.views.lines import Page

__all__ = ["write_batch"]

_ROWS_SHOWN = 3
_INDENT = 2


def write_batch(page: Page, step: Step, training: TrainingFacts, classes: list[str] | None) -> None:
    """Write the batch of a step; where values are asked for, all of it.

    classes: the names of the classes, if the data has such.
    """
    page.heading("batch", _rows_text(step, training, whole=page.values))
    page.tensors(step.batch.tensors)
    if counts := classes_text(step.batch, classes):
        page.wrapped(f"classes of y: {counts}", "", indent=_INDENT)
    if page.values and counts and (names := targets(step.batch, classes)):
        page.wrapped(f"row by row: {', '.join(names)}", "", indent=2 * _INDENT)
    _write_other_values(page, step.batch.nested)


def _rows_text(step: Step, training: TrainingFacts, *, whole: bool) -> str:
    rows, total = step.batch.rows, training.data.rows
    if training.loop is not None:
        return "" if step.batch.tensors else "no tensors"
    if rows is None:
        return f"all {total:,} rows, in order"
    whole_text = "" if step.batch.source == "the data" else f" of {step.batch.source}"
    shown = rows.tolist() if whole else rows[:_ROWS_SHOWN].tolist()
    more = ", ..." if len(shown) < len(rows) else ""
    return f"rows {', '.join(map(str, shown))}{more}{whole_text} ({len(rows):,} of {total:,})"


def _write_other_values(page: Page, nested: Any) -> None:
    """List what the batch holds besides tensors, each in a line."""
    given = dict(islice(other_values(nested), MOST_VALUES))
    label = max(map(len, given), default=0)
    for name, value in given.items():
        items = value if isinstance(value, list) else [value]
        texts = ", ".join(repr(item) if isinstance(item, str) else str(item) for item in items)
        count = f" ({len(items):,})" if isinstance(value, list) else ""
        line = f"{name:<{label}}  {texts}"
        width = page.width - _INDENT - len(count)
        if page.values:
            page.wrapped(line + count, "", indent=_INDENT)
        else:
            cut = line if len(line) <= width else f"{line[: width - 1]}…"
            page.line((cut + count, ""), indent=_INDENT)
