"""Train a neural network step by step, record every step, and open any step again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from everystep.api import open, record, runs, train, train_experiment
from everystep.errors import (
    DataError,
    DeviceError,
    EverystepError,
    ExperimentError,
    ExpressionError,
    ModelError,
    RecordingError,
    RunError,
    StepError,
    TrainingError,
    UsageError,
)
from everystep.run import Run

if TYPE_CHECKING:
    from everystep.gradient_descent import GradientDescent

__all__ = [
    "DataError",
    "DeviceError",
    "EverystepError",
    "ExperimentError",
    "ExpressionError",
    "GradientDescent",
    "ModelError",
    "RecordingError",
    "Run",
    "RunError",
    "StepError",
    "TrainingError",
    "UsageError",
    "open",
    "record",
    "runs",
    "train",
    "train_experiment",
]


def __getattr__(name: str) -> Any:
    # An optimizer is a torch class, and importing everystep must not import torch.
    if name == "GradientDescent":
        from everystep.gradient_descent import GradientDescent

        return GradientDescent
    raise AttributeError(f"module 'everystep' has no attribute {name!r}")
