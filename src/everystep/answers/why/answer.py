"""Answers: a number, the operation that computed it, and its inputs; and the steps that answer."""

from __future__ import annotations

import cmath
import math
import operator
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from everystep.answers.trace import Origin, Spot, Trace, same_number_bits
from everystep.device import on_cpu
from everystep.errors import UsageError
from everystep.ops import how_made
from everystep.ops.call import Call, Formula, NoRuleError, Piece, Sum, Words, numbers_of
from everystep.ops.formula import total
from everystep.program.observed import Observed
from everystep.replay.opened_step import Step
from everystep.replay.recorded_steps import NotReplayedError
from everystep.replay.shown import Shown

__all__ = ["Group", "Kind", "Number", "Session", "Term", "Why"]

#: Steps to open together on the way back: one replay opens them all, but each holds its tensors.
MOST_TOGETHER = 8
#: Answers to keep at each end of the path of a NaN; each holds its step.
LONGEST = 8
#: Collectives that add up numbers of all ranks.
_ADDING = {"everystep.all_reduce_.default", "everystep.all_reduce_coalesced_.default"}
#: Numbers that are followed to the rows behind them before giving up.
MOST_FOLLOWED = 20_000

Kind = Literal["operation", "batch", "outside", "state", "constant", "unseen", "difference", "parts"]


@dataclass(frozen=True)
# An answer is a tree that grows where it is asked to, e.g. of a gradient of a linear layer:
#   Why(gradients['0.weight'][3, 5])    operation #21 mm, a sum; its largest terms:
#     Group("self * mat2")  Term(self: #20[17, 3], mat2: batch.x[17, 5])  ...  and the rest
#   Number(#20[17, 3]).why()            operation #20 threshold_backward: a formula of its inputs
class Number:
    """A number of a step.

    name: as an expression that `why` takes, `#7[17, 3]` for a number of the result of operation 7;
    value; dtype; row: of the data, or of the batch where those are not known, if it is a number of the
    batch; step: its number; spot, session: where it was read, and the steps that can answer about it;
    rank: of another process, which a collective had it from.
    """

    name: str
    value: Any
    dtype: str
    step: int
    row: int | None
    spot: Spot = field(repr=False)
    session: Session = field(repr=False, compare=False)
    rank: int | None = None

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
    tensors that it used with unknown numbers; note: a remark; causes: answers for the followed
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


