"""The rows of a step's batch, ranked: as text and as plain data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from everystep.errors import RunError, UsageError, did_you_mean
from everystep.views.batch import about_columns, class_names, columns_of, targets
from everystep.views.plain import plain_data
from everystep.views.tables import Column, table_text
from everystep.views.texts import about_numbers, named, number

if TYPE_CHECKING:
    from torch import Tensor

    from everystep.answers.rows import Rows, Share
    from everystep.recording.facts import Facts
    from everystep.replay.step import Step

__all__ = ["order_of", "rows_data", "rows_text"]

#: What rows are ranked by.
ORDERS = ("loss", "gradient")
_FIRST = 10
#: Columns of each row besides its numbers.
MOST_COLUMNS = 40


class RowNumbers(NamedTuple):
    """What rows are ranked by: the loss of each, and the 2-norm of its term in the gradients (N).

    None where that is unknown; whole: the 2-norm of the gradients themselves.
    """

    loss: Tensor | None
    gradient: Tensor | None
    whole: float


def order_of(
    rows: Rows, by: str | None = None, parameter: str | None = None
) -> tuple[str, list[int]] | None:
    """Return what rows are ranked by, and their places in the batch; None if that is unknown.

    by: `loss` or `gradient`; default: the loss, unless it is unknown or a parameter is named.

    Raises:
        UsageError: there is no such order, or no such parameter.
    """
    if by not in (None, *ORDERS):
        raise UsageError(f"rows are ranked by loss or by gradient, not by {by!r:.80}")
    if parameter is not None and parameter not in rows.gradients:
        cure = did_you_mean(parameter, list(rows.gradients))
        raise UsageError(f"step {rows.step} has no gradient of {parameter!r:.80}; {cure}")
    numbers = row_numbers(rows, parameter)
    for name in [by] if by else ["gradient"] if parameter else ORDERS:
        values = numbers.loss if name == "loss" else numbers.gradient
        if values is not None:
            return name, rows.ranked(values)
    return None


def rows_text(
    step: Step,
    facts: Facts,
    *,
    name: str,
    by: str | None = None,
    parameter: str | None = None,
    first: int = _FIRST,
) -> str:
    """Return the worst rows, a line for each, then what is of no row, and what is unknown.

    facts, name: of the run; by, parameter: see `order_of`; first: how many rows.
    """
    rows = step.rows
    order = order_of(rows, by, parameter)
    title = f"{name}, step {step.number:,}: loss {number(step.loss)}"
    lines = [title if order is None else f"{title}, rows by {order[0]}", ""]
    if order is not None:
        more = [f"{len(order[1]) - first:,} more"] if len(order[1]) > first else []
        table = table_text(_columns(step, facts, parameter), order[1][:first])
        lines += [*table, *more, ""]
    return "\n".join([*lines, *about_rows(rows, parameter)]).rstrip()


def _columns(step: Step, facts: Facts, parameter: str | None) -> list[Column[int]]:
    """Return the columns of the worst rows, which are places in the batch."""
    loss, gradient, whole = row_numbers(step.rows, parameter)
    found: list[Column[int]] = [
        Column("row", lambda place: str(step.rows.numbers[place]), is_number=True)
    ]
    for header, values in (("loss", loss), ("gradient", gradient)):
        if values is not None:
            found.append(Column(header, _numbers(values), is_number=True))
    if gradient is not None:
        share = gradient / whole if whole else None
        percent = _percents(share)
        found.append(Column("of the norm", percent, is_number=True))
    if (known := targets(step.batch, class_names(facts))) is not None:
        found.append(Column("y", known.__getitem__))
    return found


def _numbers(values: Tensor) -> Callable[[int], str]:
    return lambda place: number(float(values[place]))


def _percents(share: Tensor | None) -> Callable[[int], str]:
    return lambda place: "-" if share is None else f"{100 * float(share[place]):.1f}%"


def about_rows(rows: Rows, parameter: str | None = None) -> list[str]:
    """Return what the numbers are, and why some are unknown, in lines."""
    from everystep.answers.rows import Share

    lines = [about_numbers(rows.source)]
    share = rows.loss_share
    if isinstance(share, Share):
        what = "mean" if share.is_mean else "sum"
        lines.append(f"loss: the step's loss is the {what} of these" + _rest(share.rest))
    else:
        lines.append(f"loss of each row: unknown; {share}")
    names = [parameter] if parameter else list(rows.gradients)
    known = [name for name in names if isinstance(rows.gradients[name], Share)]
    if known:
        which = known[0] if parameter else f"{len(known)} of {len(names)} parameters"
        rest = math.hypot(*(each.rest for each in _shares(rows, known)))
        lines.append(
            f"gradient: 2-norm of the row's term in the gradient of {which}, before clipping"
            + _rest(rest)
        )
    unknown: dict[str, list[str]] = {}
    for name in names:
        if name not in known:
            unknown.setdefault(str(rows.gradients[name]), []).append(name)
    lines += [f"gradient of {named(each)}: unknown; {why}" for why, each in unknown.items()]
    return lines


def _rest(rest: float) -> str:
    return (
        f", and of {number(rest)} that no row makes (a penalty, or what was there before)"
        if rest
        else ""
    )


def rows_data(
    step: Step,
    facts: Facts,
    *,
    by: str | None = None,
    parameter: str | None = None,
    most: int | None = None,
) -> dict[str, Any]:
    """Return rows by their place in the batch, in each order that is known, as plain data.

    by, parameter: see `order_of`; most: rows of each order; the rest is counted.
    """
    from everystep.answers.rows import Share

    rows = step.rows
    wanted = [by] if by else ["gradient"] if parameter else ORDERS
    ranked = (order_of(rows, each, parameter) for each in wanted)
    orders = dict(each for each in ranked if each is not None)
    loss, gradient, whole = row_numbers(rows, parameter)
    share = gradient / whole if gradient is not None and whole else None
    columns = columns_of(step.batch, facts, len(rows.numbers)) if orders else []
    shares = {name: each for name, each in rows.gradients.items() if parameter in (None, name)}
    about = [*about_rows(rows, parameter), *(about_columns(facts) if columns else [])]
    more = len(columns) - MOST_COLUMNS
    if more > 0:
        about.append(f"columns: the first {MOST_COLUMNS}, and {more:,} more are not shown")

    def number_at(numbers: Tensor | None, place: int) -> float | None:
        return None if numbers is None else float(numbers[place])

    data = {
        "step": step.number,
        "rows_of": rows.source or "the batch",
        "count": len(rows.numbers),
        "loss": step.loss,
        "orders": {name: order[:most] for name, order in orders.items()},
        "about": about,
        "columns": [
            {"name": name, "is_number": isinstance(values[0], float)}
            for name, values in columns[:MOST_COLUMNS]
        ],
        "gradients": {
            name: {"norm": each.whole, "rest": each.rest}
            if isinstance(each, Share)
            else {"unknown": str(each)}
            for name, each in shares.items()
        },
        "rows": {
            place: {
                "row": rows.numbers[place],
                "loss": number_at(loss, place),
                "gradient": number_at(gradient, place),
                "share": number_at(share, place),
                "values": [values[place] for _, values in columns[:MOST_COLUMNS]],
                "gradients": {
                    name: float(each.norms[place])
                    for name, each in shares.items()
                    if isinstance(each, Share)
                },
            }
            for place in sorted({place for order in orders.values() for place in order[:most]})
        },
    }
    found: dict[str, Any] = plain_data(data)
    return found


def row_numbers(rows: Rows, parameter: str | None = None) -> RowNumbers:
    """Return what rows are ranked by, the gradients being those of which the rows are known."""
    names = [parameter] if parameter else rows.known
    whole = math.hypot(*(share.whole for share in _shares(rows, names)))
    return RowNumbers(_known(lambda: rows.loss), _known(lambda: rows.gradient_of(*names)), whole)


def _known(numbers: Callable[[], Tensor]) -> Tensor | None:
    try:
        return numbers()
    except RunError:
        return None


def _shares(rows: Rows, names: Sequence[str]) -> list[Share]:
    """Return what is known of some parameters."""
    from everystep.answers.rows import Share

    return [each for name in names if isinstance(each := rows.gradients[name], Share)]
