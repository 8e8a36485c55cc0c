"""Operators that make numbers from nothing, or draw them."""

from __future__ import annotations

import numpy as np

from everystep.ops.call import Call, Formula, Made, NoRuleError, Words
from everystep.ops.elementwise import each_alone
from everystep.ops.labels import SHARED, Tracked
from everystep.ops.operator_record import OperatorRecord, alike
from everystep.ops.row_rules import Result, RowsCall, filled

__all__ = ["CREATING"]


def _filled(call: Call) -> Made:
    if call.kind in ("zero", "zeros", "zeros_like", "new_zeros"):
        return Formula("0")
    if call.kind in ("ones", "ones_like", "new_ones"):
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
        # A single number is the start.
        settings["intervals"] = max(call.value("steps") - 1, 1)
    return Formula(text, settings=settings)


def _drawn(call: Call) -> Made:
    given = {}
    if call.kind == "multinomial":  # a class by the probabilities of all
        given["self"] = call.piece("self", *call.index[:-1], np.arange(call.shape("self")[-1]))
    # Others only use the memory, or the shape, of their first argument.
    reads_self = call.operation.operator in ("aten.bernoulli.default", "aten.poisson.default")
    for key in ("self", "p", "mean", "std") if reads_self else ("p", "mean", "std"):
        value = call.arguments.get(key)
        if isinstance(value, str) and call.inputs[value].numel():
            given[key] = call.aligned(key)
    return Words("drawn by the random generator", given)


def _dropout(call: Call) -> Made:
    if call.place == 1:
        return Words("drawn by the random generator")
    if call.arguments.get("train") is False:
        return Formula("input", {"input": call.piece("input", *call.index)})
    p = call.value("p")
    given = {
        "input": call.piece("input", *call.index),
        "mask": call.result_piece(1, *call.index),
    }
    return Formula("input * mask / (1 - p)" if p < 1 else "input * mask * 0", given, {"p": p})


def _of_no_row(call: RowsCall) -> list[Result]:
    value = call["value"] if call.kind == "fill" else None
    if isinstance(value, Tracked):
        return [Result(value.labels.expand(call.results[0].shape))]
    return [filled(SHARED, result) for result in call.results]


CREATING: dict[str, OperatorRecord] = {
    **alike("""
    _dirichlet_grad _fused_dropout _sample_dirichlet _standard_gamma _standard_gamma_grad bartlett_window
    binomial blackman_window empty empty_like empty_strided fft_fftfreq fft_rfftfreq hamming_window
    hann_window kaiser_window logspace new_empty new_empty_strided range tril_indices triu_indices
    """),
    **alike("zero zeros zeros_like ones ones_like full full_like fill", _filled, _of_no_row),
    **alike("new_zeros new_ones new_full", _filled, _of_no_row),
    **alike("arange scalar_tensor eye linspace", _filled),
    **alike("rand_like randn_like randint_like uniform normal exponential", _drawn, _of_no_row),
    **alike("random geometric cauchy log_normal", _drawn, _of_no_row),
    **alike("rand randn randint randperm multinomial poisson normal_functional", _drawn),
    **alike("bernoulli", _drawn, line="1 with probability {p}, else 0"),
    **alike("native_dropout", _dropout, each_alone, "dropout({input}, p={p})"),
}
