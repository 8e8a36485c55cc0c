"""Rules of operators that resize images: weighted sums, with weights that the transposed operator gives.

`upsample_..._backward` is the transpose of `upsample_...`: what one of them makes of a 1 among zeros
are the weights of a number of the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from everystep.ops.call import Call, Made, Sum, Terms
from everystep.program.operators import parameters

__all__ = ["RESIZING"]


def _resized(call: Call) -> Made:
    key = "grad_output" if call.kind.endswith("_backward") else "self"
    shape = call.shape(key)
    leading, at = call.index[:2], call.index[2:]
    weights = _weights(call, at, shape[2:])
    places = torch.nonzero(weights, as_tuple=True)
    piece = call.piece(key, *leading, *(axis.numpy() for axis in places))
    values = weights[places].numpy()
    if (values == 1).all():
        return Sum((Terms(key, {key: piece}),))
    return Sum((Terms(f"{key} * weight", {key: piece}, {"weight": values}),))


def _weights(call: Call, at: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
    """Return the weight of each number of a channel of the argument, of these sizes."""
    is_backward = call.kind.endswith("_backward")
    name = call.operation.name
    name = name.removesuffix("_backward") if is_backward else f"{name}_backward"
    operator = getattr(torch.ops.aten, name).default
    own = call.results[call.output(0)].shape[2:]
    one = torch.zeros(1, 1, *own, dtype=torch.float64)
    one[(0, 0, *at)] = 1
    given = {
        "self" if is_backward else "grad_output": one,
        "output_size": list(sizes if is_backward else own),
        "input_size": [1, 1, *(own if is_backward else sizes)],
    }
    known = {p.name for p in parameters(operator)}
    for key in known - given.keys():
        given[key] = call.value(key)
    found: Tensor = operator(**{key: value for key, value in given.items() if key in known})[0, 0]
    assert math.prod(found.shape) == math.prod(sizes)
    return found


_HOW = [
    *("nearest1d", "nearest2d", "nearest3d", "nearest_exact1d", "nearest_exact2d", "nearest_exact3d"),
    *("linear1d", "bilinear2d", "trilinear3d", "bicubic2d", "bilinear2d_aa", "bicubic2d_aa"),
]
RESIZING: dict[str, Callable[[Call], Made]] = {
    **{f"upsample_{how}": _resized for how in _HOW},
    **{f"upsample_{how}_backward": _resized for how in _HOW},
}
