"""Observe: operations, activations and gradients of a step that a program repeats."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple

from torch import Tensor

from everystep.bounded import free_memory
from everystep.program.interpreter import Interpreter, Looks
from everystep.program.memory import copy_in_file, copy_on_cpu, lies_as
from everystep.program.observed import Observed
from everystep.program.operation import Operation, Storage, TensorSpec
from everystep.program.step_program import Program

__all__ = [
    "UNSCALES",
    "Observation",
    "Places",
    "StepObserver",
    "ValuePlace",
    "gradient_places",
    "makes_gradients",
]

#: The kernel by which a GradScaler divides gradients by its scale.
UNSCALES = "_amp_foreach_non_finite_check_and_unscale"
_GRADIENT = "gradient/"
#: Bytes of copies of a step that are in memory, as a share of what is free, and at least.
HELD_SHARE, LEAST_HELD = 0.25, 1_000_000_000
#: Bytes of the smallest copy that lies in a file.
SMALLEST_IN_FILE = 1_000_000
_TensorOf = Callable[[str], Tensor]


class ValuePlace(NamedTuple):
    """Where a value of a step was read: the names of its tensors, and how many operations had run."""

    names: tuple[str, ...]
    after: int


class Places(NamedTuple):
    """The memory of the names of a step's tensors.

    tensors, storages: by name; activations, gradients: where they were read, by path and by parameter;
    loss: the name of the loss, None if the step has none; ends: the tensor of a state name after the
    step, if it differs from before; has_unseen: whether operations may have run that are not in the
    step.
    """

    tensors: Mapping[str, TensorSpec]
    storages: Mapping[str, Storage]
    activations: Mapping[str, ValuePlace]
    gradients: Mapping[str, ValuePlace]
    loss: str | None
    ends: Mapping[str, str]
    has_unseen: bool = False


class Observation(NamedTuple):
    """The observed values of a step; all tensors except the loss are copies on the CPU.

    activations: the output of each module, by its path; gradients: by parameter, after backward;
    before, after: the tensors of the state, by name.
    """

    loss: Tensor
    operations: list[Observed]
    activations: dict[str, tuple[Tensor, ...]]
    gradients: dict[str, Tensor]
    places: Places
    before: dict[str, Tensor]
    after: dict[str, Tensor]


class StepObserver:
    """Observes everything in a step of the interpreter.

    Args:
        interpreter: the program.
        numbers: of the step.
        state: its live tensors by name, before the step.

    The interpreter lets `looks` look; `observation` returns the observations.

    Numbers are copied once, and those that nothing overwrites are not copied: a step of a large model
    makes several times the bytes of its parameters. Where memory is scarce, copies lie in files.
    """

    def __init__(
        self, interpreter: Interpreter, numbers: list[int | float], state: Mapping[str, Tensor]
    ) -> None:
        self._interpreter = interpreter
        self._program = program = interpreter.program
        self._state = state
        self._held, self._most_held = 0, max(LEAST_HELD, int(HELD_SHARE * free_memory()))
        self._before = {name: self._copied(tensor) for name, tensor in state.items()}
        self._operations: list[Observed] = []
        self._activations: dict[str, tuple[Tensor, ...]] = {}
        self._gradients: dict[str, Tensor] = {}
        self._read = gradient_places(program)
        own = enumerate(interpreter.numbers_of(numbers))
        self._with_numbers = [interpreter.operation_with(place, each) for place, each in own]
        #: What to copy after so many operations: activations by path, gradients by parameter.
        self._due: dict[int, list[tuple[str, tuple[str, ...]]]] = {}
        for path, outputs in program.activations.items():
            self._due.setdefault(program.done[path], []).append((path, outputs))
        self._left: dict[int, list[str]] = {}
        for parameter, place in self._read.items():
            self._left.setdefault(place.after, []).append(parameter)
        #: Copies of tensors by their names, of each storage.
        self._copies: dict[str, dict[str, Tensor]] = {}
        for name, spec in interpreter.state.items():
            if name in self._before and lies_as(self._before[name], spec):
                self._copies.setdefault(spec.storage, {})[name] = self._before[name]
        self._inputs: dict[str, Tensor] = {}
        #: After which operation the numbers of a storage stay: of those that only this step has.
        left = program.storages_of([*program.ends.values()])
        names = [name for name, each in program.storages.items() if each.kind == "temporary"]
        self._stays = {name: -1 for name in names if name not in left}
        for index, operation in enumerate(program.operations):
            changed = program.storages_of(operation.changed())
            self._stays |= {storage: index for storage in changed if storage in self._stays}

    def observation(self, loss: Tensor) -> Observation:
        """Return the observation of the step with this loss."""
        program = self._program
        places = Places(
            tensors=program.tensors,
            storages=program.storages,
            activations={
                path: ValuePlace(names, program.done[path])
                for path, names in program.activations.items()
            },
            gradients=self._read,
            loss=program.loss,
            ends=program.ends,
        )
        order = dict.fromkeys([*program.gradients, *self._gradients])
        gradients = {name: self._gradients[name] for name in order if name in self._gradients}
        known = self._operations, self._activations, gradients, places
        return Observation(loss, *known, self._before, self._after())

    def _after(self) -> dict[str, Tensor]:
        """Return copies of the tensors of the state, after the step."""
        found = {name: copy for copies in self._copies.values() for name, copy in copies.items()}
        own = {name: name for name in self._interpreter.state} | dict(self._program.ends)
        return {
            name: found[own[name]] if own.get(name) in found else self._copied(tensor)
            for name, tensor in self._state.items()
        }

    @property
    def looks(self) -> Looks:
        """What looks at the memory before and after each operation."""
        count = len(self._program.operations)
        return {index - 1: [partial(self._look, index)] for index in range(count + 1)}

    def _look(self, index: int, tensor_of: _TensorOf) -> None:
        """Look at the memory before an operation, that is, after the previous one."""
        if index:
            self._look_after(index - 1, tensor_of)
        for path, names in self._due.get(index, ()):
            self._activations[path] = tuple(self._copy(name, index, tensor_of) for name in names)
        for parameter in self._left.get(index, ()):
            self._gradients[parameter] = self._copy(self._read[parameter].names[0], index, tensor_of)
        if index < len(self._program.operations):
            reads = self._program.operations[index].reads()
            self._inputs = {name: self._copy(name, index, tensor_of) for name in reads}

    def _look_after(self, index: int, tensor_of: _TensorOf) -> None:
        operation = self._with_numbers[index]
        written = operation.written()
        # An operation that returns nothing, such as one on lists, has what it writes in their place.
        names = [name for name in operation.results if name] or written
        for storage in {self._storage(name) for name in (*names, *written)}:
            # Other tensors on this memory have new numbers, too.
            self._copies.pop(storage, None)
        given = index + 1, tensor_of
        results = {name: self._copy(name, *given) for name in names}
        others = {name: self._copy(name, *given) for name in written if name not in results}
        line = self._program.line_of(operation)
        self._operations.append(Observed(operation, self._inputs, results, others, line))

    def _copy(self, name: str, index: int, tensor_of: _TensorOf) -> Tensor:
        """Return a copy of a tensor before an operation; the tensor itself if it stays as it is."""
        storage = self._storage(name)
        copies = self._copies.setdefault(storage, {})
        if name not in copies:
            tensor = tensor_of(name).detach()
            # No later operation writes there, so the interpreter's own tensor may be shown.
            stays = tensor.is_cpu and self._stays.get(storage, index) < index
            copies[name] = self._copied(tensor, stays=stays)
        return copies[name]

    def _copied(self, tensor: Tensor, *, stays: bool = False) -> Tensor:
        """Return a copy of a tensor, or the tensor itself if it stays as it is."""
        if tensor.nbytes >= SMALLEST_IN_FILE and self._held + tensor.nbytes > self._most_held:
            return copy_in_file(tensor)
        self._held += tensor.nbytes
        return tensor if stays and not tensor.is_conj() else copy_on_cpu(tensor)

    def _storage(self, name: str) -> str:
        return self._program.tensors[name].storage


def makes_gradients(operation: Operation) -> bool:
    """Return whether an operation belongs to backward, a GradScaler's division included."""
    return operation.phase == "backward" or operation.name.rstrip("_") == UNSCALES


