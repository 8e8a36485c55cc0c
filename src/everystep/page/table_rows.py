"""Which rows of the table of losses are shown, and in which order."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from everystep.errors import UsageError
from everystep.page.columns import MOST_COLUMNS, RunColumns
from everystep.views.loss_table import shortest_texts

__all__ = ["Wanted", "frame_of", "page_of", "rows_of", "wanted_of", "whole"]

#: Rows that a page may have.
LONGEST_PAGE = 10_000

Rows = NDArray[np.intp]
Absent = TypeVar("Absent", int, None)


@dataclass(frozen=True)
class Wanted:
    """A query: the order, the first and the last step, and the range of the loss."""

    sort: str = "step"
    descending: bool = False
    first: int | None = None
    last: int | None = None
    low: float | None = None
    high: float | None = None


def wanted_of(query: Mapping[str, str]) -> Wanted:
    """Read a query.

    query: `sort`, `direction`, `first` and `last` (steps), `low` and `high` (losses).

    Raises:
        UsageError: a part of it is invalid.
    """
    direction = query.get("direction") or "asc"
    if direction not in ("asc", "desc"):
        raise UsageError(f"direction must be asc or desc, not {direction!r}")
    low, high = (_bound(word, query.get(name, "")) for name, word in (("low", "from"), ("high", "to")))
    first, last = (whole(query, name, None) for name in ("first", "last"))
    return Wanted(query.get("sort") or "step", direction == "desc", first, last, low, high)


def rows_of(columns: RunColumns, wanted: Wanted) -> Rows:
    """Return the requested rows (step - 1), in order.

    NaN counts as larger than every number; blanks come last in both directions.

    Raises:
        UsageError: there is no column of that name.
    """
    if wanted.sort != "step" and wanted.sort not in columns.table:
        known = ", ".join(["step", *columns.table])
        raise UsageError(f"no column {wanted.sort!r} to sort by; the columns are {known}")
    found: Rows = columns.remembered(wanted, lambda: _filtered(columns, wanted))
    return found


def page_of(
    columns: RunColumns, wanted: Wanted, start: int, length: int, around: int | None
) -> dict[str, Any]:
    """Return a page of the table; `around`: the one on which that step is, if it is on any."""
    rows = rows_of(columns, wanted)
    length = max(1, min(length, LONGEST_PAGE))
    if around is not None:
        found = np.flatnonzero(rows == around - 1)
        start = int(found[0]) if len(found) else start
        # The page that has the step, as its buttons would reach it.
        start -= start % length
    # A filter may have left fewer pages than the browser remembers.
    last_page = (len(rows) - 1) // length * length if len(rows) else 0
    start = max(0, min(start, last_page))
    frame = frame_of(columns, rows[start : start + length])
    steps, *others = frame.get_columns()
    texts = [steps.to_list(), *map(shortest_texts, others)]
    return {
        "columns": frame.columns,
        "total": columns.steps,
        "filtered": len(rows),
        "start": start,
        "left_out": max(0, len(columns.ends) - MOST_COLUMNS),
        "rows": list(zip(*texts, strict=True)),
    }


def frame_of(columns: RunColumns, rows: Rows) -> pl.DataFrame:
    """Return rows as a table: step, loss if it is logged, and measurements; missing values are null."""
    steps = rows + 1
    return pl.DataFrame({"step": steps} | {each: columns.numbers(each, steps) for each in columns.table})


def _filtered(columns: RunColumns, wanted: Wanted) -> Rows:
    # Sorting a million rows takes longer than choosing among them: kept for each filter in turn.
    order: Rows = columns.remembered(
        (wanted.sort, wanted.descending), lambda: _order(columns, wanted.sort, wanted.descending)
    )
    is_wanted = np.ones(columns.steps, dtype=bool)
    if wanted.first is not None:
        # A negative first step would count from the end.
        is_wanted[: max(0, wanted.first - 1)] = False
    if wanted.last is not None:
        is_wanted[max(0, wanted.last) :] = False
    # A bound is compared in the loss's own precision: the text of a loss means that loss.
    precise = columns.losses.dtype.type
    with np.errstate(over="ignore"):
        if wanted.low is not None:
            is_wanted &= columns.losses >= precise(wanted.low)
        if wanted.high is not None:
            is_wanted &= columns.losses <= precise(wanted.high)
    return order if is_wanted.all() else order[is_wanted[order]]


def _order(columns: RunColumns, sort: str, descending: bool) -> Rows:
    """Return all rows in the order of a column, equal ones in order of their steps."""
    every = np.arange(columns.steps)
    if sort == "step":
        return every[::-1] if descending else every
    frame = pl.DataFrame({"row": every, "value": columns.numbers(sort, every + 1)})
    order = frame.sort("value", descending=descending, nulls_last=True, maintain_order=True)
    found: Rows = order["row"].to_numpy()
    return found


def whole(query: Mapping[str, str], name: str, absent: Absent) -> int | Absent:
    """Return an integer of a query. absent: what a blank one stands for.

    Raises:
        UsageError: it is not an integer.
    """
    plain = query.get(name, "").strip()
    if not plain:
        return absent
    # int() also takes 1_000 and other alphabets' digits; 18 digits fit 64 bits.
    if re.fullmatch(r"-?\d{1,18}", plain, re.ASCII) is None:
        raise UsageError(f"{name} {plain[:80]!r} is not a whole number")
    return int(plain)


def _bound(word: str, text: str) -> float | None:
    if not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    if np.isnan(value):
        raise UsageError(f"losses {word} {text[:80]!r}: not a number; write 0.25 or 1e-3")
    return value
