"""The update of a captured step: operations that read the lr, or an optimizer step as a whole."""

from __future__ import annotations

import torch

from everystep.gradient_descent import GradientDescent
from everystep.program.program import OptimizerStep, hyperparameter, references
from everystep.step.capture import Capture
from everystep.step.eager import Training, changes_more_than_lr
from everystep.step.named_state import parameter_names
from everystep.step.optimizer_state import optimizer_settings
from everystep.step.recorder import CapturedOperation

__all__ = ["Update"]

#: Settings that schedules change, all or some of them: they belong to a step, not to the program.
_SCHEDULED = {"lr", "initial_lr", "max_lr", "min_lr"}
_SCHEDULED_BY_SOME = {"momentum", "betas", "base_momentum", "max_momentum"}


class Update:
    """The update: operations with the lr as a tensor, or the step of an optimizer as a whole."""

    def __init__(self, captured: Capture, training: Training) -> None:
        self._captured = captured
        self._training = training
        self._settings = optimizer_settings(
            training.optimizer, parameter_names(training.model, training.optimizer)
        )
        self._groups = {
            name: index
            for index, group in enumerate(self._settings["groups"])
            for name in group["params"]
        }
        self._with_lr = [self._lr_as_tensor(each) for each in self._own_operations()]
        self.is_optimizer_step = self._reason_against() is not None

    def operations(self) -> list[CapturedOperation]:
        """Return all operations of the step, including the optimizer's if usable."""
        before = self._captured.operations[: self._captured.update_from]
        return before if self.is_optimizer_step else before + self._with_lr

    @property
    def problem(self) -> str | None:
        """Why the update is neither operations nor the step of one of torch's optimizers, or None."""
        optimizer = type(self._training.optimizer)
        if not self.is_optimizer_step or getattr(torch.optim, optimizer.__name__, None) is optimizer:
            return None
        return f"the step of {optimizer.__qualname__} {self._reason_against()}"

    def optimizer_step(self) -> OptimizerStep:
        """Return the step of one of torch's optimizers as a whole."""
        schedule = self._training.schedule
        changing = set() if schedule is None else _SCHEDULED
        if schedule is not None and changes_more_than_lr(schedule):
            changing = changing | _SCHEDULED_BY_SOME
        groups = [
            {key: value for key, value in group.items() if key not in changing}
            for group in self._settings["groups"]
        ]
        return OptimizerStep(name=type(self._training.optimizer).__name__, groups=tuple(groups))

    def _own_operations(self) -> list[CapturedOperation]:
        return self._captured.operations[self._captured.update_from :]

    def _reason_against(self) -> str | None:
        """Return why the optimizer's operations are not the same at every step."""
        for refusal in self._captured.refusals:
            if refusal.where == "optimizer":
                return f"is not a list of operations: {refusal.reason}"
        if any(value is not None for value in self._settings["values"].values()):
            return "holds numbers that are not tensors"
        schedule = self._training.schedule
        if schedule is not None:
            if changes_more_than_lr(schedule):
                return "follows a schedule that may change more than the lr"
            if all(own is new for own, new in zip(self._own_operations(), self._with_lr, strict=True)):
                return "follows a schedule, and reads the lr as a number"
        return None

    def _lr_as_tensor(self, recorded: CapturedOperation) -> CapturedOperation:
        """Return the operation reading the lr from a float64 tensor, if it has the lr as a number.

        So the same operation serves every lr, with the bits of the number.
        """
        name = recorded.operator.overloadpacket.__name__
        if name.startswith("_fused_") and "lr" in recorded.keywords:
            group = self._group_of(next(iter(references(recorded.arguments[0])), ""))
            return recorded._replace(
                operator=recorded.operator.overloadpacket.tensor_lr,
                keywords=recorded.keywords | {"lr": hyperparameter("lr", group, "float64")},
            )
        if name == "mul" and isinstance(self._training.optimizer, GradientDescent):
            gradient, lr = recorded.arguments
            if isinstance(lr, float | int) and isinstance(gradient, str):
                # A kernel for float32 rounds a number to float32 before it multiplies; given one that
                # is rounded already, it is three times as fast on a small tensor.
                dtype = self._captured.tensors[int(gradient[1:])].dtype
                kind = "float32" if dtype == torch.float32 else "float64"
                name = hyperparameter("lr", self._group_of_gradient(gradient), kind)
                return recorded._replace(arguments=(gradient, name))
        return recorded

    def _group_of(self, parameter: str) -> int:
        number = int(parameter.removeprefix("%") or -1)
        names = {n: name for name, n in self._captured.named.items()}
        return self._groups.get(names.get(number, "").removeprefix("parameter/"), 0)

    def _group_of_gradient(self, gradient: str) -> int:
        number = int(gradient.removeprefix("%"))
        names = {n: name for name, n in self._captured.gradients.items()}
        return self._groups.get(names.get(number, ""), 0)
