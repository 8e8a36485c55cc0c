"""The default measurements of a validation part: the loss, and accuracy or R²."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["RESERVED_NAMES", "standard_measurements"]

#: Names that a user's own measurement cannot have.
RESERVED_NAMES = {"step", "loss", "lr", "validation_loss", "validation_accuracy", "validation_r2"}

Measurement = Callable[[Tensor, Tensor], Any]


def standard_measurements(loss: Measurement, target: Tensor) -> Mapping[str, Measurement]:
    """Return the measurements that fit a loss and its targets (N, ...), named `validation_...`.

    Accuracy for classes (and for the two classes of a binary cross entropy), R² for values in columns
    (N, k), each None if the prediction has another shape.
    """
    found: dict[str, Measurement] = {"validation_loss": loss}
    if isinstance(loss, nn.BCELoss | nn.BCEWithLogitsLoss):
        found["validation_accuracy"] = _binary_accuracy(0.5 if isinstance(loss, nn.BCELoss) else 0.0)
    elif target.dtype == torch.int64:
        found["validation_accuracy"] = _accuracy
    elif target.is_floating_point() and target.ndim <= 2 and len(target) > 1:
        found["validation_r2"] = _r2
    return found


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
