"""What operators do with plain numbers and with tensors: a plain number is as a tensor of one element.

Whatever is no plain number is taken for a tensor; so torch is not needed for plain numbers.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

__all__ = ["OPERATIONS", "bounded", "is_number", "plain", "truth"]

OPERATIONS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: lambda a, b: bounded(a + b),
    ast.Sub: lambda a, b: bounded(a - b),
    ast.Mult: lambda a, b: bounded(a * b),
    ast.Div: lambda a, b: _divide(operator.truediv, a, b),
    ast.FloorDiv: lambda a, b: _divide(operator.floordiv, a, b),
    ast.Mod: lambda a, b: _divide(operator.mod, a, b),
    ast.Pow: lambda a, b: _power(a, b),
    ast.MatMult: operator.matmul,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: lambda value: not truth(value),
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


def is_number(value: Any) -> bool:
    """Tell plain numbers from tensors."""
    return isinstance(value, int | float)


def plain(value: Any) -> Any:
    """Return a number, or the one element of a tensor, as a plain number."""
    if is_number(value):
        return value
    if value.numel() != 1:
        shape = tuple(value.shape)
        raise ValueError(
            f"one number is needed, not a tensor of shape {shape}; take its mean, norm, max, ..."
        )
    if value.is_complex():
        raise ValueError("this is a complex number; take its abs(...)")
    return value.item()


def truth(value: Any) -> bool:
    """Tell whether a number, or the one element of a tensor, is not 0."""
    if not is_number(value) and value.numel() != 1:
        shape = tuple(value.shape)
        raise ValueError(
            f"a tensor of shape {shape} is no condition; write any(...) or all(...) around it"
        )
    return bool(value)


def bounded(number: Any) -> Any:
    """Return a result as it is, but integers from 2**63 as floats, so that none can fill the memory."""
    if type(number) is not int or abs(number) < 2**63:
        return number
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def _divide(operation: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    try:
        return bounded(operation(a, b))
    except ZeroDivisionError:  # of plain numbers only; torch's is another
        if operation is operator.mod or a == 0 or math.isnan(a):
            return math.nan
        return math.copysign(math.inf, a) * math.copysign(1, b)


def _power(a: Any, b: Any) -> Any:
    if not (is_number(a) and is_number(b)):
        return a**b
    try:
        return math.pow(a, b)  # of floats, so that it takes no time
    except (ValueError, OverflowError):
        if a < 0 and b % 1:
            return math.nan
        return -math.inf if math.copysign(1, a) < 0 and b % 2 == 1 else math.inf
