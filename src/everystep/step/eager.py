"""The eager step: forward, loss, zero the gradients, backward, update, as Python runs them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from everystep.errors import ExperimentError, Fault, ModelError
from everystep.step.hyperparameters import hyperparameters
from everystep.step.state import State, named_state, parameter_names

__all__ = ["BatchSource", "EagerStep", "Trainee", "changes_more_than_lr", "check_loss_value"]


class BatchSource(Protocol):
    """Gives the batch of each step (from 1).

    is_fixed: whether every step sees the very same two tensors; runs_python: whether the user's code
    runs to make a batch.
    """

    is_fixed: bool
    runs_python: bool

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Return x and y of a step."""

    def shape(self, step: int) -> Hashable:
        """Return what is equal for two steps whose batches are of the same shape and dtype."""

    def into(self, step: int, x: Tensor, y: Tensor) -> None:
        """Write the batch of a step into tensors of its shape."""


@dataclass(frozen=True)
class Trainee:
    """All that a step needs, alive.

    loss: of prediction and target, gives one number; clip_norm: the largest 2-norm of all gradients
    together; steps_per_epoch: for a schedule that advances every epoch.
    """

    model: nn.Module
    loss: Callable[[Any, Any], Tensor]
    optimizer: torch.optim.Optimizer
    batch: BatchSource
    device: torch.device
    schedule: LRScheduler | None = None
    schedule_every: Literal["step", "epoch"] = "step"
    steps_per_epoch: int = 1
    clip_norm: float | None = None

    def state(self, step: int) -> State:
        """Return a copy of the state after `step`."""
        return State.capture(step, self.model, self.loss, self.optimizer, self.schedule, self.device)

    def named_state(self) -> dict[str, Tensor]:
        """Return the live tensors that the training carries from one step to the next, by name."""
        return named_state(self.model, self.loss, self.optimizer)

    def gradients(self) -> dict[str, Tensor]:
        """Return the live gradients by their parameter's name."""
        named: dict[Tensor, str] = {p: name for name, p in self.model.named_parameters()}
        named |= parameter_names(self.model, self.optimizer)
        return {name: p.grad for p, name in named.items() if p.grad is not None}

    def rates(self) -> tuple[float, ...]:
        """Return the learning rate of each param group as it is now."""
        return tuple(float(group["lr"]) for group in self.optimizer.param_groups)

    def hyperparameters(self) -> dict[str, float]:
        """Return the numbers that a schedule may change, as they are now, by name."""
        only_rates = self.schedule is None or not changes_more_than_lr(self.schedule)
        return hyperparameters(self.optimizer, only_rates=only_rates)


class EagerStep:
    """An eager step, whole (`take`) and in parts."""

    def __init__(self, trainee: Trainee) -> None:
        self.trainee = trainee
        self.zero_grad = _zeroing(trainee.optimizer)
        self.update = _updating(trainee.optimizer)
        self.advance = _advancing(trainee)
        groups = trainee.optimizer.param_groups
        self._clipped = [parameter for group in groups for parameter in group["params"]]

    def take(self, x: Tensor, y: Tensor) -> Tensor:
        """Take a whole step on a batch, but for the schedule; return the loss, still on the device.

        Raises:
            ExperimentError: the loss is not one number.
            ModelError: the loss does not depend on any parameter.
        """
        loss = self.trainee.loss(self.trainee.model(x), y)
        check_loss_value(loss)
        value = loss.detach().clone()  # it may be a view of what the update changes
        self.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.clip()
        self.update()
        return value

    def clip(self) -> None:
        """Clip the gradients, if that is asked for."""
        if self.trainee.clip_norm is not None:
            nn.utils.clip_grad_norm_(self._clipped, self.trainee.clip_norm)


def check_loss_value(loss: Any) -> None:
    """Check what a loss has given.

    Raises:
        ExperimentError: it is not one number.
        ModelError: it does not depend on any parameter.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ExperimentError(
            [Fault("loss", f'must give one number, not {got}; take reduction="mean" or "sum"')]
        )
    if not loss.requires_grad:
        raise ModelError(
            "the loss does not depend on any parameter that requires a gradient, so nothing can be "
            "learned; is the model frozen, or the loss computed without it?"
        )


def _zeroing(optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """Return what `optimizer.zero_grad()` does, without its mark for torch's profiler.

    The mark takes longer than the work: a twentieth of a step of the chapter's network.
    """
    if type(optimizer).zero_grad is not torch.optim.Optimizer.zero_grad:
        return optimizer.zero_grad

    def zero_grad() -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    return zero_grad


def _updating(optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """Return `optimizer.step`, without what torch wraps around it for hooks and for its profiler.

    Where there are hooks, or something (a schedule) has put a step of its own in place, it is taken
    as it is.
    """
    step = type(optimizer).step
    hooks = [
        (optimizer, "_optimizer_step_pre_hooks"),
        (optimizer, "_optimizer_step_post_hooks"),
        (inspect.getmodule(torch.optim.Optimizer), "_global_optimizer_pre_hooks"),
        (inspect.getmodule(torch.optim.Optimizer), "_global_optimizer_post_hooks"),
    ]
    is_hooked = any(getattr(owner, name, True) for owner, name in hooks)
    if is_hooked or "step" in vars(optimizer) or not getattr(step, "hooked", False):
        return optimizer.step
    return partial(step.__wrapped__, optimizer)  # type: ignore[attr-defined]


def _advancing(trainee: Trainee) -> Callable[[int], None] | None:
    """Return what advances the schedule after a step; one that waits for evaluations does not."""
    schedule, every = trainee.schedule, trainee.steps_per_epoch
    if schedule is None or isinstance(schedule, ReduceLROnPlateau):
        return None
    if trainee.schedule_every == "step":
        return lambda number: schedule.step()
    return lambda number: schedule.step() if number % every == 0 else None


def changes_more_than_lr(schedule: Any) -> bool:
    """Tell whether a schedule may change other settings of the optimizer, such as its momentum."""
    inner = getattr(schedule, "_schedulers", ())
    is_known = type(schedule).__module__.startswith("torch.")
    own = not is_known or getattr(schedule, "cycle_momentum", False)
    return own or any(map(changes_more_than_lr, inner))
