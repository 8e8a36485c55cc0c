"""Rules of softmax, of normalizations and of attention, where a number depends on a whole row."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from everystep.program.elements.call import (
    Axis,
    Call,
    Formula,
    Made,
    NoRuleError,
    Numbers,
    Piece,
    Sum,
    Terms,
    grid,
)
from everystep.program.elements.sums import single

__all__ = ["NORMALIZATIONS", "running"]


def _row(call: Call, key: str, dim: int) -> Piece:
    places: list[Axis] = list(call.index)
    places[dim] = np.arange(call.shape(key)[dim])
    return call.piece(key, *places)


def _softmax(call: Call) -> Made:
    if not call.index:
        return Formula("softmax( self )", {"self": call.piece("self")})
    dim = call.value("dim") % len(call.index)
    own, is_log = call.index[dim], "log" in call.kind

    def of(self: Numbers) -> Any:
        shifted = self - np.max(self)
        total = math.fsum(np.exp(shifted)) if np.isfinite(shifted).all() else np.exp(shifted).sum()
        return shifted[own] - np.log(total) if is_log else np.exp(shifted[own]) / total

    name = "log_softmax" if is_log else "softmax"
    return Formula(f"{name}( self ) , place {own}", {"self": _row(call, "self", dim)}, of)


def _softmax_backward(call: Call) -> Made:
    dim = call.value("dim") % len(call.index)
    own, is_log = call.index[dim], "log" in call.kind
    given = {key: _row(call, key, dim) for key in ("grad_output", "output")}
    if is_log:
        given["output"] = call.piece("output", *call.index)

        def of(grad_output: Numbers, output: Numbers) -> Any:
            return grad_output[own] - np.exp(output[0]) * np.sum(grad_output)

        return Formula(f"grad_output[{own}] - exp( output ) * sum( grad_output )", given, of)

    def of_softmax(grad_output: Numbers, output: Numbers) -> Any:
        return output[own] * (grad_output[own] - np.sum(grad_output * output))

    text = f"output[{own}] * ( grad_output[{own}] - sum( grad_output * output ) )"
    return Formula(text, given, of_softmax)


def _channel(call: Call, key: str, channel: int) -> Piece:
    shape = call.shape(key)
    axes = [[channel] if dim == 1 else range(size) for dim, size in enumerate(shape)]
    return call.piece(key, *grid(*axes))


def _normalized(
    self: str, mean: Piece, scale: Piece, given: dict[str, Piece], is_variance: Callable[[Any], Any]
) -> Made:
    """Return `(input - mean) * scale * weight + bias`."""
    given = given | {"mean": mean, "scale": scale}

    def of(input: Numbers, mean: Numbers, scale: Numbers, weight: Any = (1,), bias: Any = (0,)) -> Any:
        return (input[0] - mean[0]) * is_variance(scale[0]) * weight[0] + bias[0]

    weight = " * weight" if "weight" in given else ""
    bias = " + bias" if "bias" in given else ""
    return Formula(f"( input - mean ) * {self}{weight}{bias}", given, of)


def _affine(call: Call, *places: Axis) -> dict[str, Piece]:
    return {key: call.piece(key, *places) for key in ("weight", "bias") if key in call}


def _batch_norm(call: Call) -> Made:
    is_training = "no_training" not in call.kind and bool(call.arguments.get("training", True))
    if call.place and not is_training:
        return Formula("empty", {})
    eps = call.value("eps")
    channel = call.index[1] if call.place == 0 else call.index[0]
    if call.place == 1:
        piece = _channel(call, "input", channel)
        return Sum((single("input", piece),), float(piece.size))
    if call.place == 2:
        given = {"input": _channel(call, "input", channel)}
        return Formula("1 / sqrt( variance of input + eps )", given, lambda input: _inverse(input, eps))
    given = {"input": call.piece("input", *call.index)} | _affine(call, channel)
    if is_training:
        mean, scale = (call.result_piece(place, channel) for place in (1, 2))
        return _normalized("scale", mean, scale, given, lambda scale: scale)
    mean, variance = (call.piece(key, channel) for key in ("running_mean", "running_var"))
    text = f"1 / sqrt( scale + {eps} )"
    return _normalized(text, mean, variance, given, lambda variance: 1 / np.sqrt(variance + eps))


def _inverse(input: Numbers, eps: float) -> Any:
    deviations = input - math.fsum(input) / len(input)
    return 1 / np.sqrt(math.fsum(deviations * deviations) / len(input) + eps)


def running(call: Call, key: str) -> Made:
    """Return the rule of `running_mean` or `running_var`, which a batch normalization writes."""
    momentum, channel = call.scalar("momentum"), call.index[0]
    own = call.piece(key, channel)
    if not call.arguments.get("training", True):
        return Formula(f"{key}, which it leaves as it is", {key: own}, lambda **n: n[key][0])
    piece = _channel(call, "input", channel)

    def of(input: Numbers, **running: Numbers) -> Any:
        mean = math.fsum(input) / len(input)
        new = mean
        if key == "running_var":
            new = math.fsum((input - mean) ** 2) / max(len(input) - 1, 0)
        return (1 - momentum) * running[key][0] + momentum * new

    what = "mean" if key == "running_mean" else "variance"
    text = f"{1 - call.value('momentum'):g} * {key} + {call.value('momentum'):g} * {what} of input"
    return Formula(text, {key: own, "input": piece}, of)


def _standard_gradient(gradient: Numbers, normal: Numbers, own: int, scale: float) -> Any:
    """Return the derivative by number `own` of what was normalized together."""
    count = len(gradient)
    mean, along = np.sum(gradient) / count, np.sum(gradient * normal) / count
    return scale * (gradient[own] - mean - normal[own] * along)


def _position(piece: Piece, index: tuple[int, ...]) -> int:
    found = np.ones(piece.size, dtype=bool)
    for axis, place in zip(piece.places, index, strict=True):
        found &= np.asarray(axis) == place
    return int(np.flatnonzero(found)[0])


def _batch_norm_backward(call: Call) -> Made:
    gradient = "grad_out" if "grad_out" in call.arguments else "grad_output"
    is_training = bool(call.arguments.get("train", True))
    channel = call.index[1] if call.place == 0 else call.index[0]
    grads, inputs = (_channel(call, key, channel) for key in (gradient, "input"))
    if call.place == 2:
        return Sum((single(gradient, grads),))
    keys = ("save_mean", "save_invstd") if is_training else ("running_mean", "running_var")
    mean, scale = (call.piece(key, channel) for key in keys)
    eps = call.value("eps")

    def inverse(value: Numbers) -> Any:
        return value if is_training else 1 / np.sqrt(value + eps)

    if call.place == 1:
        repeated = {key: _repeated(piece, grads.size) for key, piece in zip(keys, (mean, scale))}  # noqa: B905

        def term(**n: Numbers) -> Any:
            return n[gradient] * (n["input"] - n[keys[0]]) * inverse(n[keys[1]])

        scaled = f"* {keys[1]}" if is_training else f"/ sqrt( {keys[1]} + {eps} )"
        text = f"{gradient} * ( input - {keys[0]} ) {scaled}"
        return Sum((Terms(text, {gradient: grads, "input": inputs} | repeated, term),))
    weight = {"weight": call.piece("weight", channel)} if "weight" in call else {}
    if not is_training:
        one = {gradient: call.piece(gradient, *call.index), keys[1]: scale} | weight
        return Formula(
            f"{gradient}{' * weight' if weight else ''} / sqrt( {keys[1]} + {eps} )",
            one,
            lambda **n: n[gradient][0] * inverse(n[keys[1]][0]) * n.get("weight", (1,))[0],
        )
    own = _position(inputs, call.index)

    def of(**n: Numbers) -> Any:
        scale = n[keys[1]][0]
        normal = (n["input"] - n[keys[0]][0]) * scale
        return _standard_gradient(n[gradient], normal, own, scale * n.get("weight", (1,))[0])

    given = {gradient: grads, "input": inputs, keys[0]: mean, keys[1]: scale} | weight
    return Formula("the derivative of the normalized channel", given, of)


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
        given = {"input": call.piece("input", *call.index)} | _affine(call, *call.index[outer:])
        return _normalized("scale", mean, scale, given, lambda scale: scale)
    axes = [[place] for place in call.index[:outer]] + [range(size) for size in shape[outer:]]
    piece = call.piece("input", *grid(*axes))
    if call.place == 1:
        return Sum((single("input", piece),), float(piece.size))
    eps = call.value("eps")
    text = f"1 / sqrt( variance of input + {eps} )"
    return Formula(text, {"input": piece}, lambda input: _inverse(input, eps))


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
        return Sum((Terms("grad_out * ( input - mean ) * rstd", given, _along_normal),))
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
    return _derivative(call, given, inputs, axes[outer:], "row")


def _in_group(call: Call, key: str, row: int, group: int) -> Piece:
    """Return the numbers of an argument (N, C, ...) that are normalized together."""
    shape = call.shape(key)
    size = shape[1] // call.value("group")
    return call.piece(key, *grid([row], range(group * size, (group + 1) * size), *map(range, shape[2:])))


def _group_norm(call: Call) -> Made:
    eps = call.value("eps")
    if call.place:
        piece = _in_group(call, "input", *call.index)
        if call.place == 1:
            return Sum((single("input", piece),), float(piece.size))
        text = f"1 / sqrt( variance of input + {eps} )"
        return Formula(text, {"input": piece}, lambda input: _inverse(input, eps))
    row, channel = call.index[:2]
    group = channel // (call.shape("input")[1] // call.value("group"))
    mean, scale = (call.result_piece(place, row, group) for place in (1, 2))
    given = {"input": call.piece("input", *call.index)} | _affine(call, channel)
    return _normalized("scale", mean, scale, given, lambda scale: scale)


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
        return Sum((Terms("grad_out * ( input - mean ) * rstd", given, _along_normal),))
    row, group = call.index[0], call.index[1] // size
    inputs = _in_group(call, "input", row, group)
    given = {"grad_out": _in_group(call, "grad_out", row, group), "input": inputs}
    given |= {key: call.piece(key, row, group) for key in ("mean", "rstd")}
    return _derivative(call, given, inputs, inputs.places[1], "group")


def _along_normal(grad_out: Numbers, input: Numbers, mean: Numbers, rstd: Numbers) -> Any:
    return grad_out * (input - mean) * rstd


def _derivative(
    call: Call, given: dict[str, Piece], inputs: Piece, weights: Axis | tuple[Axis, ...], what: str
) -> Made:
    """Return the derivative by the wanted number of what was normalized together.

    weights: where their weights are.
    """
    own = _position(inputs, call.index)
    if "weight" in call:
        places = weights if isinstance(weights, tuple) else (weights,)
        given = given | {"weight": call.piece("weight", *places)}

    def of(grad_out: Numbers, input: Numbers, mean: Numbers, rstd: Numbers, weight: Any = 1.0) -> Any:
        normal = (input - mean[0]) * rstd[0]
        return _standard_gradient(grad_out * weight, normal, own, rstd[0])

    return Formula(f"the derivative of the normalized {what}", given, of)


def _attention(call: Call) -> Made:
    """Return the rule of attention: out = softmax(query · keyᵀ * scale + mask) · value."""
    if call.value("dropout_p") or call.place > 1:
        raise NoRuleError("with dropout")
    *_, size = call.shape("query")
    m = call.shape("key")[-2]
    leading, row = call.index[:2], call.index[2]
    of_keys = leading[0], leading[1] // _sharing(call)
    is_causal = bool(call.value("is_causal"))
    scale = call.value("scale") if "scale" in call else 1 / math.sqrt(size)
    count = min(m, row + 1) if is_causal else m
    given = {
        "query": call.piece("query", *leading, row, np.arange(size)),
        "key": call.piece("key", *of_keys, *grid(range(count), range(size))),
    }
    if "attn_mask" in call:
        shape = call.shape("attn_mask")
        places = [np.arange(count) if s > 1 else np.zeros(count, dtype=np.int64) for s in shape[-1:]]
        whole = (*leading, row)[3 - (len(shape) - 1) :]
        before = [p if s > 1 else 0 for p, s in zip(whole, shape[:-1], strict=True)]
        given["attn_mask"] = call.piece("attn_mask", *before, *places)
    if call.place == 0:
        given["value"] = call.piece("value", *of_keys, np.arange(count), call.index[3])

    def of(query: Numbers, key: Numbers, value: Any = None, attn_mask: Any = 0) -> Any:
        scores = key.reshape(count, size) @ query * scale + attn_mask
        highest = np.max(scores)
        weights = np.exp(scores - highest)
        if value is None:
            return highest + np.log(weights.sum())
        return weights @ value / weights.sum()

    what = "softmax( query · key ) · value" if call.place == 0 else "log of the sum of exp"
    return Formula(what, given, of)


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
    by_query = {"grad_out": "grad_out", "query": "query", "out": "out"}
    given = {}
    for key in by_query:
        size = call.shape(key)[-1]
        given[key] = call.piece(key, row, *grid(heads, queries, range(size)))
    given["logsumexp"] = call.piece("logsumexp", row, *grid(heads, queries))
    for key in ("key", "value"):
        size = call.shape(key)[-1]
        given[key] = call.piece(key, row, head // shared if is_query else head, *grid(keys, range(size)))
    name = ("query", "key", "value")[call.place]
    return Formula(f"the derivative of attention by its {name}", given)


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
