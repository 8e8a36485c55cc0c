"""Operators that make each number from one of each tensor, and those that move numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from everystep.ops.labels import MIXED, SHARED, SUM, Tracked, elementwise
from everystep.ops.rows import Result, RowsCall, RowsRule, of_shape, sum_of
from everystep.ops.rows_of_places import joined

__all__ = ["ELEMENTWISE", "all_elementwise"]

_ELEMENTWISE = [
    "abs", "exp", "exp2", "expm1", "log", "log1p", "log2", "log10", "sqrt", "rsqrt", "reciprocal",
    "pow", "sin", "cos", "tan", "tanh", "sinh", "cosh", "atan", "asin", "acos", "erf", "erfc",
    "sigmoid", "log_sigmoid_forward", "relu", "gelu", "silu", "mish", "leaky_relu", "elu", "hardtanh",
    "hardswish", "hardsigmoid", "hardshrink", "softshrink", "softplus", "threshold", "celu", "clamp",
    "clamp_min", "clamp_max", "sign", "floor", "ceil", "round", "trunc", "frac", "sgn", "where",
    "masked_fill", "maximum", "minimum", "fmod", "remainder", "lerp", "addcmul", "addcdiv", "eq", "ne",
    "lt", "le", "gt", "ge", "isnan", "isinf", "nan_to_num", "logical_and", "logical_or", "logical_not",
    "logical_xor", "bitwise_and", "bitwise_or", "bitwise_not", "atan2", "logaddexp", "floor_divide",
    "xlogy", "native_dropout", "native_dropout_backward", "_prelu_kernel", "_prelu_kernel_backward",
    "threshold_backward", "gelu_backward", "silu_backward", "mish_backward", "tanh_backward",
    "sigmoid_backward", "leaky_relu_backward", "elu_backward", "hardtanh_backward",
    "hardswish_backward", "hardsigmoid_backward", "hardshrink_backward", "softshrink_backward",
    "softplus_backward", "log_sigmoid_backward", "mse_loss_backward", "smooth_l1_loss_backward",
    "huber_loss_backward", "binary_cross_entropy_backward", "soft_margin_loss_backward", "hypot",
    "erfinv", "lgamma", "digamma",
]  # fmt: skip
_CREATING = [
    "ones_like", "zeros_like", "full_like", "empty_like", "rand_like", "randn_like",
    "randint_like", "new_zeros", "new_ones", "new_full", "new_empty", "zero", "fill", "uniform",
    "normal", "exponential",
]  # fmt: skip
_LINEAR = ["clone", "copy", "_to_copy", "neg", "add", "sub", "rsub"]
#: Numbers are moved; the other arguments say where to.
_MOVING = [
    "cat", "stack", "flip", "roll", "repeat", "constant_pad_nd", "index_select", "index", "gather",
    "tril", "triu", "select_backward", "slice_backward", "pixel_shuffle", "pixel_unshuffle",
    "channel_shuffle", "native_channel_shuffle", "rot90",
]  # fmt: skip


def all_elementwise(call: RowsCall) -> list[Result]:
    """Each number from one number of each tensor, broadcast."""
    labels = elementwise([each.labels for each in call.tensors()])
    return [of_shape(labels, result) for result in call.results]


def _creating(call: RowsCall) -> list[Result]:
    value = call["value"] if call.name == "fill" else None
    if isinstance(value, Tracked):
        return [Result(value.labels.expand(call.results[0].shape))]
    shared = torch.full((), SHARED, dtype=torch.int32)
    return [Result(shared.expand(result.shape)) for result in call.results]


def _added(call: RowsCall) -> list[Result]:
    """clone, copy, neg, add, ...: sums of their arguments, times numbers."""
    if not call.results[0].is_floating_point():
        return all_elementwise(call)
    names = ["src"] if call.name == "copy" else ["self", "other"]
    given = {name: call[name] for name in names}
    tensors = {name: each for name, each in given.items() if isinstance(each, Tracked)}
    parts = [each for each in tensors.values() if not (call.is_term and _is_zero(each))]
    labels = elementwise(
        [e.labels for e in parts or tensors.values()], is_sum=True, is_strict=call.is_term
    )
    labels = labels.expand(call.results[0].shape)

    def terms(row: int) -> Tensor:
        replaced = {name: each.term(row) for name, each in tensors.items()}
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
        return all_elementwise(call)
    given = {n: _constant(call[n]) for n in ("self", "other") if isinstance(call[n], Tracked)}
    sums = [name for name, each in given.items() if each.has(SUM)]
    if sums == ["self"] or (sums == ["other"] and call.name == "mul"):
        (name,) = sums
        rest = [each.labels for n, each in given.items() if n != name]
        labels = given[name].labels.expand(call.results[0].shape)
        if rest:
            rest_labels = rest[0].expand(labels.shape)
            alone = (labels == SUM) & (rest_labels == SHARED)
            plain = elementwise([labels, rest_labels])
            labels = torch.where(alone, SUM, plain)
        found = sum_of(labels, lambda row: call.again(**{name: given[name].term(row)})[0], [given[name]])
        is_mean = (
            call.name == "div" and isinstance(call["other"], Tracked) and not call["other"].is_shared
        )
        return [found._replace(is_mean=found.is_mean or is_mean)]
    labels = elementwise([each.labels for each in given.values()])
    return [of_shape(labels, call.results[0])]


def _constant(tracked: Tracked) -> Tracked:
    """Return a number made from the data alone, such as how many targets count, as one of no row."""
    if tracked.is_data and tracked.value.numel() == 1 and (tracked.has(SUM) or tracked.has(MIXED)):
        return tracked._replace(labels=torch.full_like(tracked.labels, SHARED), terms=None)
    return tracked


def _moving(call: RowsCall) -> list[Result]:
    """Run the operator on labels instead of numbers, and join the labels of what says where to."""
    name = next(n for n in ("tensors", "self", "grad_output") if call[n] is not None)
    moved = call[name] if isinstance(call[name], list) else [call[name]]
    fill = {"value": SHARED} if call.name == "constant_pad_nd" else {}
    labels = [each.labels.contiguous() for each in moved]
    found = call.again(**{name: labels if name == "tensors" else labels[0]}, **fill)[0]
    if call.name in ("tril", "triu", "select_backward", "slice_backward"):  # zeros are of no row
        ones = call.again(**{name: torch.ones_like(labels[0])})[0]
        found = torch.where(ones == 1, found, SHARED)
    where = call.tensors(name)
    if where:
        found = joined(call, found, where)

    def terms(row: int) -> Tensor:
        parts = [each.term(row) for each in moved]
        return call.again(**{name: parts if name == "tensors" else parts[0]})[0]

    return [sum_of(found, terms, moved)]


ELEMENTWISE: dict[str, RowsRule] = {
    **dict.fromkeys(_ELEMENTWISE, all_elementwise),
    **dict.fromkeys(_CREATING, _creating),
    **dict.fromkeys(_MOVING, _moving),
    **dict.fromkeys(_LINEAR, _added),
    **dict.fromkeys(["mul", "div"], _scaled),
}
