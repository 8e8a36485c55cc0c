"""Why: where a number of a step comes from, followed through its operations and into earlier steps.

Each answer is one operation: the inputs of this number, by the operator's rule (`everystep.ops`), and
whether its formula gives the same bits for them. Each of these numbers can be followed in turn.
"""

from __future__ import annotations

from dataclasses import replace

from everystep.answers.trace import Spot
from everystep.answers.why.answer import Group, Number, Session, Term, Why
from everystep.answers.why.named import numbers_named
from everystep.device import on_cpu
from everystep.replay.opened_step import Step

__all__ = ["Group", "Number", "Spot", "Term", "Why", "why"]


@on_cpu()
def why(step: Step, expression: str | Spot, *, back: int = 0, depth: int = 1, terms: int = 5) -> Why:
    """Answer `Run.why`. expression: names the number, or is the place where it was read."""
    session, asked = Session(step, back, terms), ""
    if isinstance(expression, Spot):
        numbers = [session.number(step.number, expression)]
    else:
        asked = expression.strip()
        numbers = numbers_named(expression, session, step.number)
    is_update = len(numbers) == 2
    answer = session.difference(asked, *numbers) if is_update else numbers[0].why(terms=terms)
    return session.followed(replace(answer, asked=asked), depth, back).shown()
