"""Rules of LSTM layers on a CPU: which numbers of a sequence a number was made from.

One kernel computes all gates over all time, so what lies in between is not seen.
"""

from __future__ import annotations

from collections.abc import Callable

from everystep.ops.call import Call, Made, NoRuleError, Piece, Words, grid

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


RECURRENT: dict[str, Callable[[Call], Made]] = {
    "mkldnn_rnn_layer": _layer,
    "mkldnn_rnn_layer_backward": _layer_backward,
}
