"""Operators that combine the numbers along some dimensions."""

from __future__ import annotations

import math
from functools import partial
from math import prod
from typing import Any

import numpy as np
from torch import Tensor

from everystep.ops.call import Call, Formula, Made, NoRuleError, Piece, Sum, Terms, Words, grid, single
from everystep.ops.elementwise import each_alone
from everystep.ops.labels import SUM, Tracked, reduced
from everystep.ops.operator_record import Given, OperatorRecord, alike
from everystep.ops.operators import leaves
from everystep.ops.row_rules import Result, RowsCall, along, by_key, none_mixed, of_shape

__all__ = ["REDUCTIONS"]


def _dimensions(dim: Any, count: int) -> list[int]:
    """Return the dimensions that a reduction of a tensor with so many removes. dim: its argument."""
    listed = [dim] if isinstance(dim, int) else dim
    # torch also takes dim 0 and -1 of a tensor without dimensions.
    return [each % max(count, 1) for each in listed or range(count)]


def _reduced(call: Call) -> Piece:
    shape = call.shape("self")
    dims = _dimensions(call.value("dim"), len(shape))
    kept = [dim for dim in range(len(shape)) if dim not in dims]
    # With keepdim, the result has all dimensions, and size 1 along those that are reduced.
    is_kept = len(call.index) == len(shape)
    own = call.index if is_kept else dict(zip(kept, call.index, strict=True))
    axes = [range(size) if dim in dims else [own[dim]] for dim, size in enumerate(shape)]
    return call.piece("self", *grid(*axes))


def _total(call: Call) -> Made:
    piece = _reduced(call)
    divisor = float(piece.size) if call.kind == "mean" else 1.0
    if call.kind == "nansum":
        return Sum((Terms("0 if isnan(self) else self", {"self": piece}),))
    return Sum((single("self", piece),), divisor)


def _cumulated(call: Call) -> Made:
    if not call.index:
        return Sum((single("self", call.piece("self")),))
    dim = call.value("dim") % len(call.index)
    return Sum((single("self", call.along("self", dim, np.arange(call.index[dim] + 1))),))


def _by_formula(call: Call, text: str) -> Made:
    return Formula(text, {"self": _reduced(call)})


def _picked(call: Call) -> Made:
    """Return the rule of numbers that are picked, by `max.dim` or `sort`; the second result is where."""
    # `max(self)` of all numbers; along a dimension, it returns the places as well.
    if len(call.outputs) < 2:
        return _by_formula(call, f"{call.kind}(self)")
    piece = _reduced(call)
    if call.place == 1:
        if call.kind in ("max", "min"):
            return Formula(f"arg{call.kind}(self)", {"self": piece})
        return Words("where in self it is", {"self": piece})
    place = int(call.results[call.output(1)][call.index])
    own, indices = Piece(piece.name, piece.at(place)), call.result_piece(1, *call.index)
    return Formula("self[indices]", {"self": own, "indices": indices})


def _norm(call: Call) -> Made:
    order = call.value("ord") if "ord" in call else call.value("p") if "p" in call else 2
    # Order 0 counts the numbers that are not 0, and -inf is the smallest.
    if not isinstance(order, int | float) or order <= 0:
        raise NoRuleError("of another order")
    text = "sum(abs(self) ^ order) ^ (1 / order)"
    if math.isinf(order):
        text = "max(abs(self))"
    elif order == 2:
        text = "sqrt(sum(self ^ 2))"
    return Formula(text, {"self": _reduced(call)}, {"order": order})


def _spread(call: Call) -> Made:
    """Return the rule of `var`, `std` and those that return the mean, too."""
    piece = _reduced(call)
    if call.place == 1:
        return Sum((single("self", piece),), float(piece.size))
    correction = 1.0
    if "correction" in call:
        correction = float(call.value("correction"))
    elif call.arguments.get("unbiased") is False:
        correction = 0.0
    text = "sum((self - mean(self)) ^ 2) / count"
    if call.kind.startswith("std"):
        text = f"sqrt({text})"
    # As torch does: of one number, 0 / 0 is NaN.
    return Formula(text, {"self": piece}, {"count": max(piece.size - correction, 0)})


