"""Rules of operators whose result at a place depends on their inputs at that place alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from everystep.program.elements.call import Call, Formula, Made, NoRuleError, Piece

__all__ = ["ELEMENTWISE", "division", "elementwise", "foreach", "gelu", "outer"]

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


def _unary(text: str, function: Callable[[Any], Any]) -> Rule:
    return text, ("self",), lambda self: function(self)


def _named(name: str, function: Callable[[Any], Any]) -> Rule:
    return _unary(f"{name}( self )", function)


def _erf(x: float) -> float:
    return math.erf(x) if x == x else x


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x)) if x >= 0 or x != x else np.exp(x) / (1 + np.exp(x))


def _gelu(self: float) -> float:
    return 0.5 * self * (1 + _erf(self / math.sqrt(2)))


def _gelu_slope(grad_output: float, self: float) -> Any:
    density = np.exp(-self * self / 2) / math.sqrt(2 * math.pi)
    return grad_output * (0.5 * (1 + _erf(self / math.sqrt(2))) + self * density)


def _clamp(self: Any, min: Any, max: Any) -> Any:
    if self != self:
        return self
    low = self if min is None else np.maximum(self, min)
    return low if max is None else np.minimum(low, max)


def _softplus(self: float, beta: float, threshold: float) -> float:
    return self if self * beta > threshold else math.log1p(np.exp(self * beta)) / beta


def _lerp(self: float, end: float, weight: float) -> float:
    if abs(weight) < 0.5:
        return self + weight * (end - self)
    return end - (end - self) * (1 - weight)


def _log_sigmoid(self: float) -> float:
    return min(0.0, self) - math.log1p(np.exp(-abs(self)))


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
    "logical_not": _unary("not self", lambda x: not x),
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
    "threshold": (
        "self if self > threshold else value",
        ("self", "threshold", "value"),
        lambda self, threshold, value: value if self <= threshold else self,
    ),
    "clamp": ("self , kept between min and max", ("self", "min", "max"), _clamp),
    "hardtanh": (
        "self , kept between min_val and max_val",
        ("self", "min_val", "max_val"),
        lambda self, min_val, max_val: _clamp(self, min_val, max_val),
    ),
    "clamp_min": (
        "self , at least min",
        ("self", "min"),
        lambda self, min: _clamp(self, min, None),
    ),
    "clamp_max": (
        "self , at most max",
        ("self", "max"),
        lambda self, max: _clamp(self, None, max),
    ),
    "abs": _unary("| self |", abs),
    "neg": _unary("- self", lambda x: -x),
    "reciprocal": _unary("1 / self", lambda x: np.divide(1.0, x)),
    "exp": _named("exp", np.exp),
    "exp2": _named("exp2", np.exp2),
    "expm1": _named("expm1", np.expm1),
    "log": _named("log", np.log),
    "log1p": _named("log1p", np.log1p),
    "log2": _named("log2", np.log2),
    "log10": _named("log10", np.log10),
    "sqrt": _named("sqrt", np.sqrt),
    "rsqrt": _unary("1 / sqrt( self )", lambda x: np.divide(1.0, np.sqrt(x))),
    "sin": _named("sin", np.sin),
    "cos": _named("cos", np.cos),
    "tan": _named("tan", np.tan),
    "sinh": _named("sinh", np.sinh),
    "cosh": _named("cosh", np.cosh),
    "tanh": _named("tanh", np.tanh),
    "asin": _named("asin", np.arcsin),
    "acos": _named("acos", np.arccos),
    "atan": _named("atan", np.arctan),
    "erf": _named("erf", _erf),
    "floor": _named("floor", np.floor),
    "ceil": _named("ceil", np.ceil),
    "trunc": _named("trunc", np.trunc),
    "sign": _named("sign", np.sign),
    "sgn": _named("sign", np.sign),
    "isnan": _unary("whether self is NaN", np.isnan),
    "isinf": _unary("whether self is infinite", np.isinf),
    "relu": _named("relu", lambda x: x if x != x else max(x, 0.0)),
    "sigmoid": _named("sigmoid", _sigmoid),
    "silu": _unary("self * sigmoid( self )", lambda x: x * _sigmoid(x)),
    "log_sigmoid_forward": _named("logsigmoid", _log_sigmoid),
    "softplus": (
        "softplus( self , beta , threshold )",
        ("self", "beta", "threshold"),
        _softplus,
    ),
    "leaky_relu": (
        "self if self > 0 else negative_slope * self",
        ("self", "negative_slope"),
        lambda self, negative_slope: self if self > 0 else negative_slope * self,
    ),
    "elu": (
        "elu( self , alpha , scale , input_scale )",
        ("self", "alpha", "scale", "input_scale"),
        lambda self, alpha, scale, input_scale: (
            scale * self if self > 0 else scale * alpha * np.expm1(input_scale * self)
        ),
    ),
    "hardsigmoid": _named("hardsigmoid", lambda x: _clamp(x + 3, 0, 6) / 6),
    "hardswish": _named("hardswish", lambda x: x * _clamp(x + 3, 0, 6) / 6),
    "copy": ("src", ("src",), lambda src: src),
    "clone": _unary("self", lambda x: x),
    "to_copy": _unary("self", lambda x: x),
    "lift_fresh": _unary("self", lambda x: x),
    "threshold_backward": (
        "grad_output if self > threshold else 0",
        ("grad_output", "self", "threshold"),
        lambda grad_output, self, threshold: 0.0 if self <= threshold else grad_output,
    ),
    "tanh_backward": (
        "grad_output * ( 1 - output ^ 2 )",
        ("grad_output", "output"),
        lambda grad_output, output: grad_output * (1 - output * output),
    ),
    "sigmoid_backward": (
        "grad_output * ( 1 - output ) * output",
        ("grad_output", "output"),
        lambda grad_output, output: grad_output * (1 - output) * output,
    ),
    "silu_backward": (
        "grad_output * silu'( self )",
        ("grad_output", "self"),
        lambda grad_output, self: grad_output * _sigmoid(self) * (1 + self * (1 - _sigmoid(self))),
    ),
    "leaky_relu_backward": (
        "grad_output if self > 0 else negative_slope * grad_output",
        ("grad_output", "self", "negative_slope"),
        lambda grad_output, self, negative_slope: (
            grad_output if self > 0 else negative_slope * grad_output
        ),
    ),
    "hardtanh_backward": (
        "grad_output if min_val < self < max_val else 0",
        ("grad_output", "self", "min_val", "max_val"),
        lambda grad_output, self, min_val, max_val: (
            0.0 if self <= min_val or self >= max_val else grad_output
        ),
    ),
    "softplus_backward": (
        "grad_output * sigmoid( beta * self )",
        ("grad_output", "self", "beta", "threshold"),
        lambda grad_output, self, beta, threshold: (
            grad_output if self * beta > threshold else grad_output * _sigmoid(self * beta)
        ),
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


def gelu(call: Call) -> Made:
    """Return the rule of `gelu` and its derivative; of their approximation, the numbers alone."""
    is_backward = call.kind == "gelu_backward"
    keys = ("grad_output", "self") if is_backward else ("self",)
    text = "grad_output * gelu'( self )" if is_backward else "gelu( self )"
    if call.value("approximate") == "none":
        return elementwise(call, (text, keys, _gelu_slope if is_backward else _gelu))
    return Formula(text, {key: call.aligned(key) for key in keys})


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
