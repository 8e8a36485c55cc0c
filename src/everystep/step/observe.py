"""Observe: a step taken so that everything in it can be looked at, by program or eagerly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from everystep.program.execute import BoundProgram, Observed, without_autograd
from everystep.program.operators import leaves
from everystep.step.build import named_operations
from everystep.step.capture import take_watched
from everystep.step.eager import EagerStep
from everystep.step.recorder import StepRecorder

__all__ = ["Observation", "observe_eager", "observe_program"]


class Observation(NamedTuple):
    """What was seen of a step; all tensors are copies.

    activations: what each module gave, by its path; gradients: by parameter, as backward left them.
    """

    loss: Tensor
    operations: list[Observed]
    activations: dict[str, tuple[Tensor, ...]]
    gradients: dict[str, Tensor]


def observe_program(bound: BoundProgram) -> Observation:
    """Take the step that a program is for, on what its memory holds, and look at everything."""
    program = bound.program
    due: dict[int, list[str]] = {}
    for path, index in program.given_after().items():
        due.setdefault(index, []).append(path)
    last_backward = program.backward_until()
    copies = bound.copies()
    activations: dict[str, tuple[Tensor, ...]] = {}
    gradients: dict[str, Tensor] = {}
    seen: list[Observed] = []

    def look(index: int) -> None:
        for path in due.get(index, ()):
            activations[path] = tuple(map(copies.tensor, program.activations[path]))
        if index == last_backward:
            gradients.update({n: copies.tensor(tensor) for n, tensor in program.gradients.items()})

    with without_autograd():
        look(-1)
        for index, observed in enumerate(bound.observe(copies)):
            seen.append(observed)
            look(index)
        loss = bound.loss.clone()
    in_order = {path: activations[path] for path in program.activations}
    return Observation(loss, seen, in_order, gradients)


def observe_eager(step: EagerStep, number: int) -> Observation:
    """Take step `number` as Python runs it, and look at everything.

    Operations that a program could not hold are among them; what gives numbers to Python is not.

    Raises:
        whatever the step raises.
    """
    watcher = _Watcher(step.training.device)
    captured = take_watched(step, number, watcher)
    operations, names = named_operations(captured)
    seen = [
        Observed(operation, _named(inputs, names), _named(results, names))
        for operation, (inputs, results) in zip(operations, watcher.values, strict=True)
    ]
    return Observation(captured.loss, seen, watcher.outputs, watcher.backward_left)


def _named(tensors: Mapping[int, Tensor], names: Mapping[int, str]) -> dict[str, Tensor]:
    return {names[number]: tensor for number, tensor in tensors.items()}


class _Watcher(StepRecorder):  # type: ignore[no-untyped-call]
    """Keeps copies of what operations are given and give, of activations and of gradients.

    values: of each operation, its inputs and its results by the number of the tensor.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.values: list[tuple[dict[int, Tensor], dict[int, Tensor]]] = []
        self.outputs: dict[str, tuple[Tensor, ...]] = {}
        self.backward_left: dict[str, Tensor] = {}

    def module_done(self, path: str, outputs: list[Tensor]) -> None:
        """Copy what a module has given."""
        super().module_done(path, outputs)
        self.outputs.pop(path, None)
        self.outputs[path] = tuple(tensor.detach().clone() for tensor in outputs)

    def gradients(self, gradients: dict[str, Tensor]) -> dict[str, int]:
        """Copy the gradients that the backward phase has left."""
        self.backward_left = {name: gradient.detach().clone() for name, gradient in gradients.items()}
        return super().gradients(gradients)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.is_paused:
            return func(*args, **(kwargs or {}))
        arguments = _dense((*args, *(kwargs or {}).values()))
        given = {self.number(tensor): tensor.detach().clone() for tensor in arguments}
        count = len(self.operations)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if len(self.operations) > count:
            recorded = self.operations[-1]
            after = [t for t in arguments if self.tensors[self.number(t)].storage in recorded.writes]
            made = {self.number(t): t.detach().clone() for t in _dense(result) or after}
            self.values.append((given, made))
        return result


def _dense(value: Any) -> list[Tensor]:
    return [tensor for tensor in leaves(value) if tensor.layout == torch.strided]
