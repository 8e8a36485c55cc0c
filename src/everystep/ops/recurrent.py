"""LSTM layers on a CPU: one kernel computes all times, and another differentiates.

Their intermediate results are unknown.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from everystep.ops.call import Call, Made, NoRuleError, Piece, Words, grid
from everystep.ops.labels import MIXED, SHARED, Tracked, all_are, broadcast, reduced
from everystep.ops.operator_record import Given, OperatorRecord, alike, are_dense
from everystep.ops.operators import without_autograd
from everystep.ops.row_rules import MixesError, Result, RowsCall, by_key, filled, none_mixed

__all__ = ["RECURRENT"]


def _sequence(call: Call, key: str, times: range, rows: list[int] | range) -> Piece:
    """Return numbers of a tensor (T, N, C)."""
    return call.piece(key, *grid(times, rows, range(call.shape(key)[2])))


def _state(call: Call, key: str, rows: list[int] | range) -> Piece:
    """Return numbers of a tensor (N, H)."""
    return call.piece(key, *grid(rows, range(call.shape(key)[1])))


def _layer(call: Call) -> Made:
    if call.place == 3:
        raise NoRuleError("memory of the kernel")
    length, is_reverse = call.shape("input")[0], bool(call.value("reverse"))
    row = call.index[1] if call.place == 0 else call.index[0]
    times = range(length)
    if call.place == 0:
        time = call.index[0]
        # The output of a time depends on the sequence up to it; in reverse, on the rest of it.
        times = range(time, length) if is_reverse else range(time + 1)
    given = {"input": _sequence(call, "input", times, [row])}
    given |= {key: _state(call, key, [row]) for key in ("hx_", "cx_")}
    given |= {f"weight{n}": call.whole(f"weight{n}") for n in range(4)}
    what = "state" if call.place else "output"
    return Words(f"an LSTM's {what} after time {times[0]} to {times[-1]}", given)


def _layer_backward(call: Call) -> Made:
    """Return the numbers of the row, or of all rows for a weight, at all times."""
    length, count = call.shape("input")[:2]
    is_weight = 1 <= call.place <= 4
    rows = range(count) if is_weight else [call.index[1 if call.place == 0 else 0]]
    given = {}
    for key in ("grad_output", "input", "output"):
        if key in call:
            given[key] = _sequence(call, key, range(length), rows)
    for key in ("hx_", "cx_tmp", "hy_", "cy_", "grad_hy", "grad_cy"):
        if key in call:
            given[key] = _state(call, key, rows)
    given |= {f"weight{n}": call.whole(f"weight{n}") for n in range(1, 5)}
    names = ("input", *("weight",) * 4, "first state", "first state")
    return Words(f"the derivative of an LSTM by its {names[call.place]}", given)


#: Settings of the layer.
_SETTINGS = ("mode", "hidden_size", "num_layers", "has_biases", "bidirectional", "batch_first")


def _shared_rows(call: RowsCall, sequences: tuple[str, ...], states: tuple[str, ...]) -> Tensor:
    """Return the labels of the rows (N) that sequences and states have in common."""
    # A row is at one place of the second axis at all times.
    given = [(call[name], [0, 2]) for name in sequences] + [(call[name], [1]) for name in states]
    parts = [reduced(each.labels, axes) for each, axes in given if isinstance(each, Tracked)]
    return none_mixed(broadcast(parts))


def _layer_rows(call: RowsCall) -> list[Result]:
    call.require_shared("weight0", "weight1", "weight2", "weight3")
    keys = _shared_rows(call, ("input",), ("hx_", "cx_"))
    output, *states, workspace = call.results
    return [
        Result(keys.reshape(1, -1, 1).expand(output.shape)),
        *(Result(keys.reshape(-1, 1).expand(state.shape)) for state in states),
        filled(MIXED, workspace, "is the memory of a kernel, for all rows"),
    ]


#: Arguments of the derivative; sequences have shape (T, N, C), and states (N, H).
_WEIGHTS = ("weight1", "weight2", "weight3", "weight4")
_SEQUENCES, _STATES = ("input", "output", "grad_output"), ("hx_", "cx_tmp", "grad_hy", "grad_cy")


def _layer_backward_rows(call: RowsCall) -> list[Result]:
    call.require_shared(*_WEIGHTS)
    keys = _shared_rows(call, _SEQUENCES, _STATES)
    if keys.numel() and all_are(keys, SHARED):
        raise MixesError("adds up numbers that are the same for all rows")
    if len(call.results) != 7:
        raise MixesError("returns other results than there are gradients")

    gradient, *weights, hidden, cell = call.results
    return [
        Result(keys.reshape(1, -1, 1).expand(gradient.shape)),
        *(by_key(keys, each, partial(_of_rows, call, n)) for n, each in enumerate(weights, 1)),
        *(Result(keys.reshape(-1, 1).expand(each.shape)) for each in (hidden, cell)),
    ]


def _of_rows(call: RowsCall, place: int, at: Tensor) -> Tensor:
    """Return a gradient of some rows alone; the kernel's memory is made again for them."""
    chosen = {
        name: call[name].value.index_select(axis, at)
        for axis, names in ((1, _SEQUENCES), (0, _STATES))
        for name in names
        if isinstance(call[name], Tracked)
    }
    # The kernel keeps the inputs of its derivative only if gradients are required.
    with without_autograd(), torch.enable_grad():
        output, hy, cy, workspace = torch.ops.aten.mkldnn_rnn_layer(
            chosen["input"],
            *(call[name].value for name in _WEIGHTS),
            chosen["hx_"],
            chosen["cx_tmp"],
            call["reverse"],
            call["batch_sizes"],
            *(call[name] for name in _SETTINGS),
            True,
        )
    return call.again(**chosen | {"output": output}, hy_=hy, cy_=cy, workspace=workspace)[place]


