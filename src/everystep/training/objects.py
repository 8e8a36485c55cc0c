"""Objects: what the user trains with, checked and copied."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from everystep.errors import DataError, ExperimentError, Fault, RunError, UsageError
from everystep.training.arguments import (
    data_faults,
    loss_faults,
    metrics_faults,
    model_faults,
    optimizer_faults,
    schedule_faults,
    validation_faults,
)
from everystep.training.dataset import DEFAULT_DATASET_LIMIT

__all__ = ["Objects"]


@dataclass(frozen=True)
class Objects:
    """What the user trains with: live objects, unchecked; to replay and to fork, not all are needed.

    model: an nn.Module; loss: a function of prediction and target; optimizer: over the model's
    parameters; data: x (N, ...) and y (N, ...), or a Dataset; schedule: a scheduler of torch's;
    validation: x and y to measure, or the share of rows to keep out for it; metrics: functions of all
    predictions and targets, by name; dataset_limit: bytes that a Dataset may take as tensors.
    """

    model: Any = None
    loss: Any = None
    optimizer: Any = None
    data: Any = None
    schedule: Any = None
    schedule_every: Any = "step"
    validation: Any = None
    metrics: Mapping[str, Callable[[Tensor, Tensor], Any]] = field(default_factory=dict)
    dataset_limit: int = DEFAULT_DATASET_LIMIT

    def copied(self) -> Objects:
        """Return copies that belong to each other as the originals do.

        Raises:
            RunError: they cannot be copied.
        """
        hooked = self._hooked()
        if hooked is not None:
            raise RunError(
                f"{hooked} has a hook, which acts on the original alone: a copy would differ; write "
                "what it does into a step function: everystep.train(step, batches, parts=...)"
            )
        try:
            with _whole_optimizers():
                model, loss, optimizer, schedule = copy.deepcopy(
                    (self.model, self.loss, self.optimizer, self.schedule), self._without_graphs()
                )
        except Exception as error:  # copying a user's object may raise anything
            raise RunError(
                f"the model, loss and optimizer cannot be copied ({_first_sentence(error)}); pass new "
                "ones: model=..., loss=..., optimizer=..."
            ) from None
        return replace(self, model=model, loss=loss, optimizer=optimizer, schedule=schedule)

    def _hooked(self) -> str | None:
        """Return the first tensor, or the optimizer, with a hook; hooks of modules are copied."""
        for name, parameter in self.model.named_parameters() if self.model is not None else ():
            if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
                return str(name)
        kinds = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
        if any(getattr(self.optimizer, kind, None) for kind in kinds):
            return f"the optimizer ({type(self.optimizer).__name__})"
        return None

    def _without_graphs(self) -> dict[int, Any]:
        """Return copies, by id, of tensors that the last forward pass left in modules."""
        modules = self.model.modules() if self.model is not None else ()
        held = [value for module in modules for value in vars(module).values()]
        return {
            id(value): value.detach().clone()
            for value in held
            if isinstance(value, Tensor) and value.grad_fn is not None
        }

    def check(self) -> None:
        """Check what a training of these objects needs.

        Raises:
            ExperimentError: lists every error.
            DataError: only the data is invalid.
        """
        faults = list(self._faults())
        if faults:
            is_data = all(fault.path in ("data", "validation") for fault in faults)
            kind = DataError if is_data else ExperimentError
            raise kind(faults, "" if is_data and len(faults) == 1 else "the arguments of train")

    def _faults(self) -> Iterator[Fault]:
        yield from model_faults(self.model)
        yield from data_faults(self.data)
        yield from loss_faults(self.loss)
        yield from optimizer_faults(self.optimizer, self.model)
        yield from schedule_faults(self.schedule, self.schedule_every, self.validation is not None)
        yield from validation_faults(self.validation)
        yield from metrics_faults(self.metrics)
        if isinstance(self.dataset_limit, bool) or not isinstance(self.dataset_limit, int | float):
            yield Fault("dataset_limit", f"must be a number of bytes, not {self.dataset_limit!r}")

    def check_complete(self) -> None:
        """Check that a step can run with these objects.

        Raises:
            RunError: names what is missing.
            UsageError: names what is of the wrong kind.
        """
        missing = [n for n in ("model", "loss", "optimizer") if getattr(self, n) is None]
        if missing:
            raise RunError(
                f"pass {' and '.join(missing)} as well: a step needs a model, a loss and an optimizer"
            )
        faults = [
            *model_faults(self.model),
            *loss_faults(self.loss),
            *optimizer_faults(self.optimizer, self.model),
        ]
        if faults:
            raise UsageError(faults, "the given objects")


_COPYING = threading.Lock()


@contextmanager
def _whole_optimizers() -> Iterator[None]:
    """Make `copy.deepcopy` copy the attributes of an optimizer, which torch drops."""

    def copied(optimizer: torch.optim.Optimizer, memo: dict[int, Any]) -> torch.optim.Optimizer:
        new = memo[id(optimizer)] = type(optimizer).__new__(type(optimizer))
        # A schedule puts its own step there, which would continue to update the original.
        own = {name: value for name, value in vars(optimizer).items() if name != "step"}
        vars(new).update(copy.deepcopy(own, memo))
        return new

    with _COPYING:
        torch.optim.Optimizer.__deepcopy__ = copied  # type: ignore[attr-defined]
        try:
            yield
        finally:
            del torch.optim.Optimizer.__deepcopy__  # type: ignore[attr-defined]


def _first_sentence(error: Exception) -> str:
    return str(error).partition(". ")[0].partition("\n")[0]
