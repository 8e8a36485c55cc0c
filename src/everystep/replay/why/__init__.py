"""Why: where a number of a step comes from, followed through its operations and into the steps before.

Each answer is one operation: the numbers that it made this number from, by the operator's rule
(`everystep.ops`), and whether its formula gives the same bits for them. Each of these numbers can be
followed in turn.
"""

from everystep.replay.why.answer import Group, Number, Term, Why
from everystep.replay.why.follow import why
from everystep.replay.why.trace import Spot

__all__ = ["Group", "Number", "Spot", "Term", "Why", "why"]
