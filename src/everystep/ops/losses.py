"""Rules of losses and their derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from everystep.ops.call import Call, Formula, Made, Piece, Sum, Terms, grid
from everystep.ops.elementwise import elementwise
from everystep.ops.formula import names_in

__all__ = ["LOSSES"]

_MEAN = 1
_ERROR = "abs(self - target)"
#: One term of each loss.
_TERMS = {
    "mse_loss": "(self - target) ^ 2",
    "smooth_l1_loss": f"0.5 * (self - target) ^ 2 / beta if {_ERROR} < beta else {_ERROR} - 0.5 * beta",
    "huber_loss": (
        f"0.5 * (self - target) ^ 2 if {_ERROR} <= delta else delta * ({_ERROR} - 0.5 * delta)"
    ),
    "soft_margin_loss": "log1p(exp(-target * self))",
    "binary_cross_entropy": ("(target - 1) * max(log1p(-self), -100) - target * max(log(self), -100)"),
    "binary_cross_entropy_with_logits": ("(1 - target) * self + log1p(exp(-abs(self))) + max(-self, 0)"),
}


def _loss(call: Call) -> Made:
    text = _TERMS[call.kind]
    if "pos_weight" in call:
        text = (
            "(1 - target) * self"
            " + (1 + (pos_weight - 1) * target) * (log1p(exp(-abs(self))) + max(-self, 0))"
        )
    if "weight" in call:
        text = f"weight * ({text})"
    given: dict[str, Piece] = {}
    settings: dict[str, Any] = {}
    axes = grid(*map(range, call.shape("self")))
    for key in names_in(text):
        if not isinstance(call.arguments[key], str):
            settings[key] = call.scalar(key)
        elif call.value("reduction") == 0:
            given[key] = call.aligned(key)
        else:
            given[key] = _broadcast(call, key, axes)
    count = float(given["self"].size) if call.value("reduction") == _MEAN else 1.0
    return Sum((Terms(text, given, settings),), count)


def _broadcast(call: Call, key: str, axes: tuple[Any, ...]) -> Piece:
    shape = call.shape(key)
    last = axes[len(axes) - len(shape) :]
    return call.piece(
        key, *(axis if n > 1 else np.zeros_like(axis) for axis, n in zip(last, shape, strict=True))
    )


#: The derivative of one term by `self`.
_SLOPES = {
    "mse_loss_backward": "2 * (self - target)",
    "smooth_l1_loss_backward": (
        "(-1 if self - target <= -beta else 1 if self - target >= beta else (self - target) / beta)"
    ),
    "huber_loss_backward": "min(max(self - target, -delta), delta)",
    "soft_margin_loss_backward": "-target / (1 + exp(target * self))",
    "binary_cross_entropy_backward": "(self - target) / max((1 - self) * self, 1e-12)",
}


def _loss_backward(call: Call) -> Made:
    weight = "weight * " if "weight" in call else ""
    text = f"grad_output * {weight}{_SLOPES[call.kind]}"
    if call.value("reduction") == _MEAN:
        text += f" / {call.tensor('self').numel()}"
    return elementwise(call, text)


def _nll(call: Call) -> Made:
    """Return the rule of the negative log likelihood, of rows (N, C) or of images (N, C, H, W)."""
    targets = call.tensor("target").cpu().numpy()
    ignored = call.value("ignore_index")
    if call.value("reduction") == 0 and call.place == 0:
        axes = tuple(np.asarray([place]) for place in call.index)
    else:
        axes = grid(*map(range, targets.shape))
    classes = targets[axes]
    if call.place == 1 and call.value("reduction") == 0:
        return Formula("0", note="not used: the losses are not added up")
    if call.place == 1 and "weight" not in call:
        target = call.piece("target", *axes)
        return Formula("sum(target != ignored)", {"target": target}, {"ignored": ignored})
    kept = classes != ignored
    axes, classes = tuple(axis[kept] for axis in axes), classes[kept]
    given: dict[str, Piece] = {"target": call.piece("target", *axes)}
    if "weight" in call:
        given["weight"] = call.piece("weight", classes)
    if call.place == 1:
        return Sum((Terms("weight[target]", given),))
    places = (axes[0], classes, *axes[1:]) if call.tensor("self").dim() > 1 else (classes,)
    given = {"self": call.piece("self", *places)} | given
    text = "-weight[target] * self[target]" if "weight" in call else "-self[target]"
    divisor = 1.0
    if call.value("reduction") == _MEAN:
        total = call.tensor("weight").double()[classes].sum() if "weight" in call else len(classes)
        divisor = float(total)
    return Sum((Terms(text, given),), divisor)


def _nll_backward(call: Call) -> Made:
    has_rows = call.tensor("self").dim() > 1
    own = call.index[1 if has_rows else 0]
    where = (call.index[0], *call.index[2:]) if has_rows else ()
    gradient = call.tensor("grad_output")
    given = {
        "grad_output": call.piece("grad_output", *(where if gradient.dim() else ())),
        "target": call.piece("target", *(where if call.tensor("target").dim() else ())),
    }
    if own == call.value("ignore_index"):
        return Formula("0", given, note=f"class {own} is ignored")
    text = "-grad_output"
    if "weight" in call:
        given["weight"] = call.piece("weight", own)
        text += " * weight"
    if call.value("reduction") == _MEAN:
        given["total_weight"] = call.piece("total_weight")
        text += " / total_weight"
    return Formula(f"{text} if target == {own} else 0", given)


LOSSES: dict[str, Callable[[Call], Made]] = {
    **dict.fromkeys(_TERMS, _loss),
    **dict.fromkeys(_SLOPES, _loss_backward),
    "nll_loss_forward": _nll,
    "nll_loss2d_forward": _nll,
    "nll_loss_backward": _nll_backward,
    "nll_loss2d_backward": _nll_backward,
}
