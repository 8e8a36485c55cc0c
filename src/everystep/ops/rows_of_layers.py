"""Convolutions, pooling, attention and normalizations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from everystep.ops.labels import MIXED, Tracked, elementwise, reduced, rows_in
from everystep.ops.rows import (
    MixesError,
    Result,
    RowsCall,
    RowsRule,
    asked_of,
    by_key,
    first_axis,
    leading,
    none_mixed,
    of_shape,
    with_parameters,
)

__all__ = ["LAYERS"]

_PADDING = ("reflection", "replication")
_LINEAR = ("linear1d", "bilinear2d", "trilinear3d", "bicubic2d")
_UPSAMPLING = [
    *(f"upsample_{how}" for how in ("nearest1d", "nearest2d", "nearest3d", *_LINEAR)),
    *(f"_upsample_{how}" for how in ("nearest_exact1d", "nearest_exact2d", "nearest_exact3d")),
    *(f"_upsample_{how}_aa" for how in ("bilinear2d", "bicubic2d")),
]
#: By the first axis: the tensors that have it.
_BATCHED = {
    "max_pool2d_with_indices": ("self",),
    "max_pool2d_with_indices_backward": ("grad_output", "self", "indices"),
    "max_pool3d_with_indices": ("self",),
    "max_pool3d_with_indices_backward": ("grad_output", "self", "indices"),
    "avg_pool2d": ("self",),
    "avg_pool2d_backward": ("grad_output", "self"),
    "avg_pool3d": ("self",),
    "avg_pool3d_backward": ("grad_output", "self"),
    "_adaptive_avg_pool2d": ("self",),
    "_adaptive_avg_pool2d_backward": ("grad_output", "self"),
    "_adaptive_avg_pool3d": ("self",),
    "_adaptive_avg_pool3d_backward": ("grad_output", "self"),
    "adaptive_max_pool2d": ("self",),
    "adaptive_max_pool2d_backward": ("grad_output", "self", "indices"),
    "adaptive_max_pool3d": ("self",),
    "adaptive_max_pool3d_backward": ("grad_output", "self", "indices"),
    **{f"fractional_max_pool{n}d": ("self", "random_samples") for n in (2, 3)},
    **{f"fractional_max_pool{n}d_backward": ("grad_output", "self", "indices") for n in (2, 3)},
    **{f"{how}_pad{n}d": ("self",) for how in _PADDING for n in (1, 2, 3)},
    **{f"{how}_pad{n}d_backward": ("grad_output", "self") for how in _PADDING for n in (1, 2, 3)},
    **dict.fromkeys(_UPSAMPLING, ("self",)),
    **{f"{each}_backward": ("grad_output",) for each in _UPSAMPLING},
    "grid_sampler_2d": ("input", "grid"),
    "grid_sampler_2d_backward": ("grad_output", "input", "grid"),
    "_scaled_dot_product_flash_attention_for_cpu": ("query", "key", "value"),
    "_scaled_dot_product_flash_attention_for_cpu_backward": (
        *("grad_out", "query", "key", "value", "out", "logsumexp"),
    ),
    "_scaled_dot_product_efficient_attention": ("query", "key", "value"),
    "_scaled_dot_product_efficient_attention_backward": (
        *("grad_out_", "query", "key", "value", "out", "logsumexp"),
    ),
}
_BATCH_NORMS = ["native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "_native_batch_norm_legit"]


def _batched(call: RowsCall) -> list[Result]:
    names = _BATCHED[call.name]
    if any(call[name] is None for name in names):
        raise MixesError("has no rule")
    keys = first_axis(*(call[name] for name in names))
    mask = call["attn_mask"] or call["attn_bias"]
    if isinstance(mask, Tracked) and not mask.is_shared:
        if mask.labels.dim() != 4:
            raise MixesError("has a mask of another shape that depends on rows")
        keys = elementwise([keys, first_axis(mask)])
    none_mixed(keys)
    if any(not result.dim() or len(result) != len(keys) for result in call.results):
        raise MixesError("returns what has no rows")
    return [Result(leading(keys, result)) for result in call.results]


def _convolution(call: RowsCall) -> list[Result]:
    call.require_shared("weight", "bias")
    keys = none_mixed(first_axis(call["input"]))
    return [Result(leading(keys, call.results[0]))]


def _convolution_backward(call: RowsCall) -> list[Result]:
    call.require_shared("weight")
    gradient, given = call["grad_output"], call["input"]
    own = none_mixed(first_axis(gradient))
    keys = none_mixed(first_axis(gradient, given))

    def select(which: int) -> Callable[[Tensor], Tensor]:
        mask = [place == which for place in range(3)]
        return lambda at: call.again(
            grad_output=gradient.value[at], input=given.value[at], output_mask=mask
        )[which]

    return with_parameters(call, leading, own, keys, select)


def _group_norm(call: RowsCall) -> list[Result]:
    call.require_shared("weight", "bias")
    keys = none_mixed(first_axis(call["input"]))
    return [Result(leading(keys, result)) for result in call.results]


def _group_norm_backward(call: RowsCall) -> list[Result]:
    call.require_shared("weight")
    names = ("grad_out", "input", "mean", "rstd")
    keys = first_axis(*(call[name] for name in names))
    none_mixed(keys)

    def select(which: int) -> Callable[[Tensor], Tensor]:
        mask = [place == which for place in range(3)]

        def on(at: Tensor) -> Tensor:
            chosen = {name: call[name].value[at] for name in names}
            return call.again(**chosen, N=len(at), output_mask=mask)[which]

        return on

    return with_parameters(call, leading, keys, keys, select)


def _layer_norm(call: RowsCall) -> list[Result]:
    call.require_shared("weight", "bias")
    axes = range(-len(call["normalized_shape"]), 0)
    labels = reduced(call["input"].labels, axes, keepdim=True)
    none_mixed(labels)
    return [Result(labels.expand(result.shape)) for result in call.results]


def _layer_norm_backward(call: RowsCall) -> list[Result]:
    call.require_shared("weight", "bias")
    shape = call["normalized_shape"]
    axes = range(-len(shape), 0)
    tracked = [call[name] for name in ("grad_out", "input", "mean", "rstd")]
    places = elementwise([reduced(each.labels, axes, keepdim=True) for each in tracked])
    none_mixed(places)
    width = [-1, *shape]

    def select(which: int) -> Callable[[Tensor], Tensor]:
        mask = [place == which for place in range(3)]

        def on(at: Tensor) -> Tensor:
            gradient, given = (each.value.reshape(width)[at] for each in tracked[:2])
            mean, rstd = (each.value.reshape(-1, *[1] * len(shape))[at] for each in tracked[2:])
            return call.again(grad_out=gradient, input=given, mean=mean, rstd=rstd, output_mask=mask)[
                which
            ]

        return on

    laid = lambda labels, result: labels.expand(result.shape)  # noqa: E731
    return with_parameters(call, laid, places, places.reshape(-1), select)


def _batch_norm(call: RowsCall) -> list[Result]:
    """The place of a row stays its own, although in training mode its numbers depend on other rows."""
    call.require_shared("weight", "bias")
    if not _is_training(call):
        call.require_shared("running_mean", "running_var")
    labels = elementwise([call["input"].labels])
    none_mixed(labels)
    mixed = torch.full((), MIXED, dtype=torch.int32)
    first, *others = call.results
    why = "is of all rows together"
    return [of_shape(labels, first), *(Result(mixed.expand(o.shape), why=why) for o in others)]


def _is_training(call: RowsCall) -> bool:
    return bool(call["training"] or call["train"] or call.name == "_batch_norm_with_update")


def _batch_norm_backward(call: RowsCall) -> list[Result]:
    name = "grad_out" if call["grad_out"] is not None else "grad_output"
    gradient, given = call[name], call["input"]
    both = elementwise([gradient.labels, given.labels])
    none_mixed(both)
    others = [axis for axis in range(both.dim()) if axis != 1]
    own = reduced(both, others, keepdim=True).expand(both.shape) if _is_training(call) else both
    keys = reduced(both, range(1, both.dim()))
    rows = rows_in(keys) if not bool((keys == MIXED).any()) else None

    def select(which: int) -> Callable[[Tensor], Tensor]:
        mask = [place == which for place in range(3)]
        return lambda at: call.again(
            **{name: gradient.value[at]}, input=given.value[at], output_mask=mask
        )[which]

    found = []
    asked = asked_of(call)
    for place, result in zip(asked, call.results, strict=True):
        if place == 0:
            why = "mixes rows: through the mean of the batch, each gradient depends on all rows"
            found.append(Result(own, why=why))
        elif rows is not None:
            labels = reduced(keys, [0], is_sum=True).expand(result.shape)
            found.append(Result(labels, by_key(rows, result, select(place))))
        else:  # a channel of its own for each row, as in instance norm
            labels = reduced(both, others)
            found.append(Result(labels.expand(result.shape)))
    return found


LAYERS: dict[str, RowsRule] = {
    **dict.fromkeys(_BATCHED, _batched),
    **dict.fromkeys(_BATCH_NORMS, _batch_norm),
    **dict.fromkeys(["native_batch_norm_backward", "cudnn_batch_norm_backward"], _batch_norm_backward),
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "native_group_norm": _group_norm,
    "native_group_norm_backward": _group_norm_backward,
    "native_layer_norm": _layer_norm,
    "native_layer_norm_backward": _layer_norm_backward,
}