class Session:
    """The steps of an answer.

    step: where it begins; back: how many earlier steps are followed, if possible; terms: how many terms
    of a sum the answers of followed numbers have; rank: of the process that a collective led to.
    """

    def __init__(self, step: Step, back: int, terms: int, rank: int | None = None) -> None:
        self._first = step
        self._rank = rank
        self._terms = terms
        self._together = min(max(back, 1), MOST_TOGETHER)
        self._traces: dict[int, Trace] = {}
        self._followed: set[tuple[int, str]] = set()

    def trace(self, number: int) -> Trace:
        """Return the trace of a step, which is opened if it is not open.

        Raises:
            UsageError: the steps before are not there.
        """
        if number not in self._traces:
            self._traces[number] = Trace(self._opened(number))
        return self._traces[number]

    def _opened(self, number: int) -> Step:
        if number == self._first.number:
            return self._first
        if self._first.earlier is None:
            raise UsageError(
                "this step does not know the run that it is of, so the steps before cannot be "
                "followed; use everystep.open(run).why(step, expression, back=...)"
            )
        # In the order in which they ran: a replay goes forward, and going back takes a way of its own.
        for each in range(max(number - self._together + 1, 1), number):
            # A step on the way may be lost; only the wanted one must open.
            with suppress(NotReplayedError):
                self._first.earlier(each)
        return self._first.earlier(number)

    def number(self, step: int, spot: Spot, value: Tensor | None = None) -> Number:
        """Return the number at a spot; value: it (0-dimensional), if it was read already."""
        trace = self.trace(step)
        value = trace.read(spot) if value is None else value
        name, row = _called(trace, spot)
        dtype = str(value.dtype).removeprefix("torch.")
        return Number(name, value.item(), dtype, step, row, spot, self, self._rank)

    def earlier(self, number: Number) -> Number | None:
        """Return a number of the state at the end of the previous step, None if it differs there."""
        trace = self.trace(number.step)
        origin = trace.origin(number.spot)
        if origin is None or origin.operation is not None or trace.kind(origin.name) != "state":
            return None
        half = trace.half(origin)
        is_bits = origin.part is not None and half is None
        if is_bits or number.step == 1 or self._first.earlier is None:
            return None
        before = self.trace(number.step - 1).step
        left, now = before.end.get(origin.name), trace.written(origin)
        if left is None or now is None or left.shape != trace.step.state[origin.name].shape:
            return None
        value = origin.read(left)
        if not same_number_bits(value, now):
            return None
        # The state may have another tensor after that step: a gradient that each step makes.
        name = before.places.ends.get(origin.name, origin.name)
        spot = Spot(name, origin.index, len(before.operations), half)
        return self.number(before.number, spot, value)

    @on_cpu()
    def why(self, number: Number, terms: int) -> Why:
        """Return where a number comes from; terms: how many of a sum."""
        trace = self.trace(number.step)
        step, origin = trace.step, trace.origin(number.spot)
        if origin is None:
            halves = zip(("real", "imaginary"), number.spot.halves, strict=True)
            parts = {key: self.number(step.number, spot) for key, spot in halves}
            return _of_numbers(Why(number, "parts", step, formula="complex(real, imaginary)"), parts)
        made = Why(number, "operation", step, origin.operation)
        if trace.is_conjugate(number.spot, origin):
            return self._part(made, trace, origin, terms)
        if origin.operation is None:
            return _not_made(number, trace, origin)
        after = trace.written(origin)
        if after is not None and not number.has_bits_of(after.item()):
            note = (
                f"operation #{origin.operation} wrote {after.item()!r} there; something that is not an "
                "operation of the step has changed it since"
            )
            return replace(made, origin="unseen", note=note)
        if origin.part is not None:
            return self._part(made, trace, origin, terms)
        call, operation = trace.call(origin), origin.operation

        def at(piece: Piece, place: int) -> Number:
            index = piece.at(place)
            spot = Spot(piece.name, index, operation + piece.is_result)
            return self.number(step.number, spot, call.tensor_of(piece).detach()[index])

        try:
            return _answered(made, call, at, terms)
        except NoRuleError:
            added = self._added(made, origin.name, origin.index)
            return added or replace(made, unknown=tuple(call.inputs))

    def _added(self, made: Why, name: str, index: tuple[int, ...]) -> Why | None:
        """Return the answer for a number that a collective added up over its ranks; None if it did not.

        name, index: the tensor that it wrote, and where in it.
        """
        assert made.observed is not None
        own = made.observed.operation
        is_sum = own.operator in _ADDING and own.arguments[1] == {"text": "sum"}
        if not is_sum or made.step.of_ranks is None:
            return None

        def alike(step: Step) -> list[int]:  # every rank takes part in the same ones, in one order
            found = [
                (each.operation.operator, *each.operation.arguments[1:]) for each in step.operations
            ]
            asked = (own.operator, *own.arguments[1:])
            return [number for number, each in enumerate(found) if each == asked]

        # The same collective may run several times in a step; on all ranks in the same order.
        turn, place = alike(made.step).index(made.operation or 0), own.arguments[0].index(name)
        numbers: dict[str, Number] = {}
        for rank in own.arguments[2]:
            step = made.step.ranks[rank]
            operation = alike(step)[turn]
            given = step.operations[operation]
            other = given.operation.arguments[0][place]
            if given.inputs[other].shape != made.observed.made[name].shape:
                return None
            spot, value = Spot(other, index, operation), given.inputs[other].detach()[index]
            is_own = step.of_ranks == made.step.of_ranks
            session = self if is_own else Session(step, 1, self._terms, rank)
            numbers[f"rank {rank}"] = session.number(step.number, spot, value)
        values = np.array([number.value for number in numbers.values()])
        known = _rounded(total(values), getattr(torch, made.number.dtype))
        is_equal = known is not None and made.number.has_bits_of(known)
        found = replace(made, formula=" + ".join(numbers), recomputed=known, is_equal=is_equal)
        return _of_numbers(found, numbers)

    def _part(self, made: Why, trace: Trace, origin: Origin, terms: int) -> Why:
        """Return the answer for a number that is a part, or the conjugate, of what was written."""
        half, number = trace.half(origin), made.number
        if origin.part is not None and half is None:
            dtype = str(trace.spec(origin.name).torch_dtype).removeprefix("torch.")
            note = f"it wrote {dtype} there, and these are some of its bits"
            return replace(made, unknown=tuple(trace.call(origin).inputs), note=note)
        # As the operation left it: later ones may have written there.
        after = 0 if origin.operation is None else origin.operation + 1
        whole = self.why(self.number(number.step, Spot(origin.name, origin.index, after)), terms)
        if whole.origin == "unseen":
            return replace(whole, number=number)
        note = f"its {'imaginary' if half else 'real'} part: {whole.number.name} is complex"
        known = whole.recomputed
        if trace.is_conjugate(number.spot, origin):
            note = f"the conjugate of {whole.number.name}"
            known = None if known is None else known.conjugate()
        if half is not None and known is not None:
            known = known.imag if half else known.real
        is_equal = known is not None and number.has_bits_of(known)
        return replace(whole, number=number, recomputed=known, is_equal=is_equal, note=note)

    def difference(self, text: str, after: Number, before: Number) -> Why:
        """Return the answer for what an update changed, by the numbers after and before it."""
        # In the dtype of the parameter: torch makes float32 of a Python number.
        pair = (torch.tensor(each.value, dtype=getattr(torch, each.dtype)) for each in (after, before))
        value = operator.sub(*pair).item()
        own = replace(after, name=text, value=value, row=None)
        asked = Why(own, "difference", self.trace(after.step).step, formula="after - before")
        return _of_numbers(asked, {"after": after, "before": before})

    def followed(self, answer: Why, depth: int, back: int) -> Why:
        """Return an answer with its causes.

        depth: how many operations deep; back: how many steps back.
        """
        if not cmath.isfinite(answer.number.value):
            return self._to_its_beginning(answer)
        causes = tuple(self._causes(answer, depth, back))
        return replace(answer, causes=causes) if causes else answer

    def _causes(self, answer: Why, depth: int, back: int) -> Iterator[Why]:
        if answer.origin == "state":
            yield from self._before(answer.number, depth, back)
            return
        # The numbers of the largest terms of each kind.
        for number in (n for g in answer.groups for term in g.terms[:1] for n in term.numbers.values()):
            if not number.is_made:
                yield from self._before(number, depth, back)
            elif depth > 1 or answer.origin in ("difference", "parts"):
                yield from self._one(number, depth - 1, back)

    def _before(self, number: Number, depth: int, back: int) -> Iterator[Why]:
        if not back or number.step == 1:
            return
        try:
            earlier = number.earlier
        except NotReplayedError as error:
            yield replace(number.why(), note=str(error))
            return
        if earlier is not None:
            yield from self._one(earlier, depth, back - 1)
        elif (answer := number.why()).origin == "state":
            note = f"not what step {number.step - 1:,} left: created or changed between the steps"
            yield replace(answer, note=note)

    def _one(self, number: Number, depth: int, back: int) -> Iterator[Why]:
        # A number that is not made in the step may be read at two times, before and after a write.
        at = number.spot.after if not number.is_made else ""
        place = number.step, f"{number.rank} {number.name} {at}"
        # Several ways may lead to one number, which is answered once.
        if place not in self._followed:
            self._followed.add(place)
            yield self.followed(number.why(terms=self._terms), max(depth, 1), back)

    def _to_its_beginning(self, answer: Why) -> Why:
        """Return the answer for a NaN or infinity, with the whole way to its origin."""
        chain: list[Why] = []
        left_out = 0
        # The way may lead back through many steps, and a replay goes forward: it opens several at once.
        self._together = MOST_TOGETHER
        current = answer
        while True:
            try:
                number = _next_nonfinite(current)
            except NotReplayedError as error:
                current = replace(current, note=f"{current.note}; {error}")
                break
            if number is None:
                break
            current = number.why(terms=self._terms)
            chain.append(current)
            if len(chain) > 2 * LONGEST:
                # Readers need both ends of a long way, so the middle goes.
                del chain[LONGEST]
                left_out += 1
            # The way may be long, and a step holds all its tensors.
            self._traces = {n: trace for n, trace in self._traces.items() if n <= number.step}
        rows = current.number.session._rows_behind(current.number)
        if not chain:
            return replace(current, rows=rows)
        causes = (*chain[:-1], replace(current, rows=rows))
        return replace(answer, causes=causes, left_out=left_out)

    def _rows_behind(self, number: Number) -> tuple[int, ...] | None:
        """Return the rows that a number depends on, as the data numbers them, None if unknown.

        Only by the rules of operators: a rule may be missing, or the way too long.
        """
        trace = self.trace(number.step)
        found: set[int] = set()
        seen: set[Origin | Spot] = set()
        waiting = [number.spot]
        while waiting:
            spot = waiting.pop()
            origin = trace.origin(spot)
            if (origin or spot) in seen:
                continue
            seen.add(origin or spot)
            if len(seen) > MOST_FOLLOWED:
                return None
            if origin is None:
                waiting += spot.halves
                continue
            if origin.operation is None:
                found |= trace.rows(Piece(spot.name, spot.index))
                continue
            try:
                made = how_made(trace.call(origin))
            except NoRuleError:
                return None
            for part in made.terms if isinstance(made, Sum) else (made,):
                for piece in part.given.values():
                    after = origin.operation + piece.is_result
                    # What the step has written is followed further; the rest was there before it.
                    if min(trace.writers(piece.name), default=after) < after:
                        waiting += [Spot(piece.name, piece.at(k), after) for k in range(piece.size)]
                    else:
                        found |= trace.rows(piece)
            # The rest of the way cannot add a row.
            if len(found) == trace.step.batch.count:
                break
        return tuple(trace.step.batch.number(place) for place in sorted(found))


