"""Losses and their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from everystep.replay.rows.call import Call, Result, Rule
from everystep.replay.rows.labels import SHARED, Tracked, elementwise, reduced
from everystep.replay.rows.results import of_shape

__all__ = ["LOSSES"]

_LOSSES = [
    "mse_loss",
    "smooth_l1_loss",
    "huber_loss",
    "binary_cross_entropy",
    "soft_margin_loss",
    "binary_cross_entropy_with_logits",
]


def _loss(call: Call) -> list[Result]:
    """Losses that are means or sums of a number for each element."""
    labels = elementwise([each.labels for each in call.tensors()])
    call.none_mixed(labels, "combines numbers of several rows")
    mode = call["reduction"]
    mode = 1 if mode is None else mode
    if mode == 0:
        return [of_shape(labels, call.results[0])]
    each = call.again(reduction=0)[0]
    return [_mean_or_sum(each, labels, each.numel(), is_mean=mode == 1)]


def _mean_or_sum(each: Tensor, labels: Tensor, divisor: Tensor | float, *, is_mean: bool) -> Result:
    whole = Tracked(each, labels.expand(each.shape))
    found = reduced(whole.labels, [*range(each.dim())], is_sum=True)
    return Result(found, lambda row: whole.term(row).sum() / (divisor if is_mean else 1), is_mean)


def _nll_loss(call: Call) -> list[Result]:
    call.require_shared("weight")
    classes = reduced(call["self"].labels, [1 if call["self"].labels.dim() > 1 else 0])
    labels = elementwise([classes, call["target"].labels])
    call.none_mixed(labels, "combines numbers of several rows")
    mode = 1 if call["reduction"] is None else call["reduction"]
    shared = Result(torch.full((), SHARED, dtype=torch.int32))  # as recorded
    if mode == 0:
        return [of_shape(labels, call.results[0]), shared]
    each = call.again(reduction=0)[0]
    return [_mean_or_sum(each, labels, call.results[1], is_mean=mode == 1), shared]


def _nll_loss_backward(call: Call) -> list[Result]:
    call.require_shared("weight", "total_weight")
    whole = call["self"]
    axis = 1 if whole.labels.dim() > 1 else 0
    parts = [reduced(whole.labels, [axis], keepdim=True), call["target"].labels.unsqueeze(axis)]
    gradient = call["grad_output"].labels
    parts.append(gradient.unsqueeze(axis) if gradient.dim() else gradient)
    return [Result(elementwise(parts).expand(call.results[0].shape))]


LOSSES: dict[str, Rule] = {
    **dict.fromkeys(_LOSSES, _loss),
    **dict.fromkeys(["nll_loss_forward", "nll_loss2d_forward"], _nll_loss),
    **dict.fromkeys(["nll_loss_backward", "nll_loss2d_backward"], _nll_loss_backward),
}
