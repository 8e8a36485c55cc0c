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
    (N, k); both by torchmetrics, and None if the prediction has another shape.
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
    from torchmetrics.functional.classification import multiclass_accuracy

    # (N, C, ...) for (N, ...), as CrossEntropyLoss has it.
    if not isinstance(prediction, Tensor) or prediction.ndim != target.ndim + 1:
        return None
    classes = prediction.shape[1]
    if (prediction.shape[0], *prediction.shape[2:]) != tuple(target.shape) or classes < 2:
        return None
    if not bool(((target >= 0) & (target < classes)).all()):
        return None
    accuracy: Tensor = multiclass_accuracy(prediction, target, num_classes=classes, average="micro")
    return accuracy


def _binary_accuracy(threshold: float) -> Measurement:
    def accuracy(prediction: Any, target: Tensor) -> Any:
        from torchmetrics.functional.classification import binary_accuracy

        if not isinstance(prediction, Tensor) or prediction.shape != target.shape:
            return None
        # torchmetrics would guess from their range whether predictions are logits.
        return binary_accuracy((prediction > threshold).int(), (target > 0.5).int())

    return accuracy


def _r2(prediction: Any, target: Tensor) -> Any:
    from torchmetrics.functional.regression import r2_score

    if not isinstance(prediction, Tensor) or prediction.shape != target.shape:
        return None
    return r2_score(prediction.float(), target.float())
