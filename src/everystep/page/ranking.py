"""The rows of an opened step that make most of its loss and of its gradients, as plain data."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from everystep.recording.facts import Facts
from everystep.replay.step import Step
from everystep.views.batch_columns import about_columns, columns_of
from everystep.views.rows import ORDERS, about_rows, order_of, row_numbers

__all__ = ["ranking"]

#: Rows of each order that are shown, and columns of each row.
MOST, MOST_COLUMNS = 100, 40


def ranking(step: Step, facts: Facts) -> dict[str, Any]:
    """Return the worst rows of a step, by its place in the batch, in each order that is known.

    The rest is counted. NaN and infinities may be among the numbers.

    facts: of the run.
    """
    rows = step.rows
    orders = {by: found[1] for by in ORDERS if (found := order_of(rows, by)) is not None}
    loss, gradient, whole = row_numbers(rows)
    columns = columns_of(step.batch, facts, len(rows.numbers)) if orders else []
    shown = {place for order in orders.values() for place in order[:MOST]}
    return {
        "count": len(rows.numbers),
        "orders": {by: order[:MOST] for by, order in orders.items()},
        "about": [
            *about_rows(rows),
            *(about_columns(facts) if columns else []),
            *_left_out(len(columns)),
        ],
        "columns": [
            {"name": name, "is_number": isinstance(values[0], float)}
            for name, values in columns[:MOST_COLUMNS]
        ],
        "rows": {
            place: {
                "row": rows.numbers[place],
                "loss": _number(loss, place),
                "gradient": _number(gradient, place),
                "share": _number(None if gradient is None or not whole else gradient / whole, place),
                "values": [values[place] for _, values in columns[:MOST_COLUMNS]],
            }
            for place in sorted(shown)
        },
    }


def _number(numbers: Tensor | None, place: int) -> float | None:
    return None if numbers is None else float(numbers[place])


def _left_out(columns: int) -> list[str]:
    more = columns - MOST_COLUMNS
    return [f"columns: the first {MOST_COLUMNS}, and {more:,} more are not shown"] if more > 0 else []
