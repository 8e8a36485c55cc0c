"""Acceleration: whether programs may run the steps of a training, and until when.

A program may replace Python only if all Python of the step is torch's own, known by identity, or if the
user vouches for it. Other code runs at every step.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from everystep.step.eager import Training
from everystep.step.guards import is_a
from everystep.step.surroundings import Surroundings
from everystep.step.torchs_own import (
    is_torchs_optimizer,
    is_torchs_schedule,
    reason_against_loss,
    reason_against_module,
)

__all__ = ["Acceleration"]

_OPTIMIZER = "the optimizer"


class Acceleration:
    """Whether programs may run the steps of a training, and under which conditions.

    Args:
        training: the training.
        is_vouched: whether the user vouches for code that is not torch's.

    reason: why Python runs every step, or None; is_vouchable: whether the only objection to a program is
    code that the user may vouch for; stands_behind: what justifies the programs: the code is `known`, or
    `vouched` for.
    """

    def __init__(self, training: Training, is_vouched: bool = False) -> None:
        self._training = training
        against = (
            reason_against_module(training.model)
            or reason_against_loss(training.loss)
            or _against_functions(training.schedule)
        )
        self.stands_behind: Literal["known", "vouched"] = (
            "vouched" if is_vouched and against is not None else "known"
        )
        parts = {"the model": training.model, "the loss": training.loss}
        self._surroundings = Surroundings(
            {name: part for name, part in parts.items() if isinstance(part, nn.Module)},
            {_OPTIMIZER: training.optimizer},
            lambda: _but_optimizer(training.named_state()),
            training.device,
            is_vouched=is_vouched,
        )
        other = (
            _against_optimizer(training.optimizer)
            or _against_schedule(training)
            or ("the Dataset is read at every step" if training.batch.runs_python else None)
            or next(self._surroundings.reasons(), None)
        )
        self.reason = other if is_vouched else against or other
        self.is_vouchable = against is not None and other is None

    def begin(self) -> None:
        """Note all settings again: a program is about to be captured that holds for these."""
        self._surroundings.begin()
        self._guard_loss()

    def difference(self, state: Mapping[str, Tensor] | None = None) -> str | None:
        """Describe what changed since programs were captured, or return None.

        state: of the training now, if already known.
        """
        return self._surroundings.difference(None if state is None else _but_optimizer(state))

    def _guard_loss(self) -> None:
        """Note the arguments of a loss that is a partial torch function."""
        loss, guards = self._training.loss, self._surroundings.guards
        if type(loss) is not functools.partial:
            return
        guards.read("loss", "the loss", getattr, loss, "func")
        guards.read("arguments", "the arguments of the loss", getattr, loss, "args")
        guards.contents(loss.keywords, "the loss")
        for value in (*loss.args, *loss.keywords.values()):
            if is_a(value, Tensor):
                guards.tensor(value, "a tensor of the loss", is_state=False)


def _against_optimizer(optimizer: torch.optim.Optimizer) -> str | None:
    """Return why no program may run the update, or None."""
    if not is_torchs_optimizer(optimizer):
        return f"{type(optimizer).__qualname__} is not one of torch's optimizers"
    if "zero_grad" in vars(optimizer):
        return "the optimizer has a custom zero_grad"
    return None


def _against_schedule(training: Training) -> str | None:
    """Return why Python must advance the schedule, or None."""
    schedule = training.schedule
    if not is_torchs_schedule(schedule, but_functions=True):
        return f"{type(schedule).__qualname__} is not one of torch's schedules"
    if schedule is not None and training.has_tensor_settings:
        return "a schedule sets a learning rate that is a tensor"
    return None


def _against_functions(schedule: LRScheduler | None) -> str | None:
    """Describe the user's code that a torch schedule calls, or return None."""
    if is_torchs_schedule(schedule) or not is_torchs_schedule(schedule, but_functions=True):
        return None
    return f"{type(schedule).__qualname__} calls a function of yours"


def _but_optimizer(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the carried tensors, without those that the optimizer creates or replaces itself."""
    own = "optimizer/", "part/optimizer."
    return {name: tensor for name, tensor in state.items() if not name.startswith(own)}
