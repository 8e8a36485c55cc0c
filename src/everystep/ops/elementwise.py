"""Operators that make each number from one number of each tensor, activation functions among them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from everystep.ops.call import Axis, Call, Formula, Made, NoRuleError, Piece
from everystep.ops.formula import BINARY, UNARY, names_in
from everystep.ops.labels import MIXED, SHARED, SUM, Tracked, broadcast
from everystep.ops.operator_record import LineRule, MadeRule, OperatorRecord, alike
from everystep.ops.operators import parameters
from everystep.ops.row_rules import Result, RowsCall, RowsRule, along, of_shape, sum_of

__all__ = ["ELEMENTWISE", "by_formula", "each_alone", "foreach", "given_in"]


def by_formula(call: Call, text: str, **places: Piece) -> Made:
    """Return a formula of arguments at the wanted place, each under its own name.

    places: numbers of other places, by their name in the formula.
    """
    if call.place:
        raise NoRuleError("of another result than the first")
    return Formula(text, *given_in(text, call, call.index, places))


def given_in(
    text: str, call: Call, index: Sequence[Axis], places: Mapping[str, Piece] = MappingProxyType({})
) -> tuple[dict[str, Piece], dict[str, Any]]:
    """Return the numbers of tensors in a formula, at an index, and those that are settings.

    places: numbers of other places, by their name in the formula.
    """
    given: dict[str, Piece] = {}
    settings: dict[str, Any] = {}
    for name in names_in(text):
        if name in places:
            given[name] = places[name]
        elif isinstance(call.arguments[name], str):
            given[name] = call.aligned(name, index)
        else:
            settings[name] = call.scalar(name)
    return given, settings


#: Of the first result, of the numbers of arguments at its place.
_FORMULAS: dict[str, str] = {
    "add": "self + alpha * other",
    "sub": "self - alpha * other",
    "rsub": "other - alpha * self",
    "mul": "self * other",
    "maximum": "max(self, other)",
    "minimum": "min(self, other)",
    "pow": "self ^ exponent",
    "eq": "self == other",
    "ne": "self != other",
    "lt": "self < other",
    "le": "self <= other",
    "gt": "self > other",
    "ge": "self >= other",
    "logical_and": "self and other",
    "logical_or": "self or other",
    "logical_xor": "(self != 0) != (other != 0)",
    "logical_not": "not self",
    # Not floor(self / other): rounded up, the quotient of 1 and 0.1 is 10, but 0.1 is 9 times in 1.
    "floor_divide": "floor_divide(self, other)",
    "where": "self if condition else other",
    "masked_fill": "value if mask else self",
    "addcmul": "self + value * tensor1 * tensor2",
    "addcdiv": "self + value * tensor1 / tensor2",
    "lerp": "self + weight * (end - self)",
    "neg": "-self",
    "reciprocal": "1 / self",
    "rsqrt": "1 / sqrt(self)",
    "frac": "self - trunc(self)",
    "sgn": "sign(self)",
    "copy": "src",
    **dict.fromkeys(("clone", "_to_copy"), "self"),
    "xlogy": "0 if self == 0 and not isnan(other) else self * log(other)",
    "native_dropout_backward": "grad_output * mask * scale",
    **{name: f"{name}(self)" for name in UNARY},
    **{name: f"{name}(self, other)" for name in BINARY},
    # Activation functions.
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
    # `* 0` keeps NaN, as torch does.
    "softshrink": "self - lambd if self > lambd else self + lambd if self < -lambd else self * 0",
    "mish": "self * tanh(log1p(exp(self)))",
    "_prelu_kernel": "self if self > 0 else weight * self",
    # Their derivatives.
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
        "0 if self <= -3 else grad_output * (self / 3 + 0.5) if self < 3 else grad_output"
    ),
    "mish_backward": (
        "grad_output * (t + self * (1 - t ^ 2) / (1 + exp(-self))) where t = tanh(log1p(exp(self)))"
    ),
}


def _clamp(call: Call) -> Made:
    """Return the rule of `clamp` and its variants, with one or both bounds."""
    text, places, settings = "self", {"self": call.aligned("self")}, {}
    # In this order: where the bounds cross, the upper one holds.
    for key, name, kept in (("min", "low", "max"), ("max", "high", "min")):
        if key not in call:
            continue
        text = f"{kept}({text}, {name})"
        if isinstance(call.arguments[key], str):
            places[name] = call.aligned(key)
        else:
            settings[name] = call.scalar(key)
    return Formula(text, places, settings)


def _division_text(call: Call) -> str:
    mode = call.value("rounding_mode") if "rounding_mode" in call else None
    return f"{mode}(self / other)" if mode else "self / other"


def _division(call: Call) -> Made:
    text = _division_text(call)
    return by_formula(call, _FORMULAS["floor_divide"] if text.startswith("floor") else text)


def _round(call: Call) -> Made:
    if not call.arguments.get("decimals"):
        return by_formula(call, "round(self)")
    return by_formula(call, "round(self * 10 ^ decimals) / 10 ^ decimals")


def _gelu(call: Call) -> Made:
    if call.value("approximate") == "none":
        return by_formula(call, "self * (1 + erf(self / sqrt(2))) / 2")
    return by_formula(call, "self * (1 + tanh(sqrt(2 / pi) * (self + 0.044715 * self ^ 3))) / 2")


def _gelu_backward(call: Call) -> Made:
    if call.value("approximate") == "none":
        slope = "(1 + erf(self / sqrt(2))) / 2 + self * exp(-self ^ 2 / 2) / sqrt(2 * pi)"
        return by_formula(call, f"grad_output * ({slope})")
    inner = "self * (1 - t ^ 2) * sqrt(2 / pi) * (1 + 3 * 0.044715 * self ^ 2)"
    t = "tanh(sqrt(2 / pi) * (self + 0.044715 * self ^ 3))"
    return by_formula(call, f"grad_output * (1 + t + {inner}) / 2 where t = {t}")


def _elu_backward(call: Call) -> Made:
    below = "input_scale * alpha * scale * exp(self_or_result * input_scale)"
    if call.value("is_result"):
        below = "input_scale * (self_or_result + alpha * scale)"
    # In this order, NaN lets the gradient through, as in torch.
    return by_formula(call, f"grad_output * {below} if self_or_result <= 0 else grad_output * scale")


def _log_sigmoid(call: Call) -> Made:
    """Return the rule of both results; the second is a buffer, which is empty except on a CPU."""
    text = "exp(-abs(self))" if call.place else "min(self, 0) - log1p(exp(-abs(self)))"
    return Formula(text, {"self": call.aligned("self")})


def _log_sigmoid_backward(call: Call) -> Made:
    """Return the rule of a derivative that is computed from `buffer`, exp(-|self|), on a CPU."""
    # Except on a CPU, the derivative computes from the argument.
    if not call.tensor("buffer").numel():
        return by_formula(call, "grad_output / (1 + exp(self))")
    return by_formula(
        call, "grad_output * (1 - part if self < 0 else part) where part = buffer / (1 + buffer)"
    )


def _prelu_backward(call: Call) -> Made:
    given = {key: call.aligned(key) for key in ("grad_output", "self", "weight")}
    if call.place == 0:
        return Formula("grad_output if self > 0 else weight * grad_output", given)
    del given["weight"]
    return Formula("0 if self > 0 else self * grad_output", given)


def _outer(call: Call) -> Made:
    """Return the rule of `addr`, which adds an outer product, and reads `self` only if beta is not 0."""
    row, column = call.index
    vectors = {"vec1": call.piece("vec1", row), "vec2": call.piece("vec2", column)}
    return by_formula(
        call, ("beta * self + " * bool(call.scalar("beta"))) + "alpha * vec1 * vec2", **vectors
    )


def _glu(call: Call) -> Made:
    """Return the rule of `glu`, of the halves `a` and `b` of its argument, and of its derivative."""
    dim = call.value("dim") % len(call.index)
    half = call.shape("self")[dim] // 2
    # The derivative is of both halves: numbers of the second one come from the same pair.
    own = call.index[dim] % half
    a, b = (call.along("self", dim, place) for place in (own, own + half))
    if call.kind == "glu":
        return Formula("a / (1 + exp(-b))", {"a": a, "b": b})
    given = {"grad_output": call.along("grad_output", dim, own), "b": b}
    if call.index[dim] < half:
        return Formula("grad_output / (1 + exp(-b))", given)
    text = "grad_output * a * s * (1 - s) where s = 1 / (1 + exp(-b))"
    return Formula(text, given | {"a": a})


def foreach(call: Call) -> Call:
    """Return the call on one tensor by which a `_foreach_` operator computes the wanted result.

    Both have the same arguments in the same order, but under other names.
    """
    kind = call.kind.removeprefix("foreach_")
    packet = getattr(torch.ops.aten, kind)
    known = [each.name for each in parameters(getattr(packet, packet.overloads()[0]))]
    arguments: dict[str, Any] = {}
    for own, value in zip(known, call.arguments.values(), strict=False):
        arguments[own] = value[call.place] if isinstance(value, list | tuple) else value
    if kind in ("add", "sub"):  # a list plus a number has no alpha
        arguments.setdefault("alpha", 1)
    if kind in ("addcmul", "addcdiv") and isinstance(arguments.get("value"), str):
        raise NoRuleError("the factors are in a tensor")
    given = call.operation, call.inputs, call.results, [call.written], 0, call.index
    return Call(*given, kind, arguments)


def _added_line(call: Call) -> str:
    alpha = call.value("alpha") if "alpha" in call else 1
    alpha = alpha if call.kind == "add" else -alpha
    size = abs(alpha)
    factor = "" if size == 1 else f"{size:,} * " if isinstance(size, int) else f"{size} * "
    return "{self} " + ("-" if alpha < 0 else "+") + f" {factor}" + "{other}"


def _threshold_backward_line(call: Call) -> str:
    if bool(call.tensor("self").isnan().any()):  # it lets the gradient of NaN through
        return "0 if {self} <= {threshold} else {grad_output}"
    return "{grad_output} if {self} > {threshold} else 0"


def each_alone(call: RowsCall) -> list[Result]:
    """Return labels of results that are each made from one number of each tensor, broadcast."""
    labels = broadcast([each.labels for each in call.tensors()])
    return [of_shape(labels, result) for result in call.results]


def _added(call: RowsCall) -> list[Result]:
    """clone, copy, neg, add, ...: sums of their arguments, times numbers."""
    if not call.results[0].is_floating_point():  # not linear: a conversion cuts, and + of truths is `or`
        return each_alone(call)
    # What is overwritten has no part in the result.
    names = ["src"] if call.kind == "copy" else ["self", "other"]
    given = {name: call[name] for name in names}
    tensors = {name: each for name, each in given.items() if isinstance(each, Tracked)}
    # Zeros add nothing: `torch.zeros(()) + part` belongs to the row of `part` alone.
    parts = [each for each in tensors.values() if not (call.is_term and _is_zero(each))]
    labels = broadcast(
        [e.labels for e in parts or tensors.values()], is_sum=True, is_strict=call.is_term
    )
    labels = labels.expand(call.results[0].shape)

    def terms(row: int) -> Tensor:
        replaced = {name: each.term(row) for name, each in tensors.items()}
        # A number that is added is a term of no row.
        numbers = {n: each if row == SHARED else 0 for n, each in given.items() if _is_number(each)}
        return call.again(**replaced, **numbers)[0]

    return [sum_of(labels, terms, [*tensors.values()])]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_zero(tracked: Tracked) -> bool:
    return tracked.is_shared and not bool(tracked.value.count_nonzero())


def _scaled(call: RowsCall) -> list[Result]:
    """mul, div: linear in a sum if the other factor is of no row."""
    if call["rounding_mode"] is not None:
        return each_alone(call)
    given: dict[str, Tracked] = {"self": call["self"]}
    keeps_sums = True  # a sum over data alone has its terms, as any other
    if isinstance(call["other"], Tracked):
        given["other"] = _constant(call["other"], keeps_sums=False)
        keeps_sums = call.kind == "div" and given["other"].is_shared
    given["self"] = _constant(given["self"], keeps_sums=keeps_sums)
    sums = [name for name, each in given.items() if each.has(SUM)]
    if sums == ["self"] or (sums == ["other"] and call.kind == "mul"):
        (name,) = sums
        rest = [each.labels for n, each in given.items() if n != name]
        labels = given[name].labels.expand(call.results[0].shape)
        if rest:
            rest_labels = rest[0].expand(labels.shape)
            # A sum times what is of no row stays a sum.
            alone = (labels == SUM) & (rest_labels == SHARED)
            labels = torch.where(alone, SUM, broadcast([labels, rest_labels]))
        found = sum_of(labels, lambda row: call.again(**{name: given[name].term(row)})[0], [given[name]])
        other = call["other"]
        by_data = isinstance(other, Tracked) and not other.is_shared
        # Divided by the number of rows: the loss of a row is then its term times this number.
        is_mean = call.kind == "div" and (by_data or (_is_number(other) and other == call.count))
        return [found._replace(is_mean=found.is_mean or is_mean)]
    labels = broadcast([each.labels for each in given.values()])
    return [of_shape(labels, call.results[0])]


def _constant(tracked: Tracked, *, keeps_sums: bool) -> Tracked:
    """Label a number that depends on the data alone, such as the count of targets, as of no row."""
    is_joined = tracked.has(MIXED) or (tracked.has(SUM) and not keeps_sums)
    if tracked.is_data and tracked.value.numel() == 1 and is_joined:
        return tracked._replace(labels=torch.full_like(tracked.labels, SHARED), terms=None)
    return tracked


_MADE: dict[str, MadeRule] = {
    **{name: partial(by_formula, text=text) for name, text in _FORMULAS.items()},
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max"), _clamp),
    "div": _division,
    "round": _round,
    "elu_backward": _elu_backward,
    "gelu": _gelu,
    "gelu_backward": _gelu_backward,
    "log_sigmoid_forward": _log_sigmoid,
    "log_sigmoid_backward": _log_sigmoid_backward,
    "_prelu_kernel_backward": _prelu_backward,
}
#: Linear operators: a sum over rows stays one.
_LINEAR: dict[str, RowsRule] = {
    **dict.fromkeys(("clone", "copy", "_to_copy", "neg", "add", "sub", "rsub"), _added),
    **dict.fromkeys(("mul", "div"), _scaled),
}


def _as_line(formula: str) -> str:
    return re.sub(r"\b(self|other|grad_output|output)\b", r"{\g<0>}", formula).replace(" ^ 2", "²")


#: Written as their formula is.
_AS_FORMULA = ("mul", "gt", "lt", "neg", "reciprocal", "tanh_backward", "sigmoid_backward")
_LINES: dict[str, str | LineRule] = {
    **{kind: _as_line(_FORMULAS[kind]) for kind in _AS_FORMULA},
    **dict.fromkeys(("add", "sub"), _added_line),
    "div": lambda call: _as_line(_division_text(call)),
    "pow": "{self}^{exponent}",
    "gelu": lambda call: "gelu({self})" * (call.value("approximate") == "none"),
    "gelu_backward": lambda call: (
        "{grad_output} * gelu'({self})" * (call.value("approximate") == "none")
    ),
    "threshold_backward": _threshold_backward_line,
    "clone": "copy({self})",
    "copy": "copy({src})",
}
ELEMENTWISE: dict[str, OperatorRecord] = {
    **alike("""
    _conj_physical acosh angle asinh atanh bitwise_left_shift bitwise_right_shift bitwise_xor complex
    conj_physical copysign deg2rad fake_quantize_per_channel_affine_cachemask
    fake_quantize_per_tensor_affine_cachemask fmax fmin frexp gcd heaviside i0 igamma igammac isin
    isneginf isposinf lcm ldexp logaddexp2 logit* mvlgamma nextafter polar polygamma rad2deg
    rrelu_with_noise* rrelu_with_noise_functional signbit sinc special_airy_ai special_bessel_j0
    special_bessel_j1 special_bessel_y0 special_bessel_y1 special_entr special_erfcx special_i0e
    special_i1 special_i1e special_log_ndtr special_modified_bessel_i0 special_modified_bessel_i1
    special_modified_bessel_k0 special_modified_bessel_k1 special_ndtri special_scaled_modified_bessel_k0
    special_scaled_modified_bessel_k1 special_spherical_bessel_j0 special_xlog1py special_zeta
    """),
    **{
        name: OperatorRecord(rule, _LINEAR.get(name, each_alone), _LINES.get(name, ""))
        for name, rule in _MADE.items()
    },
    **alike("bitwise_not digamma erfinv hypot lgamma nan_to_num", rows=each_alone),
    **alike("glu*", _glu, along),
    **alike("addr", _outer),
}
