"""Operators that only move numbers.

The operator itself shows where the numbers come from: it moves their positions (in float64, which every
such operator takes), or their labels, in the same way; 0 is a place that it fills.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everystep.ops.arguments import decode, references
from everystep.ops.call import Call, Formula, Made, Piece
from everystep.ops.labels import SHARED, SUM, Tracked, broadcast
from everystep.ops.operator_record import Given, OperatorRecord, alike
from everystep.ops.row_rules import MixesError, Result, RowsCall, batched, sum_of

__all__ = ["MOVEMENTS", "of_indices"]


def _moved(call: Call, keys: tuple[str, ...]) -> Made:
    """Return where an operator that only moves numbers took the wanted one from."""
    positions: dict[str, Tensor] = {}
    # Positions begin at 1: 0 is what the operator fills in.
    count = 1
    for name in (name for key in keys for name in references(call.arguments[key])):
        if name not in positions:
            tensor = call.inputs[name]
            end = count + tensor.numel()
            positions[name] = torch.arange(count, end, dtype=torch.float64).reshape(tensor.shape)
            count = end
    replaced = {key: decode(call.arguments[key], positions.__getitem__) for key in keys}
    found = call.again(**replaced, **_filling(call))[call.place]
    at = int(found[call.index])
    if not at:
        return Formula("value", settings={"value": call.value("value") or 0}, note="which it fills in")
    name, own = next((n, p) for n, p in positions.items() if bool((p == at).any()))
    index = np.unravel_index(int((own == at).flatten().nonzero()), tuple(own.shape))
    key = next(k for k in keys if name in references(call.arguments[k]))
    return Formula(key, {key: Piece(name, tuple(map(int, index)))})


def _filling(call: Call | RowsCall) -> dict[str, int]:
    # Any other value could be taken for a position, or for a label.
    return {"value": 0} if call.kind in ("constant_pad_nd", "index_fill") else {}


def _moving(call: RowsCall, keys: tuple[str, ...]) -> list[Result]:
    """Run the operator on labels instead of numbers, and join the labels of its indices."""
    given: dict[str, Any] = {key: call[key] for key in keys}
    moved = [
        each for value in given.values() for each in (value if isinstance(value, list) else [value])
    ]

    def run(of: Any, **more: int) -> Tensor:
        replaced = {k: [*map(of, v)] if isinstance(v, list) else of(v) for k, v in given.items()}
        return call.again(**replaced, **more)[0]

    # Labels are shifted above 0, which stands for what the operator fills in.
    lowest = SUM - 1
    found = run(lambda each: each.labels - lowest, **_filling(call))
    found = torch.where(found == 0, SHARED, found + lowest)  # filled numbers are of no row
    where = call.tensors(*keys)
    if not all(each.is_shared for each in where):
        if call.kind == "gather":
            found = broadcast([found, where[0].labels])
        else:
            indices = call["indices"] if call.kind == "index" else [None]
            found = broadcast([found, of_indices(indices, found.dim())])
    return [sum_of(found, lambda row: run(lambda each: each.term(row)), moved)]


def of_indices(indices: list[Tracked | None], dims: int) -> Tensor:
    """Return the labels of indices, broadcast to the picked tensor, which has so many dimensions."""
    known = [each for each in indices if each is not None]
    first = next((place for place, each in enumerate(indices) if each is not None), 0)
    # Where a slice is between indices, torch moves their dimension to the front.
    if not known or any(each is None for each in indices[first : first + len(known)]):
        raise MixesError("selects by values of rows")
    found = broadcast([_of_index(each) for each in known])
    after = dims - first - found.dim()
    if after < 0:
        raise MixesError("selects by values of rows")
    return found.reshape(*[1] * first, *found.shape, *[1] * after)


def _of_index(index: Tracked) -> Tensor:
    """Return the labels of an index: of a mask, those of its places that are true."""
    is_mask = index.value.dtype in (torch.bool, torch.uint8)
    return index.labels[index.value.bool()] if is_mask else index.labels


def _mask_fits(given: Given) -> bool:
    """Only one of them is expanded, so that the result has no more numbers than the other."""
    shapes = given["self"].shape, given["mask"].shape
    return np.broadcast_shapes(*shapes) in shapes


def _moves(names: str, *keys: str, **more: Any) -> dict[str, OperatorRecord]:
    """Return records of operators that move the numbers of some of their arguments."""
    return alike(names, partial(_moved, keys=keys), partial(_moving, keys=keys), **more)


_OF_SELF = partial(_moved, keys=("self",))


MOVEMENTS: dict[str, OperatorRecord] = {
    **alike("""
    _conj _neg_view _reshape_alias _unsafe_view alias as_strided ccol_indices chunk col2im col_indices
    crow_indices detach diagonal expand indices lift_fresh narrow narrow_copy permute row_indices select
    slice slice_inverse split split_with_sizes squeeze t transpose unbind unfold* unsafe_split
    unsafe_split_with_sizes unsqueeze values view view_as_complex view_as_real
    """),
    **_moves("index index_select gather take flip roll rot90 repeat tril triu diag_embed", "self"),
    **_moves("constant_pad_nd pixel_shuffle pixel_unshuffle channel_shuffle im2col", "self"),
    **_moves("native_channel_shuffle index_fill", "self"),
    **_moves("masked_select", "self", line="{self}[{mask}]", fits=_mask_fits, by_values=True),
    **_moves("cat stack block_diag", "tensors"),
    **_moves("select_backward slice_backward diagonal_backward", "grad_output"),
    **_moves("select_scatter diagonal_scatter", "self", "src"),
    **alike("reflection_pad1d reflection_pad2d reflection_pad3d", _OF_SELF, batched),
    **alike("replication_pad1d replication_pad2d replication_pad3d", _OF_SELF, batched),
    **alike("_local_scalar_dense", line="read by Python: {self}", by_values=True),
}
