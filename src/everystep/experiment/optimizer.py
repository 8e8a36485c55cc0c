"""The optimizer: which of torch's implementations computes it."""

from __future__ import annotations

import torch

from everystep.experiment.catalogue import keyword_parameters
from everystep.experiment.specification import Experiment

__all__ = ["with_fused"]

# torch has fused kernels of all others on every device that everystep trains on.
_FUSED_ON_CPU_ONLY = {"Adagrad"}


def with_fused(experiment: Experiment, device: torch.device) -> Experiment:
    """Return the experiment with `fused = true` if the optimizer supports it and nothing is set.

    torch's fused, foreach and for-loop implementations differ in their last bits, and the default
    differs by device: so the experiment records which one it uses.
    """
    optimizer = experiment.optimizer
    chosen = {"fused", "foreach", "differentiable", "maximize"} & set(optimizer.keywords)
    has_it = "fused" in keyword_parameters("optimizer", optimizer.name)
    if chosen - {"maximize"} or not has_it:
        return experiment
    if optimizer.name in _FUSED_ON_CPU_ONLY and device.type != "cpu":
        return experiment
    pinned = optimizer.model_copy(update={"fused": True})
    return experiment.model_copy(update={"optimizer": pinned})
