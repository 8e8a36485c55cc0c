"""A session: the opened steps of an answer, and the answers for their numbers."""

from __future__ import annotations

from cmath import isfinite
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from everystep.answers.trace import Origin, Spot, Trace, same_number_bits
from everystep.answers.why.answer import Group, Number, Term, Why, answered
from everystep.device import on_cpu
from everystep.errors import UsageError
from everystep.ops import NoRuleError, Piece, Sum, how_made
from everystep.replay.opened_step import Step
from everystep.replay.recorded_steps import NotReplayedError

__all__ = ["Session"]

#: Steps to open together on the way back.
MOST_TOGETHER = 8
#: Answers to keep at each end of the way of a NaN; each holds its step.
LONGEST = 8
#: Numbers that are followed to the rows behind them before giving up.
MOST_FOLLOWED = 20_000


class Session:
    """The steps of an answer.

    Args:
        step: where it begins.
        back: how many earlier steps are followed, if possible; they are opened in the order in which
            they ran, since a replay goes forward.
        terms: how many terms of a sum the answers of followed numbers have.
    """

    def __init__(self, step: Step, back: int, terms: int) -> None:
        self._first = step
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
        for each in range(max(number - self._together + 1, 1), number):
            with suppress(NotReplayedError):
                self._first.earlier(each)
        return self._first.earlier(number)

    def number(self, step: int, spot: Spot, value: Tensor | None = None) -> Number:
        """Return the number at a spot; value: it (0-dimensional), if it was read already."""
        trace = self.trace(step)
        value = trace.read(spot) if value is None else value
        name, row = _called(trace, spot)
        dtype = str(value.dtype).removeprefix("torch.")
        return Number(name, value.item(), dtype, step, row, spot, self)

    def earlier(self, number: Number) -> Number | None:
        """Return a number of the state at the end of the previous step, None if it differs there."""
        trace = self.trace(number.step)
        origin = trace.origin(number.spot)
        if origin is None or origin.operation is not None or trace.kind(origin.name) != "state":
            return None
        if number.step == 1 or self._first.earlier is None:
            return None
        before = self.trace(number.step - 1).step
        left, now = before.end.get(origin.name), trace.written(origin)
        if left is None or now is None or left.shape != trace.step.state[origin.name].shape:
            return None
        half = None if origin.part is None else origin.part.half_of(left.dtype)
        if origin.part is not None and half is None:
            return None
        value = origin.read(left)
        if not same_number_bits(value, now):
            return None
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
            return _of_two(Why(number, "parts", step, formula="complex(real, imaginary)"), parts)
        if origin.operation is None:
            return _not_made(number, trace, origin)
        made = Why(number, "operation", step, origin.operation)
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
            return answered(made, call, at, terms)
        except NoRuleError:
            return replace(made, unknown=tuple(call.inputs))

    def _part(self, made: Why, trace: Trace, origin: Origin, terms: int) -> Why:
        """Return the answer for a number that is a part of what an operation wrote."""
        assert origin.operation is not None and origin.part is not None
        dtype, number = trace.spec(origin.name).torch_dtype, made.number
        half = origin.part.half_of(dtype)
        if half is None:
            note = f"it wrote {dtype} there, and these are some of its bits".replace("torch.", "")
            return replace(made, unknown=tuple(trace.call(origin).inputs), note=note)
        spot = Spot(origin.name, origin.index, origin.operation + 1)
        whole = self.why(self.number(number.step, spot), terms)
        if whole.origin == "unseen":
            return replace(whole, number=number)
        known = whole.recomputed
        if known is not None:
            known = known.imag if half else known.real
        return replace(
            whole,
            number=number,
            recomputed=known,
            is_equal=known is not None and number.has_bits_of(known),
            note=f"its {'imaginary' if half else 'real'} part: {whole.number.name} is complex",
        )

    def difference(self, text: str, after: Number, before: Number) -> Why:
        """Return the answer for what an update changed, by the numbers after and before it."""
        value = (torch.tensor(after.value) - torch.tensor(before.value)).item()
        own = replace(after, name=text, value=value, row=None)
        asked = Why(own, "difference", self.trace(after.step).step, formula="after - before")
        return _of_two(asked, {"after": after, "before": before})

    def followed(self, answer: Why, depth: int, back: int) -> Why:
        """Return an answer with its causes.

        depth: how many operations deep; back: how many steps back.
        """
        if not isfinite(answer.number.value):
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
        place = number.step, f"{number.name} {number.spot.after if not number.is_made else ''}"
        if place not in self._followed:
            self._followed.add(place)
            yield self.followed(number.why(terms=self._terms), max(depth, 1), back)

    def _to_its_beginning(self, answer: Why) -> Why:
        """Return the answer for a NaN or infinity, with the whole way to its origin."""
        chain: list[Why] = []
        left_out = 0
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
                del chain[LONGEST]
                left_out += 1
            # The way may be long, and a step holds all its tensors.
            self._traces = {n: trace for n, trace in self._traces.items() if n <= number.step}
        rows = self._rows_behind(current.number)
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
                    if min(trace.writers(piece.name), default=after) < after:
                        waiting += [Spot(piece.name, piece.at(k), after) for k in range(piece.size)]
                    else:
                        found |= trace.rows(piece)
            if len(found) == trace.step.batch.count:
                break
        return tuple(trace.step.batch.number(place) for place in sorted(found))


def _next_nonfinite(answer: Why) -> Number | None:
    """Return an input that is NaN or infinite, None if this is the origin, or it is from outside."""
    if answer.origin == "state":
        return answer.number.earlier
    bad = [number for number in answer.numbers if not isfinite(number.value)]
    is_nan = answer.number.value != answer.number.value
    bad.sort(key=lambda number: (number.value != number.value) is not is_nan)
    return bad[0] if bad else None


def _of_two(answer: Why, numbers: dict[str, Number]) -> Why:
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
        note += ", or computed by an operation of which only the results were recorded"
    return Why(number, "outside", step, note=note)


def _called(trace: Trace, spot: Spot) -> tuple[str, int | None]:
    """Return the expression for a number, and its row, if it is of the batch."""
    origin = trace.origin(spot)
    if origin is None:
        (real, row), (imaginary, _) = (_called(trace, each) for each in spot.halves)
        return f"complex({real}, {imaginary})", row
    index = str([*origin.index]) if origin.index else ""
    if origin.part is not None:
        half = origin.part.half_of(trace.spec(origin.name).torch_dtype)
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
