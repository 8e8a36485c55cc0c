"""The eager step: forward, loss, zero the gradients, backward, update, as Python runs them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from everystep.errors import EverystepError, ExperimentError, Fault, ModelError
from everystep.program.operation import Phase
from everystep.step.hyperparameters import hyperparameters
from everystep.step.parts import Parts
from everystep.step.parts_state import PartsState
from everystep.step.state import State

_OPTIMIZER_MODULE = sys.modules[torch.optim.Optimizer.__module__]

__all__ = [
    "BatchSource",
    "EagerStep",
    "Training",
    "changes_more_than_lr",
    "check_loss_value",
    "training_parts",
]


class BatchSource(Protocol):
    """Provides the batch of each step (from 1).

    is_fixed: whether every step sees the same two tensors; runs_python: whether user code runs to make a
    batch; guards: what must stay the same if the rows of a Dataset were read once, or None.
    """

    is_fixed: bool
    runs_python: bool
    guards: Any

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Return x and y of a step."""

    def shape(self, step: int) -> Hashable:
        """Return a key that is equal for steps with batches of the same shape and dtype."""

    def into(self, step: int, x: Tensor, y: Tensor) -> None:
        """Write the batch of a step into tensors of its shape."""

    def versions(self) -> list[int | None]:
        """Return what changes with the rows that a rule finds; nothing where no rule finds them."""


@dataclass(frozen=True)
class Training:
    """Everything that a step needs, live.

    loss: a function of (prediction, target) that returns one number; max_grad_norm: the largest 2-norm
    of all gradients together; steps_per_epoch: for a scheduler that advances every epoch.
    """

    model: nn.Module
    loss: Callable[[Any, Any], Tensor]
    optimizer: torch.optim.Optimizer
    batch: BatchSource
    device: torch.device
    scheduler: LRScheduler | None = None
    scheduler_every: Literal["step", "epoch"] = "step"
    steps_per_epoch: int = 1
    max_grad_norm: float | None = None

    @cached_property
    def parts(self) -> Parts:
        """What is carried from one step to the next: model, optimizer, and what else keeps something."""
        return training_parts(self.model, self.loss, self.optimizer, self.scheduler)

    @cached_property
    def _whole(self) -> PartsState:
        return PartsState(self.parts)

    def snapshot(self, step: int) -> State:
        """Return a copy of the state after `step`, without the gradients that the next step drops."""
        return self._whole.snapshot(step, self.named_state())

    def restore(self, state: State, kinds: Collection[str] | None = None) -> None:
        """Bring everything to a state.

        kinds: of `model`, `loss`, `optimizer` and `scheduler`, those to restore, where the others may be
        of another training; None: all.

        Raises:
            RunError: it is the state of something else; lists what does not fit.
        """
        self._whole.restore(state, kinds)

    def named_state(self) -> dict[str, Tensor]:
        """Return the live tensors that the training carries from one step to the next, by name.

        A gradient is among them only where no step drops it: of a parameter that the optimizer does not
        have, or of an optimizer that zeroes gradients in its own way.
        """
        found = self.parts.state()
        if has_own_zero_grad(self.optimizer):
            return found
        names = self.parts.parameter_names()
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                found.pop(f"gradient/{names[parameter]}", None)
        return found

    def rates(self) -> dict[int, float]:
        """Return the current learning rate of each param group that has one, by its number."""
        groups = enumerate(self.optimizer.param_groups)
        return {i: float(g["lr"]) for i, g in groups if isinstance(g.get("lr"), Tensor | int | float)}

    @property
    def has_tensor_settings(self) -> bool:
        """Whether a param group holds a tensor, such as a learning rate."""
        groups = self.optimizer.param_groups
        return any(isinstance(v, Tensor) for group in groups for v in group.values())

    def hyperparameters(self) -> dict[str, float]:
        """Return the current numbers of the optimizer's param groups, by name."""
        return hyperparameters(self.optimizer)


def training_parts(
    model: nn.Module, loss: Any, optimizer: torch.optim.Optimizer, scheduler: LRScheduler | None
) -> Parts:
    """Return what a training of a model carries from one step to the next."""
    named: dict[str, Any] = {"model": model, "optimizer": optimizer}
    if scheduler is not None:
        named["scheduler"] = scheduler
    if isinstance(loss, nn.Module):
        named["loss"] = loss
    return Parts(named, apart=("loss",))


