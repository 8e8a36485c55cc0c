"""The iteration: forward, loss, zero the gradients, backward, update."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from everystep.errors import ExperimentError, Fault, ModelError
from everystep.step.state import State

__all__ = ["FinishedStep", "Trainee", "iterate"]


class FinishedStep(NamedTuple):
    """A step that has been taken: its number (from 1), and its loss, still on the device.

    rates: the learning rate of each param group that it used, where there is a schedule.
    """

    number: int
    loss: Tensor
    rates: tuple[float, ...] | None


@dataclass(frozen=True)
class Trainee:
    """All that a step needs, alive.

    loss: of prediction and target, gives one number; batch: the (x, y) of a step (from 1);
    clip_norm: the largest 2-norm of all gradients together; steps_per_epoch: for a schedule that
    advances every epoch.
    """

    model: nn.Module
    loss: Callable[[Any, Any], Tensor]
    optimizer: torch.optim.Optimizer
    batch: Callable[[int], tuple[Any, Any]]
    device: torch.device
    schedule: LRScheduler | None = None
    schedule_every: Literal["step", "epoch"] = "step"
    steps_per_epoch: int = 1
    clip_norm: float | None = None

    def state(self, step: int) -> State:
        """Return a copy of the state after `step`."""
        return State.capture(step, self.model, self.optimizer, self.schedule, self.device)


def iterate(trainee: Trainee, first: int, last: int) -> Iterator[FinishedStep]:
    """Take the steps `first` to `last`, eagerly, and yield each when its update is done.

    Raises:
        ExperimentError: the loss is not one number.
        ModelError: the loss does not depend on any parameter.
    """
    model, loss_function, optimizer = trainee.model, trainee.loss, trainee.optimizer
    zero_grad, update, advance = _zeroing(optimizer), _updating(optimizer), _advancing(trainee)
    clip_norm = trainee.clip_norm
    clipped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number in range(first, last + 1):
        x, y = trainee.batch(number)
        loss = loss_function(model(x), y)
        if number == first:
            _check(loss)
        zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(clipped, clip_norm)
        update()
        rates = None
        if trainee.schedule is not None:
            rates = tuple(float(group["lr"]) for group in optimizer.param_groups)
        if advance is not None:
            advance(number)
        yield FinishedStep(number, loss.detach(), rates)


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


def _check(loss: Any) -> None:
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
