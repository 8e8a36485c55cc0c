"""Expanded: a program in which the step of an optimizer is not one operation, but those that it runs.

To look into a step, torch's own code takes the step of the optimizer on other memory, and is watched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from everystep.program.arguments import decode, references
from everystep.program.operation import Operation, Phase
from everystep.program.optimizers import ARGUMENTS, OPTIMIZERS, BoundOptimizer
from everystep.program.plain import PlainProgram, tensor_on
from everystep.program.program import Program
from everystep.step.elsewhere import Elsewhere
from everystep.step.plain import build_path
from everystep.step.watch import Watch

__all__ = ["Expanded", "expanded"]

Number = int | float


class Expanded(NamedTuple):
    """A step in which each step of an optimizer is the operations that it runs.

    inputs: bytes of what these bring along, such as a constant, by `input/name`.
    """

    plain: PlainProgram
    numbers: list[Number]
    inputs: dict[str, Tensor]


#: Returns copies of tensors of a program, by name, as they are before an operation.
Before = Callable[[int, Sequence[str]], dict[str, Tensor]]


def expanded(
    plain: PlainProgram,
    numbers: Sequence[Number],
    state: Mapping[str, Tensor],
    device: torch.device,
    before: Before,
) -> Expanded:
    """Return a step with the operations of its optimizers' steps.

    Args:
        plain: the program.
        numbers: of the step, for this program.
        state: before the step, by name: how many steps an optimizer has taken decides what it does.
        device: where the program runs.
        before: runs the step up to an operation, where the state does not tell what it is given.
    """
    program = plain.program
    if not any(operation.operator in OPTIMIZERS for operation in program.operations):
        return Expanded(plain, [*numbers], {})
    expansion = _Expansion(program, state, device, before)
    pairs = zip(plain.operations_with(numbers), plain.numbers_of(numbers), strict=True)
    for index, (operation, own) in enumerate(pairs):
        expansion.add(index, operation, own)
    return Expanded(PlainProgram(expansion.program(), device), expansion.numbers, expansion.inputs)


class _Place:
    """Stands for what follows modules and optimizers: all is of one operation."""

    where: tuple[Any, ...] = ()

    def __init__(self, operation: Operation) -> None:
        self._place = operation.phase, operation.module

    def place(self, is_zeroing: bool) -> tuple[Phase, str | None]:
        """Return the phase, and the optimizer."""
        return self._place


class _Expansion:
    def __init__(
        self, program: Program, state: Mapping[str, Tensor], device: torch.device, before: Before
    ) -> None:
        self._before = before
        self.numbers: list[Number] = []
        self.inputs: dict[str, Tensor] = {}
        self._program = program
        self._state = state
        self._device = device
        self._operations: list[Operation] = []
        self._tensors = dict(program.tensors)
        self._storages = dict(program.storages)
        self._memory: dict[str, torch.UntypedStorage] = {}
        self._stand_ins: dict[str, Tensor] = {}
        self._written: set[str] = set()

    def program(self) -> Program:
        """Return the program."""
        parts = {
            "operations": tuple(self._operations),
            "tensors": self._tensors,
            "storages": self._storages,
        }
        return self._program.model_copy(update=parts)

    def add(self, index: int, operation: Operation, numbers: Sequence[Number]) -> None:
        """Add an operation, with its numbers in it; that of an optimizer in its parts."""
        if operation.operator not in OPTIMIZERS:
            self._operations.append(operation)
            self.numbers += numbers
            written = (*operation.written(), *filter(None, operation.results))
            self._written |= {self._tensors[name].storage for name in written}
            return
        self._set_numbers(index, operation)
        before = {name: self._stand_in(name) for name in operation.reads()}
        arguments = [decode(value, self._stand_in) for value in operation.arguments]
        settings = {key: decode(v, self._stand_in) for key, v in operation.keywords.items()}
        optimizer = BoundOptimizer(OPTIMIZERS[operation.operator], *arguments)
        place: Any = _Place(operation)
        watch = Watch(self._device, place, Elsewhere())
        watch.begin(before)
        with watch:
            made = optimizer.step(settings)
        results = dict(zip((name for name in operation.results if name), made, strict=True))
        self._stand_ins |= results
        path = watch.end(before | results, None)
        built = build_path(path, watch.numbers)
        self.numbers += built.numbers(watch.numbers)
        places = self._splice(built.program)
        for name, storage in built.inputs.items():
            content = watch.content(storage)
            assert content is not None
            self.inputs[f"input/{places[name]}"] = content

    def _set_numbers(self, index: int, operation: Operation) -> None:
        """Give what an optimizer reads as a number the value that it has by then."""
        given = operation.arguments[ARGUMENTS.index("kept")], *operation.keywords.values()
        small = [name for name in references(given) if not self._tensors[name].shape]
        is_there = all(name in self._state or name in self._stand_ins for name in small)
        if not is_there or any(self._tensors[name].storage in self._written for name in small):
            for name, tensor in self._before(index, small).items():
                self._stand_in(name).copy_(tensor)

    def _stand_in(self, name: str) -> Tensor:
        """Return a tensor as one of the program lies; one of a single number has the same value."""
        if name not in self._stand_ins:
            spec = self._tensors[name]
            if spec.storage not in self._memory:
                size = self._storages[spec.storage].bytes
                place = torch.device("cpu") if self._storages[spec.storage].host else self._device
                whole = torch.zeros(size, dtype=torch.uint8, device=place)
                self._memory[spec.storage] = whole.untyped_storage()
            tensor = tensor_on(self._memory[spec.storage], spec)
            if not spec.shape and name in self._state:
                tensor.copy_(self._state[name])
            self._stand_ins[name] = tensor
        return self._stand_ins[name]

    def _splice(self, part: Program) -> dict[str, str]:
        """Add the operations of a program, in which tensors of the outer one have their names.

        Returns the new names of its storages.
        """
        names = {tensor: name for name, tensor in part.ends.items()}
        names |= {name: name for name in part.tensors if name in self._stand_ins}
        places = {part.tensors[n].storage: self._tensors[name].storage for n, name in names.items()}
        for name in part.storages.keys() - places.keys():
            places[name] = next(_free(name, self._storages))
            self._storages[places[name]] = part.storages[name]
        for name in [name for name in part.tensors if name not in names]:
            names[name] = next(_free(name, self._tensors))
            spec = part.tensors[name]
            self._tensors[names[name]] = spec.model_copy(update={"storage": places[spec.storage]})
        for each in part.operations:
            renamed = {
                "arguments": tuple(_with_names(value, names) for value in each.arguments),
                "keywords": {key: _with_names(v, names) for key, v in each.keywords.items()},
                "results": tuple(None if n is None else names[n] for n in each.results),
            }
            self._operations.append(each.model_copy(update=renamed))
        return places


def _free(name: str, taken: Mapping[str, Any]) -> Iterator[str]:
    """Yield names that are not taken."""
    if name not in taken:
        yield name
    for number in range(2, len(taken) + 3):
        if f"{name}_{number}" not in taken:
            yield f"{name}_{number}"


def _with_names(value: Any, names: Mapping[str, str]) -> Any:
    """Return an argument with other names of tensors."""
    if isinstance(value, str):
        return names[value]
    return [_with_names(item, names) for item in value] if isinstance(value, list | tuple) else value
