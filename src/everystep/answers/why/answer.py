"""Answers: a number, the operation that computed it, and its inputs."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch

from everystep.answers.trace import Spot, Trace, same_number_bits
from everystep.ops import Call, Formula, NoRuleError, Piece, Sum, Words, how_made
from everystep.ops.call import numbers_of
from everystep.ops.formula import total
from everystep.program.observed import Observed
from everystep.replay.opened_step import Step
from everystep.replay.shown import Shown

__all__ = ["Group", "Kind", "Number", "Term", "Why", "answered"]

Kind = Literal["operation", "batch", "outside", "state", "constant", "unseen", "difference", "parts"]


class OpenedSteps(Protocol):
    """The steps that can be asked about their numbers, as `Session` opens them."""

    def trace(self, number: int) -> Trace:
        """Return the trace of a step."""

    def earlier(self, number: Number) -> Number | None:
        """Return a number of the state as the step before left it, None if it is another one there."""

    def why(self, number: Number, terms: int) -> Why:
        """Return where a number comes from; terms: how many of a sum."""


@dataclass(frozen=True)
class Number:
    """A number of a step.

    name: as an expression that `why` takes, `#7[17, 3]` for a number of the result of operation 7;
    value; dtype; row: of the data, or of the batch where those are not known, if it is a number of the
    batch; step: its number; spot, session: where it was read, and the steps that can answer about it.
    """

    name: str
    value: Any
    dtype: str
    step: int
    row: int | None
    spot: Spot = field(repr=False)
    session: OpenedSteps = field(repr=False, compare=False)

    def why(self, *, terms: int = 5) -> Why:
        """Return where it comes from; of sums, the largest `terms` terms."""
        return self.session.why(self, terms).shown()

    @property
    def earlier(self) -> Number | None:
        """The same number after the step before, if it is of the state before its step and unchanged."""
        return self.session.earlier(self)

    @property
    def is_made(self) -> bool:
        """Whether an operation of its step made it."""
        origin = self.session.trace(self.step).origin(self.spot)
        return origin is not None and origin.operation is not None

    def has_bits_of(self, value: Any) -> bool:
        """Return whether a value of its dtype has its bits."""
        dtype = getattr(torch, self.dtype)
        return same_number_bits(torch.tensor(value, dtype=dtype), torch.tensor(self.value, dtype=dtype))


@dataclass(frozen=True)
class Term:
    """A term of a sum, or an input of a formula: numbers by their name in the formula.

    value: of the term; None in a formula; weights: factors of the terms that are in no tensor, by their
    name in the formula.
    """

    numbers: dict[str, Number]
    value: float | None = None
    weights: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """Terms of one kind, or the numbers of one argument; only the largest are shown.

    text: the term as a formula, or the argument; terms: shown; count: of all; rest: the sum of those
    that are not shown, None in a formula.
    """

    text: str
    terms: tuple[Term, ...]
    count: int
    rest: float | None = None


@dataclass(frozen=True)
class Why(Shown):
    """Where a number comes from.

    number; asked: the expression that named it, if any; origin: its source: an operation, the batch,
    ...; step: the opened step; operation: the number of the operation in it; formula: how the operation
    computes it from `groups`, for a sum divided by `divisor`, empty if there is only a text (`note`);
    recomputed: the formula's result for these numbers in double precision, rounded once to the dtype of
    the number, None if not computed; is_equal: whether these are the bits of the number; unknown:
    tensors of which the operation used unknown numbers; note: a remark; causes: answers for the followed
    numbers, or the whole way of a NaN or infinity except `left_out` in the middle; rows: at its origin,
    the rows of the batch that it depends on, None if unknown, as `step.batch.whole` numbers them.
    """

    number: Number
    origin: Kind
    step: Step = field(repr=False, compare=False)
    operation: int | None = None
    formula: str = ""
    groups: tuple[Group, ...] = ()
    divisor: float = 1.0
    recomputed: Any = None
    is_equal: bool = False
    unknown: tuple[str, ...] = ()
    note: str = ""
    causes: tuple[Why, ...] = ()
    rows: tuple[int, ...] | None = None
    asked: str = ""
    left_out: int = 0

    def shown(self) -> Why:
        """Return the same, with how it is written, if its step knows."""
        return replace(self, view=self.step.view)

    @property
    def observed(self) -> Observed | None:
        """The operation that made the number, with its inputs and results."""
        return None if self.operation is None else self.step.operations[self.operation]

    @property
    def began(self) -> Why | None:
        """The origin of a NaN or infinity, if it is not this number."""
        is_bad = not cmath.isfinite(self.number.value) and self.origin != "difference"
        return self.causes[-1] if is_bad and self.causes else None

    @property
    def numbers(self) -> list[Number]:
        """The numbers that are shown."""
        return [n for group in self.groups for term in group.terms for n in term.numbers.values()]

    def __repr__(self) -> str:
        made = f"#{self.operation} {self.observed.operation.operator}" if self.observed else self.origin
        return f"<step {self.number.step:,}: {self.number.name} = {self.number.value!r}, {made}>"


#: Makes the number of the tensor of a piece at one of its places.
NumberAt = Callable[[Piece, int], Number]
_Groups = tuple[Group, ...]


def answered(asked: Why, call: Call, at: NumberAt, count: int) -> Why:
    """Return an answer completed by the rule of its operator.

    call: the operation; at: turns pieces into numbers; count: how many of each kind to show.

    Raises:
        NoRuleError: there is no rule, or it covers only real numbers.
    """
    number, made = asked.number, how_made(call)
    try:
        if isinstance(made, Sum):
            groups, value = _of_sum(made, call, at, count)
        else:
            groups, value = _of_formula(made, call, at, count)
    except TypeError as error:  # a function of real numbers only
        raise NoRuleError("the rule does not give this complex number") from error
    if np.iscomplexobj(value) and not np.isclose(value, number.value, rtol=1e-3, equal_nan=True):
        raise NoRuleError("the rule does not give this complex number")
    recomputed = _rounded(value, getattr(torch, number.dtype))
    return replace(
        asked,
        formula=made.shown,
        groups=groups,
        divisor=made.divisor,
        recomputed=recomputed,
        is_equal=recomputed is not None and number.has_bits_of(recomputed),
        note=made.note,
    )


def _of_sum(made: Sum, call: Call, at: NumberAt, count: int) -> tuple[_Groups, Any]:
    groups, shown = [], []
    for terms in made.terms:
        values = terms.of({key: numbers_of(call.tensor_of(p), p) for key, p in terms.given.items()})
        largest = _largest(values, count)
        others = np.delete(values, largest)
        rest = total(others) if len(others) else None
        weights = {key: of for key, of in terms.settings.items() if isinstance(of, np.ndarray)}
        rows = tuple(
            Term(
                {key: at(p, k) for key, p in terms.given.items()},
                _plain(values[k]),
                {key: float(of[k]) for key, of in weights.items()},
            )
            for k in largest
        )
        shown += [row.value for row in rows] + ([] if rest is None else [rest])
        groups.append(Group(terms.shown, rows, len(values), rest))
    with np.errstate(all="ignore"):  # the mean of nothing is NaN
        return tuple(groups), np.divide(total(shown) if len(shown) != 1 else shown[0], made.divisor)


def _of_formula(made: Formula | Words, call: Call, at: NumberAt, count: int) -> tuple[_Groups, Any]:
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
    sizes, nans = np.abs(values), np.isnan(values)
    order = np.lexsort((-np.where(nans, np.inf, sizes), ~nans))  # stable
    return order[:count]


def _rounded(value: Any, dtype: torch.dtype) -> Any:
    """Return a formula's result, rounded once to a dtype; None if that cannot represent it."""
    if value is None:
        return None
    if dtype.is_complex:
        return torch.tensor(complex(value), dtype=torch.complex128).to(dtype).item()
    is_known = dtype.is_floating_point or math.isfinite(value)
    return torch.tensor(float(value), dtype=torch.float64).to(dtype).item() if is_known else None
