"""Rules of operators that add: matrix products, reductions along dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from everystep.ops.call import (
    Axis,
    Call,
    Formula,
    Made,
    NoRuleError,
    Piece,
    Sum,
    Terms,
    grid,
)

__all__ = ["PRODUCTS", "REDUCTIONS", "along", "dimensions", "matrix_product", "product", "single"]


def product(one: tuple[str, Piece], other: tuple[str, Piece], factor: float = 1) -> Terms:
    """Return the products of two pieces, number by number, times a factor."""
    (a, first), (b, second) = one, other
    return Terms(f"factor * {a} * {b}", {a: first, b: second}, {"factor": factor})


def single(name: str, piece: Piece, factor: float = 1) -> Terms:
    """Return the numbers of a piece times a factor."""
    return Terms(f"factor * {name}", {name: piece}, {"factor": factor})


#: Of each kind of matrix product: the matrix that it adds to, the two that it multiplies.
PRODUCTS = {
    "mm": (None, "self", "mat2"),
    "bmm": (None, "self", "mat2"),
    "mv": (None, "self", "vec"),
    "dot": (None, "self", "tensor"),
    "vdot": (None, "self", "other"),
    "addmm": ("self", "mat1", "mat2"),
    "addmv": ("self", "mat", "vec"),
    "baddbmm": ("self", "batch1", "batch2"),
    "addbmm": ("self", "batch1", "batch2"),
    "linear": ("bias", "input", "weight"),
}


def matrix_product(call: Call) -> Made:
    """Return the terms of a number of a matrix product, perhaps added to something."""
    added, left, right = PRODUCTS[call.kind]
    rows, columns = _row(call, left), _column(call, right)
    alpha = call.scalar("alpha") if "alpha" in call else 1
    terms = [product((left, rows), (right, columns), alpha)]
    beta = call.scalar("beta") if "beta" in call else 1
    if added is not None and added in call and beta != 0:
        terms.insert(0, single(added, call.aligned(added), beta))
    return Sum(tuple(terms))


def _row(call: Call, key: str) -> Piece:
    size = call.shape(key)[-1]
    if call.kind == "addbmm":
        batch, inner = grid(range(call.shape(key)[0]), range(size))
        return call.piece(key, batch, call.index[0], inner)
    is_row = call.kind in ("mv", "addmv")
    before: tuple[Axis, ...] = call.index if is_row else call.index[:-1]
    return call.piece(key, *before, np.arange(size))


def _column(call: Call, key: str) -> Piece:
    shape = call.shape(key)
    if call.kind == "linear":
        return call.piece(key, call.index[-1], np.arange(shape[-1]))
    if call.kind == "addbmm":
        batch, inner = grid(range(shape[0]), range(shape[1]))
        return call.piece(key, batch, inner, call.index[1])
    if len(shape) == 1:
        return call.piece(key, np.arange(shape[0]))
    return call.piece(key, *call.index[:-2], np.arange(shape[-2]), call.index[-1])


def dimensions(call: Call, key: str) -> tuple[int, ...]:
    """Return the dimensions that a reduction removes."""
    count = len(call.shape(key))
    value = call.value("dim") if "dim" in call else None
    listed = [value] if isinstance(value, int) else value
    return tuple(range(count)) if not listed else tuple(dim % max(count, 1) for dim in listed)


def along(call: Call, key: str, dims: tuple[int, ...]) -> Piece:
    """Return the numbers of an argument that are reduced to the wanted one."""
    shape = call.shape(key)
    kept = [dim for dim in range(len(shape)) if dim not in dims]
    is_kept = len(call.index) == len(shape)
    own = call.index if is_kept else dict(zip(kept, call.index, strict=True))
    axes = [range(size) if dim in dims else [own[dim]] for dim, size in enumerate(shape)]
    return call.piece(key, *grid(*axes))


def _total(call: Call) -> Made:
    piece = along(call, "self", dimensions(call, "self"))
    divisor = float(piece.size) if call.kind == "mean" else 1.0
    if call.kind == "nansum":
        return Sum((Terms("0 if isnan(self) else self", {"self": piece}),))
    return Sum((single("self", piece),), divisor)


def _cumulated(call: Call) -> Made:
    dim = dimensions(call, "self")[0]
    places: list[Axis] = list(call.index)
    places[dim] = np.arange(call.index[dim] + 1)
    return Sum((single("self", call.piece("self", *places)),))


def _reduced(text: str) -> Callable[[Call], Made]:
    def rule(call: Call) -> Made:
        return Formula(text, {"self": along(call, "self", dimensions(call, "self"))})

    return rule


def _extreme(call: Call) -> Made:
    """Return the rule of `max.dim` and the like, which also return where the number is."""
    if len(call.outputs) < 2:
        return _reduced(f"{call.kind}(self)")(call)
    dim = dimensions(call, "self")[0]
    piece = along(call, "self", (dim,))
    if call.place == 1:
        return Formula(f"arg{call.kind}(self)", {"self": piece})
    index = call.results[call.output(1)][call.index]
    chosen = Piece(piece.name, piece.at(int(index)))
    where = call.result_piece(1, *call.index)
    return Formula("self[indices]", {"self": chosen, "indices": where})


def _norm(call: Call) -> Made:
    order = call.value("ord") if "ord" in call else call.value("p") if "p" in call else 2
    if not isinstance(order, int | float) or order <= 0:
        raise NoRuleError("of another order")
    text = "sum(abs(self) ^ order) ^ (1 / order)"
    if math.isinf(order):
        text = "max(abs(self))"
    elif order == 2:
        text = "sqrt(sum(self ^ 2))"
    return Formula(text, {"self": along(call, "self", dimensions(call, "self"))}, {"order": order})


def _spread(call: Call) -> Made:
    """Return the rule of `var`, `std` and those that return the mean, too."""
    piece = along(call, "self", dimensions(call, "self"))
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
    return Formula(text, {"self": piece}, {"count": max(piece.size - correction, 0)})


def _trilinear(call: Call) -> Made:
    """Return the rule of products of three tensors, broadcast along some dimensions, then added up."""
    names, summed = ("i1", "i2", "i3"), sorted(call.value("sumdim"))
    count = len(call.shape("i1")) + len(call.value("expand1"))
    added = {name: sorted(call.value(f"expand{name[1]}")) for name in names}
    sizes = [1] * count
    for name in names:
        for axis, size in zip(_others(count, added[name]), call.shape(name), strict=True):
            sizes[axis] = max(sizes[axis], size)
    places = dict(zip(summed, grid(*(range(sizes[axis]) for axis in summed)), strict=True))
    places |= dict(zip(_others(count, summed), call.index, strict=True))
    given = {
        name: call.piece(
            name,
            *(
                places[axis] if size > 1 else 0
                for axis, size in zip(_others(count, added[name]), call.shape(name), strict=True)
            ),
        )
        for name in names
    }
    return Sum((Terms("i1 * i2 * i3", given),))


def _others(count: int, axes: list[int]) -> list[int]:
    return [axis for axis in range(count) if axis not in axes]


REDUCTIONS: dict[str, Callable[[Call], Made]] = {
    "sum": _total,
    "mean": _total,
    "trilinear": _trilinear,
    "nansum": _total,
    "cumsum": _cumulated,
    **{name: _reduced(f"{name}(self)") for name in ("prod", "any", "all", "argmax", "argmin")},
    "amax": _reduced("max(self)"),
    "amin": _reduced("min(self)"),
    "count_nonzero": _reduced("sum(self != 0)"),
    "logsumexp": _reduced("logsumexp(self)"),
    "max": _extreme,
    "min": _extreme,
    "linalg_vector_norm": _norm,
    "norm": _norm,
    "var": _spread,
    "std": _spread,
    "var_mean": _spread,
    "std_mean": _spread,
}
