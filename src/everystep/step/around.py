"""What a step in Python does around its operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from everystep.step.hyperparameters import changes_more_than_lr
from everystep.step.parts import Parts
from everystep.step.torchs_own import is_torchs_scheduler

__all__ = ["Around", "NotReplaceableError"]


class NotReplaceableError(Exception):
    """A step that a program cannot run in place of Python; the message gives the reason."""


class Around:
    """Effects of a step in Python other than operations: its optimizers step, its schedulers advance.

    Args:
        parts: of the training; the step is about to run.

    optimizers: that stepped, in order.
    """

    def __init__(self, parts: Parts) -> None:
        self.optimizers: list[torch.optim.Optimizer] = []
        self._parts = parts
        self._schedulers = [part for part in parts.named.values() if isinstance(part, LRScheduler)]
        self._before = [*map(_steps_taken, self._schedulers)]
        self._settings = self._settings_now()
        self._early: list[LRScheduler] = []

    def optimizer_begins(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer starts a step."""
        self.optimizers.append(optimizer)
        for scheduler, before in zip(self._schedulers, self._before, strict=True):
            if scheduler.optimizer is optimizer and _steps_taken(scheduler) != before:
                self._early.append(scheduler)

    def schedulers(self) -> list[LRScheduler]:
        """Return the schedulers that the step has advanced, each once, after its optimizer.

        Raises:
            NotReplaceableError: it has changed the settings of an optimizer in another way.
        """
        advanced = []
        for scheduler, before in zip(self._schedulers, self._before, strict=True):
            if _steps_taken(scheduler) == before:
                continue
            problem, groups = "", scheduler.optimizer.param_groups
            if not is_torchs_scheduler(scheduler, but_functions=True):
                problem = "is not a scheduler of torch; advance it between steps"
            elif isinstance(scheduler, ReduceLROnPlateau) or _steps_taken(scheduler) != before + 1:
                problem = "does not advance by one step; advance it between steps"
            elif any(each is scheduler for each in self._early):
                problem = "advances before its optimizer steps; advance it afterwards"
            elif any(isinstance(value, Tensor) for group in groups for value in group.values()):
                problem = "sets a learning rate that is a tensor; use a number"
            if problem:
                raise NotReplaceableError(f"{type(scheduler).__name__} {problem}")
            advanced.append(scheduler)
        now = self._settings_now()
        for name, optimizer in self._parts.optimizers.items():
            own = [scheduler for scheduler in advanced if scheduler.optimizer is optimizer]
            expected = [repr(each.get_last_lr()) for each in own] or [self._settings[name][0]]
            is_more = any(map(changes_more_than_lr, own))
            if now[name][0] not in expected or (now[name][1] != self._settings[name][1] and not is_more):
                raise NotReplaceableError(
                    f"the step changes settings of {name}; do so between steps, or by a scheduler of "
                    "torch that is among the parts"
                )
        return advanced

    def _settings_now(self) -> dict[str, tuple[str, str]]:
        """Return the learning rates and the other settings of each optimizer, comparable."""
        found = {}
        for name, optimizer in self._parts.optimizers.items():
            rates = [group.get("lr") for group in optimizer.param_groups]
            others = [
                {key: value for key, value in group.items() if key not in ("params", "lr")}
                for group in optimizer.param_groups
            ]
            found[name] = repr(rates), repr(others)
        return found


def _steps_taken(scheduler: Any) -> int:
    """Return how often a scheduler has advanced; a chain of schedulers advances all of them."""
    own = vars(scheduler)
    if "last_epoch" in own:
        return int(own["last_epoch"])
    return _steps_taken(own["_schedulers"][0]) if own.get("_schedulers") else 0
