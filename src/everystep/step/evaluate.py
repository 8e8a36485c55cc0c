"""Evaluation: measurements of a state that leave the training as if nothing had been asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from everystep.errors import ExperimentError, Fault
from everystep.step.state import generators_preserved

__all__ = ["Evaluation"]


@dataclass(frozen=True)
class Evaluation:
    """What is measured of a state, on rows x (N, ...) and targets y (N, ...).

    measurements: name to a function of all predictions and all targets; rows: how many rows go
    through the model at once.
    """

    model: nn.Module
    measurements: Mapping[str, Callable[[Tensor, Tensor], Any]]
    x: Tensor
    y: Tensor
    device: torch.device
    rows: int = 1024

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Return each measurement as a number.

        In evaluation mode; the mode of every module, the buffers and the random generators are
        afterwards as they were.
        """
        with generators_preserved(self.device), _evaluating(self.model):
            parts = [self.model(part) for part in torch.split(self.x, self.rows)]
            prediction = torch.cat(parts) if len(parts) > 1 else parts[0]
            return {
                name: _one_number(name, measurement(prediction, self.y))
                for name, measurement in self.measurements.items()
            }


def _one_number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ExperimentError(
            [Fault(f"metrics[{name!r}]", f"must give one number, not {got}")]
        ) from None


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for buffer, before in buffers:
            buffer.copy_(before)
