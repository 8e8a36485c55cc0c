"""Softmax, normalizations and attention, where a number depends on a whole row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from everystep.ops.call import (
    Axis,
    Call,
    Formula,
    Made,
    NoRuleError,
    Piece,
    Sum,
    Terms,
    Words,
    grid,
    numbers_of,
    single,
)
from everystep.ops.formula import names_in
from everystep.ops.labels import MIXED, broadcast, reduced
from everystep.ops.operator_record import LATER, Given, OperatorRecord, alike, are_dense
from everystep.ops.row_rules import (
    MASKS,
    Result,
    RowsCall,
    along,
    asked_of,
    batched,
    by_key,
    filled,
    none_mixed,
    of_shape,
)

__all__ = ["NORMALIZATIONS"]


# A normalization returns the result, the means, and 1 / the deviations ("scale"; torch: rstd or invstd).
# The numbers with one mean, for an input (N, C, ...), are in
#   batch norm  a channel: means (C)                 a weight for each channel
#   group norm  channels of a row: means (N, group)  a weight for each channel
#   layer norm  the last dimensions: means (N, 1)    a weight for each place of them
def _softmax(call: Call) -> Made:
    given = {"self": call.piece("self", *call.index), "row": call.line("self")}
    if "log" in call.kind:
        return Formula("self - logsumexp(row)", given)
    # "safe": a row that a mask hides as a whole has 0, not NaN.
    text = "exp(self - logsumexp(row))"
    return Formula(f"0 if max(row) == -inf else {text}" if "safe" in call.kind else text, given)


def _softmax_backward(call: Call) -> Made:
    given = {key: call.piece(key, *call.index) for key in ("grad_output", "output")}
    given["gradients"] = call.line("grad_output")
    if "log" in call.kind:
        return Formula("grad_output - exp(output) * sum(gradients)", given)
    given["outputs"] = call.line("output")
    return Formula("output * (grad_output - sum(gradients * outputs))", given)


def _outer(call: Call) -> int:
    """Return how many axes a layer norm has before those that it normalizes."""
    return len(call.shape("input")) - len(call.value("normalized_shape"))


def _group_size(call: Call) -> int:
    return int(call.shape("input")[1] // call.value("group"))


def _statistics_at(call: Call, index: Sequence[Any]) -> tuple[Any, ...]:
    """Return the index of the mean and of the deviation by which a number of `input` is normalized."""
    if "batch" in call.kind:
        return (index[1],)
    if "group" in call.kind:
        return index[0], index[1] // _group_size(call)
    outer = _outer(call)
    return (*index[:outer], *[0] * (len(index) - outer))  # torch keeps these axes, with size 1


def _weight_at(call: Call, index: Sequence[Any]) -> tuple[Any, ...]:
    """Return the index of the weight and of the bias of a number of `input`."""
    return tuple(index[_outer(call) :]) if "layer" in call.kind else (index[1],)


def _together(call: Call, at: Sequence[int]) -> tuple[Any, ...]:
    """Return the places in `input` of all numbers with a mean of this index."""
    axes: list[Any] = [*map(range, call.shape("input"))]
    if "batch" in call.kind:
        axes[1] = at
    elif "group" in call.kind:
        size = _group_size(call)
        axes[:2] = [at[0]], range(at[1] * size, (at[1] + 1) * size)
    else:
        outer = _outer(call)
        axes[:outer] = [[place] for place in at[:outer]]
    return grid(*axes)


def _norm(call: Call) -> Made:
    """Return the rule of a normalization; its other results are the means and inverse deviations."""
    if call.written not in call.operation.results:  # it also writes these statistics in place
        return _running(call)
    if "batch" in call.kind and ("no_training" in call.kind or not call.arguments.get("training", True)):
        return _without_statistics(call)
    if call.place:
        piece = call.piece("input", *_together(call, call.index))
        if call.place == 1:
            return Sum((single("input", piece),), float(piece.size))
        deviation = "1 / sqrt(mean((input - mean(input)) ^ 2) + eps)"
        return Formula(deviation, {"input": piece}, {"eps": call.value("eps")})
    at = _statistics_at(call, call.index)
    given = {"input": call.piece("input", *call.index)}
    # The recorded statistics, which can be asked for in turn; without them, every number would be made
    # of all.
    given |= {key: call.result_piece(place, *at) for place, key in ((1, "mean"), (2, "scale"))}
    return _affine(call, "(input - mean) * scale", given, *_weight_at(call, call.index))


def _without_statistics(call: Call) -> Made:
    if call.place:
        return Words("empty")
    channel = call.index[1]
    given = {"input": call.piece("input", *call.index)}
    given |= {key: call.piece(key, channel) for key in ("running_mean", "running_var")}
    text = "(input - running_mean) / sqrt(running_var + eps)"
    return _affine(call, text, given, channel, eps=call.value("eps"))


def _affine(call: Call, text: str, given: dict[str, Piece], *places: Axis, **settings: float) -> Made:
    """Return a formula times a weight plus a bias, of those that there are."""
    for key, sign in (("weight", "*"), ("bias", "+")):
        if key in call:
            text, given = f"{text} {sign} {key}", given | {key: call.piece(key, *places)}
    return Formula(text, given, settings)


def _running(call: Call) -> Made:
    """Return the rule of `running_mean` or `running_var`, which a batch normalization writes."""
    key = "running_mean" if call.arguments["running_mean"] == call.written else "running_var"
    given = {key: call.piece(key, *call.index)}
    if not call.arguments.get("training", True):
        return Formula(key, given, note="which it leaves as it is")
    piece = call.piece("input", *_together(call, call.index))
    # torch normalizes by the biased variance of the batch, but keeps the unbiased one.
    new = "mean(input)" if key == "running_mean" else "sum((input - mean(input)) ^ 2) / others"
    settings = {"momentum": call.scalar("momentum"), "others": max(piece.size - 1, 0)}
    text = f"(1 - momentum) * {key} + momentum * {new}"
    return Formula(text, given | {"input": piece}, settings)


def _norm_backward(call: Call) -> Made:
    is_batch = "batch" in call.kind
    is_training = bool(call.arguments.get("train", True))
    keys = ("mean", "rstd")
    if is_batch:
        keys = ("save_mean", "save_invstd") if is_training else ("running_mean", "running_var")
    scaled = f"* {keys[1]}" if is_training else f"/ sqrt({keys[1]} + eps)"
    settings = {"eps": call.value("eps")} if is_batch else {}
    if call.place:
        return _of_parameter(call, keys, scaled, settings)
    at, own = _statistics_at(call, call.index), _weight_at(call, call.index)
    weights = {"weight": call.piece("weight", *own)} if "weight" in call else {}
    if not is_training:
        given = {"grad_out": call.piece("grad_out", *call.index), keys[1]: call.piece(keys[1], *at)}
        return Formula(f"grad_out{' * weight' * bool(weights)} {scaled}", given | weights, settings)
    places = _together(call, at)
    given = {
        **{key: call.piece(key, *call.index) for key in ("grad_out", "input")},
        "gradients": call.piece("grad_out", *places),
        "inputs": call.piece("input", *places),
        **{key: call.piece(key, *at) for key in keys},
    }
    mean, scale = keys
    gradient, every, factor = "grad_out", "gradients", scale
    if weights and is_batch:  # all numbers with one mean have the same weight
        factor = f"weight * {scale}"
    elif weights:
        given["weights"] = call.piece("weight", *_weight_at(call, places))
        gradient, every = "grad_out * weight", "gradients * weights"
    text = (
        # Through the mean and the deviation: Ioffe and Szegedy, 2015, arXiv:1502.03167.
        f"{factor} * ({gradient} - mean({every}) - normal * mean({every} * normals))"
        f" where normal = (input - {mean}) * {scale}, normals = (inputs - {mean}) * {scale}"
    )
    return Formula(text, given | weights)


def _of_parameter(call: Call, keys: tuple[str, ...], scaled: str, settings: dict[str, Any]) -> Made:
    """Return the rule of the gradient of a weight, or of a bias: sums over the numbers that have it."""
    axes: list[Any] = [*map(range, call.shape("input"))]
    if "layer" in call.kind:
        axes[_outer(call) :] = [[place] for place in call.index]
    else:
        axes[1] = call.index
    places = grid(*axes)
    given = {"grad_out": call.piece("grad_out", *places)}
    if call.place == 2:
        return Sum((single("grad_out", given["grad_out"]),))
    given["input"] = call.piece("input", *places)
    given |= {key: call.piece(key, *_statistics_at(call, places)) for key in keys}
    return Sum((Terms(f"grad_out * (input - {keys[0]}) {scaled}", given, settings),))


def _attention(call: Call) -> Made:
    """Return the rule of attention: out = softmax(query · keyᵀ * scale + mask) · value."""
    if call.value("dropout_p"):
        raise NoRuleError("with dropout")
    if call.place > 1:
        raise NoRuleError("only the output and logsumexp have a rule")
    *_, size = call.shape("query")
    m = call.shape("key")[-2]
    leading, row = call.index[:2], call.index[2]
    of_keys = leading[0], leading[1] // _sharing(call)
    # A causal mask hides the keys after the place of the query.
    count = min(m, row + 1) if bool(call.value("is_causal")) else m
    given = {
        "query": call.piece("query", *leading, row, np.arange(size)),
        "key": call.piece("key", *of_keys, *grid(range(count), range(size))),
    }
    scores = "key · query * scale"
    hidden = ""
    for mask in filter(call.__contains__, MASKS):
        scores += f" + {mask}"
        given[mask] = call.aligned(mask, (*leading, row, np.arange(count)))
        if bool(np.isneginf(numbers_of(call.tensor(mask), given[mask])).all()):
            # Of a query without any key, such as one in the padding, torch returns 0 instead of NaN.
            hidden = f"0 if max({mask}) == -inf else "
    settings = {"scale": _scale(call)}
    if call.place == 1:
        return Formula(f"{hidden}logsumexp({scores})", given, settings)
    given["value"] = call.piece("value", *of_keys, np.arange(count), call.index[3])
    return Formula(f"{hidden}softmax({scores}) · value", given, settings)


def _scale(call: Call) -> float:
    return float(call.value("scale") if "scale" in call else 1 / math.sqrt(call.shape("query")[-1]))


def _sharing(call: Call) -> int:
    """Return how many heads of queries share a head of keys."""
    return call.shape("query")[1] // call.shape("key")[1]


def _attention_backward(call: Call) -> Made:
    """Return the numbers of one head that a derivative of attention is made from."""
    if call.value("dropout_p"):
        raise NoRuleError("with dropout")
    row, head = call.index[:2]
    n, m = call.shape("query")[-2], call.shape("key")[-2]
    is_query, shared = call.place == 0, _sharing(call)
    # The gradient of a key adds up those of all heads of queries that share it.
    heads = [head] if is_query else range(head * shared, (head + 1) * shared)
    queries = [call.index[2]] if is_query else range(n)
    keys = range(m) if is_query else [call.index[2]]
    if bool(call.value("is_causal")):
        # With a causal mask, queries before a key do not see it.
        queries = queries if is_query else range(min(call.index[2], n), n)
        keys = range(min(m, call.index[2] + 1)) if is_query else keys
    if not queries:
        return Formula("0", note="no query sees this key")
    of_keys = row, head // shared if is_query else head

    def by_query(key: str, *last: Sequence[int]) -> Piece:
        return call.piece(key, row, *grid(heads, queries, *last))

    def by_key(key: str, *last: Sequence[int]) -> Piece:
        return call.piece(key, *of_keys, *grid(keys, *last))

    names = ("grad_out", "query", "out", "key", "value")
    sizes = {key: range(call.shape(key)[-1]) for key in names}
    given = {key: by_query(key, sizes[key]) for key in ("query", "grad_out", "out")}
    given |= {key: by_key(key, sizes[key]) for key in ("key", "value")}
    given["logsumexp"] = by_query("logsumexp")
    scores = "key · query * scale" if is_query else "query · key * scale"
    for mask in filter(call.__contains__, MASKS):
        scores += f" + {mask}"
        given[mask] = call.aligned(mask, (row, *grid(heads, queries, keys)))
    of_column = ("key", "query", "grad_out")[call.place]
    given["column"] = (by_key if is_query else by_query)(of_column, [call.index[3]])
    # From the output, as the kernel does (Dao et al., 2022, arXiv:2205.14135): it keeps no weights.
    slope = (
        "scale * weights * (value · grad_out - sum(grad_out * out))",
        "scale * weights * (grad_out · value - row_sums(grad_out * out, size))",
        "weights",
    )[call.place]
    text = f"{slope} · column where weights = exp({scores} - logsumexp)"
    settings = {"scale": _scale(call), "size": len(sizes["out"])}
    # Every piece is shown as an input: only those that the formula names.
    used = {key: piece for key, piece in given.items() if key in names_in(text)}
    return Formula(text, used, settings)


def _layer_norm_rows(call: RowsCall) -> list[Result]:
    outer = call["input"].value.dim() - len(call["normalized_shape"])
    return batched(call, axes=outer, has_sums=call.kind.endswith("_backward"))


def _batch_norm_rows(call: RowsCall) -> list[Result]:
    """A place still belongs to its row, although in training mode its numbers depend on other rows."""
    call.require_shared("weight", "bias")
    if not _is_training(call):
        call.require_shared("running_mean", "running_var")
    labels = broadcast([call["input"].labels])
    none_mixed(labels)
    first, *others = call.results
    why = "is of all rows together"
    return [of_shape(labels, first), *(filled(MIXED, other, why) for other in others)]


def _is_training(call: RowsCall) -> bool:
    return bool(call["training"] or call["train"])


def _batch_norm_backward_rows(call: RowsCall) -> list[Result]:
    name = "grad_out" if call["grad_out"] is not None else "grad_output"
    gradient, given = call[name], call["input"]
    both = broadcast([gradient.labels, given.labels])
    none_mixed(both)
    others = [axis for axis in range(both.dim()) if axis != 1]
    own = reduced(both, others, keepdim=True).expand(both.shape) if _is_training(call) else both
    keys = reduced(both, range(1, both.dim()))
    are_apart = not bool((keys == MIXED).any())

    def on(which: int, at: Tensor) -> Tensor:
        mask = [place == which for place in range(3)]
        chosen = {name: gradient.value[at], "input": given.value[at]}
        return call.again(**chosen, output_mask=mask)[which]

    found = []
    asked = asked_of(call)
    for place, result in zip(asked, call.results, strict=True):
        if place == 0:
            why = "mixes rows: through the mean of the batch, each gradient depends on all rows"
            found.append(Result(own, why=why))
        elif are_apart:
            found.append(by_key(keys, result, partial(on, place)))
        else:  # a separate channel for each row, as in instance norm
            labels = reduced(both, others)
            found.append(Result(labels.expand(result.shape)))
    return found


def _norm_line(call: Call) -> str:
    given = ["input", *(key for key in ("weight", "bias") if key in call)]
    return f"{call.kind.partition('_')[2]}({', '.join(f'{{{key}}}' for key in given)})"


def _softmax_fits(given: Given) -> bool:
    return bool(given["grad_output"].shape == given["output"].shape)


def _batch_norm_fits(given: Given) -> bool:
    channels = given["input"].shape[1:2]
    vectors = (given.get(name) for name in ("weight", "bias", "running_mean", "running_var"))
    return all(vector is None or vector.shape == channels for vector in vectors)


def _weight_norm_fits(given: Given) -> bool:
    v, g, dim = given["v"].shape, given["g"].shape, given.get("dim", 0)
    norms = tuple(size if place == dim else 1 for place, size in enumerate(v))
    # The kernel knows norms over all dimensions but the first, or but the last.
    return dim in (0, len(v) - 1) and g == norms and are_dense(given)


def _attention_fits(given: Given) -> bool:
    q, k, v = (given[name].shape for name in ("query", "key", "value"))
    # (N, heads, length, size) each; several heads of queries may share one of keys and values.
    if not len(q) == len(k) == len(v) == 4 or not k[1] or q[1] % k[1] or k[:3] != v[:3]:
        return False
    ends = [given[name].stride(3) for name in ("query", "key", "value")]
    mask = given.get("attn_mask")
    whole = (*q[:3], k[2])
    mask_fits = mask is None or (
        len(mask.shape) in (2, 4)
        and all(size in (1, full) for size, full in zip(mask.shape[::-1], whole[::-1], strict=False))
    )
    return q[0] == k[0] and q[3] == k[3] == v[3] and set(ends) <= {1} and mask_fits


_OF_SOFTMAX = "Tensor grad_output, Tensor output, int dim, ScalarType input_dtype"
_INPUT = "Tensor input, Optional[Tensor] weight, Optional[Tensor] bias, "
_RUNNING = "Tensor running_mean, Tensor running_var, "
_TRAINING = "bool training, float momentum, float eps"
_OF_ATTENTION = (
    "Tensor query, Tensor key, Tensor value, float dropout_p, bool is_causal, "
    "Optional[Tensor] attn_mask, Optional[float] scale"
)
_FLASH = "_scaled_dot_product_flash_attention"
_EFFICIENT = "_scaled_dot_product_efficient_attention"
_CUDNN = "_scaled_dot_product_cudnn_attention"
_OVERRIDEABLE = "_scaled_dot_product_fused_attention_overrideable"
NORMALIZATIONS: dict[str, OperatorRecord] = {
    **alike("_scaled_dot_product_attention_math_for_mps miopen_batch_norm_backward"),
    **alike("softmax _softmax", _softmax, along, "softmax({self}, {dim})"),
    **alike("log_softmax _log_softmax", _softmax, along, "log_softmax({self}, {dim})"),
    **alike("_safe_softmax", _softmax, along),
    **alike(
        "_softmax_backward_data",
        *(_softmax_backward, along, "{output} * ({grad_output} - sum({grad_output} * {output}, {dim}))"),
        *(_softmax_fits, _OF_SOFTMAX),
    ),
    **alike(
        "_log_softmax_backward_data",
        *(_softmax_backward, along, "{grad_output} - exp({output}) * sum({grad_output}, {dim})"),
        *(_softmax_fits, _OF_SOFTMAX),
    ),
    **alike(
        "native_batch_norm",
        *(_norm, _batch_norm_rows, _norm_line, _batch_norm_fits),
        f"{_INPUT}Optional[Tensor] running_mean, Optional[Tensor] running_var, {_TRAINING}",
        has_statistics=True,
    ),
    **alike(
        "_native_batch_norm_legit",
        *(_norm, _batch_norm_rows, "", _batch_norm_fits),
        f"{_INPUT}{_RUNNING}{_TRAINING} | {_INPUT}{_TRAINING}",
        has_statistics=True,
    ),
    **alike(
        "_native_batch_norm_legit_no_training",
        *(_norm, None, "", _batch_norm_fits),
        f"{_INPUT}{_RUNNING}float momentum, float eps",
    ),
    **alike("cudnn_batch_norm", None, _batch_norm_rows, _norm_line, memory_from=3),
    **alike("miopen_batch_norm", None, _batch_norm_rows),
    **alike(
        "native_batch_norm_backward",
        *(_norm_backward, _batch_norm_backward_rows),
        kept=LATER,
        renamed={"train": "training"},
    ),
    **alike("cudnn_batch_norm_backward", None, _batch_norm_backward_rows),
    **alike("native_group_norm", _norm, batched, _norm_line, are_dense, has_statistics=True),
    **alike("native_group_norm_backward", _norm_backward, partial(batched, has_sums=True), kept=LATER),
    **alike("native_layer_norm", _norm, _layer_norm_rows, _norm_line, has_statistics=True),
    **alike("native_layer_norm_backward", _norm_backward, _layer_norm_rows, kept=LATER),
    **alike("_fused_rms_norm", has_statistics=True),
    **alike("_fused_rms_norm_backward"),
    **alike("_weight_norm_interface", fits=_weight_norm_fits, arguments="Tensor v, Tensor g, int dim"),
    **alike("_weight_norm_interface_backward", kept=LATER, renamed={"saved_v": "v", "saved_g": "g"}),
    **alike(f"{_FLASH}_for_cpu", _attention, batched, fits=_attention_fits, arguments=_OF_ATTENTION),
    **alike(f"{_FLASH}_for_cpu_backward", _attention_backward, batched, kept=range(9)),
    **alike(f"{_FLASH} {_CUDNN} {_OVERRIDEABLE}", _attention, batched, memory_from=2),
    **alike(_EFFICIENT, _attention, batched, memory_from=1),
    **alike(f"{_FLASH}_backward", _attention_backward, batched, kept=(0, 1, 2, 3, 6, 7)),
    **alike(f"{_EFFICIENT}_backward", rows=batched, kept=(0, 1, 2, 3)),
    **alike(f"{_CUDNN}_backward", rows=batched, kept=(0, 1, 6, 7, 2, 3)),
    **alike(f"{_OVERRIDEABLE}_backward", rows=batched, kept=(0, 1, 2, 3, 6, 7)),
}
