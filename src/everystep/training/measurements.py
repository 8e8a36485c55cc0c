"""The default measurements of a validation part: the loss, and accuracy or R²."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["RESERVED_NAMES", "standard_measurements"]

#: Names that a user's own measurement cannot have.
RESERVED_NAMES = {"step", "loss", "lr", "validation_loss", "validation_accuracy", "validation_r2"}

#: The threshold of predictions for torch's losses of two classes, by class and by function.
_THRESHOLDS = {
    **{"BCELoss": 0.5, "binary_cross_entropy": 0.5},
    **{"BCEWithLogitsLoss": 0.0, "binary_cross_entropy_with_logits": 0.0},
}
#: Torch's losses of predictions that are on the scale of their targets.
_OF_VALUES = {
    *("MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss"),
    *("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"),
}
_OF_RATES = {"PoissonNLLLoss", "poisson_nll_loss"}

Measurement = Callable[[Tensor, Tensor], Any]


def standard_measurements(loss: Measurement, target: Tensor) -> Mapping[str, Measurement]:
    """Return the measurements that fit a loss and its targets (N, ...), named `validation_...`.

    Accuracy for classes (and for the two classes of a binary cross entropy), R² for values in columns
    (N, k), each None if the prediction has another shape. R² only if predictions are on the scale of
    their targets, or can be converted to it; for a loss that is not torch's, this is assumed.
    """
    name = _torchs_name(loss)
    found: dict[str, Measurement] = {"validation_loss": loss}
    if name in _THRESHOLDS:
        found["validation_accuracy"] = _binary_accuracy(_THRESHOLDS[name])
    elif target.dtype == torch.int64:
        found["validation_accuracy"] = _accuracy
    elif target.is_floating_point() and target.ndim <= 2 and len(target) > 1:
        if name in _OF_RATES:
            found["validation_r2"] = _r2_of_logs if _predicts_logs(loss) else _r2
        elif name is None or name in _OF_VALUES:
            found["validation_r2"] = _r2
    return found


def _torchs_name(loss: Any) -> str | None:
    """Return the name of the torch loss that a loss is or derives from; None for others."""
    if isinstance(loss, nn.Module):
        own = (each.__name__ for each in type(loss).__mro__ if each.__module__ == nn.MSELoss.__module__)
        return next((name for name in own if not name.startswith("_")), None)
    function: Any = loss.func if type(loss) is partial else loss
    if not isinstance(function, FunctionType):
        return None
    name = function.__name__
    return name if vars(functional).get(name) is function else None


def _predicts_logs(loss: Any) -> bool:
    """Return whether predictions for a loss of rates are the logarithms of rates, as by default."""
    if isinstance(loss, nn.PoissonNLLLoss):
        return loss.log_input
    return bool(loss.keywords.get("log_input", True)) if type(loss) is partial else True


def _accuracy(prediction: Any, target: Tensor) -> Tensor | None:
    # (N, C, ...) for (N, ...), as CrossEntropyLoss has it.
    if not isinstance(prediction, Tensor) or prediction.ndim != target.ndim + 1:
        return None
    classes = prediction.shape[1]
    if (prediction.shape[0], *prediction.shape[2:]) != tuple(target.shape) or classes < 2:
        return None
    if not bool(((target >= 0) & (target < classes)).all()):
        return None
    return _share(prediction.argmax(1) == target)


def _binary_accuracy(threshold: float) -> Measurement:
    def accuracy(prediction: Any, target: Tensor) -> Any:
        if not isinstance(prediction, Tensor) or prediction.shape != target.shape:
            return None
        return _share((prediction > threshold) == (target > 0.5))

    return accuracy


def _share(right: Tensor) -> Tensor:
    """Return the share of true values."""
    return right.sum() / right.numel()


def _r2(prediction: Any, target: Tensor) -> Any:
    """Return the coefficient of determination, the mean over the columns: 1 - residual / total.

    A column with equal targets has 1 if each is predicted exactly, else 0.
    """
    if not isinstance(prediction, Tensor) or prediction.shape != target.shape:
        return None
    target, prediction = target.cpu().double(), prediction.cpu().double()
    residual = (target - prediction).square().sum(0)
    total = (target - target.mean(0)).square().sum(0)
    score = torch.where(total > 0, 1 - residual / total, (residual == 0).double())
    return score.mean().float()


def _r2_of_logs(prediction: Any, target: Tensor) -> Any:
    """Return R² of the exponentials of predictions."""
    return _r2(prediction.cpu().double().exp() if isinstance(prediction, Tensor) else prediction, target)