def _layer_fits(given: Given) -> bool:
    """An LSTM's layer: four gates."""
    x, hidden = given["input"].shape, given["hidden_size"]
    # As cuDNN counts them: 2 is an LSTM, 3 a GRU; with batch sizes, a sequence would be packed.
    if len(x) != 3 or hidden < 1 or given["mode"] != 2 or given["batch_sizes"]:
        return False
    shapes = [given[f"weight{number}"].shape for number in range(4)]
    gates = 4 * hidden
    biases = not given["has_biases"] or shapes[2] == shapes[3] == (gates,)
    states = all(math.prod(given[name].shape) == x[1] * hidden for name in ("hx_", "cx_"))
    return biases and states and are_dense(given) and shapes[:2] == [(gates, x[2]), (gates, hidden)]


_ARGUMENTS = (
    "Tensor input, Tensor weight0, Tensor weight1, Tensor weight2, Tensor weight3, Tensor hx_, "
    "Tensor cx_, bool reverse, List[int] batch_sizes, int mode, int hidden_size, int num_layers, "
    "bool has_biases, bool bidirectional, bool batch_first, bool train"
)
RECURRENT: dict[str, OperatorRecord] = {
    **alike("_cudnn_rnn miopen_rnn", memory_from=3),
    **alike("""
    _cudnn_rnn_backward _thnn_fused_gru_cell* _thnn_fused_lstm_cell _thnn_fused_lstm_cell_backward_impl
    lstm_mps_backward miopen_rnn_backward
    """),
    **alike("_pack_padded_sequence", by_values=True),
    **alike("mkldnn_rnn_layer", _layer, _layer_rows, "", _layer_fits, _ARGUMENTS, memory_from=3),
    **alike(
        "mkldnn_rnn_layer_backward",
        *(_layer_backward, _layer_backward_rows),
        kept=range(9),
        renamed={f"weight{n + 1}": f"weight{n}" for n in range(4)} | {"cx_tmp": "cx_"},
    ),
}
