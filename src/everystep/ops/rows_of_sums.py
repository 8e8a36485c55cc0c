"""Operators that combine numbers along axes: sums, products of matrices, softmax, embeddings."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from everystep.ops.labels import MIXED, SHARED, SUM, Tracked, elementwise, reduced, rows_in
from everystep.ops.rows import (
    MixesError,
    Result,
    RowsCall,
    RowsRule,
    by_key,
    none_mixed,
    of_shape,
    sum_of,
)
from everystep.ops.rows_of_elementwise import all_elementwise

__all__ = ["SUMS"]

#: Arguments with an axis that is left as it was.
_ALONG = [
    "_softmax", "_log_softmax", "_softmax_backward_data", "_log_softmax_backward_data", "cumsum",
    "cumprod", "logcumsumexp", "glu", "glu_backward", "_safe_softmax", "topk", "sort",
]  # fmt: skip
_REDUCING = [
    "amax", "amin", "argmax", "argmin", "max", "min", "prod", "any", "all", "var", "std",
    "var_mean", "std_mean", "logsumexp", "linalg_vector_norm", "norm",
]  # fmt: skip


def _axes(call: RowsCall, tracked: Tracked) -> list[int]:
    given = call["dim"]
    axes = [given] if isinstance(given, int) else [*(given or ())]
    return [axis % tracked.labels.dim() for axis in axes] or [*range(tracked.labels.dim())]


def _summed(call: RowsCall) -> list[Result]:
    """sum and mean over axes."""
    whole: Tracked = call["self"]
    if not whole.labels.dim():
        return [Result(whole.labels, whole.terms, whole.is_mean)]
    axes = _axes(call, whole)
    if call.is_backward and whole.is_shared and prod(whole.labels.size(axis) for axis in axes) > 1:
        raise MixesError("adds up numbers that are the same for all rows")
    keeps = bool(call["keepdim"])
    labels = reduced(whole.labels, axes, keepdim=keeps, is_sum=True, is_strict=call.is_term)

    def terms(row: int) -> Tensor:
        return call.again(self=whole.term(row))[0]

    if not bool((labels == SUM).any()):
        return [Result(labels)]
    sizes = zip(whole.labels.shape, whole.labels.stride(), strict=True)
    varying = [axis for axis, (size, stride) in enumerate(sizes) if size > 1 and stride]
    if call.name == "sum" and len(varying) == 1 and not whole.has(SUM):
        (key,) = varying
        rows = rows_in(reduced(whole.labels, [a for a in range(whole.labels.dim()) if a != key]))
        chosen = by_key(
            rows, call.results[0], lambda at: call.again(self=whole.value.index_select(key, at))[0]
        )
        return [Result(labels, chosen)]
    is_mean = whole.is_mean if whole.has(SUM) else call.name == "mean"
    return [Result(labels, terms, is_mean)]


def _reducing(call: RowsCall) -> list[Result]:
    if isinstance(call["other"], Tracked):
        return all_elementwise(call)
    whole: Tracked = call["self"]
    labels = reduced(whole.labels, _axes(call, whole), keepdim=bool(call["keepdim"]))
    none_mixed(labels)
    return [of_shape(labels, result) for result in call.results]


def _along(call: RowsCall) -> list[Result]:
    axis = -1 if call["dim"] is None else call["dim"]
    labels = elementwise([reduced(each.labels, [axis], keepdim=True) for each in call.tensors()])
    none_mixed(labels)
    return [Result(labels.expand(result.shape)) for result in call.results]


#: The two factors of each product; vectors with the axis that makes them matrices.
_FACTORS: dict[str, dict[str, int | None]] = {
    "mm": {"self": None, "mat2": None},
    "bmm": {"self": None, "mat2": None},
    "addmm": {"mat1": None, "mat2": None},
    "baddbmm": {"batch1": None, "batch2": None},
    "mv": {"self": None, "vec": -1},
    "addmv": {"mat": None, "vec": -1},
    "dot": {"self": 0, "tensor": -1},
    "vdot": {"self": 0, "other": -1},
}


def _product(call: RowsCall) -> list[Result]:
    """Products of matrices: (..., i, k) with (..., k, j), perhaps added to another tensor."""
    axes, shape = _FACTORS[call.name], call.results[0].shape
    factors = {name: _matrix(call[name], axis) for name, axis in axes.items()}
    a, b = factors.values()
    added = None if "self" in axes else call["self"]
    if call.is_backward and a.is_shared and b.is_shared and not any(map(call.is_state, axes)):
        raise MixesError("adds up numbers that are the same for all rows")
    labels = elementwise([reduced(a.labels, [-1], keepdim=True), reduced(b.labels, [-2], keepdim=True)])
    if not bool((labels == MIXED).any()):
        labels = labels.reshape(shape)
        parts = [labels] if added is None else [labels, added.labels.expand(shape)]
        return [Result(elementwise(parts))]

    def run(row: int, **matrices: Tensor) -> Tensor:
        given = {name: _squeezed(each, axes[name]) for name, each in matrices.items()}
        return call.again(**given, **({} if added is None else {"self": added.term(row)}))[0]

    labels, terms, summed = _sum_of_products(factors, run)
    labels = labels.reshape(shape)
    if added is not None:
        labels = elementwise([labels, added.labels.expand(shape)], is_sum=True, is_strict=True)
    return [sum_of(labels, terms, summed)]


def _matrix(factor: Tracked, axis: int | None) -> Tracked:
    if axis is None:
        return factor
    terms = factor.terms
    return factor._replace(
        value=factor.value.unsqueeze(axis),
        labels=factor.labels.unsqueeze(axis),
        terms=None if terms is None else lambda row: terms(row).unsqueeze(axis),
    )


def _squeezed(matrix: Tensor, axis: int | None) -> Tensor:
    return matrix if axis is None else matrix.squeeze(axis)


def _sum_of_products(
    factors: dict[str, Tracked], run: Callable[..., Tensor]
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
    left = reduced(a.labels, [-2], keepdim=True).transpose(-1, -2)
    keys = elementwise([left, reduced(b.labels, [-1], keepdim=True)])
    none_mixed(keys, "multiplies numbers of different rows with each other")
    labels = reduced(keys, [-2], keepdim=True, is_sum=True).expand(shape)
    return labels, _product_terms(names, a, b, keys, run), []


def _product_terms(
    names: tuple[str, ...], a: Tracked, b: Tracked, keys: Tensor, run: Callable[..., Tensor]
) -> Callable[[int], Tensor]:
    if keys.dim() == 2:
        rows = rows_in(keys.flatten())
        nowhere = next(iter(rows.values()))[:0]

        def selected(row: int) -> Tensor:
            at = rows.get(row, nowhere)
            return run(row, **{names[0]: a.value[:, at], names[1]: b.value[at]})

        return selected

    def masked(row: int) -> Tensor:
        one = torch.where(keys.transpose(-1, -2) == row, a.value, torch.zeros_like(a.value))
        other = torch.where(keys == row, b.value, torch.zeros_like(b.value))
        return run(row, **{names[0]: one, names[1]: other})

    return masked


def _trilinear(call: RowsCall) -> list[Result]:
    """Products of three tensors, each broadcast along some axes, and then added up along others."""
    names = ("i1", "i2", "i3")
    given = [call[name] for name in names]
    axes = [sorted(call[f"expand{place}"]) for place in (1, 2, 3)]

    def spread(tensor: Tensor, added: list[int]) -> Tensor:
        for axis in added:
            tensor = tensor.unsqueeze(axis)
        return tensor

    keys = elementwise([spread(each.labels, added) for each, added in zip(given, axes, strict=True)])
    none_mixed(keys, "multiplies numbers of different rows with each other")
    labels = reduced(keys, call["sumdim"], is_sum=True)
    if bool((keys == SHARED).any()) and (call.is_backward or bool((labels == SUM).any())):
        raise MixesError("adds up numbers that are the same for all rows")
    if not bool((labels == SUM).any()):
        return [of_shape(labels, call.results[0])]

    def terms(row: int) -> Tensor:
        parts = {
            name: torch.where((each.labels == row) | (each.labels == SHARED), each.value, 0)
            for name, each in zip(names, given, strict=True)
        }
        return call.again(**parts)[0]

    return [Result(labels, terms)]


def _embedding(call: RowsCall) -> list[Result]:
    call.require_shared("weight")
    labels = elementwise([call["indices"].labels])
    return [Result(labels.unsqueeze(-1).expand(call.results[0].shape))]


def _embedding_backward(call: RowsCall) -> list[Result]:
    if call["scale_grad_by_freq"]:
        raise MixesError("divides by how often an entry is in the batch")
    gradient, indices = call["grad_output"], call["indices"]
    if gradient.has(SUM) and indices.is_shared and not gradient.has(MIXED):
        labels = torch.full((), SUM, dtype=torch.int32).expand(call.results[0].shape)
        return [sum_of(labels, lambda row: call.again(grad_output=gradient.term(row))[0], [gradient])]
    keys = elementwise([reduced(gradient.labels, [-1]), indices.labels]).reshape(-1)
    rows = rows_in(none_mixed(keys))
    if set(rows) == {SHARED}:
        raise MixesError("adds up numbers that are the same for all rows")
    width = gradient.value.shape[-1]

    def select(at: Tensor) -> Tensor:
        chosen = gradient.value.reshape(-1, width)[at]
        return call.again(grad_output=chosen, indices=indices.value.reshape(-1)[at])[0]

    labels = reduced(keys, [0], is_sum=True).expand(call.results[0].shape)
    return [Result(labels, by_key(rows, call.results[0], select))]


SUMS: dict[str, RowsRule] = {
    **dict.fromkeys(["sum", "mean"], _summed),
    **dict.fromkeys(_FACTORS, _product),
    **dict.fromkeys(_ALONG, _along),
    **dict.fromkeys(_REDUCING, _reducing),
    "_trilinear": _trilinear,
    "embedding": _embedding,
    "embedding_dense_backward": _embedding_backward,
}
