"""Products of matrices and of vectors, which add up products of pairs of numbers; linear algebra."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from everystep.ops.call import Axis, Call, Made, NoRuleError, Piece, Sum, Terms, grid, product, single
from everystep.ops.labels import MIXED, SHARED, SUM, Tracked, broadcast, reduced, rows_in
from everystep.ops.operator_record import Given, LineRule, OperatorRecord, alike
from everystep.ops.row_rules import MixesError, Result, RowsCall, none_mixed, of_shape, sum_of

__all__ = ["PRODUCTS"]

#: For each kind of matrix product: the matrix that it adds to, the two that it multiplies.
_FACTORS = {
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


def _matrix_product(call: Call) -> Made:
    """Return the terms of a number of a matrix product, perhaps added to something."""
    added, left, right = _FACTORS[call.kind]
    row, column = _row_and_column(call, left, right)
    alpha = call.scalar("alpha") if "alpha" in call else 1
    terms = [product((left, row), (right, column), alpha)]
    beta = call.scalar("beta") if "beta" in call else 1
    # Where beta is 0, torch does not read the tensor, and a NaN in it has no effect.
    if added is not None and added in call and beta != 0:
        terms.insert(0, single(added, call.aligned(added), beta))
    return Sum(tuple(terms))


def _row_and_column(call: Call, left: str, right: str) -> tuple[Piece, Piece]:
    """Return the numbers of both factors that meet in the wanted one."""
    shape = call.shape(left)
    inner: Axis = np.arange(shape[-1])
    before: tuple[Axis, ...] = call.index[: len(shape) - 1]
    leading: tuple[Axis, ...] = call.index[:-2]
    # It adds up the products of all matrices: the batch is one of the axes that are summed.
    if call.kind == "addbmm":
        batch, inner = grid(range(shape[0]), range(shape[-1]))
        before, leading = (batch, call.index[0]), (batch,)
    column: tuple[Axis, ...] = (inner,)
    # Its weight is (outputs, inputs), and not transposed.
    if call.kind == "linear":
        column = (call.index[-1], inner)
    elif len(call.shape(right)) > 1:
        column = (*leading, inner, call.index[-1])
    return call.piece(left, *before, inner), call.piece(right, *column)


def _product_rows(call: RowsCall) -> list[Result]:
    """Products of matrices: (..., i, k) with (..., k, j), perhaps added to another tensor."""
    extra, *names = _FACTORS[call.kind]
    shape, added = call.results[0].shape, None if extra is None else call[extra]
    # A vector on the left is a matrix of one row, one on the right of one column.
    vectors = {n: axis for n, axis in zip(names, (0, -1), strict=True) if call[n].value.dim() == 1}
    factors = {n: _matrix(call[n], vectors[n]) if n in vectors else call[n] for n in names}
    a, b = factors.values()
    # A product with a weight adds up features; one of two other tensors may add up rows.
    if call.is_backward and a.is_shared and b.is_shared and not any(map(call.is_state, names)):
        raise MixesError("adds up numbers that are the same for all rows")
    # In a gradient of a parameter, what is of no row is a term by itself: of a batch of one row that was
    # joined with other numbers, the row has not made the whole gradient.
    is_strict = call.is_backward and call.is_term
    rows, columns = (
        reduced(each.labels, [axis], keepdim=True, is_strict=is_strict)
        for each, axis in ((a, -1), (b, -2))
    )
    labels = broadcast([rows, columns])
    # Each number has factors of one row at most, as in a forward pass.
    if not bool((labels == MIXED).any()):
        labels = labels.reshape(shape)
        return [Result(broadcast([labels] if added is None else [labels, added.labels.expand(shape)]))]

    def run(row: int, **matrices: Tensor) -> Tensor:
        given = {n: m.squeeze(vectors[n]) if n in vectors else m for n, m in matrices.items()}
        return call.again(**given, **({} if added is None else {"self": added.term(row)}))[0]

    labels, terms, summed = _sum_of_products(factors, run, is_strict)
    labels = labels.reshape(shape)
    if added is not None:
        labels = broadcast([labels, added.labels.expand(shape)], is_sum=True, is_strict=True)
    return [sum_of(labels, terms, summed)]


def _matrix(vector: Tracked, axis: int) -> Tracked:
    terms = vector.terms
    return vector._replace(
        value=vector.value.unsqueeze(axis),
        labels=vector.labels.unsqueeze(axis),
        terms=None if terms is None else lambda row: terms(row).unsqueeze(axis),
    )


def _sum_of_products(
    factors: dict[str, Tracked], run: Callable[..., Tensor], is_strict: bool
) -> tuple[Tensor, Callable[[int], Tensor], list[Tracked]]:
    """Return labels and terms of a product that adds up rows, and the sums among its factors."""
    names, (a, b) = tuple(factors), factors.values()
    shape = (*a.labels.shape[:-1], b.labels.shape[-1])
    sums = [name for name in names if factors[name].has(SUM)]
    if sums:
        (name, *more), other = sums, b if sums[0] == names[0] else a
        if more or not other.is_shared:
            raise MixesError("multiplies a sum over rows with what depends on rows")
        whole = factors[name]
        labels = reduced(whole.labels, [-1 if name == names[0] else -2], keepdim=True, is_sum=True)
        return labels.expand(shape), lambda row: run(row, **{name: whole.term(row)}), [whole]
    # Column k of one factor meets row k of the other: both must be of the same row of the batch.
    left = reduced(a.labels, [-2], keepdim=True).transpose(-1, -2)
    keys = broadcast([left, reduced(b.labels, [-1], keepdim=True)])
    none_mixed(keys, "multiplies numbers of different rows with each other")
    labels = reduced(keys, [-2], keepdim=True, is_sum=True, is_strict=is_strict).expand(shape)
    return labels, _product_terms(names, a, b, keys, run), []


def _product_terms(
    names: tuple[str, ...], a: Tracked, b: Tracked, keys: Tensor, run: Callable[..., Tensor]
) -> Callable[[int], Tensor]:
    if keys.dim() == 2:  # within a batch of matrices, a row may be at different places in each
        rows = rows_in(keys.flatten())
        # For a row without a place: the product of empty matrices is zeros.
        nowhere = next(iter(rows.values()))[:0]

        # The numbers of the row alone: a product with zeros for all others costs as much as the whole.
        def selected(row: int) -> Tensor:
            at = rows.get(row, nowhere)
            return run(row, **{names[0]: a.value[:, at], names[1]: b.value[at]})

        return selected

    def masked(row: int) -> Tensor:
        one = torch.where(keys.transpose(-1, -2) == row, a.value, torch.zeros_like(a.value))
        other = torch.where(keys == row, b.value, torch.zeros_like(b.value))
        return run(row, **{names[0]: one, names[1]: other})

    return masked


def _grouped_product(call: Call) -> Made:
    """Return the terms of a product of groups: of rows, columns, or the numbers that are summed."""
    if "bias" in call:
        raise NoRuleError("with a bias")
    left, right = (len(call.shape(key)) for key in ("self", "mat2"))
    *before, row, column = call.index
    # One past the last row, column or summed number of each group; the first group begins at 0.
    ends = call.tensor("offs").tolist() if "offs" in call else []
    inner: Axis = np.arange(call.shape("self")[-1])
    if left == right == 2:
        inner = np.arange(*([0, *ends][before[0] : before[0] + 2]))
        before = []
    elif left != right:
        before = [bisect_right(ends, row if left == 2 else column)]
        if before[0] == len(ends):
            raise NoRuleError("no group has it")
    one = call.piece("self", *(before if left == 3 else []), row, inner)
    other = call.piece("mat2", *(before if right == 3 else []), inner, column)
    return Sum((product(("self", one), ("mat2", other)),))


#: The factors of `_trilinear`, each broadcast along some axes; their product is added up along others.
_THREE = ("i1", "i2", "i3")


def _trilinear(call: Call) -> Made:
    summed = sorted(call.value("sumdim"))
    count = len(call.shape("i1")) + len(call.value("expand1"))
    axes = {name: _others(count, call.value(f"expand{name[1]}")) for name in _THREE}
    sizes = [1] * count
    for name in _THREE:
        for axis, size in zip(axes[name], call.shape(name), strict=True):
            sizes[axis] = max(sizes[axis], size)
    places = dict(zip(summed, grid(*(range(sizes[axis]) for axis in summed)), strict=True))
    places |= dict(zip(_others(count, summed), call.index, strict=True))
    given = {}
    for name in _THREE:
        sides = zip(axes[name], call.shape(name), strict=True)
        given[name] = call.piece(name, *(places[axis] if size > 1 else 0 for axis, size in sides))
    return Sum((Terms("i1 * i2 * i3", given),))


def _others(count: int, axes: list[int]) -> list[int]:
    return [axis for axis in range(count) if axis not in axes]


def _trilinear_rows(call: RowsCall) -> list[Result]:
    given = [call[name] for name in _THREE]
    spread = []
    for name, each in zip(_THREE, given, strict=True):
        labels = each.labels
        for axis in sorted(call[f"expand{name[1]}"]):
            labels = labels.unsqueeze(axis)
        spread.append(labels)
    keys = broadcast(spread)
    none_mixed(keys, "multiplies numbers of different rows with each other")
    labels = reduced(keys, call["sumdim"], is_sum=True)
    if bool((keys == SHARED).any()) and (call.is_backward or bool((labels == SUM).any())):
        raise MixesError("adds up numbers that are the same for all rows")
    if not bool((labels == SUM).any()):
        return [of_shape(labels, call.results[0])]

    def terms(row: int) -> Tensor:
        parts = {
            name: torch.where((each.labels == row) | (each.labels == SHARED), each.value, 0)
            for name, each in zip(_THREE, given, strict=True)
        }
        return call.again(**parts)[0]

    return [Result(labels, terms)]


_LINES: dict[str, str | LineRule] = {
    **dict.fromkeys(("mm", "bmm"), "{self} · {mat2}"),
    "mv": "{self} · {vec}",
    "dot": "{self} · {tensor}",
    "addmm": lambda call: "{mat1} · {mat2} + {self}" * (call.value("beta") == call.value("alpha") == 1),
}


def _dimensions_fit(given: Given) -> bool:
    """The dimensions of a Fourier transform, counted from the front."""
    dimensions = given["dim"]
    return len(set(dimensions)) == len(dimensions) and all(
        0 <= dim < len(given["self"].shape) for dim in dimensions
    )


_TRANSFORMED = "Tensor self, List[int] dim, int normalization"
#: Of a factorization; the pivots are row swaps, by which kernels move rows.
_FACTORIZED = "Tensor factors, Tensor pivots"
PRODUCTS: dict[str, OperatorRecord] = {
    **alike("""
    _addmm_activation _linalg_det _linalg_eigh _linalg_eigvals _linalg_slogdet _linalg_solve_ex
    _linalg_svd cholesky cholesky_inverse cholesky_solve geqrf linalg_cholesky_ex linalg_cross linalg_eig
    linalg_eigvals linalg_householder_product linalg_inv_ex linalg_ldl_factor_ex linalg_lu
    linalg_lu_factor linalg_lu_factor_ex linalg_matrix_exp linalg_matrix_sqrth linalg_pinv linalg_polar
    linalg_qr linalg_solve_triangular linear_backward matmul ormqr triangular_solve
    """),
    **alike("_fft_c2c", fits=_dimensions_fit, arguments=f"{_TRANSFORMED}, bool forward"),
    **alike("_fft_c2r", fits=_dimensions_fit, arguments=f"{_TRANSFORMED}, int last_dim_size"),
    **alike("_fft_r2c", fits=_dimensions_fit, arguments=f"{_TRANSFORMED}, bool onesided"),
    **alike("linalg_ldl_solve", arguments=f"{_FACTORIZED}, Tensor B, bool hermitian"),
    **alike("linalg_lu_solve", arguments=f"{_FACTORIZED}, Tensor B, bool left, bool adjoint"),
    **alike("lu_unpack", arguments=f"{_FACTORIZED}, bool unpack_data, bool unpack_pivots"),
    **{kind: OperatorRecord(_matrix_product, _product_rows, _LINES.get(kind, "")) for kind in _FACTORS},
    **alike("addbmm linear", _matrix_product),
    **alike("_grouped_mm", _grouped_product),
    **alike("_trilinear", _trilinear, _trilinear_rows),
}
