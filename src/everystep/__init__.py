"""Train a neural network step by step, record every step, and open any step again."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from everystep.errors import (
    DamageWarning,
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

if TYPE_CHECKING:
    from everystep import lightning as lightning
    from everystep import numerics as numerics
    from everystep import transformers as transformers
    from everystep.api import doctor, open, record, runs, sweep, train, train_experiment
    from everystep.gradient_descent import GradientDescent
    from everystep.run import Run

__all__ = [
    "DamageWarning",
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
    "doctor",
    "open",
    "record",
    "runs",
    "sweep",
    "train",
    "train_experiment",
]


#: Imported at first use: importing everystep is quick, and does not import torch.
_MODULES = {"GradientDescent": "everystep.gradient_descent", "Run": "everystep.run"}
_SUBMODULES = ("lightning", "numerics", "transformers")


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(_MODULES.get(name, "everystep.api")), name)
    # Without an import of their own: `everystep.lightning` needs a package that may not be there.
    if name in _SUBMODULES:
        return import_module(f"everystep.{name}")
    raise AttributeError(f"module 'everystep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted((*__all__, *_SUBMODULES))
