"""What a training measures besides its loss: the metrics that fit the loss and the targets.

To measure a state leaves the training unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from everystep.errors import ExperimentError, Fault
from everystep.experiment.metrics import METRICS, VALIDATION, TargetKind
from everystep.program.memory import copy_into
from everystep.step.generators import generators_preserved
from everystep.step.state import same_bits
from everystep.step.torchs_own import reason_against_loss, reason_against_module
from everystep.training.objects import Objects

__all__ = ["Evaluation", "evaluation_of"]

#: Rows per forward pass.
ROWS = 1024

#: The threshold of predictions for torch's losses of two classes, by class and by function.
_THRESHOLDS = {
    **{"BCELoss": 0.5, "binary_cross_entropy": 0.5},
    **{"BCEWithLogitsLoss": 0.0, "binary_cross_entropy_with_logits": 0.0},
}
#: Torch's losses of predictions that are on the scale of their targets.
_OF_VALUES = {
    *("MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss"),
    *("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"),
}
_OF_RATES = {"PoissonNLLLoss", "poisson_nll_loss"}

Measure = Callable[[Tensor, Tensor], Any]


@dataclass(frozen=True)
class Evaluation:
    """The measurements of a state, on rows x (N, ...) and targets y (N, ...).

    standard: everystep's measurements, by name, including the training loss; metrics: the user's own;
    each a function of all predictions and all targets, and a standard one returns None if it does not
    fit the prediction. x may stay in a file.
    """

    model: nn.Module
    standard: Mapping[str, Measure]
    metrics: Mapping[str, Measure]
    x: Any
    y: Tensor

    @property
    def has_foreign_code(self) -> bool:
        """Whether it calls code that is neither torch's nor everystep's, which may change anything."""
        loss = self.standard.get(f"{VALIDATION}loss")  # not measured on the training's own rows
        of_loss = loss is not None and reason_against_loss(loss)
        return bool(self.metrics or reason_against_module(self.model) or of_loss)

    def measure(self) -> dict[str, float]:
        """Return each measurement as a number.

        The model predicts in evaluation mode. The mode of every module, the buffers and the random
        generators are restored before a metric is called: changes by a metric stay.
        """
        device = self.y.device
        # In groups of rows: activations of all rows may not fit into memory.
        with torch.no_grad(), generators_preserved(device), _evaluating(self.model, self.standard):
            prediction = _joined([self.model(part) for part in self.x.split(ROWS)])
            found = {name: measure(prediction, self.y) for name, measure in self.standard.items()}
        found = {name: value for name, value in found.items() if value is not None}
        found |= {name: metric(prediction, self.y) for name, metric in self.metrics.items()}
        return {name: _one_number(name, value) for name, value in found.items()}


def evaluation_of(
    objects: Objects, rows: tuple[Tensor, Tensor], *, is_validation: bool
) -> Evaluation | None:
    """Return what is measured on rows x and y (N, ...), on the device of the model; None if nothing is.

    On validation rows: the loss, and the standard metrics that fit the loss and the targets, each named
    `validation_...`, and omitted if the outputs have another shape. On these or others: the metrics that
    the objects have.

    Raises:
        ExperimentError: a metric by name does not fit the loss and the targets.
    """
    metrics = objects.metrics or ()
    own, named = (metrics, ()) if isinstance(metrics, Mapping) else ({}, metrics)
    kind, scaled = _kind_of(objects.loss, rows[1])
    prefix = VALIDATION if is_validation else ""
    found: dict[str, Measure] = {f"{VALIDATION}loss": objects.loss} if is_validation else {}
    for name, metric in METRICS.items():
        if name not in named and not (is_validation and metric.is_standard):
            continue
        if kind is not None and kind in metric.of:
            asked = name if name in named else None
            found[f"{prefix}{name}"] = partial(_measured, metric.of[kind], kind, scaled, asked)
        elif name in named:
            raise ExperimentError([Fault("metrics", _misfit(name, kind))])
    return Evaluation(objects.model, found, own, *rows) if found or own else None


def _kind_of(loss: Any, target: Tensor) -> tuple[TargetKind | None, Callable[[Tensor], Tensor]]:
    """Return the kind of the targets (N, ...), and what brings outputs to their scale.

    Targets are values only where outputs are on their scale, or can be brought to it; of a loss that is
    not torch's, they are taken to be.
    """
    name = _torchs_name(loss)
    # Then the sign of an output is its class, of probabilities and of logits alike.
    if name in _THRESHOLDS:
        return "two classes", lambda output: output - _THRESHOLDS[name]
    if target.dtype == torch.int64:
        return "classes", lambda output: output
    if target.is_floating_point() and target.ndim <= 2 and len(target) > 1:
        # In double, since e to the 89 overflows float32; on the CPU, since mps has no double.
        if name in _OF_RATES and _predicts_logs(loss):
            return "values", lambda output: output.cpu().double().exp()
        if name is None or name in _OF_VALUES | _OF_RATES:
            return "values", lambda output: output
    return None, lambda output: output


def _torchs_name(loss: Any) -> str | None:
    """Return the name of the torch loss that a loss is or derives from; None for others."""
    if isinstance(loss, nn.Module):
        own = (each.__name__ for each in type(loss).__mro__ if each.__module__ == nn.MSELoss.__module__)
        return next((name for name in own if not name.startswith("_")), None)
    function: Any = loss.func if type(loss) is partial else loss
    if not isinstance(function, FunctionType):
        return None
    name = function.__name__
    return name if vars(functional).get(name) is function else None


def _predicts_logs(loss: Any) -> bool:
    """Return whether predictions for a loss of rates are the logarithms of rates, as by default."""
    if isinstance(loss, nn.PoissonNLLLoss):
        return loss.log_input
    return bool(loss.keywords.get("log_input", True)) if type(loss) is partial else True


def _measured(
    measure: Measure,
    kind: TargetKind,
    scaled: Callable[[Tensor], Tensor],
    asked: str | None,
    output: Any,
    target: Tensor,
) -> Tensor | None:
    """Return a metric of outputs and targets; None if their shapes do not fit, and nobody `asked`."""
    if _fits(output, target, kind):
        value: Tensor = measure(scaled(output), target)
        return value
    if asked is None:
        return None
    got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    problem = f"{asked} cannot compare the model's output {got} with targets {tuple(target.shape)}"
    raise ExperimentError([Fault("metrics", problem)])


def _fits(output: Any, target: Tensor, kind: TargetKind) -> bool:
    """Return whether outputs can be compared with targets: for classes, one output for each."""
    if not isinstance(output, Tensor):
        return False
    if kind != "classes":
        return output.shape == target.shape
    if output.ndim != target.ndim + 1 or output.shape[1] < 2:
        return False
    is_in_range = bool(((target >= 0) & (target < output.shape[1])).all())
    return is_in_range and output.shape[:1] + output.shape[2:] == target.shape


def _misfit(name: str, kind: TargetKind | None) -> str:
    fitting = ", ".join(each for each, metric in METRICS.items() if kind in metric.of)
    needed, known = " or ".join(METRICS[name].of), f"; known for these: {fitting}" if fitting else ""
    are = f"the targets of this loss are {kind or 'of another kind'}{known}"
    return f"{name} needs targets that are {needed}, but {are}"


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
    """Put a model into evaluation mode; restore it, and the buffers of the modules among functions."""
    # Each module's own mode, since a user may have put some of them into evaluation mode for good.
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
