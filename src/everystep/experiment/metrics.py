"""Metrics by name. Experiments, `train`, recorded loops and all views read them here.

Imports no torch: lists of runs show metrics, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["METRICS", "RESERVED_NAMES", "VALIDATION", "Metric", "Metrics", "TargetKind", "metric_of"]

#: What a measurement on validation rows is called, before the name of its metric.
VALIDATION = "validation_"

#: What targets are, and what the outputs of a model are to them.
#: classes: numbers of classes (N, ...), and scores (N, C, ...) with C >= 2;
#: two classes: 0 or 1 (N, ...), and margins of the same shape, above 0 for class 1;
#: values: numbers (N, ...), and predictions of the same shape on the same scale.
TargetKind = Literal["classes", "two classes", "values"]

#: What a user asks for: names of metrics, or functions of outputs and targets by new names.
Metrics = Mapping[str, "Callable[[Tensor, Tensor], Any]"] | Sequence[str]


@dataclass(frozen=True)
class Metric:
    """A number about all outputs of a model and their targets.

    of: how to compute it from outputs and targets, by the kind of target that it exists for; better:
    whether a good model has a high or a low one; is_share: between 0 and 1, and shown in percent;
    is_standard: measured on all validation rows of these kinds, without being asked for.
    """

    of: Mapping[TargetKind, Callable[[Tensor, Tensor], Tensor]]
    better: Literal["up", "down"]
    is_share: bool = False
    is_standard: bool = False


def _share(right: Tensor) -> Tensor:
    return right.sum() / right.numel()


def _r2(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the coefficient of determination, the mean over the columns: 1 - residual / total.

    A column with equal targets has 1 if each is predicted exactly, else 0.
    """
    # On the CPU, since not every accelerator has double precision (MPS).
    target, prediction = target.cpu().double(), prediction.cpu().double()
    residual = (target - prediction).square().sum(0)
    # Clamped, so that the mean of equal numbers is that number, whatever their sum rounds to.
    mean = target.mean(0).clamp(target.amin(0), target.amax(0))
    total = (target - mean).square().sum(0)
    return (1 - residual / total).where(total != 0, (residual == 0).double()).mean().float()


#: All metrics; a run in one line has the first that was measured.
METRICS: dict[str, Metric] = {
    "accuracy": Metric(
        {
            "classes": lambda scores, target: _share(scores.argmax(1) == target),
            "two classes": lambda margin, target: _share((margin > 0) == (target > 0.5)),
        },
        better="up",
        is_share=True,
        is_standard=True,
    ),
    "r2": Metric({"values": _r2}, better="up", is_standard=True),
    # The training's own loss, which no name is needed for.
    "loss": Metric({}, better="down"),
}

#: Names that a user's own measurement cannot have.
RESERVED_NAMES = {"step", "loss", "lr", *(f"{VALIDATION}{name}" for name in METRICS)}


def metric_of(measurement: str) -> Metric | None:
    """Return the metric that a measurement is named after (`validation_accuracy`), or None."""
    return METRICS.get(measurement.removeprefix(VALIDATION))