def _total_rows(call: RowsCall) -> list[Result]:
    whole: Tracked = call["self"]
    if not whole.labels.dim():
        return [Result(whole.labels, whole.terms, whole.is_mean)]
    axes = _dimensions(call["dim"], whole.labels.dim())
    if prod(whole.labels.size(axis) for axis in axes) > 1:
        call.require_rows(whole.labels)
    keeps = bool(call["keepdim"])
    labels = reduced(whole.labels, axes, keepdim=keeps, is_sum=True, is_strict=call.is_term)

    def terms(row: int) -> Tensor:
        return call.again(self=whole.term(row))[0]

    if not bool((labels == SUM).any()):
        return [Result(labels)]
    sizes = zip(whole.labels.shape, whole.labels.stride(), strict=True)
    varying = [axis for axis, (size, stride) in enumerate(sizes) if size > 1 and stride]
    # Adding only the numbers of the row is quicker than adding zeros for all others.
    if call.kind == "sum" and len(varying) == 1 and not whole.has(SUM):
        (key,) = varying
        keys = reduced(whole.labels, [a for a in range(whole.labels.dim()) if a != key])
        chosen = by_key(
            keys, call.results[0], lambda at: call.again(self=whole.value.index_select(key, at))[0]
        )
        return [Result(labels, chosen.terms)]
    is_mean = whole.is_mean if whole.has(SUM) else call.kind == "mean"
    return [Result(labels, terms, is_mean)]


def _reduced_rows(call: RowsCall) -> list[Result]:
    # `max(self, other)`: of pairs of numbers.
    if isinstance(call["other"], Tracked):
        return each_alone(call)
    whole: Tracked = call["self"]
    axes = _dimensions(call["dim"], whole.labels.dim())
    labels = reduced(whole.labels, axes, keepdim=bool(call["keepdim"]))
    none_mixed(labels)
    return [of_shape(labels, result) for result in call.results]


def _total_line(call: Call) -> str:
    axes = call.value("dim") if "dim" in call else []
    texts = map(str, axes if isinstance(axes, list) else [axes])
    return f"{call.kind}({', '.join(['{self}', *texts])})"


_TEXTS = {
    **{name: f"{name}(self)" for name in ("prod", "any", "all", "argmax", "argmin", "logsumexp")},
    "amax": "max(self)",
    "amin": "min(self)",
    "count_nonzero": "sum(self != 0)",
}


def _none_repeats(given: Given) -> bool:
    """No tensor has the same number at several places."""
    geometry = [(each.stride(), each.shape) for each in leaves([*given.values()])]
    return not any(step == 0 and n > 1 for pair in geometry for step, n in zip(*pair, strict=True))


def _distances_fit(given: Given) -> bool:
    one, two, distances = (given[name].shape for name in ("x1", "x2", "cdist"))
    return (
        given["grad"].shape == distances == (*one[:-1], *two[-2:-1])
        and (one[:-2], one[-1:]) == (two[:-2], two[-1:])
        and len(one) > 1
    )


_OF_DISTANCES = "Tensor grad, Tensor x1, Tensor x2, float p, Tensor cdist"
REDUCTIONS: dict[str, OperatorRecord] = {
    **alike("""
    _cdist_forward _euclidean_dist _foreach_powsum _is_all_true _is_any_true _pdist_forward aminmax
    cummax cummin dist hash_tensor histc kthvalue linalg__powsum mode renorm trace
    """),
    **alike("median nanmedian", fits=_none_repeats),
    **alike("_cdist_backward", fits=_distances_fit, arguments=_OF_DISTANCES),
    **alike("_pdist_backward", kept=range(9)),
    **alike("sum mean", _total, _total_rows, _total_line),
    **alike("nansum", _total),
    **{
        name: OperatorRecord(partial(_by_formula, text=text), _reduced_rows)
        for name, text in _TEXTS.items()
    },
    **alike("max min", _picked, _reduced_rows),
    **alike("linalg_vector_norm norm", _norm, _reduced_rows),
    **alike("var std var_mean std_mean", _spread, _reduced_rows),
    **alike("cumsum", _cumulated, along),
    **alike("cumprod logcumsumexp", rows=along),
    **alike("sort topk", _picked, along),
}
