"""A record: what everystep knows of an operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from everystep.ops.call import Call, Made
from everystep.ops.rows import RowsRule

__all__ = ["LineRule", "MadeRule", "Record"]

#: Returns which numbers a number was made from; raises NoRuleError.
MadeRule = Callable[[Call], Made]
#: Returns a line as `Record` has it, for some arguments; empty for those that it does not foresee.
LineRule = Callable[[Call], str]


class Record(NamedTuple):
    """Everything known about an operator; a field is None if unknown.

    made: which numbers a number of a result was computed from, and how; rows: the rows of the batch that
    results belong to; line: its mathematical notation, with its arguments by name in braces, if that is
    not a call of the operator. If the kind of an operator implies a rule, its family derives it.
    """

    made: MadeRule | None = None
    rows: RowsRule | None = None
    line: str | LineRule = ""
