"""Operators with tensors that say where: which rows the numbers there, or put there, belong to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from everystep.ops.labels import SHARED, Tracked, elementwise, gathered
from everystep.ops.rows import MixesError, Result, RowsCall, RowsRule, none_mixed, sum_of

__all__ = ["PLACES", "joined"]


def joined(call: RowsCall, labels: Tensor, where: list[Tracked]) -> Tensor:
    """Return the labels of numbers that were picked, with those of what says where they are."""
    if all(each.is_shared for each in where):
        return labels
    if call.name == "gather":
        return elementwise([labels, where[0].labels])
    indices: list[Any] = call["indices"] if call.name == "index" else [None]
    return elementwise([labels, _of_indices(indices, labels.dim())])


def _of_indices(indices: list[Tracked | None], dims: int) -> Tensor:
    """Return the labels of indices, broadcast to what they pick, which has so many dimensions."""
    known = [each for each in indices if each is not None]
    first = next((place for place, each in enumerate(indices) if each is not None), 0)
    if not known or any(each is None for each in indices[first : first + len(known)]):
        raise MixesError("selects by values of rows")
    found = elementwise([_of_index(each) for each in known])
    after = dims - first - found.dim()
    if after < 0:
        raise MixesError("selects by values of rows")
    return found.reshape(*[1] * first, *found.shape, *[1] * after)


def _of_index(index: Tracked) -> Tensor:
    """Return the labels of an index: of a mask, those of its places that are true."""
    is_mask = index.value.dtype in (torch.bool, torch.uint8)
    return index.labels[index.value.bool()] if is_mask else index.labels


def _index_put(call: RowsCall) -> list[Result]:
    """Numbers are added to others, or put into their place, where indices say."""
    whole, given = call["self"], call["values"]
    indices = [each.value if isinstance(each, Tracked) else slice(None) for each in call["indices"]]
    if not call["accumulate"]:
        return [Result(_put(call, whole, given))]
    cells = torch.arange(whole.value.numel()).reshape(whole.value.shape)[tuple(indices)]
    labels = given.labels
    if not all(each.is_shared for each in call["indices"] if isinstance(each, Tracked)):
        labels = elementwise([labels, _of_indices(call["indices"], cells.dim())])
    return _added(call, "values", cells, labels.expand(cells.shape))


def _put(call: RowsCall, whole: Tracked, given: Tracked) -> Tensor:
    indices = [each for each in call["indices"] if each is not None]
    if all(each.is_shared for each in indices):
        labels = [elementwise([each.labels]).contiguous() for each in (whole, given)]
        return call.again(self=labels[0], values=labels[1])[0]
    (where, *more) = indices
    if more or where.value.shape != whole.value.shape or given.value.numel() != 1:
        raise MixesError("puts numbers at places that depend on rows")
    return elementwise([whole.labels, where.labels, given.labels.reshape(())])


def _scatter_add(call: RowsCall) -> list[Result]:
    whole, index, given = call["self"], call["index"], call["src"]
    used = tuple(slice(size) for size in index.value.shape)
    axis = call["dim"] % max(whole.value.dim(), 1)
    others = (slice(None) if place == axis else part for place, part in enumerate(used))
    cells = torch.arange(whole.value.numel()).reshape(whole.value.shape)[tuple(others)]
    labels = given.labels[used]
    if not index.is_shared:
        labels = elementwise([labels, index.labels])
    return _added(call, "src", cells.gather(axis, index.value.cpu()), labels)


def _added(call: RowsCall, name: str, cells: Tensor, labels: Tensor) -> list[Result]:
    """Return what is known where numbers with these labels are added to cells of `self`."""
    whole, given = call["self"], call[name]
    if not whole.is_shared:
        raise MixesError("adds to what depends on rows")
    if call.is_backward and labels.numel() and bool((labels == SHARED).all()):
        raise MixesError("adds up numbers that are the same for all rows")
    is_own = all(each.is_shared for each in call.tensors("self", name))
    if not is_own and labels.shape != given.value.shape:
        raise MixesError("adds numbers of another shape than its indices")
    none_mixed(labels)

    def terms(row: int) -> Tensor:
        zeros = torch.zeros_like(given.value)
        part = given.term(row) if is_own else torch.where(labels == row, given.value, zeros)
        return call.again(**{"self": whole.value if row == SHARED else whole.value * 0, name: part})[0]

    found = gathered(labels, cells, whole.value.numel(), is_strict=call.is_term)
    return [sum_of(found.reshape(whole.value.shape), terms, [given])]


def _scattered(call: RowsCall) -> list[Result]:
    """Numbers are put into others, where an index says."""
    whole, index, given = call["self"], call["index"], call["src"]
    if call["reduce"] is not None:
        raise MixesError("has no rule for these arguments")
    labels = index.labels
    if isinstance(given, Tracked):
        part = given.labels[tuple(slice(size) for size in labels.shape)]
        labels = elementwise([part, labels])
    where = index.value
    return [Result(whole.labels.clone().scatter_(call["dim"], where, labels.contiguous()))]


PLACES: dict[str, RowsRule] = {
    "index_put": _index_put,
    "scatter": _scattered,
    "scatter_add": _scatter_add,
}
