"""LSTM layers on a CPU, which one kernel computes over all time, and another differentiates."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from everystep.ops.labels import MIXED, SHARED, Tracked, elementwise, reduced, rows_in
from everystep.ops.rows import MixesError, Result, RowsCall, RowsRule, by_key, none_mixed
from everystep.program.calls import without_autograd

__all__ = ["RECURRENT"]

#: Settings of the layer; what it is given is of shape (T, N, C), and its states (N, H).
_SETTINGS = ("mode", "hidden_size", "num_layers", "has_biases", "bidirectional", "batch_first")


def _rows(call: RowsCall, sequences: tuple[str, ...], states: tuple[str, ...]) -> Tensor:
    """Return the labels of the rows (N) that sequences and states have in common."""
    given = [(call[name], [0, 2]) for name in sequences] + [(call[name], [1]) for name in states]
    parts = [reduced(each.labels, axes) for each, axes in given if isinstance(each, Tracked)]
    return none_mixed(elementwise(parts))


def _layer(call: RowsCall) -> list[Result]:
    call.require_shared("weight0", "weight1", "weight2", "weight3")
    keys = _rows(call, ("input",), ("hx_", "cx_"))
    output, *states, workspace = call.results
    mixed = torch.full((), MIXED, dtype=torch.int32).expand(workspace.shape)
    return [
        Result(keys.reshape(1, -1, 1).expand(output.shape)),
        *(Result(keys.reshape(-1, 1).expand(state.shape)) for state in states),
        Result(mixed, why="is the memory of a kernel, for all rows"),
    ]


def _layer_backward(call: RowsCall) -> list[Result]:
    weights = ("weight1", "weight2", "weight3", "weight4")
    call.require_shared(*weights)
    sequences, states = ("input", "output", "grad_output"), ("hx_", "cx_tmp", "grad_hy", "grad_cy")
    keys = _rows(call, sequences, states)
    rows = rows_in(keys)
    if set(rows) == {SHARED}:
        raise MixesError("adds up numbers that are the same for all rows")
    if len(call.results) != 7:
        raise MixesError("returns other results than there are gradients")

    def on(place: int) -> Callable[[Tensor], Tensor]:
        return lambda at: _of_rows(call, weights, sequences, states, at)[place]

    found = [Result(keys.reshape(1, -1, 1).expand(call.results[0].shape))]
    for place in range(1, 5):
        result = call.results[place]
        labels = reduced(keys, [0], is_sum=True).expand(result.shape)
        found.append(Result(labels, by_key(rows, result, on(place))))
    return found + [Result(keys.reshape(-1, 1).expand(each.shape)) for each in call.results[5:]]


def _of_rows(
    call: RowsCall,
    weights: tuple[str, ...],
    sequences: tuple[str, ...],
    states: tuple[str, ...],
    at: Tensor,
) -> tuple[Tensor, ...]:
    """Return the gradients of some rows alone; the kernel's memory is made again for them."""
    chosen = {
        name: call[name].value.index_select(axis, at)
        for axis, names in ((1, sequences), (0, states))
        for name in names
        if isinstance(call[name], Tracked)
    }
    # The kernel keeps what its derivative needs only where gradients are asked for.
    with without_autograd(), torch.enable_grad():
        output, hy, cy, workspace = torch.ops.aten.mkldnn_rnn_layer(
            chosen["input"],
            *(call[name].value for name in weights),
            chosen["hx_"],
            chosen["cx_tmp"],
            call["reverse"],
            call["batch_sizes"],
            *(call[name] for name in _SETTINGS),
            True,
        )
    return call.again(**chosen | {"output": output}, hy_=hy, cy_=cy, workspace=workspace)


RECURRENT: dict[str, RowsRule] = {
    "mkldnn_rnn_layer": _layer,
    "mkldnn_rnn_layer_backward": _layer_backward,
}
