"""The operators and functions, for plain numbers and for tensors, and the constants.

A plain number acts like a tensor of one element. Everything else is assumed to be a tensor, so plain
numbers do not need torch.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

__all__ = [
    "CONSTANTS",
    "FUNCTIONS",
    "OF_EACH",
    "OPERATIONS",
    "bounded",
    "is_number",
    "plain",
    "truth",
]

# Lambdas, not `operator.truediv` itself: of plain numbers, Python raises where torch has infinity or
# NaN.
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
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


def is_number(value: Any) -> bool:
    """Return whether a value is a plain number, not a tensor."""
    return isinstance(value, int | float)


def plain(value: Any) -> Any:
    """Return a number, or the one element of a tensor, as a plain number."""
    if is_number(value):
        return value
    if value.numel() != 1:
        shape = tuple(value.shape)
        raise ValueError(
            f"expected one number, not a tensor of shape {shape}; use its mean, norm, max, ..."
        )
    if value.is_complex():
        raise ValueError("this is a complex number; use abs(...) of it")
    return value.item()


def truth(value: Any) -> bool:
    """Return whether a number, or the one element of a tensor, is not 0."""
    if not is_number(value) and value.numel() != 1:
        shape = tuple(value.shape)
        raise ValueError(f"a tensor of shape {shape} is not a condition; use any(...) or all(...) of it")
    return bool(value)


def _where(condition: Any, yes: Any, no: Any) -> Any:
    values = condition, yes, no
    if all(map(is_number, values)):
        return yes if condition else no
    import torch

    device = next(value.device for value in values if not is_number(value))
    # Numbers as float64 tensors: of one element, they leave the dtype of the others as it is.
    condition, yes, no = (
        torch.tensor(value, dtype=None if isinstance(value, bool) else torch.float64, device=device)
        if is_number(value)
        else value
        for value in values
    )
    return torch.where(condition if condition.dtype == torch.bool else condition != 0, yes, no)


def bounded(number: Any) -> Any:
    """Return a result unchanged, but integers from 2**63 as floats, so that none can fill the memory."""
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
        # The sign of a zero counts: 1 / -0.0 is -inf, as in torch.
        return math.copysign(math.inf, a) * math.copysign(1, b)


def _power(a: Any, b: Any) -> Any:
    if not (is_number(a) and is_number(b)):
        return a**b
    try:
        return math.pow(a, b)  # of floats, so that it takes no time
    except (ValueError, OverflowError):
        if a < 0 and b % 1:
            return math.nan
        # As IEEE 754 has it: an odd power of a negative number, or of -0.0, keeps the sign.
        return -math.inf if math.copysign(1, a) < 0 and b % 2 == 1 else math.inf


def _of_each(function: Callable[[float], Any], x: Any) -> Any:
    """Apply a function of `math` to a number; to a tensor, torch's of the same name."""
    if not is_number(x):
        return getattr(x, function.__name__)()
    try:
        return function(x)
    except OverflowError:
        return math.inf
    except ValueError:
        return math.nan if x else -math.inf  # log(0)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    **{name: partial(_of_each, getattr(math, name)) for name in ("sqrt", "exp", "log", "log10")},
    "sign": lambda x: (x > 0) - (x < 0) if is_number(x) else x.sign(),
    "clip": lambda x, low, high: _clip(x, low, high),
    "where": _where,
    "sum": lambda x: x + 0 if is_number(x) else (_floating(x) if x.is_floating_point() else x).sum(),
    "mean": lambda x: float(x) if is_number(x) else _floating(x).mean(),
    "std": lambda x: math.nan if _is_single(x) else _floating(x).std(),
    "var": lambda x: math.nan if _is_single(x) else _floating(x).var(),
    "min": lambda *values: _extreme(min, values),
    "max": lambda *values: _extreme(max, values),
    "median": lambda x: float(x) if is_number(x) else _floating(x).median(),
    "quantile": lambda x, q: _quantile(x, plain(q)),
    "norm": lambda x: abs(float(x)) if is_number(x) else _norm(_floating(x)),
    "rms": lambda x: abs(float(x)) if is_number(x) else _norm(_floating(x)) / math.sqrt(x.numel()),
    "zeros": lambda x: float(x == 0) if is_number(x) else (x == 0).sum().double() / x.numel(),
    "nonfinite": lambda x: int(not math.isfinite(x)) if is_number(x) else (~x.isfinite()).sum(),
    "numel": lambda x: 1 if is_number(x) else x.numel(),
    **{name: partial(_of_each, getattr(math, name)) for name in ("isnan", "isinf", "isfinite")},
    "any": lambda x: bool(x) if is_number(x) else x.any(),
    "all": lambda x: bool(x) if is_number(x) else x.all(),
    "dot": lambda a, b: _dot(a, b),
    "cosine": lambda a, b: _cosine(a, b),
}
#: Functions of each element; the others return one number.
OF_EACH = frozenset(
    {"abs", "sqrt", "exp", "log", "log10", "sign", "clip", "where", "isnan", "isinf", "isfinite"}
)
CONSTANTS = {"nan": math.nan, "inf": math.inf, "pi": math.pi}


