"""Rules of activation functions and their derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from everystep.program.elements.call import Axis, Call, Formula, Made, Numbers, Piece
from everystep.program.elements.elementwise import Rule, clamp, elementwise, erf, named, unary

__all__ = ["ACTIVATIONS", "WITH_ARGUMENTS"]


def _gelu(self: float) -> float:
    return 0.5 * self * (1 + erf(self / math.sqrt(2)))


def _gelu_slope(grad_output: float, self: float) -> Any:
    density = np.exp(-self * self / 2) / math.sqrt(2 * math.pi)
    return grad_output * (0.5 * (1 + erf(self / math.sqrt(2))) + self * density)


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x)) if x >= 0 or x != x else np.exp(x) / (1 + np.exp(x))


def _softplus(self: float, beta: float, threshold: float) -> float:
    return self if self * beta > threshold else math.log1p(np.exp(self * beta)) / beta


def _log_sigmoid(self: float) -> float:
    return min(0.0, self) - math.log1p(np.exp(-abs(self)))


def _mish(self: float) -> Any:
    return self * np.tanh(_softplus(self, 1.0, 20.0))


def _mish_slope(grad_output: float, self: float) -> Any:
    bent = np.tanh(_softplus(self, 1.0, 20.0))
    return grad_output * (bent + self * _sigmoid(self) * (1 - bent * bent))


def _elu_slope(
    grad_output: float,
    self_or_result: float,
    alpha: float,
    scale: float,
    input_scale: float,
    is_result: bool,
) -> Any:
    if self_or_result > 0:
        return grad_output * scale
    if is_result:
        return grad_output * input_scale * (self_or_result + alpha * scale)
    return grad_output * input_scale * alpha * scale * np.exp(self_or_result * input_scale)


def _softshrink(self: float, lambd: float) -> float:
    return self - lambd if self > lambd else self + lambd if self < -lambd else self * 0.0


def _hardswish_slope(grad_output: float, self: float) -> float:
    if self <= -3:
        return 0.0
    return grad_output if self >= 3 else grad_output * (self / 3 + 0.5)


ACTIVATIONS: dict[str, Rule] = {
    "threshold": (
        "self if self > threshold else value",
        ("self", "threshold", "value"),
        lambda self, threshold, value: value if self <= threshold else self,
    ),
    "hardtanh": (
        "self , kept between min_val and max_val",
        ("self", "min_val", "max_val"),
        lambda self, min_val, max_val: clamp(self, min_val, max_val),
    ),
    "relu": named("relu", lambda x: x if x != x else max(x, 0.0)),
    "sigmoid": named("sigmoid", _sigmoid),
    "silu": unary("self * sigmoid( self )", lambda x: x * _sigmoid(x)),
    "log_sigmoid_forward": named("logsigmoid", _log_sigmoid),
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
    "hardsigmoid": named("hardsigmoid", lambda x: clamp(x + 3, 0, 6) / 6),
    "hardswish": named("hardswish", lambda x: x * clamp(x + 3, 0, 6) / 6),
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
    "celu": (
        "celu( self , alpha )",
        ("self", "alpha"),
        lambda self, alpha: self if self > 0 else alpha * np.expm1(self / alpha),
    ),
    "elu_backward": (
        "grad_output * elu'( self_or_result )",
        ("grad_output", "self_or_result", "alpha", "scale", "input_scale", "is_result"),
        _elu_slope,
    ),
    "hardshrink": (
        "0 if - lambd <= self <= lambd else self",
        ("self", "lambd"),
        lambda self, lambd: 0.0 if -lambd <= self <= lambd else self,
    ),
    "hardshrink_backward": (
        "0 if - lambd <= self <= lambd else grad_out",
        ("grad_out", "self", "lambd"),
        lambda grad_out, self, lambd: 0.0 if -lambd <= self <= lambd else grad_out,
    ),
    "softshrink": ("softshrink( self , lambd )", ("self", "lambd"), _softshrink),
    "softshrink_backward": (
        "0 if - lambd <= self <= lambd else grad_output",
        ("grad_output", "self", "lambd"),
        lambda grad_output, self, lambd: 0.0 if -lambd <= self <= lambd else grad_output,
    ),
    "hardsigmoid_backward": (
        "grad_output / 6 if - 3 < self < 3 else 0",
        ("grad_output", "self"),
        lambda grad_output, self: grad_output / 6 if -3 < self < 3 else 0.0,
    ),
    "hardswish_backward": (
        "grad_output * hardswish'( self )",
        ("grad_output", "self"),
        _hardswish_slope,
    ),
    "mish": unary("self * tanh( softplus( self ) )", _mish),
    "mish_backward": ("grad_output * mish'( self )", ("grad_output", "self"), _mish_slope),
    "prelu_kernel": (
        "self if self > 0 else weight * self",
        ("self", "weight"),
        lambda self, weight: self if self > 0 else weight * self,
    ),
}


def _gelu_or_slope(call: Call) -> Made:
    """Return the rule of `gelu` and its derivative; of their approximation, the numbers alone."""
    is_backward = call.kind == "gelu_backward"
    keys = ("grad_output", "self") if is_backward else ("self",)
    text = "grad_output * gelu'( self )" if is_backward else "gelu( self )"
    if call.value("approximate") == "none":
        return elementwise(call, (text, keys, _gelu_slope if is_backward else _gelu))
    return Formula(text, {key: call.aligned(key) for key in keys})


def _log_sigmoid_backward(call: Call) -> Made:
    """Return the rule of a derivative that is computed from `buffer`, exp(-|self|), on a CPU."""
    given = {key: call.aligned(key) for key in ("grad_output", "self")}
    if not call.tensor("buffer").numel():
        text = "grad_output * sigmoid( - self )"
        return Formula(text, given, lambda grad_output, self: grad_output[0] * _sigmoid(-self[0]))

    def of(grad_output: Numbers, self: Numbers, buffer: Numbers) -> Any:
        part = buffer[0] / (1 + buffer[0])
        return grad_output[0] * (1 - part if self[0] < 0 else part)

    text = "grad_output * ( 1 / ( 1 + buffer ) if self < 0 else buffer / ( 1 + buffer ) )"
    return Formula(text, given | {"buffer": call.aligned("buffer")}, of)


def _prelu_backward(call: Call) -> Made:
    given = {key: call.aligned(key) for key in ("grad_output", "self", "weight")}
    if call.place == 0:
        text = "grad_output if self > 0 else weight * grad_output"
        return Formula(text, given, lambda **n: n["grad_output"][0] * _prelu_slope(n))
    del given["weight"]
    text = "0 if self > 0 else self * grad_output"
    return Formula(
        text, given, lambda grad_output, self: 0.0 if self[0] > 0 else self[0] * grad_output[0]
    )


def _prelu_slope(numbers: dict[str, Numbers]) -> Any:
    return 1.0 if numbers["self"][0] > 0 else numbers["weight"][0]


def _halves(call: Call) -> tuple[Piece, Piece, int]:
    """Return the numbers of both halves of `glu`'s argument, and in which of them the wanted one is."""
    dim = call.value("dim") % len(call.index)
    half = call.shape("self")[dim] // 2
    own = call.index[dim]

    def at(place: int) -> Piece:
        places: list[Axis] = list(call.index)
        places[dim] = place
        return call.piece("self", *places)

    return at(own % half), at(own % half + half), own // half


