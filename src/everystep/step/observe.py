"""Observe: what is seen of a step that a program repeats: operations, activations, gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from everystep.program.interpreter import Environment, Interpreter
from everystep.program.memory import copy_on_cpu
from everystep.program.observed import Observed
from everystep.program.operation import Operation, Storage, TensorSpec
from everystep.program.program import Program

__all__ = [
    "UNSCALES",
    "Observation",
    "Place",
    "Places",
    "StepObserver",
    "gradients_by_parameter",
    "makes_gradients",
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
    the step, if it is another than before; has_unseen: whether operations may have run that are not
    among those of the step.
    """

    tensors: Mapping[str, TensorSpec]
    storages: Mapping[str, Storage]
    activations: Mapping[str, Place]
    gradients: Mapping[str, Place]
    loss: str | None
    ends: Mapping[str, str]
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


def _places_of(program: Program, after: Mapping[str, int], gradients: Mapping[str, Place]) -> Places:
    return Places(
        tensors=program.tensors,
        storages=program.storages,
        activations={path: Place(n, after[path] + 1) for path, n in program.activations.items()},
        gradients=gradients,
        loss=program.loss,
        ends=program.ends,
    )


class StepObserver:
    """Observes everything in a step of the interpreter.

    Args:
        interpreter: the program.
        numbers: of the step.

    The interpreter calls `look`; `observation` returns the observations.
    """

    def __init__(self, interpreter: Interpreter, numbers: list[int | float]) -> None:
        program = interpreter.program
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
        self._interpreter = interpreter
        self._program = program
        self._with_numbers = interpreter.operations_with(numbers)
        self._due: dict[int, list[str]] = {}
        for path, index in interpreter.given_after.items():
            self._due.setdefault(index, []).append(path)
        #: Copies of tensors by their names, of each storage.
        self._copies: dict[str, dict[str, Tensor]] = {}
        self._inputs: dict[str, Tensor] = {}

    def observation(self, loss: Tensor) -> Observation:
        """Return the observation of the step with this loss."""
        places = _places_of(self._program, self._interpreter.given_after, self._read)
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
        written = self._interpreter.written[index]
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
