"""Evaluation: measurements of a state that leave the training unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from everystep.errors import ExperimentError, Fault
from everystep.program.memory import copy_into
from everystep.step.generators import generators_preserved
from everystep.step.state import same_bits
from everystep.step.torchs_own import reason_against_loss, reason_against_module

__all__ = ["Evaluation"]


#: Rows per forward pass, by default.
ROWS = 1024


@dataclass(frozen=True)
class Evaluation:
    """The measurements of a state, on rows x (N, ...) and targets y (N, ...).

    standard: everystep's measurements, by name, including the training loss; metrics: the user's own;
    each a function of all predictions and all targets, and a standard one returns None if it does not
    fit the prediction. rows: the number of rows per forward pass. x may stay in a file.
    """

    model: nn.Module
    standard: Mapping[str, Callable[[Tensor, Tensor], Any]]
    metrics: Mapping[str, Callable[[Tensor, Tensor], Any]]
    x: Any
    y: Tensor
    device: torch.device
    rows: int = ROWS

    @property
    def has_foreign_code(self) -> bool:
        """Whether it calls code that is neither torch's nor everystep's, which may change anything."""
        parts = (
            reason_against_module(self.model),
            reason_against_loss(self.standard.get("validation_loss")),
        )
        return bool(self.metrics) or any(reason is not None for reason in parts)

    def measure(self) -> dict[str, float]:
        """Return each measurement as a number.

        The model predicts in evaluation mode. The mode of every module, the buffers and the random
        generators are restored before a metric is called: changes by a metric stay.
        """
        with torch.no_grad(), generators_preserved(self.device), _evaluating(self.model, self.standard):
            parts = [self.model(part) for part in self.x.split(self.rows)]
            prediction = _joined(parts)
            found = {name: measure(prediction, self.y) for name, measure in self.standard.items()}
        found = {name: value for name, value in found.items() if value is not None}
        found |= {name: metric(prediction, self.y) for name, metric in self.metrics.items()}
        return {name: _one_number(name, value) for name, value in found.items()}


def _joined(parts: list[Any]) -> Any:
    """Return the predictions of several groups of rows as one."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, Mapping):
        return {name: _joined([part[name] for part in parts]) for name in first}
    if isinstance(first, list | tuple):
        return tuple(map(_joined, map(list, zip(*parts, strict=True))))
    problem = (
        f"predictions of several groups of rows are {type(first).__name__}, which everystep cannot "
        "concatenate"
    )
    raise ExperimentError([Fault("validation", f"{problem}; pass at most {ROWS} rows")])


def _one_number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ExperimentError(
            [Fault(f"metrics[{name!r}]", f"must return one number, not {got}")]
        ) from None


@contextmanager
def _evaluating(model: nn.Module, functions: Mapping[str, Any]) -> Iterator[None]:
    """Put a model and the modules among functions into evaluation mode, and restore them."""
    modes = [(module, module.training) for module in model.modules()]
    others = [function for function in functions.values() if isinstance(function, nn.Module)]
    buffers = [(buffer, buffer.clone()) for module in (model, *others) for buffer in module.buffers()]
    model.eval()
    try:
        yield
    finally:
        # As a loop does, since a model may do more than to set the mode.
        model.train(modes[0][1])
        for module, training in modes:
            module.training = training
        for buffer, before in buffers:
            if not same_bits(buffer, before):  # a write counts as a change
                copy_into(buffer, before)
