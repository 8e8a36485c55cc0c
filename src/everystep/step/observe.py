"""Observe: runs a step with everything in it observable, by a program or eagerly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from everystep.program.execute import BoundProgram, Observed, without_autograd
from everystep.program.memory import copy_on_cpu
from everystep.program.operation import Operation, Storage, TensorSpec
from everystep.program.operators import leaves
from everystep.program.plain import Environment, PlainProgram
from everystep.program.program import OptimizerStep, Program
from everystep.step.build import named_operations
from everystep.step.capture import take_watched
from everystep.step.eager import EagerStep
from everystep.step.recorder import StepRecorder

__all__ = [
    "UNSCALES",
    "Observation",
    "Place",
    "Places",
    "PlainObserver",
    "gradients_by_parameter",
    "makes_gradients",
    "observe_eager",
    "observe_program",
]

#: The kernel by which a GradScaler divides gradients by its scale.
UNSCALES = "_amp_foreach_non_finite_check_and_unscale"
_GRADIENT = "gradient/"


class Place(NamedTuple):
    """Where a value of a step was read: the names of its tensors, and how many operations had run."""

    names: tuple[str, ...]
    after: int


class Places(NamedTuple):
    """Which memory the names of a step's tensors mean.

    tensors, storages: by name; activations, gradients: where they were read, by path and by parameter;
    loss: the name of the loss, None if the step has none; ends: the tensor that a state name means after
    the step, if it is another than before; optimizer: the step of an optimizer as a whole, if it is one;
    has_unseen: whether operations may have run that are not among those of the step.
    """

    tensors: Mapping[str, TensorSpec]
    storages: Mapping[str, Storage]
    activations: Mapping[str, Place]
    gradients: Mapping[str, Place]
    loss: str | None
    ends: Mapping[str, str]
    optimizer: OptimizerStep | None = None
    has_unseen: bool = False


class Observation(NamedTuple):
    """What was seen of a step; all tensors but the loss are copies on the CPU.

    activations: what each module returned, by its path; gradients: by parameter, as backward left them.
    """

    loss: Tensor
    operations: list[Observed]
    activations: dict[str, tuple[Tensor, ...]]
    gradients: dict[str, Tensor]
    places: Places


def observe_program(bound: BoundProgram) -> Observation:
    """Run the step of a program on the content of its memory, and observe everything."""
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
    read = {n: Place((name,), last_backward + 1) for n, name in program.gradients.items()}
    places = _places_of(program, program.given_after(), read)
    return Observation(loss, seen, in_order, gradients, places)


def _places_of(program: Program, after: Mapping[str, int], gradients: Mapping[str, Place]) -> Places:
    return Places(
        tensors=program.tensors,
        storages=program.storages,
        activations={path: Place(n, after[path] + 1) for path, n in program.activations.items()},
        gradients=gradients,
        loss=program.loss,
        ends=program.ends,
        optimizer=program.optimizer_step,
    )


def observe_eager(step: EagerStep, number: int) -> Observation:
    """Run step `number` in Python, and observe everything.

    This includes operations that a program could not hold, but not those that return numbers to Python.

    Raises:
        whatever the step raises.
    """
    watcher = _Watcher(step.training.device)
    captured = take_watched(step, number, watcher)
    named = named_operations(captured)
    names = named.names
    seen = [
        Observed(operation, *(_named(tensors, names) for tensors in values))
        for operation, values in zip(named.operations, watcher.values, strict=True)
    ]
    activations = {
        path: Place(tuple(names[n] for n in numbers), watcher.done_after[path])
        for path, numbers in captured.activations.items()
    }
    gradients = {
        name: Place((names[n],), watcher.backward_after) for name, n in captured.gradients.items()
    }
    assert captured.loss_tensor is not None
    loss = names[captured.loss_tensor]
    places = Places(named.tensors, named.storages, activations, gradients, loss, named.ends)
    return Observation(captured.loss, seen, watcher.outputs, watcher.backward_left, places)


class PlainObserver:
    """Observes everything in a step of the interpreter of plain programs.

    Args:
        plain: the program.
        numbers: of the step.

    The interpreter calls `look`; `observation` returns the observations.
    """

    def __init__(self, plain: PlainProgram, numbers: list[int | float]) -> None:
        program = plain.program
        self._operations: list[Observed] = []
        self._activations: dict[str, tuple[Tensor, ...]] = {}
        self._gradients: dict[str, Tensor] = {}
        self._read: dict[str, Place] = {}
        #: What backward last left of each gradient that no optimizer has used yet, and where.
        self._left: dict[str, tuple[Tensor, Place]] = {}
        self._gradients_on: dict[str, list[tuple[str, str]]] = {}
        for parameter, name in gradients_by_parameter(program).items():
            on = self._gradients_on.setdefault(program.tensors[name].storage, [])
            on.append((parameter, name))
        self._plain = plain
        self._program = program
        self._with_numbers = plain.operations_with(numbers)
        self._due: dict[int, list[str]] = {}
        for path, index in plain.given_after.items():
            self._due.setdefault(index, []).append(path)
        #: Copies of tensors by their names, of each storage.
        self._copies: dict[str, dict[str, Tensor]] = {}
        self._inputs: dict[str, Tensor] = {}

    def observation(self, loss: Tensor) -> Observation:
        """Return the observation of the step with this loss."""
        places = _places_of(self._program, self._plain.given_after, self._read)
        order = dict.fromkeys([*self._program.gradients, *self._gradients])
        gradients = {name: self._gradients[name] for name in order if name in self._gradients}
        return Observation(loss, self._operations, self._activations, gradients, places)

    def look(self, index: int, environment: Environment) -> None:
        """Look at the memory before an operation, that is, after the previous one."""
        operations = self._program.operations
        if index:
            self._look_after(index - 1, environment)
        for path in self._due.get(index - 1, ()):
            names = self._program.activations[path]
            self._activations[path] = tuple(self._copy(name, environment) for name in names)
        is_over = index == len(operations)
        if is_over:
            self._read_gradients(self._gradients_on, index, environment)
        elif operations[index].phase == "update" and not makes_gradients(operations[index]):
            used = {self._storage(name) for name in operations[index].reads()}
            self._read_gradients(used, index, environment)
        if not is_over:
            self._inputs = {n: self._copy(n, environment) for n in operations[index].reads()}

    def _read_gradients(self, storages: Iterable[str], index: int, environment: Environment) -> None:
        """Keep the gradients that are used from here on: as backward left them, not as clipped."""
        for parameter, name in (each for s in storages for each in self._gradients_on.get(s, ())):
            if parameter in self._gradients:
                continue
            if parameter in self._left:
                self._gradients[parameter], self._read[parameter] = self._left[parameter]
            elif parameter in self._program.gradients and environment.is_there(name):
                self._gradients[parameter] = self._copy(name, environment)
                self._read[parameter] = Place((name,), index)

    def _look_after(self, index: int, environment: Environment) -> None:
        operation = self._with_numbers[index]
        written = self._plain.written[index]
        names = [name for name in operation.results if name] or written
        changed = {self._storage(name) for name in (*names, *written)}
        for storage in changed:
            self._copies.pop(storage, None)
        results = {name: self._copy(name, environment) for name in names}
        others = {name: self._copy(name, environment) for name in written if name not in results}
        self._operations.append(Observed(operation, self._inputs, results, others))
        if makes_gradients(operation):
            for parameter, name in (each for s in changed for each in self._gradients_on.get(s, ())):
                if environment.is_there(name):
                    self._left[parameter] = self._copy(name, environment), Place((name,), index + 1)

    def _copy(self, name: str, environment: Environment) -> Tensor:
        copies = self._copies.setdefault(self._storage(name), {})
        if name not in copies:
            copies[name] = copy_on_cpu(environment.tensor(name))
        return copies[name]

    def _storage(self, name: str) -> str:
        return self._program.tensors[name].storage


def makes_gradients(operation: Operation) -> bool:
    """Tell whether an operation is of backward; that a GradScaler divides by its scale is part of it."""
    return operation.phase == "backward" or operation.name.rstrip("_") == UNSCALES


def gradients_by_parameter(program: Program) -> dict[str, str]:
    """Return the names of the gradients that a step makes or leaves behind, by parameter."""
    pending = (name for name in (*program.state_names, *program.ends) if name.startswith(_GRADIENT))
    left = {name.removeprefix(_GRADIENT): program.ends.get(name, name) for name in pending}
    return left | program.gradients


def _named(tensors: Mapping[int, Tensor], names: Mapping[int, str]) -> dict[str, Tensor]:
    return {names[number]: tensor for number, tensor in tensors.items()}


class _Watcher(StepRecorder):  # type: ignore[no-untyped-call]
    """Keeps copies of inputs and results of operations, of activations and of gradients.

    values: of each operation, its inputs, its results, and what else it wrote into, by the number of the
    tensor; done_after, backward_after: how many operations had run when a module was done, and when
    backward was.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.values: list[tuple[dict[int, Tensor], dict[int, Tensor], dict[int, Tensor]]] = []
        self.outputs: dict[str, tuple[Tensor, ...]] = {}
        self.done_after: dict[str, int] = {}
        self.backward_left: dict[str, Tensor] = {}
        self.backward_after = 0

    def module_done(self, path: str, outputs: list[Tensor]) -> None:
        """Copy the output of a module."""
        super().module_done(path, outputs)
        self.outputs.pop(path, None)
        self.outputs[path] = tuple(map(copy_on_cpu, outputs))
        self.done_after[path] = len(self.operations)

    def gradients(self, gradients: dict[str, Tensor]) -> dict[str, int]:
        """Copy the gradients that the backward phase has left."""
        self.backward_left = {name: copy_on_cpu(gradient) for name, gradient in gradients.items()}
        self.backward_after = len(self.operations)
        return super().gradients(gradients)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.is_paused:
            return func(*args, **(kwargs or {}))
        arguments = _dense((*args, *(kwargs or {}).values()))
        given = {self.number(tensor): copy_on_cpu(tensor) for tensor in arguments}
        count = len(self.operations)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if len(self.operations) > count:
            recorded = self.operations[-1]
            after = [t for t in arguments if self.tensors[self.number(t)].storage in recorded.writes]
            made = {self.number(t): copy_on_cpu(t) for t in _dense(result) or after}
            others = {self.number(t): t for t in after}
            written = {n: copy_on_cpu(t) for n, t in others.items() if n not in made}
            self.values.append((given, made, written))
        return result


def _dense(value: Any) -> list[Tensor]:
    return [tensor for tensor in leaves(value) if tensor.layout == torch.strided]
