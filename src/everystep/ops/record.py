"""A record: what everystep knows of an operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from everystep.ops.call import Call, Made
from everystep.ops.rows import RowsRule

__all__ = ["MadeRule", "Record"]

#: Returns which numbers a number was made from; raises NoRuleError.
MadeRule = Callable[[Call], Made]


class Record(NamedTuple):
    """What is known of an operator; None: nothing.

    made: which numbers one number of a result was made from, and how; rows: the rows of the batch that
    results belong to. The functions that make records of a kind of operators derive both from the kind.
    """

    made: MadeRule | None = None
    rows: RowsRule | None = None
