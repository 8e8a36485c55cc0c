"""The table of rules: looks up the one of an operator."""

from __future__ import annotations

from everystep.ops.activations import ACTIVATIONS, WITH_ARGUMENTS
from everystep.ops.call import Call, Made, NoRuleError
from everystep.ops.convolutions import CONVOLUTIONS
from everystep.ops.elementwise import (
    BY_ARGUMENTS,
    ELEMENTWISE,
    elementwise,
    foreach,
)
from everystep.ops.losses import LOSSES
from everystep.ops.margins import MARGINS
from everystep.ops.movements import DRAWN, FILLED, MOVED, PICKED, drawn, filled, moved
from everystep.ops.normalizations import NORMALIZATIONS, running
from everystep.ops.optimizers import FUSED, fused, unscaled
from everystep.ops.recurrent import RECURRENT
from everystep.ops.resizing import RESIZING
from everystep.ops.sums import PRODUCTS, REDUCTIONS, matrix_product

__all__ = ["KINDS", "how_made"]

_RULES = {
    **dict.fromkeys(PRODUCTS, matrix_product),
    **REDUCTIONS,
    **CONVOLUTIONS,
    **LOSSES,
    **MARGINS,
    **NORMALIZATIONS,
    **PICKED,
    **RECURRENT,
    **RESIZING,
    **BY_ARGUMENTS,
    **WITH_ARGUMENTS,
    **dict.fromkeys(MOVED, moved),
    **dict.fromkeys(FILLED, filled),
    **dict.fromkeys(DRAWN, drawn),
}
_ELEMENTWISE = ELEMENTWISE | ACTIVATIONS
_UNSCALED = "amp_foreach_non_finite_check_and_unscale"
#: Every kind that has a rule; `foreach_` before it has the same.
KINDS = {*_RULES, *_ELEMENTWISE, *FUSED, _UNSCALED}


def how_made(call: Call, written: str) -> Made:
    """Return which numbers one number of a result was made from, and how.

    written: the name of the tensor that it is a number of: the result at `call.place`, or an argument
    that the operation writes into.

    Raises:
        NoRuleError: there is no rule for the operator, or none for these arguments.
    """
    if call.kind in FUSED:
        return fused(call, written)
    if call.kind == _UNSCALED:
        return unscaled(call, written)
    if written not in call.operation.results:
        for key in ("running_mean", "running_var"):
            if call.arguments.get(key) == written and "batch_norm" in call.kind:
                return running(call, key)
    if call.kind.startswith("foreach_"):
        call = foreach(call)
    if call.kind == "zero" or (call.kind == "fill" and not isinstance(call.arguments["value"], str)):
        return filled(call)
    try:
        if call.kind in _RULES:
            return _RULES[call.kind](call)
        if call.kind in _ELEMENTWISE:
            return elementwise(call, _ELEMENTWISE[call.kind])
    except (KeyError, IndexError, ValueError, TypeError, RuntimeError) as error:
        # A call of an operator in a form that the rule does not foresee is one without a rule.
        raise NoRuleError(str(error)) from error
    raise NoRuleError(f"{call.operation.operator} has no rule")
