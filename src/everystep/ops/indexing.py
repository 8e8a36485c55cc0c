"""Operators that put or add numbers at indices, and embeddings, which pick rows by index."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from everystep.ops.arguments import decode
from everystep.ops.call import Call, Formula, Made, NoRuleError, Sum, single
from everystep.ops.labels import MIXED, SHARED, SUM, Tracked, all_are, broadcast, gathered, reduced
from everystep.ops.movements import of_indices
from everystep.ops.operator_record import LATER, Given, OperatorRecord, alike, are_dense
from everystep.ops.row_rules import MixesError, Result, RowsCall, by_key, filled, none_mixed, sum_of

__all__ = ["INDEXING"]


def _put(call: Call) -> Made:
    """Return the rule of an operator that puts numbers into places of `self`, or adds them there."""
    key = next((k for k in ("values", "source", "src") if k in call), None)
    if key is None or "reduce" in call:
        raise NoRuleError("with a value, or a reduction")
    places = (
        _put_there(call) if key == "values" else _put_along(call, call.tensor("index").cpu().numpy())
    )
    count = len(places[0])
    piece = call.aligned(key, places)
    own = single("self", call.piece("self", *call.index))
    if not count:
        return Sum((own,))
    if bool(call.arguments.get("accumulate")) or call.kind in ("index_add", "scatter_add"):
        factor = call.scalar("alpha") if "alpha" in call else 1
        # A number that is broadcast is added to each place.
        return Sum((own, single(key, piece, factor * (count // piece.size))))
    # torch does not define which of them stays.
    if count > 1:
        raise NoRuleError("several numbers are put into one place")
    return Sum((single(key, piece),))


def _put_there(call: Call) -> tuple[Any, ...]:
    """Return the places of `indices` that name the wanted one."""
    # torch itself resolves indices, which may be masks, slices, or broadcast to each other.
    shape = call.shape("self")
    positions = torch.arange(call.tensor("self").numel()).reshape(shape)
    indices = decode(call.arguments["indices"], lambda name: call.inputs[name].cpu())
    targets = positions[tuple(slice(None) if each is None else each for each in indices)]
    return np.nonzero((targets == positions[call.index]).numpy())


def _put_along(call: Call, index: NDArray[np.int64]) -> tuple[Any, ...]:
    """Return the places of a source with the wanted index along a dimension, and its own in others."""
    dim = call.value("dim") % max(len(call.index), 1)
    line = index.reshape(-1)
    # Its index names a place for each number, that of index_add and index_copy for each slice.
    if "scatter" in call.kind:
        at: list[Any] = [slice(p, p + 1) for p in call.index]
        at[dim] = slice(None)
        line = index[tuple(at)].reshape(-1)
    found = np.flatnonzero(line == call.index[dim])
    return tuple(found if d == dim else np.full(len(found), p) for d, p in enumerate(call.index))


def _embedding(call: Call) -> Made:
    *where, column = call.index
    row = int(call.tensor("indices")[tuple(where)])
    given = {
        "weight": call.piece("weight", row, column),
        "indices": call.piece("indices", *where),
    }
    return Formula("weight[indices]", given)


def _embedding_backward(call: Call) -> Made:
    row, column = call.index
    if row == call.value("padding_idx"):
        return Formula("0", note="the row of the padding has no gradient")
    places = np.nonzero(call.tensor("indices").cpu().numpy() == row)
    columns = np.full(len(places[0]) if places else 1, column)
    piece = call.piece("grad_output", *places, columns)
    # Divided by how often the row is named: the terms are as many.
    by_frequency = bool(call.value("scale_grad_by_freq")) and piece.size > 0
    return Sum((single("grad_output", piece),), float(piece.size) if by_frequency else 1.0)


def _embedding_rows(call: RowsCall) -> list[Result]:
    call.require_shared("weight")
    labels = broadcast([call["indices"].labels])
    return [Result(labels.unsqueeze(-1).expand(call.results[0].shape))]


def _embedding_backward_rows(call: RowsCall) -> list[Result]:
    if call["scale_grad_by_freq"]:
        raise MixesError("divides by how often an entry is in the batch")
    gradient, indices = call["grad_output"], call["indices"]
    if gradient.has(SUM) and indices.is_shared and not gradient.has(MIXED):
        labels = filled(SUM, call.results[0]).labels
        return [sum_of(labels, lambda row: call.again(grad_output=gradient.term(row))[0], [gradient])]
    keys = none_mixed(broadcast([reduced(gradient.labels, [-1]), indices.labels]).reshape(-1))
    if keys.numel() and all_are(keys, SHARED):
        raise MixesError("adds up numbers that are the same for all rows")
    width = gradient.value.shape[-1]

    def select(at: Tensor) -> Tensor:
        chosen = gradient.value.reshape(-1, width)[at]
        return call.again(grad_output=chosen, indices=indices.value.reshape(-1)[at])[0]

    return [by_key(keys, call.results[0], select)]


def _index_put_rows(call: RowsCall) -> list[Result]:
    whole, given = call["self"], call["values"]
    indices = [each.value if isinstance(each, Tracked) else slice(None) for each in call["indices"]]
    if not call["accumulate"]:
        return [Result(_put_rows(call, whole, given))]
    # torch itself resolves the indices: into the number of the cell that each value is added to.
    cells = torch.arange(whole.value.numel()).reshape(whole.value.shape)[tuple(indices)]
    labels = given.labels
    if not all(each.is_shared for each in call["indices"] if isinstance(each, Tracked)):
        labels = broadcast([labels, of_indices(call["indices"], cells.dim())])
    return _added(call, "values", cells, labels.expand(cells.shape))


def _put_rows(call: RowsCall, whole: Tracked, given: Tracked) -> Tensor:
    indices = [each for each in call["indices"] if each is not None]
    if all(each.is_shared for each in indices):
        # The operator may write in place, which torch refuses in expanded memory.
        labels = [broadcast([each.labels]).contiguous() for each in (whole, given)]
        return call.again(self=labels[0], values=labels[1])[0]
    (where, *more) = indices
    if more or where.value.shape != whole.value.shape or given.value.numel() != 1:
        raise MixesError("puts numbers at places that depend on rows")
    return broadcast([whole.labels, where.labels, given.labels.reshape(())])


def _scatter_add_rows(call: RowsCall) -> list[Result]:
    whole, index, given = call["self"], call["index"], call["src"]
    used = tuple(slice(size) for size in index.value.shape)
    axis = call["dim"] % max(whole.value.dim(), 1)
    others = (slice(None) if place == axis else part for place, part in enumerate(used))
    cells = torch.arange(whole.value.numel()).reshape(whole.value.shape)[tuple(others)]
    labels = given.labels[used]
    if not index.is_shared:
        labels = broadcast([labels, index.labels])
    return _added(call, "src", cells.gather(axis, index.value.cpu()), labels)


def _added(call: RowsCall, name: str, cells: Tensor, labels: Tensor) -> list[Result]:
    """Return the labels after numbers with these labels are added to cells of `self`."""
    whole, given = call["self"], call[name]
    if not whole.is_shared:
        raise MixesError("adds to what depends on rows")
    call.require_rows(labels)
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


def _scatter_rows(call: RowsCall) -> list[Result]:
    whole, index, given = call["self"], call["index"], call["src"]
    if call["reduce"] is not None:
        raise MixesError("has no rule for these arguments")
    labels = index.labels
    if isinstance(given, Tracked):
        part = given.labels[tuple(slice(size) for size in labels.shape)]
        labels = broadcast([part, labels])
    where = index.value
    return [Result(whole.labels.clone().scatter_(call["dim"], where, labels.contiguous()))]


def _embedding_backward_line(call: Call) -> str:
    if call.value("padding_idx") >= 0 or call.value("scale_grad_by_freq"):
        return ""
    return "sum of {grad_output} at {indices}"


_OF_BAG = (
    "Tensor weight, Tensor indices, Tensor offsets, bool scale_grad_by_freq, int mode, bool sparse, "
    "Optional[Tensor] per_sample_weights, bool include_last_offset, int padding_idx"
)


def _bag_fits(given: Given) -> bool:
    return are_dense(given, "weight")


INDEXING: dict[str, OperatorRecord] = {
    **alike("""
    _embedding_bag_forward_only bucketize embedding_renorm index_reduce masked_scatter* put
    scatter_reduce searchsorted value_selecting_reduction_backward
    """),
    **alike("_unique2 unique_dim unique_consecutive", by_values=True),
    **alike("nonzero", line="where {self} is not 0", by_values=True),
    **alike("_embedding_bag", fits=_bag_fits, arguments=_OF_BAG),
    **alike("_embedding_bag_backward", kept=LATER),
    **alike("_embedding_bag_per_sample_weights_backward", kept=LATER, forward="_embedding_bag"),
    **alike("embedding", _embedding, _embedding_rows, "{weight}[{indices}]"),
    **alike(
        "embedding_dense_backward",
        *(_embedding_backward, _embedding_backward_rows, _embedding_backward_line),
        kept=LATER,
        forward="embedding",
    ),
    **alike("index_put", _put, _index_put_rows),
    **alike("index_add index_copy", _put),
    **alike("scatter", _put, _scatter_rows),
    **alike("scatter_add", _put, _scatter_add_rows),
}
