"""The rows of a step's batch, ranked: as text and as plain data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from everystep.errors import RunError, UsageError, did_you_mean
from everystep.views.answers import NAMED
from everystep.views.batch import about_numbers, targets
from everystep.views.terminal import number

if TYPE_CHECKING:
    from torch import Tensor

    from everystep.replay.rows import Rows, Share
    from everystep.replay.step import Step

__all__ = ["ORDERS", "RowNumbers", "about_rows", "order_of", "row_numbers", "rows_data", "rows_text"]

#: What rows are ranked by.
ORDERS = ("loss", "gradient")
_FIRST = 10


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
    *,
    name: str,
    by: str | None = None,
    parameter: str | None = None,
    first: int = _FIRST,
    classes: list[str] | None = None,
) -> str:
    """Return the worst rows, a line for each, then what is of no row, and what is unknown.

    name: of the run; by, parameter: see `order_of`; first: how many rows; classes: the names of the
    classes of the targets.
    """
    rows = step.rows
    order = order_of(rows, by, parameter)
    title = f"{name}, step {step.number:,}: loss {number(step.loss)}"
    lines = [title if order is None else f"{title}, rows by {order[0]}", ""]
    if order is not None:
        lines += [*_table(step, order[1], parameter, first, classes), ""]
    return "\n".join([*lines, *about_rows(rows, parameter)]).rstrip()


def _table(
    step: Step, order: list[int], parameter: str | None, first: int, classes: list[str] | None
) -> list[str]:
    rows = step.rows
    columns: list[list[str]] = [["row", *(str(rows.numbers[place]) for place in order[:first])]]
    loss, gradient, whole = row_numbers(rows, parameter)
    if loss is not None:
        columns.append(["loss", *(number(float(loss[place])) for place in order[:first])])
    if gradient is not None:
        columns.append(["gradient", *(number(float(gradient[place])) for place in order[:first])])
        columns.append(["of the norm", *(_percent(float(gradient[p]), whole) for p in order[:first])])
    lines = [
        "  ".join(f"{cell:>{_width(each)}}" for cell, each in zip(line, columns, strict=True))
        for line in zip(*columns, strict=True)
    ]
    known = targets(step.batch, classes)
    if known is not None:
        lines = [
            f"{line}  {text}"
            for line, text in zip(lines, ["y", *(known[place] for place in order[:first])], strict=True)
        ]
    more = len(order) - first
    return [*lines, f"{more:,} more"] if more > 0 else lines


def _width(cells: list[str]) -> int:
    return max(map(len, cells))


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "-"


def about_rows(rows: Rows, parameter: str | None = None) -> list[str]:
    """Return what the numbers are, and why some are unknown, in lines."""
    from everystep.replay.rows import Share

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
    lines += [f"gradient of {_listed(each)}: unknown; {why}" for why, each in unknown.items()]
    return lines


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _rest(rest: float) -> str:
    return (
        f", and of {number(rest)} that no row makes (a penalty, or what was there before)"
        if rest
        else ""
    )


def rows_data(step: Step, *, by: str | None = None, parameter: str | None = None) -> dict[str, Any]:
    """Return all rows, ranked, as plain data."""
    from everystep.replay.rows import Share

    rows = step.rows
    order = order_of(rows, by, parameter)
    places = range(len(rows.numbers)) if order is None else order[1]
    loss, gradient, _ = row_numbers(rows, parameter)
    share = rows.loss_share
    shares = {name: each for name, each in rows.gradients.items() if parameter in (None, name)}
    return {
        "step": step.number,
        "by": None if order is None else order[0],
        "rows_of": rows.source or "the batch",
        "loss": {"value": step.loss, "of_rows": "mean" if share.is_mean else "sum", "rest": share.rest}
        if isinstance(share, Share)
        else {"value": step.loss, "unknown": str(share)},
        "gradients": {
            name: {"norm": each.whole, "rest": each.rest}
            if isinstance(each, Share)
            else {"unknown": str(each)}
            for name, each in shares.items()
        },
        "rows": [
            {
                "row": rows.numbers[place],
                "place": place,
                "loss": None if loss is None else float(loss[place]),
                "gradient": None if gradient is None else float(gradient[place]),
                "gradients": {
                    name: float(each.norms[place])
                    for name, each in shares.items()
                    if isinstance(each, Share)
                },
            }
            for place in places
        ],
    }


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
    from everystep.replay.rows import Share

    return [each for name in names if isinstance(each := rows.gradients[name], Share)]
