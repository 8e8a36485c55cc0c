"""Expanded: a program with the single operations of an optimizer's step.

To get them, torch's own code takes the step of the optimizer on other memory, and is watched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain, count
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from everystep.ops.arguments import decode, references
from everystep.program.interpreter import Interpreter
from everystep.program.memory import tensor_on
from everystep.program.number_slots import Number
from everystep.program.operation import Operation
from everystep.program.optimizer_operator import ARGUMENTS, OPTIMIZERS, BoundOptimizer
from everystep.program.step_program import Program
from everystep.step.build import BuiltPath, build_path
from everystep.step.cursor import Cursor
from everystep.step.known_paths import KnownPaths
from everystep.step.outside_tensors import OutsideTensors
from everystep.step.path import Path
from everystep.step.versions import Versions

__all__ = ["Expanded", "Expander"]

#: Returns copies of tensors of a program, by name, before an operation.
Before = Callable[[int, Sequence[str]], dict[str, Tensor]]


class Expanded(NamedTuple):
    """A step with the single operations of each optimizer's step.

    inputs: bytes of their inputs, such as a constant, by `input/name`.
    """

    interpreter: Interpreter
    numbers: list[Number]
    inputs: dict[str, Tensor]


class _Part(NamedTuple):
    """The program of an optimizer's step. names: of its storages in the program around it."""

    built: BuiltPath
    names: dict[str, str]


class Expander:
    """Expands steps with a program.

    Args:
        interpreter: the program.
        device: where it runs.
    """

    def __init__(self, interpreter: Interpreter, device: torch.device) -> None:
        self._interpreter = interpreter
        self._device = device
        operations = interpreter.program.operations
        self._places = [n for n, each in enumerate(operations) if each.operator in OPTIMIZERS]
        #: By place: the tensor that an optimizer reads as numbers, and whether it is in the state
        #: before.
        self._read = {place: _read(operations[place], interpreter.program) for place in self._places}
        self._is_told = {place: self._tells(place) for place in self._places}
        self._last: tuple[list[Path], Interpreter, dict[int, _Part]] | None = None

    def _tells(self, place: int) -> bool:
        """Return whether a number that an optimizer reads is in the state, still unchanged."""
        program = self._interpreter.program
        written: set[str] = set()
        made: set[str | None] = set()
        for each in program.operations[:place]:
            if each.operator in OPTIMIZERS:  # its stand-ins hold the numbers that it wrote
                made.update(each.results)
            else:
                written |= program.storages_of(each.changed())
        return all(
            (name in program.state_names or name in made)
            and program.tensors[name].storage not in written
            for name in self._read[place]
        )

    def expanded(
        self, numbers: Sequence[Number], state: Mapping[str, Tensor], before: Before
    ) -> Expanded:
        """Return a step with the operations of its optimizers' steps.

        Args:
            numbers: of the step, for this program.
            state: before the step, by name: an optimizer's operations depend on how many steps it has
                taken.
            before: runs the step up to an operation, for inputs that are not in the state.
        """
        if not self._places:
            return Expanded(self._interpreter, [*numbers], {})
        own = self._interpreter.numbers_of(numbers)
        stand_ins = _StandIns(self._interpreter, state, self._device)
        watched: dict[int, tuple[Path, Cursor]] = {}
        for place in self._places:
            # Such as a rate that a tensor has, and that an operation of the step has changed.
            if not self._is_told[place]:
                stand_ins.set(before(place, self._read[place]))
            watched[place] = stand_ins.take(self._interpreter.operation_with(place, own[place]))
        paths = [path for path, _ in watched.values()]
        # Most steps of an optimizer make the same operations, and differ in numbers only.
        if self._last is None or self._last[0] != paths:
            self._last = paths, *_spliced(self._interpreter, watched, self._device)
        _, interpreter, parts = self._last
        inputs: dict[str, Tensor] = {}
        for place, (built, names) in parts.items():
            _, watch = watched[place]
            own[place] = built.numbers(watch.numbers)
            for name, storage in built.inputs.items():
                brought = watch.from_outside(storage)
                assert brought is not None
                inputs[f"input/{names[name]}"] = brought.content
        return Expanded(interpreter, [number for each in own for number in each], inputs)


def _read(operation: Operation, program: Program) -> list[str]:
    """Return the tensors that an optimizer reads as numbers: one-element state or settings."""
    if OPTIMIZERS[operation.operator].kind is torch.optim.Adafactor:
        return [*dict.fromkeys(operation.reads())]  # it reads the norms of parameters and updates
    given = operation.arguments[ARGUMENTS.index("kept")], *operation.keywords.values()
    return [name for name in references(given) if not program.tensors[name].shape]