def _glu(call: Call) -> Made:
    first, second, _ = _halves(call)
    given = {"a": first, "b": second}
    return Formula("a * sigmoid( b )", given, lambda a, b: a[0] * _sigmoid(b[0]))


def _glu_backward(call: Call) -> Made:
    first, second, which = _halves(call)
    dim = call.value("dim") % len(call.index)
    places: list[Axis] = list(call.index)
    places[dim] = call.index[dim] % (call.shape("self")[dim] // 2)
    given = {"grad_output": call.piece("grad_output", *places), "b": second}
    if not which:
        return Formula(
            "grad_output * sigmoid( b )",
            given,
            lambda grad_output, b: grad_output[0] * _sigmoid(b[0]),
        )

    def of(grad_output: Numbers, b: Numbers, a: Numbers) -> Any:
        bent = _sigmoid(b[0])
        return grad_output[0] * a[0] * bent * (1 - bent)

    text = "grad_output * a * sigmoid( b ) * ( 1 - sigmoid( b ) )"
    return Formula(text, given | {"a": first}, of)


#: Rules that depend on arguments, or on other places.
WITH_ARGUMENTS: dict[str, Callable[[Call], Made]] = {
    "gelu": _gelu_or_slope,
    "gelu_backward": _gelu_or_slope,
    "log_sigmoid_backward": _log_sigmoid_backward,
    "prelu_kernel_backward": _prelu_backward,
    "glu": _glu,
    "glu_backward": _glu_backward,
}