def _norm(x: Any) -> Any:
    """Return the 2-norm of all elements; by what Tensor.norm ends up with, in half the time."""
    import torch

    return torch.linalg.vector_norm(x)


def _floating(x: Any) -> Any:
    """Return a tensor with a dtype that supports means and norms; a number unchanged."""
    if is_number(x):
        return x
    if not x.is_floating_point():
        return x if x.is_complex() else x.double()  # float32 rounds integers from 2**24
    return x if x.element_size() >= 4 else x.float()


def _is_single(x: Any) -> bool:
    """Return whether it has fewer than two elements, so that it has no spread; torch would warn."""
    return is_number(x) or x.numel() < 2


def _extreme(choose: Callable[[list[Any]], Any], values: tuple[Any, ...]) -> Any:
    if len(values) == 1 and not is_number(values[0]):
        name, shape = choose.__name__, tuple(values[0].shape)
        if not values[0].numel():
            raise ValueError(f"a tensor of shape {shape} is empty and has no {name}")
        return getattr(values[0], name)()
    numbers = [*map(plain, values)]
    # Python's min and max ignore NaN or not, by its place.
    return math.nan if any(map(math.isnan, numbers)) else choose(numbers)


def _clip(x: Any, low: Any, high: Any) -> Any:
    low, high = plain(low), plain(high)
    if not is_number(x):
        return x.clamp(low, high)
    return math.nan if math.isnan(low) or math.isnan(high) else min(max(x, low), high)


def _quantile(x: Any, q: Any) -> Any:
    if not 0 <= q <= 1:
        raise ValueError(f"quantile needs a fraction between 0 and 1, not {q}")
    if is_number(x):
        return float(x)
    return _floating(x).quantile(q) if x.numel() else math.nan


def _dot(a: Any, b: Any) -> Any:
    shapes = [() if is_number(x) else tuple(x.shape) for x in (a, b)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the shapes {shapes[0]} and {shapes[1]} do not match")
    # Not torch.dot, which takes vectors only.
    product = _floating(a) * _floating(b)
    return bounded(product) if is_number(product) else product.sum()


def _cosine(a: Any, b: Any) -> Any:
    product = _dot(_direction(a), _direction(b))
    return product if FUNCTIONS["numel"](a) else math.nan


def _direction(x: Any) -> Any:
    """Return a vector of length 1. Scaled first: squares of elements of 1e-25 are 0 in float32."""
    if is_number(x):
        return x / abs(x) if x else math.nan
    x = _floating(x)
    scaled = x / x.abs().max() if x.numel() else x
    return scaled / _norm(scaled)
