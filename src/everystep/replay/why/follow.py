"""Following a number: from an answer to those of its numbers, and into the steps before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from everystep.device import on_cpu
from everystep.errors import UsageError
from everystep.replay.step import Step
from everystep.replay.why.answer import Group, Number, Term, Why
from everystep.replay.why.rows import rows_behind
from everystep.replay.why.session import Session
from everystep.replay.why.trace import Spot, is_finite
from everystep.replay.why.wanted import wanted

__all__ = ["why"]

#: So many answers at each end of the way of a NaN are kept: each holds its step.
LONGEST = 8


@on_cpu()
def why(step: Step, expression: str | Spot, *, back: int = 0, depth: int = 1, terms: int = 5) -> Why:
    """Return where a number of a step comes from.

    Args:
        step: the opened step.
        expression: names the number, or is where it was read.
        back: how many steps before to follow what was there before the step.
        depth: how many operations deep to follow the largest numbers.
        terms: how many terms of a sum to return one by one.

    Raises:
        UsageError: an argument is invalid, or the expression is not one number of the step.
        RunError: an earlier step cannot be opened.
    """
    for name, value, least in (("back", back, 0), ("depth", depth, 1), ("terms", terms, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UsageError(f"{name} must be an integer of at least {least}, not {value!r:.80}")
    session = Session(step, back)
    if isinstance(expression, Spot):
        answer = session.number(step.number, expression, session.read(step, expression)).why(terms=terms)
        return _Following(terms, session).followed(answer, depth, back).shown()
    found = wanted(expression, step, session.trace(step.number))
    if found.is_previous:
        session.open(step.number - 1)
        earlier = session.trace(step.number - 1).step
        text = expression.replace("previous.", "", 1)
        found, step = wanted(text, earlier, session.trace(earlier.number)), earlier
    numbers = [session.number(step.number, spot, session.read(step, spot)) for spot in found.spots]
    if len(numbers) == 2:
        answer = _difference(session, expression, step, numbers)
    else:
        answer = numbers[0].why(terms=terms)
    answer = replace(answer, asked=expression.strip())
    return _Following(terms, session).followed(answer, depth, back).shown()


def _difference(session: Session, text: str, step: Step, numbers: list[Number]) -> Why:
    after, before = numbers
    value = torch.tensor(after.value) - torch.tensor(before.value)
    own = Number(text, value.item(), after.dtype, step.number, None, after.spot, session)
    groups = tuple(
        Group(name, (Term({name: each}),), 1) for name, each in (("after", after), ("before", before))
    )
    return Why(own, "difference", step, formula="after - before", groups=groups)


class _Following:
    """Follows the numbers of an answer."""

    def __init__(self, terms: int, session: Session) -> None:
        self._terms = terms
        self._session = session
        self._done: set[tuple[int, str]] = set()

    def followed(self, answer: Why, depth: int, back: int) -> Why:
        """Return an answer with its causes.

        depth: how many operations deep; back: how many steps back.
        """
        if not is_finite(answer.number.value):
            return self._to_its_beginning(answer)
        causes = tuple(self._causes(answer, depth, back))
        return replace(answer, causes=causes) if causes else answer

    def _causes(self, answer: Why, depth: int, back: int) -> Iterator[Why]:
        if answer.origin == "state":
            yield from self._before(answer.number, depth, back)
            return
        for number in _main(answer):
            if number.is_made:
                if depth > 1 or answer.origin in ("difference", "parts"):
                    yield from self._one(number, depth - 1, back)
            else:
                yield from self._before(number, depth, back)

    def _before(self, number: Number, depth: int, back: int) -> Iterator[Why]:
        if not back or number.step == 1:
            return
        earlier = number.earlier
        if earlier is not None:
            yield from self._one(earlier, depth, back - 1)
        elif (answer := number.why()).origin == "state":
            note = f"not what step {number.step - 1:,} left: made, or changed, between the steps"
            yield replace(answer, note=note)

    def _one(self, number: Number, depth: int, back: int) -> Iterator[Why]:
        place = number.step, f"{number.name} {number.spot.after if not number.is_made else ''}"
        if place in self._done:
            return
        self._done.add(place)
        yield self.followed(number.why(terms=self._terms), max(depth, 1), back)

    def _to_its_beginning(self, answer: Why) -> Why:
        """Return the answer for a NaN or infinity, with all that it came through up to its beginning."""
        chain: list[Why] = []
        left_out = 0
        self._session.goes_far()
        current = answer
        while (number := _next_nonfinite(current)) is not None:
            current = number.why(terms=self._terms)
            chain.append(current)
            if len(chain) > 2 * LONGEST:
                del chain[LONGEST]
                left_out += 1
            self._session.forget_after(current.number.step)
        rows = rows_behind(self._session, current.number)
        known = current.step.batch.rows
        if rows is not None and known is not None:
            rows = tuple(int(known[place]) for place in rows)
        if not chain:
            return replace(answer, rows=rows)
        causes = (*chain[:-1], replace(current, rows=rows))
        return replace(answer, causes=causes, left_out=left_out)


def _next_nonfinite(answer: Why) -> Number | None:
    """Return a number that brought a NaN or infinity here, None if it began here, or is from outside."""
    if answer.origin == "state":
        return answer.number.earlier
    bad = [number for number in answer.numbers if not is_finite(number.value)]
    is_nan = answer.number.value != answer.number.value
    bad.sort(key=lambda number: (number.value != number.value) is not is_nan)
    return bad[0] if bad else None


def _main(answer: Why) -> list[Number]:
    """Return the numbers to follow: of each kind of terms the largest."""
    return [n for group in answer.groups for term in group.terms[:1] for n in term.numbers.values()]
