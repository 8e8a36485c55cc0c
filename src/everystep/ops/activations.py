"""Rules of activation functions and their derivatives."""

from __future__ import annotations

from collections.abc import Callable

from everystep.ops.call import Axis, Call, Formula, Made, Piece
from everystep.ops.elementwise import elementwise

__all__ = ["ACTIVATIONS", "WITH_ARGUMENTS"]

ACTIVATIONS: dict[str, str] = {
    "threshold": "value if self <= threshold else self",
    "hardtanh": "min(max(self, min_val), max_val)",
    "relu": "max(self, 0)",
    "sigmoid": "1 / (1 + exp(-self))",
    "silu": "self / (1 + exp(-self))",
    "softplus": "self if self * beta > threshold else log1p(exp(self * beta)) / beta",
    "leaky_relu": "self if self > 0 else negative_slope * self",
    "elu": "scale * self if self > 0 else scale * alpha * expm1(input_scale * self)",
    "celu": "self if self > 0 else alpha * expm1(self / alpha)",
    "hardsigmoid": "min(max(self + 3, 0), 6) / 6",
    "hardswish": "self * min(max(self + 3, 0), 6) / 6",
    "hardshrink": "0 if -lambd <= self <= lambd else self",
    "softshrink": "self - lambd if self > lambd else self + lambd if self < -lambd else self * 0",
    "mish": "self * tanh(log1p(exp(self)))",
    "prelu_kernel": "self if self > 0 else weight * self",
    "threshold_backward": "0 if self <= threshold else grad_output",
    "tanh_backward": "grad_output * (1 - output ^ 2)",
    "sigmoid_backward": "grad_output * (1 - output) * output",
    "silu_backward": "grad_output * s * (1 + self * (1 - s)) where s = 1 / (1 + exp(-self))",
    "leaky_relu_backward": "grad_output if self > 0 else negative_slope * grad_output",
    "hardtanh_backward": "0 if self <= min_val or self >= max_val else grad_output",
    "softplus_backward": "grad_output / (1 if self * beta > threshold else 1 + exp(-self * beta))",
    "hardshrink_backward": "0 if -lambd <= self <= lambd else grad_out",
    "softshrink_backward": "0 if -lambd <= self <= lambd else grad_output",
    "hardsigmoid_backward": "grad_output / 6 if -3 < self < 3 else 0",
    "hardswish_backward": (
        "0 if self <= -3 else grad_output if self >= 3 else grad_output * (self / 3 + 0.5)"
    ),
    "mish_backward": "grad_output * (t + self * (1 - t ^ 2) / (1 + exp(-self)))"
    " where t = tanh(log1p(exp(self)))",
}


def _gelu(call: Call) -> Made:
    if call.value("approximate") == "none":
        return elementwise(call, "self * (1 + erf(self / sqrt(2))) / 2")
    return elementwise(call, "self * (1 + tanh(sqrt(2 / pi) * (self + 0.044715 * self ^ 3))) / 2")


def _gelu_backward(call: Call) -> Made:
    if call.value("approximate") == "none":
        slope = "(1 + erf(self / sqrt(2))) / 2 + self * exp(-self ^ 2 / 2) / sqrt(2 * pi)"
        return elementwise(call, f"grad_output * ({slope})")
    inner = "self * (1 - t ^ 2) * sqrt(2 / pi) * (1 + 3 * 0.044715 * self ^ 2)"
    t = "tanh(sqrt(2 / pi) * (self + 0.044715 * self ^ 3))"
    return elementwise(call, f"grad_output * (1 + t + {inner}) / 2 where t = {t}")


def _elu_backward(call: Call) -> Made:
    below = "input_scale * alpha * scale * exp(self_or_result * input_scale)"
    if call.value("is_result"):
        below = "input_scale * (self_or_result + alpha * scale)"
    return elementwise(call, f"grad_output * scale if self_or_result > 0 else grad_output * {below}")


def _log_sigmoid(call: Call) -> Made:
    """Return the rule of both results; the second is a buffer, which is empty but on a CPU."""
    text = "exp(-abs(self))" if call.place else "min(self, 0) - log1p(exp(-abs(self)))"
    return Formula(text, {"self": call.aligned("self")})


def _log_sigmoid_backward(call: Call) -> Made:
    """Return the rule of a derivative that is computed from `buffer`, exp(-|self|), on a CPU."""
    if not call.tensor("buffer").numel():
        return elementwise(call, "grad_output / (1 + exp(self))")
    return elementwise(
        call, "grad_output * (1 - part if self < 0 else part) where part = buffer / (1 + buffer)"
    )


def _prelu_backward(call: Call) -> Made:
    given = {key: call.aligned(key) for key in ("grad_output", "self", "weight")}
    if call.place == 0:
        return Formula("grad_output if self > 0 else weight * grad_output", given)
    del given["weight"]
    return Formula("0 if self > 0 else self * grad_output", given)


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
    a, b, _ = _halves(call)
    return Formula("a / (1 + exp(-b))", {"a": a, "b": b})


def _glu_backward(call: Call) -> Made:
    a, b, which = _halves(call)
    dim = call.value("dim") % len(call.index)
    places: list[Axis] = list(call.index)
    places[dim] = call.index[dim] % (call.shape("self")[dim] // 2)
    given = {"grad_output": call.piece("grad_output", *places), "b": b}
    if not which:
        return Formula("grad_output / (1 + exp(-b))", given)
    text = "grad_output * a * s * (1 - s) where s = 1 / (1 + exp(-b))"
    return Formula(text, given | {"a": a})


#: Rules that depend on arguments, or on other places.
WITH_ARGUMENTS: dict[str, Callable[[Call], Made]] = {
    "elu_backward": _elu_backward,
    "gelu": _gelu,
    "gelu_backward": _gelu_backward,
    "log_sigmoid_forward": _log_sigmoid,
    "log_sigmoid_backward": _log_sigmoid_backward,
    "prelu_kernel_backward": _prelu_backward,
    "glu": _glu,
    "glu_backward": _glu_backward,
}
