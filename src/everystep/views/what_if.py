"""Trainings without some rows: as text and as plain data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from everystep.views.batch import about_numbers
from everystep.views.terminal import number

if TYPE_CHECKING:
    from everystep.replay.what_if import WhatIf

__all__ = ["what_if_data", "what_if_text"]

#: Rows that are named before the rest is counted.
_NAMED = 8


def what_if_text(found: WhatIf) -> str:
    """Return what became of a number at the last step, a line for each training, the smallest first."""
    with_all = found.recorded.value
    rows = [("rows left out", found.by, "change"), ("none", _text(with_all), "")]
    rows += [
        (_rows_text(case.rows), _text(case.value), _change(with_all, case.value)) for case in found.cases
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    title = f"{found.name}, trained again from state {found.at:,}: {found.by} at step {found.until:,}"
    lines = [
        f"{left:<{widths[0]}}  {value:>{widths[1]}}  {change:>{widths[2]}}".rstrip()
        for left, value, change in rows
    ]
    return "\n".join([title, "", *lines, "", about_numbers(found.source)])


def what_if_data(found: WhatIf) -> dict[str, Any]:
    """Return the same as plain data."""
    return {
        "run": found.name,
        "at": found.at,
        "until": found.until,
        "by": found.by,
        "rows_of": found.source,
        "recorded": {"value": found.recorded.value, "losses": list(found.recorded.losses)},
        "cases": [
            {"rows": list(case.rows), "value": case.value, "losses": list(case.losses)}
            for case in found.cases
        ],
    }


def _rows_text(rows: tuple[int, ...]) -> str:
    more = f" and {len(rows) - _NAMED:,} more" if len(rows) > _NAMED else ""
    return ", ".join(map(str, rows[:_NAMED])) + more


def _text(value: float | None) -> str:
    return "-" if value is None else number(value)


def _change(with_all: float | None, value: float | None) -> str:
    if with_all is None or value is None:
        return "-"
    return f"{value - with_all:+.4g}"