def gradient_places(program: Program) -> dict[str, ValuePlace]:
    """Return where each gradient is read, by parameter: as backward leaves it, before an update uses it.

    Clipping is part of the update.
    """
    found: dict[str, ValuePlace] = {}
    left: dict[str, int] = {}
    on: dict[str, list[tuple[str, str]]] = {}
    for parameter, name in _gradients_by_parameter(program).items():
        on.setdefault(program.tensors[name].storage, []).append((parameter, name))
    there = {name for name, storage in program.storages.items() if storage.kind != "temporary"}

    def read(used: Iterable[str], index: int) -> None:
        for storage in used:
            for parameter, name in on.get(storage, ()):
                place = left.get(parameter)
                if place is None and storage in there and parameter in program.gradients:
                    place = index
                if place is not None:
                    found.setdefault(parameter, ValuePlace((name,), place))

    for index, operation in enumerate(program.operations):
        makes = makes_gradients(operation)
        if operation.phase == "update" and not makes:
            read(program.storages_of(operation.reads()), index)
        changed = program.storages_of(operation.changed())
        there |= changed
        if makes:
            left |= {parameter: index + 1 for s in changed for parameter, _ in on.get(s, ())}
    read(on, len(program.operations))
    return found


def _gradients_by_parameter(program: Program) -> dict[str, str]:
    """Return the names of the gradients that a step makes or leaves behind, by parameter."""
    pending = (name for name in (*program.state_names, *program.ends) if name.startswith(_GRADIENT))
    left = {name.removeprefix(_GRADIENT): program.ends.get(name, name) for name in pending}
    return left | program.gradients
