"""Operators: what everystep knows of ATen's, one record for each, in one module per family.

A program, which a stranger may have written, calls only operators with a record, and their variants in
place (`add_`) and of lists (`_foreach_add`). A record has what torch's kernel trusts, so that
`program.soundness` checks it, and three rules: from which numbers of its inputs an operator computed a
number of a result, and how; which rows of the batch its results belong to; and its mathematical
notation. They follow the operator's definition in torch's documentation. Nothing is guessed by changing
inputs and looking what changes.
"""

from __future__ import annotations

import re

from everystep.ops.call import Call, Made, NoRuleError, kind_of
from everystep.ops.convolutions import CONVOLUTIONS
from everystep.ops.creating import CREATING
from everystep.ops.elementwise import ELEMENTWISE, foreach
from everystep.ops.indexing import INDEXING
from everystep.ops.losses import LOSSES
from everystep.ops.movements import MOVEMENTS
from everystep.ops.normalizations import NORMALIZATIONS
from everystep.ops.operator_record import OperatorRecord
from everystep.ops.optimizers import OPTIMIZERS
from everystep.ops.products import PRODUCTS
from everystep.ops.recurrent import RECURRENT
from everystep.ops.reductions import REDUCTIONS

__all__ = ["PERMITTED", "RECORDS", "how_made", "is_allowed", "record_of"]

#: By the names of operators, without an overload.
PERMITTED: dict[str, OperatorRecord] = {
    **ELEMENTWISE,
    **CREATING,
    **MOVEMENTS,
    **INDEXING,
    **REDUCTIONS,
    **PRODUCTS,
    **CONVOLUTIONS,
    **NORMALIZATIONS,
    **LOSSES,
    **RECURRENT,
    **OPTIMIZERS,
}
#: By kind; `foreach_` before it has the same record; only its `made` holds.
RECORDS = {kind_of(name): record for name, record in PERMITTED.items()}
_VARIANT = re.compile(r"^_foreach_|(?<=[a-z0-9])_$")


def record_of(name: str) -> OperatorRecord:
    """Return the record of an operator, or of the one that it varies; an empty one if there is none."""
    return PERMITTED.get(name) or PERMITTED.get(_VARIANT.sub("", name), OperatorRecord())


def is_allowed(name: str) -> bool:
    """Return whether a program may call an operator, by its name without an overload."""
    return not {name, _VARIANT.sub("", name)}.isdisjoint(PERMITTED) and not record_of(name).by_values


def how_made(call: Call) -> Made:
    """Return which numbers a number of a result was computed from, and how.

    Raises:
        NoRuleError: there is no rule for the operator, or none for these arguments.
    """
    # A list of tensors is a call for each of them: the rule of the operator for one tensor holds.
    kind = call.kind.removeprefix("foreach_")
    rule = RECORDS.get(kind, OperatorRecord()).made
    if rule is None:
        raise NoRuleError(f"{call.operation.operator} has no rule")
    try:
        return rule(call if kind == call.kind else foreach(call))
    except (ArithmeticError, LookupError, ValueError, TypeError, RuntimeError) as error:
        # A call of an operator in a form that the rule does not foresee is one without a rule.
        raise NoRuleError(str(error)) from error
