"""What a rule says, with numbers: the largest terms, the rest, and whether the bits are the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everystep.ops import Call, Formula, Made, NoRuleError, Piece, Sum, Words
from everystep.ops.call import numbers_of
from everystep.ops.formula import total
from everystep.replay.step import Step
from everystep.replay.why.answer import Group, Number, Term, Why
from everystep.replay.why.trace import same_number_bits

__all__ = ["as_tensor", "computed", "same_value_bits"]


def as_tensor(number: Number) -> Tensor:
    """Return a number as a tensor (0-dimensional) of its dtype."""
    return torch.tensor(number.value, dtype=getattr(torch, number.dtype))


#: Makes the number of the tensor of a piece at one of its places.
NumberAt = Callable[[Piece, int], Number]


def computed(
    number: Number, step: Step, operation: int, made: Made, call: Call, at: NumberAt, terms: int
) -> Why:
    """Return the answer for a number that an operation made.

    made: how, by the rule of the operator; call: the operation; at: makes numbers of pieces;
    terms: how many numbers of each kind are shown.

    Raises:
        NoRuleError: the rule does not give such complex numbers: it was written for real ones.
    """
    try:
        if isinstance(made, Sum):
            groups, value = _sum(made, call, at, terms)
        else:
            groups, value = _formula(made, call, at, terms)
    except TypeError as error:  # a function of real numbers only
        raise NoRuleError("the rule does not give this complex number") from error
    if np.iscomplexobj(value) and not np.isclose(value, number.value, rtol=1e-3, equal_nan=True):
        raise NoRuleError("the rule does not give this complex number")
    rounded, is_equal = _compared(value, number)
    return Why(
        number,
        "operation",
        step,
        operation,
        formula="" if isinstance(made, Words) else made.shown,
        groups=groups,
        divisor=made.divisor if isinstance(made, Sum) else 1.0,
        recomputed=rounded,
        is_equal=is_equal,
        note=made.text if isinstance(made, Words) else "" if isinstance(made, Sum) else made.note,
    )


def _sum(made: Sum, call: Call, at: NumberAt, count: int) -> tuple[tuple[Group, ...], Any]:
    groups, shown = [], []
    for terms in made.terms:
        given = {key: numbers_of(call.tensor_of(p), p) for key, p in terms.given.items()}
        values = terms.of(given)
        largest = _largest(values, count)
        others = np.delete(values, largest)
        rest = total(others) if len(others) else None
        rows = tuple(
            Term(
                {key: at(p, k) for key, p in terms.given.items()},
                _plain(values[k]),
                {key: float(of[k]) for key, of in terms.settings.items() if isinstance(of, np.ndarray)},
            )
            for k in largest
        )
        shown += [row.value for row in rows] + ([] if rest is None else [rest])
        groups.append(Group(terms.shown, rows, len(values), rest))
    with np.errstate(all="ignore"):  # the mean of nothing is NaN
        return tuple(groups), np.divide(total(shown) if len(shown) != 1 else shown[0], made.divisor)


def _formula(
    made: Formula | Words, call: Call, at: NumberAt, count: int
) -> tuple[tuple[Group, ...], Any]:
    groups, given = [], {}
    for key, piece in made.given.items():
        given[key] = numbers_of(call.tensor_of(piece), piece)
        rows = tuple(Term({key: at(piece, k)}) for k in _largest(given[key], count))
        groups.append(Group(key, rows, piece.size))
    return tuple(groups), None if isinstance(made, Words) else made.of(given)


def _plain(value: Any) -> float:
    return complex(value) if np.iscomplexobj(value) else float(value)  # type: ignore[return-value]


def _largest(values: Any, count: int) -> Any:
    """Return the places of the largest values by size, NaN first."""
    sizes = np.abs(values)
    sizes = np.where(np.isnan(sizes), np.inf, sizes)
    nans = np.isnan(values)
    order = np.lexsort((np.arange(len(sizes)), -sizes, ~nans))
    return order[:count]


def same_value_bits(value: Any, number: Number) -> bool:
    """Tell whether a value of the number's dtype has its bits."""
    return same_number_bits(torch.tensor(value, dtype=getattr(torch, number.dtype)), as_tensor(number))


def _compared(recomputed: Any, number: Number) -> tuple[Any, bool]:
    """Return what a formula gives as a number of the result's dtype, and whether it has its bits."""
    if recomputed is None:
        return None, False
    dtype = getattr(torch, number.dtype)
    if dtype.is_complex:
        rounded = torch.tensor(complex(recomputed), dtype=torch.complex128).to(dtype)
        return rounded.item(), same_value_bits(rounded.item(), number)
    value = float(recomputed)
    if not dtype.is_floating_point and not math.isfinite(value):
        return None, False
    rounded = torch.tensor(value, dtype=torch.float64).to(dtype)
    return rounded.item(), same_number_bits(rounded, as_tensor(number))
