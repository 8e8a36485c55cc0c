"""The optimizer and its scheduler, created from their specification."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from everystep.errors import ExperimentError, Fault
from everystep.experiment.catalogue import keyword_parameters, make_optimizer, make_scheduler
from everystep.experiment.specification import Experiment, Optimizer, Scheduler

__all__ = ["build_optimizer", "build_scheduler", "with_fused"]

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


def build_optimizer(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Create the optimizer of these parameters.

    Raises:
        ExperimentError: torch rejects an argument, or there are no parameters.
    """
    try:
        return make_optimizer(optimizer.name, optimizer.keywords, parameters)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ExperimentError([Fault("optimizer", f"{optimizer.name}: {error}")]) from None


def build_scheduler(scheduler: Scheduler, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """Make the scheduler of the optimizer's learning rate.

    Raises:
        ExperimentError: torch refuses an argument.
    """
    try:
        return make_scheduler(scheduler.name, scheduler.keywords, optimizer)
    except (ValueError, TypeError, KeyError) as error:
        raise ExperimentError([Fault("scheduler", f"{scheduler.name}: {error}")]) from None