def _next_nonfinite(answer: Why) -> Number | None:
    """Return an input that is NaN or infinite, None if this is the origin, or it is from outside."""
    if answer.origin == "state":
        return answer.number.earlier
    bad = [number for number in answer.numbers if not cmath.isfinite(number.value)]
    is_nan = answer.number.value != answer.number.value
    # A NaN is more likely to come from a NaN, and an infinity from an infinity.
    bad.sort(key=lambda number: (number.value != number.value) is not is_nan)
    return bad[0] if bad else None


def _of_numbers(answer: Why, numbers: dict[str, Number]) -> Why:
    groups = tuple(Group(name, (Term({name: each}),), 1) for name, each in numbers.items())
    return replace(answer, groups=groups)


def _not_made(number: Number, trace: Trace, origin: Origin) -> Why:
    """Return the answer for a number that was there before the step."""
    step, storage = trace.step, trace.kind(origin.name)
    if storage == "temporary":
        note = "a constant: the same in every step that has these operations"
        return Why(number, "constant", step, note=note)
    if storage == "state":
        first = number.step == 1
        note = (
            "the state before the first step" if first else f"the state after step {number.step - 1:,}"
        )
        return Why(number, "state", step, note=note)
    if origin.name.removeprefix("batch/") in step.batch.tensors:
        note = "of the batch" if number.row is None else f"row {number.row} of {step.batch.whole}"
        return Why(number, "batch", step, note=note)
    note = "passed to the step by your own code, not part of the batch"
    if step.places.has_unseen:
        note += ", or computed by an operation with recorded results only"
    return Why(number, "outside", step, note=note)


