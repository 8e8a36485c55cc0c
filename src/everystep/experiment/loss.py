"""The loss: any loss of `torch.nn` that compares a prediction with a target."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from everystep.errors import DataError, ExperimentError, Fault, ModelError
from everystep.experiment.data import Data, Target
from everystep.experiment.specification import Loss

__all__ = ["check_loss", "target_of"]

_OF_CLASSES = {"CrossEntropyLoss", "NLLLoss", "MultiMarginLoss"}


def target_of(loss: Loss) -> Target:
    """Return the kind of target that the loss needs: class indices, or values."""
    return "classes" if loss.name in _OF_CLASSES else "values"


def check_loss(loss: nn.Module, prediction: Tensor, data: Data) -> None:
    """Try the loss on a prediction (n, ...) of the first n rows, and name what does not fit.

    Raises:
        ModelError: the shapes of prediction and target do not go together.
        DataError: a class that the model has no output for, or that the loss cannot ignore.
        ExperimentError: the loss is not a single number.
    """
    name = type(loss).__name__
    known = data.preparation.classes if data.preparation else None
    ignored = getattr(loss, "ignore_index", None)
    numbers = [*range(len(known or ()))]
    is_renumbered = known is not None and known != numbers and isinstance(known[0], int)
    if known and is_renumbered and ignored is not None and ignored in (*known, *numbers):
        raise DataError(
            f"the loss ignores class {ignored}, but the {len(known)} classes of this data, "
            f"{known[0]} to {known[-1]}, are numbered again from 0; number them so in the data, and "
            "remove rows that the loss should ignore"
        )
    target = data.y[: len(prediction)]
    if name in _OF_CLASSES and data.y.dtype == torch.int64:
        classes = prediction.shape[1] if prediction.ndim > 1 else 0
        if classes <= int(data.y.max()):
            raise DataError(
                f"the data has {int(data.y.max()) + 1} classes, but the model has {classes} outputs "
                f"(shape {tuple(prediction.shape)}); {name} needs one output per class"
            )
    elif name not in _OF_CLASSES and prediction.shape != target.shape:
        raise ModelError(
            f"{name} compares the model's output {tuple(prediction.shape)} with a target of shape "
            f"{tuple(target.shape)}; set the last layer to {target.shape[-1]} outputs"
        )
    try:
        value = loss(prediction, target)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ModelError(f"{name} cannot compare the model's output with the target: {error}") from None
    if value.numel() != 1:
        shape = tuple(value.shape)
        problem = f'the loss must be one number, not {shape}; use reduction = "mean" or "sum"'
        raise ExperimentError([Fault("loss.reduction", problem)])
