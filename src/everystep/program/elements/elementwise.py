"""Rules of operators whose result at a place depends on their inputs at that place alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from everystep.program.elements.call import Call, Formula, Made, NoRuleError, Piece

__all__ = [
    "ELEMENTWISE",
    "Rule",
    "clamp",
    "division",
    "elementwise",
    "erf",
    "foreach",
    "named",
    "outer",
    "unary",
]

#: The formula, the arguments that are tensors or numbers, and what it gives.
Rule = tuple[str, tuple[str, ...], Callable[..., Any]]


def elementwise(call: Call, rule: Rule) -> Made:
    """Return the rule of a call, with its numbers in the formula."""
    if call.place:
        raise NoRuleError("of another result than the first")
    text, keys, function = rule
    given: dict[str, Piece] = {}
    fixed: dict[str, Any] = {}
    for key in keys:
        value = call.arguments.get(key)
        if isinstance(value, str):
            given[key] = call.aligned(key)
        elif value is None:
            fixed[key] = None
            text = _replaced(text, key, "none")
        else:
            fixed[key] = call.scalar(key)
            text = _replaced(text, key, call.value(key))

    def of(**numbers: Any) -> Any:
        one = {key: value[0] for key, value in numbers.items()}
        return function(**fixed, **one)

    return Formula(_simplified(text), given, of)


def _replaced(text: str, key: str, value: Any) -> str:
    words = text.split(" ")
    return " ".join(str(value) if word == key else word for word in words)


def _simplified(text: str) -> str:
    for factor in ("1 * ", "1.0 * "):
        text = text.replace(f"+ {factor}", "+ ").replace(f"- {factor}", "- ")
    return text


def unary(text: str, function: Callable[[Any], Any]) -> Rule:
    """Return the rule of a function of one number, `self`."""
    return text, ("self",), lambda self: function(self)


def named(name: str, function: Callable[[Any], Any]) -> Rule:
    """Return the rule of a function of one number that has a name."""
    return unary(f"{name}( self )", function)


def erf(x: float) -> float:
    """Return the error function; NaN for NaN."""
    return math.erf(x) if x == x else x


def clamp(self: Any, min: Any, max: Any) -> Any:
    """Return a number, kept between two others, either of which may be None; NaN for NaN."""
    if self != self:
        return self
    low = self if min is None else np.maximum(self, min)
    return low if max is None else np.minimum(low, max)


def _lerp(self: float, end: float, weight: float) -> float:
    if abs(weight) < 0.5:
        return self + weight * (end - self)
    return end - (end - self) * (1 - weight)


_PAIR = ("self", "other")

ELEMENTWISE: dict[str, Rule] = {
    "add": ("self + alpha * other", (*_PAIR, "alpha"), lambda self, other, alpha: self + alpha * other),
    "sub": ("self - alpha * other", (*_PAIR, "alpha"), lambda self, other, alpha: self - alpha * other),
    "rsub": ("other - alpha * self", (*_PAIR, "alpha"), lambda self, other, alpha: other - alpha * self),
    "mul": ("self * other", _PAIR, lambda self, other: self * other),
    "maximum": (
        "the larger of self and other",
        _PAIR,
        lambda self, other: np.maximum(self, other),
    ),
    "minimum": (
        "the smaller of self and other",
        _PAIR,
        lambda self, other: np.minimum(self, other),
    ),
    "pow": ("self ^ exponent", ("self", "exponent"), lambda self, exponent: np.power(self, exponent)),
    "atan2": ("atan2( self , other )", _PAIR, lambda self, other: np.arctan2(self, other)),
    "eq": ("self == other", _PAIR, lambda self, other: self == other),
    "ne": ("self != other", _PAIR, lambda self, other: self != other),
    "lt": ("self < other", _PAIR, lambda self, other: self < other),
    "le": ("self <= other", _PAIR, lambda self, other: self <= other),
    "gt": ("self > other", _PAIR, lambda self, other: self > other),
    "ge": ("self >= other", _PAIR, lambda self, other: self >= other),
    "logical_and": ("self and other", _PAIR, lambda self, other: bool(self) and bool(other)),
    "logical_or": ("self or other", _PAIR, lambda self, other: bool(self) or bool(other)),
    "logical_xor": ("self xor other", _PAIR, lambda self, other: bool(self) != bool(other)),
    "bitwise_and": ("self and other", _PAIR, lambda self, other: int(self) & int(other)),
    "bitwise_or": ("self or other", _PAIR, lambda self, other: int(self) | int(other)),
    "logical_not": unary("not self", lambda x: not x),
    "floor_divide": (
        "floor( self / other )",
        _PAIR,
        lambda self, other: np.floor(np.divide(self, other)),
    ),
    "fmod": (
        "self - other * trunc( self / other )",
        _PAIR,
        lambda self, other: math.fmod(self, other) if other else math.nan,
    ),
    "logaddexp": (
        "log( exp( self ) + exp( other ) )",
        _PAIR,
        lambda self, other: np.logaddexp(self, other),
    ),
    "where": (
        "self if condition else other",
        ("condition", *_PAIR),
        lambda condition, self, other: self if condition else other,
    ),
    "masked_fill": (
        "value if mask else self",
        ("self", "mask", "value"),
        lambda self, mask, value: value if mask else self,
    ),
    "addcmul": (
        "self + value * tensor1 * tensor2",
        ("self", "tensor1", "tensor2", "value"),
        lambda self, tensor1, tensor2, value: self + value * tensor1 * tensor2,
    ),
    "addcdiv": (
        "self + value * tensor1 / tensor2",
        ("self", "tensor1", "tensor2", "value"),
        lambda self, tensor1, tensor2, value: self + value * tensor1 / tensor2,
    ),
    "lerp": ("self + weight * ( end - self )", ("self", "end", "weight"), _lerp),
    "clamp": ("self , kept between min and max", ("self", "min", "max"), clamp),
    "clamp_min": (
        "self , at least min",
        ("self", "min"),
        lambda self, min: clamp(self, min, None),
    ),
    "clamp_max": (
        "self , at most max",
        ("self", "max"),
        lambda self, max: clamp(self, None, max),
    ),
    "abs": unary("| self |", abs),
    "neg": unary("- self", lambda x: -x),
    "reciprocal": unary("1 / self", lambda x: np.divide(1.0, x)),
    "exp": named("exp", np.exp),
    "exp2": named("exp2", np.exp2),
    "expm1": named("expm1", np.expm1),
    "log": named("log", np.log),
    "log1p": named("log1p", np.log1p),
    "log2": named("log2", np.log2),
    "log10": named("log10", np.log10),
    "sqrt": named("sqrt", np.sqrt),
    "rsqrt": unary("1 / sqrt( self )", lambda x: np.divide(1.0, np.sqrt(x))),
    "sin": named("sin", np.sin),
    "cos": named("cos", np.cos),
    "tan": named("tan", np.tan),
    "sinh": named("sinh", np.sinh),
    "cosh": named("cosh", np.cosh),
    "tanh": named("tanh", np.tanh),
    "asin": named("asin", np.arcsin),
    "acos": named("acos", np.arccos),
    "atan": named("atan", np.arctan),
    "erf": named("erf", erf),
    "erfc": named("1 - erf", lambda x: math.erfc(x) if x == x else x),
    "round": named("round", np.round),
    "frac": unary("self - trunc( self )", lambda x: x - np.trunc(x)),
    "floor": named("floor", np.floor),
    "ceil": named("ceil", np.ceil),
    "trunc": named("trunc", np.trunc),
    "sign": named("sign", np.sign),
    "sgn": named("sign", np.sign),
    "isnan": unary("whether self is NaN", np.isnan),
    "isinf": unary("whether self is infinite", np.isinf),
    "copy": ("src", ("src",), lambda src: src),
    "clone": unary("self", lambda x: x),
    "to_copy": unary("self", lambda x: x),
    "lift_fresh": unary("self", lambda x: x),
    "remainder": (
        "self - other * floor( self / other )",
        _PAIR,
        lambda self, other: np.remainder(self, other) if other else math.nan,
    ),
    "xlogy": (
        "self * log( other ) , 0 if self is 0",
        _PAIR,
        lambda self, other: 0.0 if self == 0 and other == other else self * np.log(other),
    ),
    "native_dropout_backward": (
        "grad_output * mask * scale",
        ("grad_output", "mask", "scale"),
        lambda grad_output, mask, scale: grad_output * mask * scale,
    ),
}


def division(call: Call) -> Made:
    """Return the rule of `div`, which may round."""
    mode = call.value("rounding_mode") if "rounding_mode" in call else None
    if mode is None:
        return elementwise(call, ("self / other", _PAIR, lambda self, other: np.divide(self, other)))
    rounded = {"floor": np.floor, "trunc": np.trunc}[mode]
    return elementwise(
        call,
        (
            f"{mode}( self / other )",
            _PAIR,
            lambda self, other: rounded(np.divide(self, other)),
        ),
    )


def outer(call: Call) -> Made:
    """Return the rule of `addr`, which adds an outer product."""
    alpha, beta = call.scalar("alpha"), call.scalar("beta")
    row, column = call.index
    given = {"vec1": call.piece("vec1", row), "vec2": call.piece("vec2", column)}
    if beta:
        given["self"] = call.aligned("self")

    def of(vec1: Any, vec2: Any, self: Any = (0,)) -> Any:
        return beta * self[0] + alpha * vec1[0] * vec2[0]

    return Formula(_simplified(f"{beta} * self + {alpha} * vec1 * vec2"), given, of)


#: How the arguments of `_foreach_` operators are called by the operator that runs on each tensor.
_EACH = {
    "add": {"scalar": "other", "scalars": "other", "other": "other"},
    "addcdiv": {"scalars": "value"},
    "lerp": {"tensors1": "end", "weights": "weight"},
    "clamp_min": {"scalar": "min", "scalars": "min", "other": "min"},
    "clamp_max": {"scalar": "max", "scalars": "max", "other": "max"},
    "pow": {"exponent": "exponent"},
    "copy": {"self": "self", "src": "src"},
}
_LIKE_ADD = {"sub", "mul", "div", "maximum", "minimum"}


def foreach(call: Call) -> Call:
    """Return the call on one tensor that a `_foreach_` operator makes of the wanted result's list."""
    kind = call.kind.removeprefix("foreach_")
    known = "add" if kind in _LIKE_ADD else "addcdiv" if kind == "addcmul" else kind
    renamed = _EACH.get(known, {})
    arguments: dict[str, Any] = {}
    for key, value in call.arguments.items():
        each = value[call.place] if isinstance(value, list | tuple) else value
        arguments[renamed.get(key, key)] = each
    if kind in ("add", "sub"):
        arguments.setdefault("alpha", 1)
    if kind in ("addcmul", "addcdiv") and isinstance(arguments.get("value"), str):
        raise NoRuleError("the factors are in a tensor")
    return call.standing_for(kind, arguments)
