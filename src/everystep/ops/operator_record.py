"""A record: what everystep knows of an operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from everystep.ops.call import Call, Made
from everystep.ops.row_rules import RowsRule

__all__ = ["LineRule", "MadeRule", "OperatorRecord"]

#: Returns which numbers a number was made from; raises NoRuleError.
MadeRule = Callable[[Call], Made]
#: Returns the line of an `OperatorRecord` for the arguments of a call; empty if it does not cover them.
LineRule = Callable[[Call], str]


# e.g. "addmm": OperatorRecord(made, rows, line), where for each number of the result
#   made(call)  is a Sum of the products of a row and a column, and of the bias;
#   rows(call)  has the rows of `mat1` in the forward pass, and a sum over rows for a weight's gradient;
#   line        is "{mat1} · {mat2} + {self}".
class OperatorRecord(NamedTuple):
    """What is known of an operator; None: nothing.

    made: which numbers a number of a result was computed from, and how; rows: the rows of the batch that
    results belong to; line: its mathematical notation, with its arguments by name in braces, if that is
    not a call of the operator. If the kind of an operator implies a rule, its family derives it.
    """

    made: MadeRule | None = None
    rows: RowsRule | None = None
    line: str | LineRule = ""