def _called(trace: Trace, spot: Spot) -> tuple[str, int | None]:
    """Return the expression for a number, and its row, if it is of the batch."""
    origin = trace.origin(spot)
    if origin is None:
        (real, row), (imaginary, _) = (_called(trace, each) for each in spot.halves)
        return f"complex({real}, {imaginary})", row
    index = str([*origin.index]) if origin.index else ""
    if origin.part is not None:
        half = trace.half(origin)
        index += ".bits" if half is None else (".real", ".imag")[half]
    if origin.operation is not None:
        place = f".{origin.place + 1}" if origin.place else ""
        return f"#{origin.operation}{place}{index}", None
    kind, _, rest = origin.name.partition("/")
    step, row = trace.step, None
    if trace.kind(origin.name) == "input":
        path = origin.name.removeprefix("batch/")
        at = trace.row(origin)
        row = None if at is None else step.batch.number(at)
        if path in ("x", "y"):
            return f"batch.{path}{index}", row
    if kind in ("parameter", "buffer") and rest in getattr(step, f"{kind}s"):
        return f"{kind}s[{rest!r}]{index}", None
    return f"tensors[{origin.name!r}]{index}", row


#: Makes the number of the tensor of a piece at one of its places.
NumberAt = Callable[[Piece, int], Number]
_Groups = tuple[Group, ...]


def _answered(asked: Why, call: Call, at: NumberAt, count: int) -> Why:
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
    # Rules are those of real numbers: for complex ones, they may leave out a conjugate.
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
                values[k].item(),
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
