"""The rows of a step's batch, ranked: as text and as plain data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from torch import Tensor

from everystep.answers.rows import Rows, Share
from everystep.errors import RunError, UsageError, named
from everystep.ops.labels import Reason
from everystep.program.operation import CodeLine
from everystep.recording.facts import Facts
from everystep.replay.opened_step import Step
from everystep.views.batch_text import about_columns, class_names, columns_of, targets
from everystep.views.formatting import about_numbers, number
from everystep.views.plain import plain_data
from everystep.views.terminal import keyed, table_text

__all__ = ["orders_of", "rows_data", "rows_text"]


class RowMeasure(NamedTuple):
    """A number of each row: a column of the terminal, of JSON and of the page."""

    key: str
    header: str
    is_share: bool = False

    def text(self, value: float) -> str:
        """Return the text of a cell; decimals align percentages."""
        return f"{100 * value:.1f}%" if self.is_share else number(value)


MEASURES = (
    RowMeasure("loss", "loss"),
    RowMeasure("gradient", "gradient"),
    RowMeasure("share", "of the norm", is_share=True),
)
#: What rows are ranked by.
ORDERS = ("loss", "gradient")
#: Columns of each row other than its numbers.
MOST_COLUMNS = 40


def orders_of(rows: Rows, by: str | None = None, parameter: str | None = None) -> dict[str, list[int]]:
    """Return the places of rows in the batch in each order that is known, by what ranks them.

    by: only `loss`, or only `gradient`; default: both, or the gradient if a parameter is named.

    Raises:
        UsageError: there is no such order, or no such parameter.
    """
    if by not in (None, *ORDERS):
        raise UsageError(f"rows are ranked by loss or by gradient, not by {by!r:.80}")
    known = _numbers(rows, parameter)
    wanted = [by] if by else ["gradient"] if parameter else ORDERS
    return {name: rows.ranked(known[name]) for name in wanted if name in known}


def rows_text(
    step: Step,
    facts: Facts,
    *,
    name: str,
    by: str | None = None,
    parameter: str | None = None,
    first: int = 10,
) -> str:
    """Return the worst rows, a line for each, then the term of no row, and unknown ones.

    facts, name: of the run; by, parameter: see `orders_of`, the first is taken; first: how many rows.
    """
    title = f"{name}, step {step.number:,}: loss {number(step.loss)}"
    orders = orders_of(step.rows, by, parameter)
    # Neither loss nor gradient is known by row: the reasons are all there is.
    if not orders:
        return "\n".join([title, "", *about_rows(step, parameter)])
    order, places = next(iter(orders.items()))
    known, classes = _numbers(step.rows, parameter), targets(step.batch, class_names(facts))
    rows = []
    for place in places[:first]:
        row = {"row": str(step.rows.numbers[place]), "y": "" if classes is None else classes[place]}
        texts = {m.key: m.text(float(known[m.key][place])) for m in MEASURES if m.key in known}
        rows.append(row | texts)
    numbers = (keyed(each.key, each.header, is_number=True) for each in MEASURES)
    columns = [keyed("row", is_number=True), *numbers, keyed("y")]
    more = [f"{len(places) - first:,} more"] if len(places) > first else []
    table = table_text(columns, rows)
    return "\n".join([f"{title}, rows by {order}", "", *table, *more, "", *about_rows(step, parameter)])


def about_rows(step: Step, parameter: str | None = None) -> list[str]:
    """Return explanations of the numbers, and why some are unknown, in lines."""
    rows = step.rows
    lines = [about_numbers(rows.source)]
    share = rows.loss_share
    if isinstance(share, Share):
        what = "mean" if share.is_mean else "sum"
        lines.append(f"loss: the step's loss is the {what} of these" + _rest(share.rest))
    else:
        lines += [f"loss of each row: unknown; {share}", *_line_text(step, share)]
    names = [parameter] if parameter else list(rows.gradients)
    known = [name for name in names if isinstance(rows.gradients[name], Share)]
    if known:
        which = known[0] if parameter else f"{len(known)} of {len(names)} parameters"
        # The norm of all these gradients together.
        rest = math.hypot(*(each.rest for each in _shares(rows, known)))
        lines.append(
            f"gradient: 2-norm of the row's term in the gradient of {which}, before clipping"
            + _rest(rest)
        )
    # By reason: parameters often share one, and it is long.
    unknown: dict[Reason, list[str]] = {}
    for name in names:
        if not isinstance(reason := rows.gradients[name], Share):
            unknown.setdefault(reason, []).append(name)
    for reason, each in unknown.items():
        lines += [f"gradient of {named(each)}: unknown; {reason}", *_line_text(step, reason)]
    return lines


def _line(step: Step, reason: Reason) -> CodeLine | None:
    return None if reason.operation is None else step.operations[reason.operation].line


def _line_text(step: Step, reason: Reason) -> list[str]:
    line = _line(step, reason)
    return [] if line is None else [f"  {line}"]


def _rest(rest: float) -> str:
    return f", and of {number(rest)} from no row (a penalty, or earlier gradients)" if rest else ""


def rows_data(
    step: Step,
    facts: Facts,
    *,
    by: str | None = None,
    parameter: str | None = None,
    most: int | None = None,
) -> dict[str, Any]:
    """Return rows by their place in the batch, in each order that is known, as plain data.

    by, parameter: see `orders_of`; most: rows of each order; the rest is counted.
    """
    rows = step.rows
    orders = orders_of(rows, by, parameter)
    known = _numbers(rows, parameter)
    columns = columns_of(step.batch, facts, len(rows.numbers)) if orders else []
    shares = {name: each for name, each in rows.gradients.items() if parameter in (None, name)}
    about = [*about_rows(step, parameter), *(about_columns(facts) if columns else [])]
    more = len(columns) - MOST_COLUMNS
    if more > 0:
        about.append(f"columns: the first {MOST_COLUMNS}, and {more:,} more are not shown")

    data = {
        "step": step.number,
        "rows_of": rows.source or "the batch",
        "count": len(rows.numbers),
        "loss": step.loss,
        "orders": {name: order[:most] for name, order in orders.items()},
        "about": about,
        "measures": [each._asdict() for each in MEASURES if each.key in known],
        "columns": [
            {"name": name, "is_number": isinstance(values[0], float)}
            for name, values in columns[:MOST_COLUMNS]
        ],
        "gradients": {
            name: {"norm": each.whole, "rest": each.rest}
            if isinstance(each, Share)
            else {"unknown": str(each), "line": _line(step, each)}
            for name, each in shares.items()
        },
        "rows": {
            place: {
                "row": rows.numbers[place],
                **{
                    each.key: float(known[each.key][place]) if each.key in known else None
                    for each in MEASURES
                },
                "values": [values[place] for _, values in columns[:MOST_COLUMNS]],
                "gradients": {
                    name: float(each.norms[place])
                    for name, each in shares.items()
                    if isinstance(each, Share)
                },
            }
            # Rows of both orders, each once.
            for place in sorted({place for order in orders.values() for place in order[:most]})
        },
    }
    found: dict[str, Any] = plain_data(data)
    return found


def _numbers(rows: Rows, parameter: str | None) -> dict[str, Tensor]:
    """Return the known numbers that rows are ranked by (N).

    The loss of each row, the 2-norm of its term in the gradients with known rows, and the share of that
    in the norm of these gradients.
    """
    names = [parameter] if parameter else rows.known
    found: dict[str, Tensor] = {}
    with suppress(RunError):
        found["loss"] = rows.loss
    with suppress(RunError):
        found["gradient"] = rows.gradient_of(*names)
        # Of a gradient of 0, no row has a share.
        if whole := math.hypot(*(each.whole for each in _shares(rows, names))):
            found["share"] = found["gradient"] / whole
    return found


def _shares(rows: Rows, names: Sequence[str]) -> list[Share]:
    return [each for name in names if isinstance(each := rows.gradients[name], Share)]
