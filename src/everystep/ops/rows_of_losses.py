"""Losses and their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from everystep.ops.labels import SHARED, Tracked, elementwise, reduced
from everystep.ops.rows import Result, RowsCall, RowsRule, none_mixed, of_shape

__all__ = ["LOSSES"]

_LOSSES = [
    "mse_loss",
    "smooth_l1_loss",
    "huber_loss",
    "binary_cross_entropy",
    "soft_margin_loss",
    "binary_cross_entropy_with_logits",
]


def _loss(call: RowsCall) -> list[Result]:
    """Losses that are means or sums of a number for each element."""
    labels = elementwise([each.labels for each in call.tensors()])
    none_mixed(labels)
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


def _nll_loss(call: RowsCall) -> list[Result]:
    call.require_shared("weight")
    classes = reduced(call["self"].labels, [1 if call["self"].labels.dim() > 1 else 0])
    labels = elementwise([classes, call["target"].labels])
    none_mixed(labels)
    mode = 1 if call["reduction"] is None else call["reduction"]
    shared = Result(torch.full((), SHARED, dtype=torch.int32))  # as recorded
    if mode == 0:
        return [of_shape(labels, call.results[0]), shared]
    each = call.again(reduction=0)[0]
    return [_mean_or_sum(each, labels, call.results[1], is_mean=mode == 1), shared]


def _nll_loss_backward(call: RowsCall) -> list[Result]:
    call.require_shared("weight", "total_weight")
    whole = call["self"]
    axis = 1 if whole.labels.dim() > 1 else 0
    parts = [reduced(whole.labels, [axis], keepdim=True), call["target"].labels.unsqueeze(axis)]
    gradient = call["grad_output"].labels
    parts.append(gradient.unsqueeze(axis) if gradient.dim() else gradient)
    return [Result(elementwise(parts).expand(call.results[0].shape))]


def _margin(call: RowsCall) -> list[Result]:
    """Losses that are a number for each row of classes, and perhaps which classes are its targets."""
    labels = _of_classes(call)
    rows = labels.reshape(-1, labels.shape[-1])[:, 0]
    mode = 1 if call["reduction"] is None else call["reduction"]
    others = [Result(labels.expand(result.shape)) for result in call.results[1:]]
    if mode == 0:
        return [of_shape(rows.reshape(call.results[0].shape), call.results[0]), *others]
    each = call.again(reduction=0)[0].reshape(-1)
    return [_mean_or_sum(each, rows, len(each), is_mean=mode == 1), *others]


def _margin_backward(call: RowsCall) -> list[Result]:
    gradient = call["grad_output"].labels
    labels = _of_classes(call)
    parts = [labels, gradient.unsqueeze(-1) if gradient.dim() and labels.dim() > 1 else gradient]
    return [Result(elementwise(parts).expand(call.results[0].shape))]


def _of_classes(call: RowsCall) -> Tensor:
    """Return the labels of rows of classes (N, C), each of its row."""
    call.require_shared("weight")
    whole, target = call["self"], call["target"].labels
    of_row = reduced(whole.labels, [-1], keepdim=True)
    if target.shape == whole.labels.shape:
        target = reduced(target, [-1], keepdim=True)
    else:
        target = target.reshape(of_row.shape)
    labels = elementwise([of_row, target]).expand(whole.labels.shape)
    return none_mixed(labels)


LOSSES: dict[str, RowsRule] = {
    **dict.fromkeys(_LOSSES, _loss),
    **dict.fromkeys(["multi_margin_loss", "multilabel_margin_loss_forward"], _margin),
    **dict.fromkeys(["multi_margin_loss_backward", "multilabel_margin_loss_backward"], _margin_backward),
    **dict.fromkeys(["nll_loss_forward", "nll_loss2d_forward"], _nll_loss),
    **dict.fromkeys(["nll_loss_backward", "nll_loss2d_backward"], _nll_loss_backward),
}
