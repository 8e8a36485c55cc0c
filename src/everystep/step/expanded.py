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

from everystep.program.arguments import decode, references
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
        self._last: tuple[list[Path], _Spliced] | None = None

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
        watched: list[tuple[Path, Cursor]] = []
        for place in self._places:
            if not self._is_told[place]:
                stand_ins.set(before(place, self._read[place]))
            watched.append(stand_ins.take(self._interpreter.operation_with(place, own[place])))
        paths = [path for path, _ in watched]
        if self._last is None or self._last[0] != paths:
            self._last = paths, _Spliced(self._interpreter, self._places, watched, self._device)
        spliced = self._last[1]
        inputs: dict[str, Tensor] = {}
        for place, (_, watch), (built, names) in zip(self._places, watched, spliced.parts, strict=True):
            own[place] = built.numbers(watch.numbers)
            for name, storage in built.inputs.items():
                brought = watch.from_outside(storage)
                assert brought is not None
                inputs[f"input/{names[name]}"] = brought.content
        return Expanded(spliced.interpreter, [number for each in own for number in each], inputs)


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
        following: Any = SimpleNamespace(where=(), watch=None, place=lambda is_zeroing: place)
        watch = Cursor(KnownPaths(), self._device, following, OutsideTensors())
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


class _Spliced:
    """A program with those of its optimizers' steps in it.

    parts: these, each with the new names of its storages.
    """

    def __init__(
        self,
        interpreter: Interpreter,
        places: Sequence[int],
        watched: Sequence[tuple[Path, Cursor]],
        device: torch.device,
    ) -> None:
        program = interpreter.program
        self.parts: list[tuple[BuiltPath, dict[str, str]]] = []
        self._tensors = dict(program.tensors)
        self._storages = dict(program.storages)
        operations = [[each] for each in program.operations]
        for place, (path, watch) in zip(places, watched, strict=True):
            built = build_path(path, watch.numbers)
            outer = program.operations[place]
            inner, names = self._renamed(built.program, {*outer.reads()})
            operations[place] = [each.model_copy(update={"line": outer.line}) for each in inner]
            self.parts.append((built, names))
        parts = {
            "operations": tuple(each for own in operations for each in own),
            "tensors": self._tensors,
            "storages": self._storages,
        }
        self.interpreter = Interpreter(program.model_copy(update=parts), device)

    def _renamed(self, part: Program, known: set[str]) -> tuple[list[Operation], dict[str, str]]:
        """Return the operations of a part, and the new names of its storages.

        known: tensors of the outer program, which have their names in the part.
        """
        names = {tensor: name for name, tensor in part.ends.items()}
        names |= {name: name for name in part.tensors if name in known}
        places = {part.tensors[n].storage: self._tensors[name].storage for n, name in names.items()}
        for name in part.storages.keys() - places.keys():
            places[name] = _free(name, self._storages)
            self._storages[places[name]] = part.storages[name]
        for name, storage in part.storages.items():
            if storage.kind == "input":  # what begins as a constant may be a result of the outer program
                self._storages[places[name]] = storage
        for name in [name for name in part.tensors if name not in names]:
            names[name] = _free(name, self._tensors)
            spec = part.tensors[name]
            self._tensors[names[name]] = spec.model_copy(update={"storage": places[spec.storage]})
        return [_with_names(each, names) for each in part.operations], places


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
