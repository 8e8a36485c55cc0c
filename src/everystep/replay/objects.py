"""What the user trained with: needed to replay what no program takes, and to fork."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

from everystep.errors import Fault, RunError, UsageError
from everystep.recording.facts import EAGERLY
from everystep.recording.run import RecordedRun

__all__ = ["Objects", "needed"]


@dataclass(frozen=True)
class Objects:
    """What the user trained with, for steps that no program takes, and for forks.

    data: x and y, or a Dataset, where the run does not hold them; schedule and metrics: for forks alone.
    """

    model: nn.Module | None = None
    loss: Callable[[Any, Any], Tensor] | None = None
    optimizer: torch.optim.Optimizer | None = None
    data: tuple[Any, Any] | Dataset[Any] | None = None
    schedule: LRScheduler | None = None
    schedule_every: str = "step"
    metrics: Mapping[str, Callable[[Tensor, Tensor], Any]] = field(default_factory=dict)

    def copied(self) -> Objects:
        """Return copies that belong to each other as these do.

        Raises:
            RunError: they cannot be copied.
        """
        try:
            with _whole_optimizers():
                model, loss, optimizer, schedule = copy.deepcopy(
                    (self.model, self.loss, self.optimizer, self.schedule), self._without_graphs()
                )
        except Exception as error:  # whatever the user's objects make of being copied
            raise RunError(
                f"the model, loss and optimizer cannot be copied ({_first_sentence(error)}); "
                "give new ones: model=..., loss=..., optimizer=..."
            ) from None
        return replace(self, model=model, loss=loss, optimizer=optimizer, schedule=schedule)

    def _without_graphs(self) -> dict[int, Any]:
        """Return copies, by id, of tensors that the last forward pass left in modules."""
        modules = self.model.modules() if self.model is not None else ()
        held = [value for module in modules for value in vars(module).values()]
        return {
            id(value): value.detach().clone()
            for value in held
            if isinstance(value, Tensor) and value.grad_fn is not None
        }

    def check_complete(self) -> None:
        """Check that a step can be taken with them.

        Raises:
            RunError: names what is missing.
            UsageError: names what is of the wrong kind.
        """
        missing = [n for n in ("model", "loss", "optimizer") if getattr(self, n) is None]
        if missing:
            raise RunError(
                f"give {' and '.join(missing)} as well: a step takes a model, a loss and an optimizer"
            )
        wanted: dict[str, tuple[Any, str]] = {
            "model": (nn.Module, "an nn.Module"),
            "loss": (Callable, "a callable of (prediction, target)"),
            "optimizer": (torch.optim.Optimizer, "an optimizer over the model's parameters"),
        }
        faults = [
            Fault(name, f"must be {what}, not {type(getattr(self, name)).__name__}")
            for name, (kind, what) in wanted.items()
            if not isinstance(getattr(self, name), kind)
        ]
        if faults:
            raise UsageError(faults, "what the run is opened with")


_COPYING = threading.Lock()


@contextmanager
def _whole_optimizers() -> Iterator[None]:
    """Let `copy.deepcopy` copy the attributes of an optimizer, which torch drops."""

    def copied(optimizer: torch.optim.Optimizer, memo: dict[int, Any]) -> torch.optim.Optimizer:
        new = memo[id(optimizer)] = type(optimizer).__new__(type(optimizer))
        # A schedule puts a step of its own there, which would go on to update the original.
        own = {name: value for name, value in vars(optimizer).items() if name != "step"}
        vars(new).update(copy.deepcopy(own, memo))
        return new

    with _COPYING:
        torch.optim.Optimizer.__deepcopy__ = copied  # type: ignore[attr-defined]
        try:
            yield
        finally:
            del torch.optim.Optimizer.__deepcopy__  # type: ignore[attr-defined]


def needed(run: RecordedRun, objects: Objects | None) -> Objects | None:
    """Return the objects if the run cannot be replayed without them, else None."""
    for stretch in run.stretches:
        facts, engine = stretch.facts, stretch.facts.engine or EAGERLY
        stored = not facts.data.lazy and (facts.data_file is None or facts.data_file.stored)
        if engine.eager_from is not None or engine.live_optimizer or not stored:
            return objects
    return None


def _first_sentence(error: Exception) -> str:
    return str(error).partition(". ")[0].partition("\n")[0]
