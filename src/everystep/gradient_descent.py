"""The chapter's update as a torch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

__all__ = ["GradientDescent"]


class GradientDescent(torch.optim.Optimizer):
    """The chapter's update: `parameter - gradient * lr`.

    It multiplies, then subtracts, and rounds after each. `torch.optim.SGD` uses a fused multiply-add
    instead, so its last bits differ.

    Args:
        params: parameters or param groups, as for every torch optimizer.
        lr: the learning rate, a finite number >= 0.

    Raises:
        ValueError: lr is negative or not finite.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3) -> None:
        if not 0.0 <= lr < float("inf"):
            raise ValueError(f"lr must be a finite number >= 0, not {lr}")
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Subtract `gradient * lr` from every parameter that has a gradient, in place."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr = group["lr"]
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad * lr)
        return loss
