"""Rules of operators that move numbers, pick some of them, add what meets, or draw.

Where the numbers of an operator that only moves them come from, the operator itself says: it moves
their positions (float64, which every such operator takes; from 1; 0 is a place that it fills) in the
same way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everystep.ops.call import (
    Axis,
    Call,
    Formula,
    Made,
    NoRuleError,
    Piece,
    Sum,
    Words,
    tensors_in,
)
from everystep.ops.sums import single
from everystep.program.arguments import decode

__all__ = ["DRAWN", "FILLED", "MOVED", "PICKED", "drawn", "filled", "moved"]

#: Arguments of operators that only move numbers: those that they move.
MOVED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("index", "index_select", "gather", "take", "flip", "roll", "rot90"), ("self",)),
    **dict.fromkeys(("repeat", "tril", "triu", "diag_embed", "constant_pad_nd"), ("self",)),
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "im2col"), ("self",)),
    **dict.fromkeys(("native_channel_shuffle", "masked_select"), ("self",)),
    **dict.fromkeys(("reflection_pad1d", "reflection_pad2d", "reflection_pad3d"), ("self",)),
    **dict.fromkeys(("replication_pad1d", "replication_pad2d", "replication_pad3d"), ("self",)),
    **dict.fromkeys(("cat", "stack", "block_diag"), ("tensors",)),
    **dict.fromkeys(("select_backward", "slice_backward", "diagonal_backward"), ("grad_output",)),
    **dict.fromkeys(("select_scatter", "diagonal_scatter"), ("self", "src")),
}
#: Operators that make numbers from nothing.
FILLED = {
    *("zeros", "zeros_like", "ones", "ones_like", "full", "full_like", "fill", "zero", "arange"),
    *("scalar_tensor", "new_zeros", "new_ones", "new_full", "eye", "linspace"),
}
#: Operators that draw random numbers.
DRAWN = {
    *("bernoulli", "rand", "randn", "rand_like", "randn_like", "randint", "randint_like", "randperm"),
    *("normal", "uniform", "random", "exponential", "multinomial", "poisson", "geometric", "cauchy"),
    *("log_normal", "normal_functional"),
}


def moved(call: Call) -> Made:
    """Return where an operator that only moves numbers took the wanted one from."""
    keys = MOVED[call.kind]
    names = [name for key in keys for name in tensors_in(call.arguments[key])]
    begins, count = {}, 1
    for name in names:
        if name not in begins:
            begins[name] = count
            count += call.inputs[name].numel()
    positions = {
        name: torch.arange(begin, begin + call.inputs[name].numel(), dtype=torch.float64).reshape(
            call.inputs[name].shape
        )
        for name, begin in begins.items()
    }
    arguments = {}
    for key, value in call.arguments.items():
        if key == "value":
            value = 0  # what fills
        arguments[key] = decode(value, partial(_either, positions if key in keys else {}, call))
    operator = call.operation.resolved
    passed = [key for key in call.arguments if key in {p.name for p in operator._schema.arguments}]
    kept = {key: arguments[key] for key in passed}
    found = _result(operator(**kept), call.place)
    at = int(found[call.index])
    if not at:
        fill = call.arguments.get("value", 0)
        return Formula("value", settings={"value": decode(fill, _no_tensor)}, note="which it fills in")
    name = next(n for n, b in begins.items() if b <= at < b + call.inputs[n].numel())
    index = np.unravel_index(at - begins[name], tuple(call.inputs[name].shape))
    piece = Piece(name, tuple(int(place) for place in index))
    key = next(k for k in keys if name in tensors_in(call.arguments[k]))
    return Formula(key, {key: piece})


def _either(known: dict[str, Tensor], call: Call, name: str) -> Tensor:
    return known[name] if name in known else call.inputs[name].cpu()


def _no_tensor(name: str) -> Tensor:
    raise NoRuleError(name)


def _result(result: Any, place: int) -> Tensor:
    found: Tensor = result[place] if isinstance(result, list | tuple) else result
    return found


def filled(call: Call) -> Made:
    """Return the rule of an operator that makes numbers from nothing."""
    if call.kind.startswith("zero") or call.kind == "new_zeros":
        return Formula("0")
    if call.kind.startswith("one") or call.kind == "new_ones":
        return Formula("1")
    if call.kind == "eye":
        return Formula(str(int(len(set(call.index)) == 1)))
    if call.kind == "arange":
        return _in_a_row(call, "start + place * step")
    if call.kind == "linspace":
        return _in_a_row(call, "start + place * (end - start) / intervals")
    for key in ("value", "fill_value", "s"):
        if isinstance(call.arguments.get(key), str):
            return Formula("value", {"value": call.piece(key)})
        if key in call:
            return Formula("value", settings={"value": call.value(key)})
    raise NoRuleError(call.kind)


def _in_a_row(call: Call, text: str) -> Made:
    settings = {"start": 0, "step": 1, "place": call.index[0]}
    settings |= {key: call.value(key) for key in ("start", "step", "end") if key in call}
    if call.kind == "linspace":
        settings["intervals"] = max(call.value("steps") - 1, 1)
    return Formula(text, settings=settings)


def drawn(call: Call) -> Made:
    """Return the rule of an operator that draws."""
    given = {}
    for key in ("self", "p", "mean", "std"):
        value = call.arguments.get(key)
        if isinstance(value, str) and call.inputs[value].numel() and not _is_overwritten(call, key):
            given[key] = call.aligned(key)
    return Words("drawn by the random generator", given)


def _is_overwritten(call: Call, key: str) -> bool:
    """Tell whether the operator only uses the memory, or the shape, of an argument."""
    return key == "self" and (call.operation.name.endswith(("_", "_like")) or call.kind != "bernoulli")


def _dropout(call: Call) -> Made:
    if call.place == 1:
        return Words("drawn by the random generator")
    p = call.value("p")
    given = {
        "input": call.piece("input", *call.index),
        "mask": call.result_piece(1, *call.index),
    }
    return Formula("input * mask / (1 - p)" if p < 1 else "input * mask * 0", given, {"p": p})


def _padding_backward(call: Call) -> Made:
    """Return the sum of the gradients at the places that the padding copied the wanted number to."""
    shape = call.shape("self")
    positions = torch.arange(call.tensor("self").numel(), dtype=torch.float64).reshape(shape)
    forward = getattr(torch.ops.aten, call.kind.removesuffix("_backward"))
    copies = forward(positions, call.value("padding"))
    places = np.nonzero((copies == positions[call.index]).numpy())
    return Sum((single("grad_output", call.piece("grad_output", *places)),))


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
    by_frequency = bool(call.value("scale_grad_by_freq")) and piece.size > 0
    return Sum((single("grad_output", piece),), float(piece.size) if by_frequency else 1.0)


def _index_put(call: Call) -> Made:
    shape = call.shape("self")
    positions = torch.arange(call.tensor("self").numel()).reshape(shape)
    indices = decode(call.arguments["indices"], lambda name: call.inputs[name].cpu())
    targets = positions[tuple(slice(None) if each is None else each for each in indices)]
    found = np.nonzero(targets.numpy() == int(positions[call.index]))
    values = call.shape("values")
    last = found[len(found) - len(values) :]
    places = [axis if n > 1 else np.zeros_like(axis) for axis, n in zip(last, values, strict=True)]
    return _added(call, "values", places, len(found[0]) if found else 1)


def _added(call: Call, key: str, places: list[Any], count: int) -> Made:
    """Return the rule of an operator that adds numbers to one of `self`, or puts one there."""
    own = single("self", call.piece("self", *call.index))
    factor = call.scalar("alpha") if "alpha" in call else 1
    piece = call.piece(key, *places)
    adds = bool(call.arguments.get("accumulate")) or call.kind in ("index_add", "scatter_add")
    if adds:
        repeated = factor if places else factor * count  # a number alone is added to each place
        return Sum((own, single(key, piece, repeated))) if count else Sum((own,))
    if count > 1:
        raise NoRuleError("several numbers are put into one place")
    return Sum((single(key, piece) if count else own,))


def _index_add(call: Call) -> Made:
    key = "source" if "source" in call.arguments else "src"
    dim = call.value("dim") % max(len(call.index), 1)
    found = np.flatnonzero(call.tensor("index").cpu().numpy().reshape(-1) == call.index[dim])
    places: list[Axis] = list(call.index)
    places[dim] = found
    return _added(call, key, places, len(found))


def _scatter(call: Call) -> Made:
    if "reduce" in call or "src" not in call:
        raise NoRuleError("with a value, or a reduction")
    dim, index = call.value("dim") % max(len(call.index), 1), call.tensor("index").cpu().numpy()
    others = [place for d, place in enumerate(call.index) if d != dim]
    sizes = [size for d, size in enumerate(index.shape) if d != dim]
    if any(place >= size for place, size in zip(others, sizes, strict=True)):
        found = np.empty(0, dtype=np.int64)
    else:
        line = index[tuple(slice(None) if d == dim else p for d, p in enumerate(call.index))]
        found = np.flatnonzero(line == call.index[dim])
    places: list[Axis] = list(call.index)
    places[dim] = found
    return _added(call, "src", places, len(found))


def _sorted(call: Call) -> Made:
    """Return the rule of operators whose second result says where the first was."""
    dim = call.value("dim") % max(len(call.index), 1)
    if call.place == 1:
        places: list[Axis] = list(call.index)
        places[dim] = np.arange(call.shape("self")[dim])
        return Words("where in self it is", {"self": call.piece("self", *places)})
    places = list(call.index)
    places[dim] = int(call.results[call.output(1)][call.index])
    given = {"self": call.piece("self", *places), "indices": call.result_piece(1, *call.index)}
    return Formula("self[indices]", given)


PICKED: dict[str, Callable[[Call], Made]] = {
    "native_dropout": _dropout,
    "embedding": _embedding,
    "embedding_dense_backward": _embedding_backward,
    "index_put": _index_put,
    "index_add": _index_add,
    "index_copy": _index_add,
    "scatter": _scatter,
    "scatter_add": _scatter,
    **{
        f"{how}_pad{dims}d_backward": _padding_backward
        for how in ("reflection", "replication")
        for dims in (1, 2, 3)
    },
    "sort": _sorted,
    "topk": _sorted,
}
