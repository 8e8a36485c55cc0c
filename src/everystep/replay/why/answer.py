"""Answers: a number, what made it, and the numbers that went in."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from everystep.program.observed import Observed
from everystep.replay.shown import Shown
from everystep.replay.step import Step
from everystep.replay.why.rows import batch_rows
from everystep.replay.why.trace import Spot, Written, is_finite

if TYPE_CHECKING:
    from everystep.replay.why.session import Session

__all__ = ["Group", "Number", "Origin", "Term", "Why"]

Origin = Literal[
    "operation", "batch", "outside", "state", "setting", "constant", "unseen", "difference", "parts"
]


@dataclass(frozen=True)
class Number:
    """A number of a step.

    name: as an expression that `why` takes, `#7[17, 3]` for a number of the result of operation 7;
    value; dtype; row: of the data, or of the batch where those are not known, if it is a number of the
    batch; step: its number; spot, session: where it was read, and the steps that can be asked about it.
    """

    name: str
    value: Any
    dtype: str
    step: int
    row: int | None
    spot: Spot = field(repr=False)
    session: Session = field(repr=False, compare=False)

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
        return isinstance(self.session.trace(self.step).origin(self.spot), Written)


@dataclass(frozen=True)
class Term:
    """A term of a sum, or a number that a formula is given: numbers by their name in the formula.

    value: of the term; None in a formula; weights: numbers by which the terms differ that are of no
    tensor, by their name in the formula.
    """

    numbers: dict[str, Number]
    value: float | None = None
    weights: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """Terms of one kind, or the numbers of one argument; the largest are shown.

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

    number; asked: the expression that named it, if one did; origin: whether an operation made it, or
    what else it is; step: the opened step; operation: the number of the operation in it; formula: how
    the operation makes it from `groups`, for a sum divided by `divisor`, empty if only words (`note`)
    report it; recomputed: what the formula gives for these numbers in double precision, rounded once to
    the dtype of the number, None if it was not computed; is_equal: whether these are the bits of the
    number; unknown: tensors of which the operation used numbers, but which is not known; note: what else
    there is to say; causes: answers for numbers that were followed as asked, or all that a NaN or
    infinity came through but for `left_out` in the middle; rows: where that began, the rows of the batch
    behind it, None if they are not known, as `step.batch.whole` numbers them.
    """

    number: Number
    origin: Origin
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
        """Where a NaN or infinity began, if this is one that came from somewhere else."""
        is_bad = not is_finite(self.number.value) and self.origin != "difference"
        return self.causes[-1] if is_bad and self.causes else None

    @property
    def step_rows(self) -> int:
        """How many rows the batch has."""
        return batch_rows(self.step)

    @property
    def numbers(self) -> list[Number]:
        """The numbers that are shown."""
        return [n for group in self.groups for term in group.terms for n in term.numbers.values()]

    def __repr__(self) -> str:
        made = f"#{self.operation} {self.observed.operation.operator}" if self.observed else self.origin
        return f"<step {self.number.step:,}: {self.number.name} = {self.number.value!r}, {made}>"