class _StandIns:
    """Tensors with the layouts of those of a program, on other memory."""

    def __init__(
        self, interpreter: Interpreter, state: Mapping[str, Tensor], device: torch.device
    ) -> None:
        self._interpreter = interpreter
        self._state = state
        self._device = device
        self._memory: dict[str, torch.UntypedStorage] = {}
        self._tensors: dict[str, Tensor] = {}

    def set(self, values: Mapping[str, Tensor]) -> None:
        """Set the values of some."""
        for name, tensor in values.items():
            self._tensor(name).copy_(tensor)

    def take(self, operation: Operation) -> tuple[Path, Cursor]:
        """Take the step of an optimizer, with the numbers of the operation, and watch it."""
        given = {name: self._tensor(name) for name in operation.reads()}
        arguments = [decode(value, self._tensor) for value in operation.arguments]
        settings = {key: decode(value, self._tensor) for key, value in operation.keywords.items()}
        optimizer = BoundOptimizer(OPTIMIZERS[operation.operator], *arguments)
        place = operation.phase, operation.module  # of all that it does
        # In place of a follower, which needs modules, and hooks of torch.
        following: Any = SimpleNamespace(where=(), watch=None, place=lambda is_zeroing: place)
        watch = Cursor(KnownPaths(), self._device, following, OutsideTensors())
        # The tensors that it is given are the state of this watch, which has no batch.
        watch.begin(given, Versions.of(given))
        with watch:
            made = optimizer.step(settings)
        results = dict(zip(filter(None, operation.results), made, strict=True))
        self._tensors |= results
        return watch.end(after := given | results, Versions.of(after), None), watch

    def _tensor(self, name: str) -> Tensor:
        """Return the stand-in of a tensor; one with a single element has its value from the state."""
        if name not in self._tensors:
            spec = self._interpreter.program.tensors[name]
            if spec.storage not in self._memory:
                self._memory[spec.storage] = self._interpreter.fresh(spec.storage)
            tensor = tensor_on(self._memory[spec.storage], spec)
            if not spec.shape and name in self._state:
                tensor.copy_(self._state[name])
            self._tensors[name] = tensor
        return self._tensors[name]


def _spliced(
    interpreter: Interpreter,
    watched: Mapping[int, tuple[Path, Cursor]],
    device: torch.device,
) -> tuple[Interpreter, dict[int, _Part]]:
    """Return a program with those of its optimizers' steps in it, and these.

    watched: the steps, by the place of their operation.
    """
    program = interpreter.program
    parts: dict[int, _Part] = {}
    tensors, storages = dict(program.tensors), dict(program.storages)
    operations = [[each] for each in program.operations]
    for place, (path, watch) in watched.items():
        built, outer = build_path(path, watch.numbers), program.operations[place]
        part, known = built.program, {*outer.reads()}  # tensors that have their names in the part
        # From names of the part to those of the program around it; new ones must be free in that.
        names = {tensor: name for name, tensor in part.ends.items()}
        names |= {name: name for name in part.tensors if name in known}
        memory = {part.tensors[n].storage: tensors[name].storage for n, name in names.items()}
        for name in part.storages.keys() - memory.keys():
            memory[name] = _free(name, storages)
            storages[memory[name]] = part.storages[name]
        for name, storage in part.storages.items():
            if storage.kind == "input":  # what begins as a constant may be a result of the outer program
                storages[memory[name]] = storage
        for name in [name for name in part.tensors if name not in names]:
            names[name] = _free(name, tensors)
            spec = part.tensors[name]
            tensors[names[name]] = spec.model_copy(update={"storage": memory[spec.storage]})
        renamed = [_with_names(each, names) for each in part.operations]
        operations[place] = [each.model_copy(update={"line": outer.line}) for each in renamed]
        parts[place] = _Part(built, memory)
    joined = tuple(chain.from_iterable(operations))
    done = {name: sum(map(len, operations[:count])) for name, count in program.done.items()}
    changed = {"operations": joined, "tensors": tensors, "storages": storages, "done": done}
    return Interpreter(program.model_copy(update=changed), device), parts


def _free(name: str, taken: Mapping[str, Any]) -> str:
    """Return a name like another one that is not taken."""
    names = chain([name], (f"{name}_{number}" for number in count(2)))
    return next(each for each in names if each not in taken)


def _with_names(operation: Operation, names: Mapping[str, str]) -> Operation:
    """Return an operation with other names of tensors."""

    def renamed(value: Any) -> Any:
        if isinstance(value, str):
            return names[value]
        return [*map(renamed, value)] if isinstance(value, list | tuple) else value

    changed = {
        "arguments": tuple(map(renamed, operation.arguments)),
        "keywords": {key: renamed(value) for key, value in operation.keywords.items()},
        "results": tuple(None if name is None else names[name] for name in operation.results),
    }
    return operation.model_copy(update=changed)
