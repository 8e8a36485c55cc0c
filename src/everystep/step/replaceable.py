"""Replaceable: whether a program may run steps like one of Python, in its place.

Its numbers must be foreseen, it must find again what it begins with, and Python must do nothing that a
program does not.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from everystep.ops.operators import draws_random_numbers, has_shape_of_values
from everystep.program.step_program import Program
from everystep.step.cursor import Cursor
from everystep.step.hyperparameters import changes_more_than_lr
from everystep.step.optimizer_steps import OptimizerStep
from everystep.step.parts import Parts
from everystep.step.path import Path
from everystep.step.torchs_own import is_torchs_scheduler

__all__ = [
    "Around",
    "CreatesTensorsError",
    "NotReplaceableError",
    "check_optimizers",
    "check_replaceable",
]


class NotReplaceableError(Exception):
    """A step that a program cannot run in place of Python; the message gives the reason."""


class CreatesTensorsError(NotReplaceableError):
    """A step that leaves other tensors in the state than it found, as the first of a training does."""


def check_replaceable(
    program: Program,
    path: Path,
    seen: Cursor,
    batch: Mapping[str, Tensor],
    device: torch.device,
) -> None:
    """Check that a program computes all that steps with its path do.

    Args:
        program, path: of the steps.
        seen: one of them, in Python.
        batch: its tensors, by name.
        device: of the training.

    Raises:
        NotReplaceableError: steps may differ from it; gives the reason.
    """
    if program.moves:
        raise NotReplaceableError("it reads a view that lies at another place in each step")
    if seen.unseen:
        raise NotReplaceableError(f"a program cannot hold the step: {next(iter(seen.unseen))}")
    if seen.changed_unseen:
        name = seen.changed_unseen[0].partition("/")[2]
        raise NotReplaceableError(f"something changes {name} where torch does not see it")
    if path.read_unseen or path.read_batch:
        raise NotReplaceableError(
            "Python reads the memory of a tensor (numpy, tolist), and may branch on it; compute with "
            "the tensor, or return it"
        )
    # A batch is copied to where the program reads it, and that must be memory of its own.
    for name, tensor in batch.items():
        if name in program.tensors and program.storage_of(name).kind != "input":
            raise NotReplaceableError(f"{name} of the batch shares memory with a part")
        if tensor.requires_grad:
            raise NotReplaceableError(f"{name} of the batch requires a gradient")
    # After a step, the parts get the program's own tensors as gradients.
    for name, end in program.ends.items():
        if program.storage_of(end).kind != "temporary":
            raise NotReplaceableError(
                f"the gradient of {name.partition('/')[2]} shares memory with something else"
            )
    inputs = {place for place, known in enumerate(path.storages) if known.kind == "input"}
    written = {storage for each in path.operations for storage in each.writes} & inputs
    if written:
        is_outside = any(seen.from_outside(place) is not None for place in written)
        raise NotReplaceableError(
            "the step changes " + ("a tensor that is in no part" if is_outside else "its batch")
        )
    # A bound program has a fixed memory for each result.
    for each in path.operations:
        indices = (path.tensors[number].dtype for number in each.tensors_read()[1:])
        if has_shape_of_values(each.operator, indices):
            raise NotReplaceableError(f"{each.operator} returns shapes that depend on values")
    if device.type != "cpu" and any(draws_random_numbers(each.operator) for each in path.operations):
        raise NotReplaceableError("random numbers are drawn on a device other than the CPU")
    other = [n for n in (*dict(path.ends), *path.gone) if not n.startswith("gradient/")]
    if other:
        raise CreatesTensorsError(f"{other[0].partition('/')[2]} is another tensor after each step")


def check_optimizers(
    known: Sequence[OptimizerStep], optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    """Check that all steps of optimizers are known.

    Raises:
        NotReplaceableError: the numbers of one cannot be predicted.
    """
    steps = {id(step.optimizer): step for step in known}
    for optimizer in optimizers:
        name = type(optimizer).__name__
        if id(optimizer) not in steps:
            raise NotReplaceableError(
                f"{name} is not one of torch's own optimizers, is no part, or was changed by other code"
            )
        if sum(each is optimizer for each in optimizers) > 1:
            raise NotReplaceableError(f"{name} steps twice")


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
        self._rates = {
            name: [group.get("lr") for group in optimizer.param_groups]
            for name, optimizer in parts.optimizers.items()
        }
        self._early: list[LRScheduler] = []

    def optimizer_begins(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer starts a step."""
        self.optimizers.append(optimizer)
        # A program runs the whole step first, and advances the schedulers afterwards.
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
                problem = "is not one of torch.optim.lr_scheduler; advance it between steps"
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
            if len(own) == 1 and not _follows(own[0], self._rates[name]):
                raise NotReplaceableError(
                    f"{type(own[0]).__name__} does not advance from the rates before the step; call "
                    "step() without an epoch, and change rates between steps"
                )
            if now[name][0] not in expected or (now[name][1] != self._settings[name][1] and not is_more):
                raise NotReplaceableError(
                    f"the step changes settings of {name}; do so between steps, or by a scheduler of "
                    "torch that is among the parts"
                )
        return advanced

    def _settings_now(self) -> dict[str, tuple[str, str]]:
        """Return the learning rates and the other settings of each optimizer, comparable."""
        # As texts, which stay as they are when the settings change, and in which NaN equals NaN.
        found = {}
        for name, optimizer in self._parts.optimizers.items():
            rates = [group.get("lr") for group in optimizer.param_groups]
            others = [
                {key: value for key, value in group.items() if key not in ("params", "lr")}
                for group in optimizer.param_groups
            ]
            found[name] = repr(rates), repr(others)
        return found


def _follows(scheduler: LRScheduler, before: Sequence[Any]) -> bool:
    """Return whether `step()` leads from the rates before it to those now, as `step(epoch)` may not.

    True where torch has no other formula for an epoch.
    """
    if not hasattr(scheduler, "_get_closed_form_lr"):
        return True
    groups = scheduler.optimizer.param_groups
    now = [group["lr"] for group in groups]
    # The two formulas differ in rounding.
    try:
        for group, rate in zip(groups, before, strict=True):
            group["lr"] = rate
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is called outside of a step
            return repr([*scheduler.get_lr()]) == repr(now)
    finally:
        for group, rate in zip(groups, now, strict=True):
            group["lr"] = rate


def _steps_taken(scheduler: Any) -> int:
    """Return how often a scheduler has advanced; a chain of schedulers advances all of them."""
    own = vars(scheduler)
    if "last_epoch" in own:
        return int(own["last_epoch"])
    return _steps_taken(own["_schedulers"][0]) if own.get("_schedulers") else 0
