"""The training of a model, and its step: forward, loss, zero the gradients, backward, update."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from everystep.errors import EverystepError, ExperimentError, Fault, ModelError
from everystep.experiment.batches import RowsOf
from everystep.program.operation import Phase
from everystep.step.guards import Guards
from everystep.step.hyperparameters import hyperparameters
from everystep.step.optimizer_call import has_own_zero_grad
from everystep.step.parts import Parts
from everystep.step.parts_state import PartsState
from everystep.step.state import State
from everystep.training.dataset import DatasetBatches
from everystep.training.objects import Objects
from everystep.training.shares import Shares

__all__ = ["Training", "training_parts"]


@dataclass(frozen=True)
class Training:
    """Everything that a step needs, live.

    loss: a function of (prediction, target) that returns one number; max_grad_norm: the largest 2-norm
    of all gradients together; steps_per_epoch: for a scheduler that advances every epoch; shares: how
    several processes train together, None if one trains alone; guards: what must stay the same for the
    rows to be those of the Dataset that they were read from, if they were.
    """

    model: nn.Module
    loss: Callable[[Any, Any], Tensor]
    optimizer: torch.optim.Optimizer
    batch: RowsOf | DatasetBatches
    device: torch.device
    scheduler: LRScheduler | None = None
    scheduler_every: Literal["step", "epoch"] = "step"
    steps_per_epoch: int = 1
    max_grad_norm: float | None = None
    shares: Shares | None = None
    guards: Guards | None = None

    @cached_property
    def parts(self) -> Parts:
        """What is carried from one step to the next: model, optimizer, and what else keeps something."""
        return training_parts(self)

    # Once, as the training begins: it notes what modules hold at first.
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
        # torch's zero_grad drops them before the backward pass, so no step depends on them.
        found = self.parts.state()
        if has_own_zero_grad(self.optimizer):
            return found
        names = self.parts.parameter_names()
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                found.pop(f"gradient/{names[parameter]}", None)
        return found

    @property
    def has_tensor_settings(self) -> bool:
        """Whether a param group holds a tensor, such as a learning rate."""
        groups = self.optimizer.param_groups
        return any(isinstance(v, Tensor) for group in groups for v in group.values())

    def hyperparameters(self) -> dict[str, float]:
        """Return the current numbers of the optimizer's param groups, by name."""
        return hyperparameters(self.optimizer.param_groups)

    def step(
        self,
        number: int,
        x: Tensor,
        y: Tensor,
        log: Callable[[Tensor], None] = lambda loss: None,
        enter: Callable[[Phase], None] = lambda phase: None,
    ) -> Tensor:
        """Run a step on a batch: forward, loss, zero the gradients, backward, clip, update.

        With several processes, the gradients are exchanged after the backward pass.

        Returns a copy of the loss, still on the device. The scheduler is left to the caller.

        Args:
            number: of the step.
            x, y: the batch.
            log: called with the loss itself before the gradients are zeroed.
            enter: called with each phase as it begins.

        Raises:
            ExperimentError: the loss is not one number, or a custom optimizer raises.
            ModelError: the loss does not depend on any parameter.
        """
        prediction = self.model(x)
        enter("loss")
        loss = self.loss(prediction, y)
        _check_loss_value(loss)
        with torch._C._DisableTorchDispatch():  # not an operation of the step
            value = loss.detach().clone()  # it may be a view of what the update changes
        # The watch notes where in the step that is: the update may write into the memory of the loss.
        log(loss)
        enter("zero_grad")
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if has_own_zero_grad(self.optimizer):
            self.optimizer.zero_grad()
        else:  # as torch does, without its mark for a profiler, which takes longer than the work
            for parameter in parameters:
                parameter.grad = None
        enter("backward")
        loss.backward()  # type: ignore[no-untyped-call]
        if self.shares is not None:
            self.shares.exchange(number, parameters)
        enter("update")
        # After the exchange: the norm is that of the gradients of the whole batch.
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        try:
            self.optimizer.step()
        except Exception as error:
            is_torchs = type(self.optimizer).__module__.startswith(("torch.", "everystep."))
            if is_torchs or isinstance(error, EverystepError):
                raise
            raise _fault_of(self.optimizer, error) from error
        return value

    def advance(self, number: int) -> None:
        """Advance the scheduler after a step; one that waits for evaluations does not."""
        is_due = self.scheduler_every == "step" or number % self.steps_per_epoch == 0
        if self.scheduler is not None and not isinstance(self.scheduler, ReduceLROnPlateau) and is_due:
            self.scheduler.step()


def training_parts(trained: Training | Objects) -> Parts:
    """Return what a training of a model carries from one step to the next."""
    named: dict[str, Any] = {"model": trained.model, "optimizer": trained.optimizer}
    if trained.scheduler is not None:
        named["scheduler"] = trained.scheduler
    if isinstance(trained.loss, nn.Module):  # a function keeps nothing
        named["loss"] = trained.loss
    return Parts(named, apart=("loss",))


def _fault_of(optimizer: torch.optim.Optimizer, error: Exception) -> ExperimentError:
    reason = str(error).strip().partition("\n")[0]
    problem = f"{type(optimizer).__name__}.step() raises {type(error).__name__}: {reason}"
    cure = "everystep calls it without arguments, after one backward pass of each step"
    return ExperimentError([Fault("optimizer", f"{problem}; {cure}")])


def _check_loss_value(loss: Any) -> None:
    """Check that a loss has returned one real number, which depends on a parameter."""
    # Before the backward pass, which has messages of its own, without a cure.
    problem = None
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        problem = f"must return one number, not {_not_one_number(loss)}"
    elif loss.is_complex():
        problem = "must return one real number, not a complex one; use its .real or .abs()"
    elif loss.layout != torch.strided:
        problem = "must return one number, not a sparse tensor; use its .to_dense()"
    if problem is not None:
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
