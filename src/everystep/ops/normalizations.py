"""Rules of softmax, of normalizations and of attention, where a number depends on a whole row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

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
)
from everystep.ops.formula import names_in
from everystep.ops.sums import single

__all__ = ["NORMALIZATIONS", "running"]


def _row(call: Call, key: str, dim: int) -> Piece:
    places: list[Axis] = list(call.index)
    places[dim] = np.arange(call.shape(key)[dim])
    return call.piece(key, *places)


def _softmax(call: Call) -> Made:
    given = {"self": call.piece("self", *call.index)}
    given["row"] = given["self"]
    if call.index:
        given["row"] = _row(call, "self", call.value("dim") % len(call.index))
    if "log" in call.kind:
        return Formula("self - logsumexp(row)", given)
    text = "exp(self - logsumexp(row))"
    return Formula(f"0 if max(row) == -inf else {text}" if "safe" in call.kind else text, given)


def _softmax_backward(call: Call) -> Made:
    dim = call.value("dim") % len(call.index)
    given = {key: call.piece(key, *call.index) for key in ("grad_output", "output")}
    given["gradients"] = _row(call, "grad_output", dim)
    if "log" in call.kind:
        return Formula("grad_output - exp(output) * sum(gradients)", given)
    given["outputs"] = _row(call, "output", dim)
    return Formula("output * (grad_output - sum(gradients * outputs))", given)


def _channel(call: Call, key: str, channel: int) -> Piece:
    shape = call.shape(key)
    axes = [[channel] if dim == 1 else range(size) for dim, size in enumerate(shape)]
    return call.piece(key, *grid(*axes))


def _normalized(call: Call, mean: Piece, scale: Piece, *places: Axis) -> Made:
    """Return the rule of a number that is normalized by two results.

    places: of its weight and bias.
    """
    given = {"input": call.piece("input", *call.index), "mean": mean, "scale": scale}
    return _affine(call, "(input - mean) * scale", given, *places)


_DEVIATION = "1 / sqrt(mean((input - mean(input)) ^ 2) + eps)"


def _affine(call: Call, text: str, given: dict[str, Piece], *places: Axis, **settings: float) -> Made:
    """Return a formula times a weight plus a bias, of those that there are."""
    for key, sign in (("weight", "*"), ("bias", "+")):
        if key in call:
            text, given = f"{text} {sign} {key}", given | {key: call.piece(key, *places)}
    return Formula(text, given, settings)


def _statistics(call: Call, piece: Piece) -> Made:
    """Return the rule of the mean, or of the inverse of the deviation, of what is normalized."""
    if call.place == 1:
        return Sum((single("input", piece),), float(piece.size))
    return Formula(_DEVIATION, {"input": piece}, {"eps": call.value("eps")})


def _batch_norm(call: Call) -> Made:
    is_training = "no_training" not in call.kind and bool(call.arguments.get("training", True))
    if call.place and not is_training:
        return Words("empty")
    if call.place:
        return _statistics(call, _channel(call, "input", call.index[0]))
    channel = call.index[1]
    if is_training:
        mean, scale = (call.result_piece(place, channel) for place in (1, 2))
        return _normalized(call, mean, scale, channel)
    given = {"input": call.piece("input", *call.index)}
    given |= {key: call.piece(key, channel) for key in ("running_mean", "running_var")}
    text = "(input - running_mean) / sqrt(running_var + eps)"
    return _affine(call, text, given, channel, eps=call.value("eps"))


def running(call: Call, key: str) -> Made:
    """Return the rule of `running_mean` or `running_var`, which a batch normalization writes."""
    channel = call.index[0]
    given = {key: call.piece(key, channel)}
    if not call.arguments.get("training", True):
        return Formula(key, given, note="which it leaves as it is")
    piece = _channel(call, "input", channel)
    new = "mean(input)" if key == "running_mean" else "sum((input - mean(input)) ^ 2) / others"
    settings = {"momentum": call.scalar("momentum"), "others": max(piece.size - 1, 0)}
    text = f"(1 - momentum) * {key} + momentum * {new}"
    return Formula(text, given | {"input": piece}, settings)


def _batch_norm_backward(call: Call) -> Made:
    gradient = "grad_out" if "grad_out" in call.arguments else "grad_output"
    is_training = bool(call.arguments.get("train", True))
    channel = call.index[1] if call.place == 0 else call.index[0]
    grads, inputs = (_channel(call, key, channel) for key in (gradient, "input"))
    if call.place == 2:
        return Sum((single(gradient, grads),))
    keys = ("save_mean", "save_invstd") if is_training else ("running_mean", "running_var")
    mean, scale = (call.piece(key, channel) for key in keys)
    scaled = f"* {keys[1]}" if is_training else f"/ sqrt({keys[1]} + eps)"
    settings = {"eps": call.value("eps")}
    if call.place == 1:
        repeated = {key: _repeated(piece, grads.size) for key, piece in zip(keys, (mean, scale))}  # noqa: B905
        text = f"{gradient} * (input - {keys[0]}) {scaled}"
        return Sum((Terms(text, {gradient: grads, "input": inputs} | repeated, settings),))
    weight = {"weight": call.piece("weight", channel)} if "weight" in call else {}
    if not is_training:
        given = {gradient: call.piece(gradient, *call.index), keys[1]: scale} | weight
        return Formula(f"{gradient}{' * weight' * bool(weight)} {scaled}", given, settings)
    given = {gradient: grads, "input": inputs, keys[0]: mean, keys[1]: scale}
    return _derivative(call, given, weight)


def _repeated(piece: Piece, count: int) -> Piece:
    places = tuple(np.broadcast_to(np.asarray(axis), count) for axis in piece.places)
    return piece._replace(places=places)


def _layer_norm(call: Call) -> Made:
    shape = call.shape("input")
    inner = len(call.value("normalized_shape"))
    outer = len(shape) - inner
    if call.place == 0:
        leading = (*call.index[:outer], *[0] * inner)
        mean, scale = (call.result_piece(place, *leading) for place in (1, 2))
        return _normalized(call, mean, scale, *call.index[outer:])
    axes = [[place] for place in call.index[:outer]] + [range(size) for size in shape[outer:]]
    return _statistics(call, call.piece("input", *grid(*axes)))


def _layer_norm_backward(call: Call) -> Made:
    shape = call.shape("input")
    outer = len(shape) - len(call.value("normalized_shape"))
    if call.place:
        axes = grid(*map(range, shape[:outer]))
        inner = [np.full(len(axes[0]) if axes else 1, place) for place in call.index]
        grads = call.piece("grad_out", *axes, *inner)
        if call.place == 2:
            return Sum((single("grad_out", grads),))
        flat = (*axes, *[np.zeros_like(inner[0])] * len(inner))
        given = {
            "grad_out": grads,
            "input": call.piece("input", *axes, *inner),
            "mean": call.piece("mean", *flat),
            "rstd": call.piece("rstd", *flat),
        }
        return Sum((Terms("grad_out * (input - mean) * rstd", given),))
    leading = [[place] for place in call.index[:outer]]
    axes = grid(*leading, *map(range, shape[outer:]))
    inputs = call.piece("input", *axes)
    one = (*call.index[:outer], *[0] * (len(shape) - outer))
    given = {
        "grad_out": call.piece("grad_out", *axes),
        "input": inputs,
        "mean": call.piece("mean", *one),
        "rstd": call.piece("rstd", *one),
    }
    return _derivative(call, given, _affine_pair(call, axes[outer:], call.index[outer:]))


def _in_group(call: Call, key: str, row: int, group: int) -> Piece:
    """Return the numbers of an argument (N, C, ...) that are normalized together."""
    shape = call.shape(key)
    size = shape[1] // call.value("group")
    return call.piece(key, *grid([row], range(group * size, (group + 1) * size), *map(range, shape[2:])))


def _group_norm(call: Call) -> Made:
    if call.place:
        return _statistics(call, _in_group(call, "input", *call.index))
    row, channel = call.index[:2]
    group = channel // (call.shape("input")[1] // call.value("group"))
    mean, scale = (call.result_piece(place, row, group) for place in (1, 2))
    return _normalized(call, mean, scale, channel)


def _group_norm_backward(call: Call) -> Made:
    shape = call.shape("input")
    size = shape[1] // call.value("group")
    if call.place:
        (channel,) = call.index
        grads, inputs = (_channel(call, key, channel) for key in ("grad_out", "input"))
        if call.place == 2:
            return Sum((single("grad_out", grads),))
        rows, groups = grads.places[0], np.full(grads.size, channel // size)
        given = {"grad_out": grads, "input": inputs}
        given |= {key: call.piece(key, rows, groups) for key in ("mean", "rstd")}
        return Sum((Terms("grad_out * (input - mean) * rstd", given),))
    row, group = call.index[0], call.index[1] // size
    inputs = _in_group(call, "input", row, group)
    given = {"grad_out": _in_group(call, "grad_out", row, group), "input": inputs}
    given |= {key: call.piece(key, row, group) for key in ("mean", "rstd")}
    return _derivative(call, given, _affine_pair(call, inputs.places[1:2], call.index[1:2]))


def _affine_pair(call: Call, places: Sequence[Axis], own: Sequence[int]) -> dict[str, Piece]:
    """Return the weights of what was normalized together, and that of the wanted number."""
    if "weight" not in call:
        return {}
    return {"weights": call.piece("weight", *places), "weight": call.piece("weight", *own)}


def _derivative(call: Call, given: dict[str, Piece], weights: dict[str, Piece]) -> Made:
    """Return the derivative by the wanted number of what was normalized together.

    given: gradients, inputs, mean and inverse deviation, under the names of the arguments; weights: the
    weight of the wanted number, and those of all where they differ.
    """
    gradient, _, mean, scale = given
    numbers = {
        gradient: call.piece(gradient, *call.index),
        "gradients": given[gradient],
        "input": call.piece("input", *call.index),
        "inputs": given["input"],
        mean: given[mean],
        scale: given[scale],
    }
    own, every = gradient, "gradients"
    factor = scale
    if "weights" in weights:
        own, every = f"{gradient} * weight", "gradients * weights"
    elif "weight" in weights:
        factor = f"weight * {scale}"
    text = (
        f"{factor} * ({own} - mean({every}) - normal * mean({every} * normals))"
        f" where normal = (input - {mean}) * {scale}, normals = (inputs - {mean}) * {scale}"
    )
    return Formula(text, numbers | weights)


def _attention(call: Call) -> Made:
    """Return the rule of attention: out = softmax(query · keyᵀ * scale + mask) · value."""
    if call.value("dropout_p") or call.place > 1:
        raise NoRuleError("with dropout")
    *_, size = call.shape("query")
    m = call.shape("key")[-2]
    leading, row = call.index[:2], call.index[2]
    of_keys = leading[0], leading[1] // _sharing(call)
    count = min(m, row + 1) if bool(call.value("is_causal")) else m
    given = {
        "query": call.piece("query", *leading, row, np.arange(size)),
        "key": call.piece("key", *of_keys, *grid(range(count), range(size))),
    }
    scores = "key · query * scale"
    if "attn_mask" in call:
        scores += " + attn_mask"
        given["attn_mask"] = _mask(call, *leading, row, np.arange(count))
    settings = {"scale": _scale(call)}
    if call.place == 1:
        return Formula(f"logsumexp({scores})", given, settings)
    given["value"] = call.piece("value", *of_keys, np.arange(count), call.index[3])
    return Formula(f"softmax({scores}) · value", given, settings)


def _scale(call: Call) -> float:
    return float(call.value("scale") if "scale" in call else 1 / math.sqrt(call.shape("query")[-1]))


def _mask(call: Call, *places: Axis) -> Piece:
    """Return numbers of the mask, which is broadcast to rows, heads, queries and keys."""
    shape = call.shape("attn_mask")
    count = max((len(axis) for axis in places if not isinstance(axis, int)), default=1)
    axes = [axis if n > 1 else 0 for axis, n in zip(places[4 - len(shape) :], shape, strict=True)]
    if all(isinstance(axis, int) for axis in axes):
        return _repeated(call.piece("attn_mask", *axes), count)
    return call.piece("attn_mask", *axes)


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
    heads = [head] if is_query else range(head * shared, (head + 1) * shared)
    queries = [call.index[2]] if is_query else range(n)
    keys = range(m) if is_query else [call.index[2]]
    if bool(call.value("is_causal")):
        queries = queries if is_query else range(min(call.index[2], n), n)
        keys = range(min(m, call.index[2] + 1)) if is_query else keys
    column = call.index[3]
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
    if "attn_mask" in call:
        scores += " + attn_mask"
        given["attn_mask"] = _mask(call, row, *grid(heads, queries, keys))
    weights = f"weights = exp({scores} - logsumexp)"
    settings = {"scale": _scale(call), "size": len(sizes["out"])}
    if call.place == 2:
        given["column"] = by_query("grad_out", [column])
        text = f"weights · column where {weights}"
    elif is_query:
        given["column"] = by_key("key", [column])
        slope = "scale * weights * (value · grad_out - sum(grad_out * out))"
        text = f"{slope} · column where {weights}"
    else:
        given["column"] = by_query("query", [column])
        slope = "scale * weights * (grad_out · value - row_sums(grad_out * out, size))"
        text = f"{slope} · column where {weights}"
    used = {key: piece for key, piece in given.items() if key in names_in(text)}
    return Formula(text, used, settings)


NORMALIZATIONS: dict[str, Callable[[Call], Made]] = {
    "softmax": _softmax,
    "log_softmax": _softmax,
    "safe_softmax": _softmax,
    "softmax_backward_data": _softmax_backward,
    "log_softmax_backward_data": _softmax_backward,
    "native_batch_norm": _batch_norm,
    "native_batch_norm_legit": _batch_norm,
    "native_batch_norm_legit_no_training": _batch_norm,
    "native_batch_norm_backward": _batch_norm_backward,
    "native_group_norm": _group_norm,
    "native_group_norm_backward": _group_norm_backward,
    "native_layer_norm": _layer_norm,
    "native_layer_norm_backward": _layer_norm_backward,
    "scaled_dot_product_flash_attention_for_cpu": _attention,
    "scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
}
