"""Rules of losses and their derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from everystep.program.elements.call import Call, Formula, Made, Numbers, Piece, Sum, Terms, grid
from everystep.program.elements.elementwise import elementwise

__all__ = ["LOSSES"]

_MEAN = 1


def _clamped_log(x: Numbers) -> Any:
    return np.maximum(np.log(x), -100)


def _squared(self: Numbers, target: Numbers) -> Any:
    return (self - target) * (self - target)


def _smooth(self: Numbers, target: Numbers, beta: float) -> Any:
    error = np.abs(self - target)
    return np.where(error < beta, 0.5 * error * error / beta, error - 0.5 * beta)


def _huber(self: Numbers, target: Numbers, delta: float) -> Any:
    error = np.abs(self - target)
    return np.where(error <= delta, 0.5 * error * error, delta * (error - 0.5 * delta))


def _entropy(self: Numbers, target: Numbers, weight: Numbers | float = 1) -> Any:
    return -weight * (target * _clamped_log(self) + (1 - target) * _clamped_log(1 - self))


def _entropy_of_logits(
    self: Numbers, target: Numbers, weight: Numbers | float = 1, pos_weight: Numbers | float = 1
) -> Any:
    factor = (pos_weight - 1) * target + 1
    softplus = np.log1p(np.exp(-np.abs(self))) + np.maximum(-self, 0)
    return weight * ((1 - target) * self + factor * softplus)


def _soft_margin(self: Numbers, target: Numbers) -> Any:
    return np.log1p(np.exp(-target * self))


def _soft_margin_slope(self: Any, target: Any) -> Any:
    return -target / (1 + np.exp(target * self))


#: One term of each loss, what else than self and target is a tensor, and what a number.
_TERMS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], Callable[..., Numbers]]] = {
    "mse_loss": ("( self - target ) ^ 2", (), (), _squared),
    "smooth_l1_loss": ("smooth_l1( self , target )", (), ("beta",), _smooth),
    "huber_loss": ("huber( self , target )", (), ("delta",), _huber),
    "soft_margin_loss": ("log1p( exp( - target * self ) )", (), (), _soft_margin),
    "binary_cross_entropy": (
        "- target * max( log( self ) , -100 ) - ( 1 - target ) * max( log( 1 - self ) , -100 )",
        ("weight",),
        (),
        _entropy,
    ),
    "binary_cross_entropy_with_logits": (
        "( 1 - target ) * self + log1p( exp( - self ) )",
        ("weight", "pos_weight"),
        (),
        _entropy_of_logits,
    ),
}


def _loss(call: Call) -> Made:
    text, tensors, numbers, function = _TERMS[call.kind]
    fixed = {key: call.scalar(key) for key in numbers}
    keys = ("self", "target", *(key for key in tensors if key in call))
    if "pos_weight" in call:
        text = text.replace("log1p", "( 1 + ( pos_weight - 1 ) * target ) * log1p")
    if "weight" in call:
        text = f"weight * ( {text} )"
    reduction = call.value("reduction")
    if reduction == 0:
        given = {key: call.aligned(key) for key in keys}
    else:
        axes = grid(*map(range, call.shape("self")))
        given = {key: _broadcast(call, key, axes) for key in keys}

    def of(**values: Numbers) -> Numbers:
        return function(**values, **fixed)

    count = float(given["self"].size) if reduction == _MEAN else 1.0
    return Sum((Terms(text, given, of),), count)


def _broadcast(call: Call, key: str, axes: tuple[Any, ...]) -> Piece:
    shape = call.shape(key)
    last = axes[len(axes) - len(shape) :]
    return call.piece(
        key, *(axis if n > 1 else np.zeros_like(axis) for axis, n in zip(last, shape, strict=True))
    )


def _loss_backward(text: str, keys: tuple[str, ...], function: Callable[..., Any]) -> Any:
    def rule(call: Call) -> Made:
        count = call.tensor("self").numel() if call.value("reduction") == _MEAN else 1

        def of(grad_output: Any, **values: Any) -> Any:
            return grad_output * function(**values) / count

        divided = f"{text} / {count}" if count != 1 else text
        return elementwise(call, (divided, ("grad_output", *keys), of))

    return rule


def _smooth_slope(self: Any, target: Any, beta: Any) -> Any:
    error = self - target
    return np.sign(error) if abs(error) >= beta else error / beta


def _huber_slope(self: Any, target: Any, delta: Any) -> Any:
    return min(max(self - target, -delta), delta)


def _entropy_slope(self: Any, target: Any, weight: Any) -> Any:
    factor = 1 if weight is None else weight
    return factor * (self - target) / max((1 - self) * self, 1e-12)


def _nll(call: Call) -> Made:
    """Return the rule of the negative log likelihood, of rows (N, C) or of images (N, C, H, W)."""
    targets = call.tensor("target").cpu().numpy()
    ignored = call.value("ignore_index")
    if call.value("reduction") == 0 and call.place == 0:
        axes = tuple(np.asarray([place]) for place in call.index)
    else:
        axes = grid(*map(range, targets.shape))
    classes = targets[axes]
    kept = classes != ignored
    axes, classes = tuple(axis[kept] for axis in axes), classes[kept]
    given: dict[str, Piece] = {"target": call.piece("target", *axes)}
    if "weight" in call:
        given["weight"] = call.piece("weight", classes)
    if call.place == 1:
        if call.value("reduction") == 0:
            return Formula("0, not used", {}, lambda: 0.0)
        if "weight" in call:
            return Sum((Terms("weight", {"weight": given["weight"]}, lambda weight: weight),))
        return Formula("how many are in target", given, lambda target: len(target))
    places = (axes[0], classes, *axes[1:]) if call.tensor("self").dim() > 1 else (classes,)
    given = {"self": call.piece("self", *places)} | given
    text = "- weight * self[target]" if "weight" in call else "- self[target]"

    def of(self: Numbers, target: Numbers, weight: Numbers | float = 1) -> Numbers:
        return -weight * self

    divisor = 1.0
    if call.value("reduction") == _MEAN:
        total = call.tensor("weight").double()[classes].sum() if "weight" in call else len(classes)
        divisor = float(total)
    return Sum((Terms(text, given, of),), divisor)


def _nll_backward(call: Call) -> Made:
    has_rows = call.tensor("self").dim() > 1
    own = call.index[1 if has_rows else 0]
    where = (call.index[0], *call.index[2:]) if has_rows else ()
    gradient = call.tensor("grad_output")
    given = {
        "grad_output": call.piece("grad_output", *(where if gradient.dim() else ())),
        "target": call.piece("target", *(where if call.tensor("target").dim() else ())),
    }
    text = "grad_output"
    if "weight" in call:
        given["weight"] = call.piece("weight", own)
        text += " * weight"
    if call.value("reduction") == _MEAN:
        given["total_weight"] = call.piece("total_weight")
        text += " / total_weight"
    ignored = call.value("ignore_index")

    def of(grad_output: Numbers, target: Numbers, weight: Any = (1,), total_weight: Any = (1,)) -> Any:
        if target[0] != own or own == ignored:
            return 0.0
        return -grad_output[0] * weight[0] / total_weight[0]

    return Formula(f"- {text} if target == {own} else 0", given, of)


LOSSES: dict[str, Callable[[Call], Made]] = {
    **dict.fromkeys(_TERMS, _loss),
    "nll_loss_forward": _nll,
    "nll_loss2d_forward": _nll,
    "nll_loss_backward": _nll_backward,
    "nll_loss2d_backward": _nll_backward,
    "mse_loss_backward": _loss_backward(
        "grad_output * 2 * ( self - target )",
        ("self", "target"),
        lambda self, target: 2 * (self - target),
    ),
    "smooth_l1_loss_backward": _loss_backward(
        "grad_output * smooth_l1'( self , target )", ("self", "target", "beta"), _smooth_slope
    ),
    "huber_loss_backward": _loss_backward(
        "grad_output * huber'( self , target )", ("self", "target", "delta"), _huber_slope
    ),
    "soft_margin_loss_backward": _loss_backward(
        "grad_output * ( - target ) / ( 1 + exp( target * self ) )",
        ("self", "target"),
        _soft_margin_slope,
    ),
    "binary_cross_entropy_backward": _loss_backward(
        "grad_output * ( self - target ) / max( self * ( 1 - self ) , 1e-12 )",
        ("self", "target", "weight"),
        _entropy_slope,
    ),
}
