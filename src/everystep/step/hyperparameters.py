"""The numbers of an optimizer that may change from step to step, by the names they are recorded under.

`lr`, `momentum` and `beta1` are those of the first param group, `lr[1]` that of the second.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["hyperparameters", "is_hyperparameter", "set_hyperparameter"]

_NAME = re.compile(r"(lr|momentum|beta1)(?:\[(\d+)\])?")


def hyperparameters(optimizer: torch.optim.Optimizer, *, only_rates: bool) -> dict[str, float]:
    """Return the numbers as they are now; `only_rates`: the learning rates alone."""
    found: dict[str, float] = {}
    for index, group in enumerate(optimizer.param_groups):
        suffix = f"[{index}]" if index else ""
        found[f"lr{suffix}"] = float(group["lr"])
        if not only_rates and "momentum" in group:
            found[f"momentum{suffix}"] = float(group["momentum"])
        if not only_rates and "betas" in group:
            found[f"beta1{suffix}"] = float(group["betas"][0])
    return found


def is_hyperparameter(name: str) -> bool:
    """Tell whether a measurement of that name is such a number."""
    return _NAME.fullmatch(name) is not None


def set_hyperparameter(optimizer: torch.optim.Optimizer, name: str, value: float) -> None:
    """Set a number that `hyperparameters` gave that name; a param group that is not there has none."""
    from torch import Tensor

    match = _NAME.fullmatch(name)
    index = int(match[2] or 0) if match else 0
    if match is None or index >= len(optimizer.param_groups):
        return
    group: dict[str, Any] = optimizer.param_groups[index]
    if match[1] == "beta1" and "betas" in group:
        group["betas"] = (value, *group["betas"][1:])
    elif isinstance(group.get(match[1]), Tensor):
        group[match[1]].fill_(value)
    elif match[1] in group:
        group[match[1]] = value
