"""What a run says of its experiment, in words and numbers, for every view of it."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from everystep.experiment.batches import Batches
from everystep.experiment.data import Data
from everystep.gradient_descent import GradientDescent
from everystep.step.eager import Training
from everystep.step.purity.guards import is_plain
from everystep.step.purity.torchs_own import reason_against_module

__all__ = ["describe", "module_text", "optimizer_text"]


def describe(
    trainee: Training,
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
            "text": module_text(trainee.model),
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
        key: _setting_text(value)
        for key, value in group.items()
        if key not in ("params", "initial_lr") and not _is_nothing(value)
    }
    settings = ", ".join(f"{key}={text}" for key, text in told.items())
    return f"{type(optimizer).__name__}({settings})"


def _is_nothing(value: Any) -> bool:
    """Tell whether a setting is None, False or 0, also as a tensor of one number."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.item() == 0
    return value is None or (isinstance(value, bool | int | float) and value == 0)


def _setting_text(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray) and value.ndim:
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    # Another object may count how often it is printed.
    return str(value) if is_plain(value) or isinstance(value, Tensor) else type(value).__name__


def module_text(module: nn.Module) -> str:
    """Return a module as torch prints it, but run none of the user's code for it.

    What torch's own modules say of themselves is said; of the user's, the class and what is within.
    """
    if reason_against_module(module) is None:
        return repr(module)
    inner = [(name, module_text(m)) for name, m in module._modules.items() if m is not None]
    if type(module) is nn.ModuleList:
        lines = _together([text for _, text in inner])
    else:
        lines = [f"({name}): {text}" for name, text in inner]
    name = type(module).__name__
    indented = "".join(f"\n{line}" for line in lines).replace("\n", "\n  ")
    return f"{name}({indented}\n)" if lines else f"{name}()"


def _together(texts: list[str]) -> list[str]:
    """Return modules of a list, those that are alike and next to each other in one line."""
    lines, first = [], 0
    for last, text in enumerate(texts):
        if last + 1 == len(texts) or texts[last + 1] != text:
            count = last - first + 1
            lines.append(f"({first}-{last}): {count} x {text}" if count > 1 else f"({last}): {text}")
            first = last + 1
    return lines


def _loss_text(loss: Any) -> str:
    if not isinstance(loss, nn.Module):
        own = getattr(loss, "__qualname__", None) if inspect.isroutine(loss) else None
        return str(own or type(loss).__name__)
    reduction = vars(loss).get("reduction")
    is_said = isinstance(reduction, str)
    return f"{type(loss).__name__}(reduction={reduction!r})" if is_said else module_text(loss)


def _schedule_text(trainee: Training) -> str | None:
    if trainee.schedule is None:
        return None
    return f"{type(trainee.schedule).__name__}, every {trainee.schedule_every}"
