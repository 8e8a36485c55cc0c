"""A record: what everystep knows of an operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from everystep.ops.call import Call, Made
from everystep.ops.row_rules import RowsRule

__all__ = ["LineRule", "MadeRule", "OperatorRecord"]

#: Returns which numbers a number was made from; raises NoRuleError.
MadeRule = Callable[[Call], Made]
#: Returns a line as `OperatorRecord` has it, for some arguments; empty for those not foreseen.
LineRule = Callable[[Call], str]


class OperatorRecord(NamedTuple):
    """What is known of an operator; None: nothing.

    made: which numbers one number of a result was made from, and how; rows: the rows of the batch that
    results belong to; line: what it computes as people write it, with its arguments by name in braces,
    where that is not a call of the operator. Where the kind of an operator implies a rule, its family
    derives it.
    """

    made: MadeRule | None = None
    rows: RowsRule | None = None
    line: str | LineRule = ""