class EagerStep:
    """An eager step, whole (`take`) and in parts."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.advance = _advancing(training)

    def take(
        self,
        x: Tensor,
        y: Tensor,
        log: Callable[[Tensor], None] = lambda loss: None,
        enter: Callable[[Phase], None] = lambda phase: None,
    ) -> Tensor:
        """Run a step on a batch: forward, loss, zero the gradients, backward, clip, update.

        Returns a copy of the loss, still on the device. The scheduler is left to the caller.

        Args:
            x, y: the batch.
            log: called with the loss itself before the gradients are zeroed.
            enter: called with each phase as it begins.

        Raises:
            ExperimentError: the loss is not one number.
            ModelError: the loss does not depend on any parameter.
        """
        prediction = self.training.model(x)
        enter("loss")
        loss = self.training.loss(prediction, y)
        check_loss_value(loss)
        with torch._C._DisableTorchDispatch():  # not an operation of the step
            value = loss.detach().clone()  # it may be a view of what the update changes
        log(loss)
        enter("zero_grad")
        self.zero_grad()
        enter("backward")
        loss.backward()  # type: ignore[no-untyped-call]
        enter("update")
        self.clip()
        self.update()
        return value

    def zero_grad(self) -> None:
        """Do what `optimizer.zero_grad()` does, without its mark for torch's profiler.

        The mark takes longer than the work: a twentieth of a step of the chapter's network.
        """
        if has_own_zero_grad(self.training.optimizer):
            self.training.optimizer.zero_grad()
            return
        for group in self.training.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def clip(self) -> None:
        """Clip the gradients, if the training does."""
        training = self.training
        if training.max_grad_norm is not None:
            groups = training.optimizer.param_groups
            clipped = [parameter for group in groups for parameter in group["params"]]
            nn.utils.clip_grad_norm_(clipped, training.max_grad_norm)

    def update(self) -> None:
        """Do what `optimizer.step()` does, without torch's wrapper if that has no effect.

        With hooks, or if something (a scheduler) replaced the step, call it as it is.

        Raises:
            ExperimentError: a custom optimizer raises.
        """
        optimizer = self.training.optimizer
        step = type(optimizer).step
        is_hooked = any(getattr(owner, name, True) for owner, name in _step_hooks(optimizer))
        if not type(optimizer).__module__.startswith(("torch.", "everystep.")):
            with _named(optimizer):
                optimizer.step()
        elif is_hooked or "step" in vars(optimizer) or not getattr(step, "hooked", False):
            optimizer.step()
        else:
            step.__wrapped__(optimizer)  # type: ignore[attr-defined]


@contextmanager
def _named(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Report an error of the user's optimizer with its name, and with how it was called."""
    try:
        yield
    except EverystepError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        problem = f"{type(optimizer).__name__}.step() raises {type(error).__name__}: {reason}"
        cure = "everystep calls it without arguments, after one backward pass of each step"
        raise ExperimentError([Fault("optimizer", f"{problem}; {cure}")]) from error


def _step_hooks(optimizer: torch.optim.Optimizer) -> list[tuple[Any, str]]:
    return [
        (optimizer, "_optimizer_step_pre_hooks"),
        (optimizer, "_optimizer_step_post_hooks"),
        (_OPTIMIZER_MODULE, "_global_optimizer_pre_hooks"),
        (_OPTIMIZER_MODULE, "_global_optimizer_post_hooks"),
    ]


def check_loss_value(loss: Any) -> None:
    """Check the result of a loss.

    Raises:
        ExperimentError: it is not one number.
        ModelError: it does not depend on any parameter.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ExperimentError([Fault("loss", f"must return one number, not {_not_one_number(loss)}")])
    if loss.is_complex():
        problem = "must return one real number, not a complex one; use its .real or .abs()"
        raise ExperimentError([Fault("loss", problem)])
    if loss.layout != torch.strided:
        problem = "must return one number, not a sparse tensor; use its .to_dense()"
        raise ExperimentError([Fault("loss", problem)])
    if not loss.requires_grad:
        raise ModelError(
            "the loss does not depend on any parameter that requires a gradient, so nothing can be "
            "learned; check whether the model is frozen, or the loss is computed without it"
        )


def _not_one_number(loss: Any) -> str:
    """Return what a loss returned, and the fix."""
    if isinstance(loss, Tensor):
        return f'shape {tuple(loss.shape)}; use reduction="mean" or "sum"'
    if loss is None:
        return "None; does the function end with a return?"
    kind = type(loss).__name__
    if isinstance(loss, dict | list | tuple):
        names = f" of {', '.join(map(repr, loss))}" if isinstance(loss, dict) and loss else ""
        return f"{kind}{names}; return the one to minimize, or their sum"
    return f"{kind}; return a tensor with a gradient (without .item() or float())"


def _advancing(training: Training) -> Callable[[int], None] | None:
    """Return what advances the scheduler after a step; one that waits for evaluations does not."""
    scheduler, every = training.scheduler, training.steps_per_epoch
    if scheduler is None or isinstance(scheduler, ReduceLROnPlateau):
        return None
    if training.scheduler_every == "step":
        return lambda number: scheduler.step()
    return lambda number: scheduler.step() if number % every == 0 else None


def has_own_zero_grad(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether an optimizer has a custom zero_grad."""
    usual = torch.optim.Optimizer.zero_grad
    return type(optimizer).zero_grad is not usual or "zero_grad" in vars(optimizer)


def changes_more_than_lr(scheduler: Any) -> bool:
    """Tell whether a scheduler may change other settings of the optimizer, such as its momentum."""
    inner = getattr(scheduler, "_schedulers", ())
    is_known = type(scheduler).__module__.startswith("torch.")
    own = not is_known or getattr(scheduler, "cycle_momentum", False)
    return own or any(map(changes_more_than_lr, inner))
