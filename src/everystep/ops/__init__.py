"""Elements: which numbers of its inputs an operator makes one number of a result from, and how.

`how_made` looks the rule of an operator up: one for each kind, written down from the operator's
definition in torch's documentation. Nothing is guessed by changing inputs and looking what changes. An
operator without a rule has none, which `how_made` says.
"""

from everystep.ops.call import Call, Formula, Made, NoRuleError, Piece, Sum, Terms, Words
from everystep.ops.rules import how_made

__all__ = ["Call", "Formula", "Made", "NoRuleError", "Piece", "Sum", "Terms", "Words", "how_made"]
