"""What a run says of its experiment, in words and numbers, for every view of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from everystep.experiment.batches import Batches
from everystep.experiment.data import Data
from everystep.gradient_descent import GradientDescent
from everystep.step.eager import Trainee

__all__ = ["describe", "optimizer_text"]


def describe(
    trainee: Trainee,
    data: Data | None,
    batches: Batches,
    source: dict[str, Any],
    seed: int | None,
    evaluate_every: int,
) -> dict[str, Any]:
    """Return the facts of a training before it starts, as JSON can hold them.

    seed: what torch's generator was seeded with, or None where it was taken as it was.
    """
    facts: dict[str, Any] = {
        "device": str(trainee.device),
        "seed": seed,
        "data": source | {"rows": batches.rows},
        "batches": {
            "batch_size": batches.batch_size,
            "drop_last": batches.drop_last,
            "seed": batches.seed,
            "steps_per_epoch": batches.steps_per_epoch,
        },
        "model": {
            "text": str(trainee.model),
            "parameters": sum(parameter.numel() for parameter in trainee.model.parameters()),
        },
        "loss": {"text": _loss_text(trainee.loss)},
        "optimizer": {"text": optimizer_text(trainee.optimizer)},
        "schedule": _schedule_text(trainee),
        "clip_norm": trainee.clip_norm,
        "evaluate_every": None,
    }
    if data is not None:
        facts["data"] |= {"x": list(data.x.shape), "y": list(data.y.shape)}
        if data.validation is not None:
            facts["data"]["validation_rows"] = len(data.validation[0])
            facts["evaluate_every"] = evaluate_every
        if data.preparation is not None:
            facts["preparation"] = data.preparation.model_dump()
    return facts


def optimizer_text(optimizer: torch.optim.Optimizer) -> str:
    """Return the optimizer in a line: its class, and what its first param group says."""
    group = dict(optimizer.param_groups[0])
    if "initial_lr" in group:  # what a schedule makes of it is another thing
        group["lr"] = group["initial_lr"]
    if isinstance(optimizer, GradientDescent):
        return f"GradientDescent(lr={group['lr']}): parameter - gradient * {group['lr']}"
    told = {
        key: value
        for key, value in group.items()
        if key not in ("params", "initial_lr") and value not in (None, False, 0)
    }
    settings = ", ".join(f"{key}={value}" for key, value in told.items())
    return f"{type(optimizer).__name__}({settings})"


def _loss_text(loss: Any) -> str:
    if not isinstance(loss, nn.Module):
        return str(getattr(loss, "__qualname__", repr(loss)))
    name = type(loss).__name__
    reduction = getattr(loss, "reduction", None)
    return f"{name}(reduction={reduction!r})" if isinstance(reduction, str) else str(loss)


def _schedule_text(trainee: Trainee) -> str | None:
    if trainee.schedule is None:
        return None
    return f"{type(trainee.schedule).__name__}, every {trainee.schedule_every}"
