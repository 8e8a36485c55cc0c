"""Acceleration: whether programs may run the steps of a training, until when, and how it is checked.

A program may replace Python only if all Python of the step is torch's own, known by identity, or if the
user vouches for it. Other code runs at every step.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from everystep.errors import TrainingError
from everystep.step.eager import Training
from everystep.step.guards import is_a
from everystep.step.state import State
from everystep.step.surroundings import Surroundings
from everystep.step.torchs_own import (
    is_torchs_optimizer,
    is_torchs_scheduler,
    reason_against_loss,
    reason_against_module,
)

__all__ = ["Acceleration", "CheckPlan", "WayBack"]

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
            or _against_functions(training.scheduler)
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
            or _against_scheduler(training)
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


def _against_scheduler(training: Training) -> str | None:
    """Return in words why Python must advance the scheduler, or None."""
    scheduler = training.scheduler
    if not is_torchs_scheduler(scheduler, but_functions=True):
        return f"{type(scheduler).__qualname__} is not one of torch's schedulers"
    if scheduler is not None and training.has_tensor_settings:
        return "a scheduler sets a learning rate that is a tensor"
    return None


def _against_functions(scheduler: LRScheduler | None) -> str | None:
    """Return in words which code of the user's a scheduler of torch's calls, or None."""
    if is_torchs_scheduler(scheduler) or not is_torchs_scheduler(scheduler, but_functions=True):
        return None
    return f"{type(scheduler).__qualname__} calls a function of yours"


def _but_optimizer(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the carried tensors, without those that the optimizer creates or replaces itself."""
    own = "optimizer/", "part/optimizer."
    return {name: tensor for name, tensor in state.items() if not name.startswith(own)}


#: Checks may take this share of the time, once the steps 2, 4, 8, ... are that far apart. A check that
#: takes longer than so many seconds may not take more before either, nor at the last step.
CHECK_SHARE = 0.01
LIGHT_SECONDS = 0.03


@dataclass
class CheckPlan:
    """When a program was checked, and when it will be: ever more rarely from `start` on."""

    start: int = 0
    checked: list[int] = field(default_factory=list)
    next: int = 0
    _step_seconds: float = 0.0
    _seconds: float = 0.0

    def __post_init__(self) -> None:
        self.next = self.start + 2

    def timed(self, steps: int, seconds: float) -> None:
        """Note the time of steps by program."""
        self._step_seconds = seconds / steps if steps > 0 else 0.0

    def captured(self, step: int, seconds: float) -> None:
        """Note that a program was captured at a step and passed, and the time of comparing the two."""
        if step >= self.next:
            self.passed(step, 2 * seconds)  # a check also runs the step in Python
        else:
            self.checked.append(step)

    def is_due(self, step: int, last: int | None) -> bool:
        """Tell whether to check at a step; the last step of a training is checked if that is cheap."""
        return step >= self.next or (step == last and self._is_cheap(step))

    def until(self, last: int) -> int:
        """Return the next step to check, or the one after the last."""
        ends = last if self._is_cheap(last) else last + 1
        return min(self.next, ends)

    def _is_cheap(self, step: int) -> bool:
        since = step - (self.checked[-1] if self.checked else self.start)
        allowed = since * self._step_seconds * CHECK_SHARE
        return self.is_light(self._seconds) or allowed >= self._seconds

    def is_light(self, seconds: float) -> bool:
        """Tell whether something takes too little time to matter."""
        return seconds < LIGHT_SECONDS

    def passed(self, step: int, seconds: float) -> None:
        """Note that a check passed at a step, and its time."""
        self.checked.append(step)
        self._seconds = seconds
        # A check runs a step twice, and at the first check no step was timed alone.
        allowed = (self._step_seconds or seconds / 2) * CHECK_SHARE
        is_light = self.is_light(seconds)
        interval = 1
        while interval * allowed < seconds and (interval < step - self.start or not is_light):
            interval *= 2
        self.next = step + interval


class WayBack:
    """The last verified state, which training can go back to unless that is closed.

    step: the step after which it is.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self._state: State | None = None

    def keep(self, training: Training, step: int) -> None:
        """Keep a copy of the verified state."""
        self.step, self._state = step, training.snapshot(step)

    def close(self) -> None:
        """Close the way back: unknown code has run, and cannot be undone."""
        self._state = None

    def go(self, training: Training, number: int, reason: str) -> None:
        """Restore the state, because step `number` cannot be trusted.

        Raises:
            TrainingError: there is no way back.
        """
        if self._state is None:
            raise TrainingError(
                f"step {number} cannot be trusted: {reason}. Your code has run since the last check, "
                f"at step {self.step}, so training cannot go back. Steps up to {self.step} are "
                'verified, later ones are not; engine="eager" trains without programs'
            )
        training.restore(self._state)
