"""Live: a plain program that runs steps of a training in place of the recorded Python.

It is compiled once, for tensors at fixed addresses, into functions that read their arguments from one
list and write their results to it: each tensor, number and constant has a slot there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from everystep.errors import ProgramError
from everystep.program.arguments import decode
from everystep.program.calls import ASK_FOR_GRADIENTS, quickest
from everystep.program.operation import Operation, TensorSpec
from everystep.program.operators import parameters
from everystep.program.plain import READ, is_number, is_number_slot, tensor_on
from everystep.program.program import Program

__all__ = ["LiveProgram", "LiveStep"]

Number = int | float
_Instruction = Callable[[list[Any]], None]
#: Memory of so many bytes is given back as soon as no operation needs it.
LARGE_BYTES = 65_536


class LiveStep(NamedTuple):
    """The results of a step.

    given: the loss, if the program has one, and other logged numbers, by name; ends: the tensors of
    state names from now on; numbers: of the step, including those that it read.
    """

    given: dict[str, Tensor]
    ends: dict[str, Tensor]
    numbers: list[Number]


class LiveProgram:
    """A plain program, compiled for the live tensors of a training.

    Args:
        program: the program to run.
        state: the tensors of the training by name; their memory must not move.
        inputs: bytes of each input storage that does not belong to the batch, by the storage's name.
        batch: the names of the tensors of the batch.
        device: the device of memory that the program allocates.

    Raises:
        ProgramError: the program cannot be compiled for these tensors; gives the reason.
    """

    def __init__(
        self,
        program: Program,
        state: Mapping[str, Tensor],
        inputs: Mapping[str, Tensor],
        batch: Sequence[str],
        device: torch.device,
    ) -> None:
        self.program = program
        compiler = _Compiler(program, state, inputs, batch, device)
        for operation in program.operations:
            compiler.add(operation)
        self._ends = {name: compiler.read(tensor) for name, tensor in program.ends.items()}
        loss = {} if program.loss is None else {"loss": program.loss}
        self._given = {n: compiler.read(tensor) for n, tensor in (loss | program.logged).items()}
        self._instructions = compiler.instructions()
        self._values = compiler.values
        self._batch = compiler.batch
        self._numbers = compiler.numbers
        self._temporary = compiler.temporary()

    def run(self, batch: Mapping[str, Tensor], numbers: Sequence[Number]) -> LiveStep:
        """Run a step; call it inside `without_autograd`.

        Args:
            batch: its tensors by name, of the geometry of the program; the step may change them.
            numbers: of the step, in the order of its operations.

        Raises:
            RuntimeError: a kernel rejects its arguments (or IndexError, ValueError, TypeError).
        """
        values = self._values
        for place, number in zip(self._numbers, numbers, strict=True):
            values[place] = number
        for name, place in self._batch.items():
            values[place] = batch[name].detach()
        for instruction in self._instructions:
            instruction(values)
        given = {name: values[place].clone() for name, place in self._given.items()}
        ends = {name: values[place] for name, place in self._ends.items()}
        used = [values[place] for place in self._numbers]
        for place in self._temporary:
            values[place] = None
        return LiveStep(given, ends, used)


class _Compiler:
    """Assigns a slot in the list of values to everything, and converts operations to instructions.

    values: the list, filled with what is the same at every step; numbers, batch: the slots of what
    belongs to a step.
    """

    def __init__(
        self,
        program: Program,
        state: Mapping[str, Tensor],
        inputs: Mapping[str, Tensor],
        batch: Sequence[str],
        device: torch.device,
    ) -> None:
        self.values: list[Any] = []
        self.numbers: list[int] = []
        self.batch: dict[str, int] = {}
        self._program = program
        self._device = device
        self._places: dict[str, int] = {}
        #: The tensors of each storage that are in their places at this point of the step.
        self._there: dict[str, list[str]] = {}
        self._code: list[_Instruction] = []
        self._last_use: dict[str, int] = {}
        self._memory: dict[str, torch.UntypedStorage] = {}
        for name in program.tensors:
            storage = program.tensors[name].storage
            if program.storages[storage].kind == "state" and name in state:
                self._memory[storage] = state[name].untyped_storage()
        for name, content in inputs.items():
            self._memory[name] = content.untyped_storage()
        for name in batch:
            if name in program.tensors:
                self.batch[name] = self._place_of(name)
                self._there.setdefault(program.tensors[name].storage, []).append(name)

    def instructions(self) -> list[_Instruction]:
        """Return what is to be done at each step, in order; large memory is let go early."""
        kept = {self._storage(n) for n in (*self._program.ends.values(), *self._program.logged.values())}
        kept |= {self._storage(self._program.loss)} if self._program.loss else set()
        done: dict[int, list[int]] = {}
        for name, place in self._places.items():
            storage = self._storage(name)
            known = self._program.storages[storage]
            if known.kind == "temporary" and known.bytes >= LARGE_BYTES and storage not in kept:
                done.setdefault(self._last_use[storage], []).append(place)
        found = []
        for index, instruction in enumerate(self._code):
            found.append(instruction)
            if index in done:
                found.append(_forgetting(done[index]))
        return found

    def temporary(self) -> list[int]:
        """Return the places that hold nothing between two steps."""
        kinds = {name: self._program.storages[self._storage(name)].kind for name in self._places}
        fixed = {n for n in self._places if self._storage(n) in self._memory}
        return [p for n, p in self._places.items() if kinds[n] != "state" and n not in fixed]

    def read(self, name: str) -> int:
        """Return the slot of a tensor; fill it first if necessary."""
        place = self._place_of(name)
        spec = self._program.tensors[name]
        there = self._there.setdefault(spec.storage, [])
        if name not in there:
            there.append(name)
            if spec.storage in self._memory:
                self.values[place] = tensor_on(self._memory[spec.storage], spec)
            else:
                self._code.append(self._view(name, spec, there[:-1]))
        self._last_use[spec.storage] = len(self._code)
        return place

    def add(self, operation: Operation) -> None:
        """Make an instruction of an operation."""
        operator = operation.resolved
        names = [p.name for p in parameters(operator) if p.is_positional]
        pairs = zip(names, operation.arguments, strict=False)
        positional = [self._argument(v, is_number_slot(operator, n)) for n, v in pairs]
        keywords = {
            k: self._argument(v, is_number_slot(operator, k)) for k, v in operation.keywords.items()
        }
        if operation.operator == READ:
            self.numbers.append(self._new(None))
            if operation.phase != "update":  # an optimizer's numbers are known before
                self._code.append(_reading(positional[0], self.numbers[-1]))
            return
        written = {self._storage(n) for n in operation.written()}
        made = [
            None if name is None or self._storage(name) in written else self._made(name)
            for name in operation.results
        ]
        self._code.append(_calling(operator, positional, keywords, made))
        for name in {*operation.reads(), *filter(None, operation.results)}:
            self._last_use[self._storage(name)] = len(self._code) - 1

    def _made(self, name: str) -> int:
        """Return the slot of a result on new memory that nothing else uses from now on."""
        storage = self._storage(name)
        if storage in self._memory:
            raise ProgramError(f"{name} is created on memory that exists before the step")
        self._there[storage] = [name]
        return self._place_of(name)

    def _argument(self, value: Any, is_slot: bool) -> int:
        """Return the place of an argument."""
        if isinstance(value, str):
            return self.read(value)
        if isinstance(value, list | tuple):
            return self._listed([self._argument(item, is_slot) for item in value])
        if is_slot and is_number(value):
            self.numbers.append(self._new(None))
            return self.numbers[-1]
        return self._new(decode(value, _no_tensor))

    def _listed(self, places: list[int]) -> int:
        """Return the slot of a list of the values in other slots."""
        place = self._new(None)
        if not places:
            self.values[place] = []
        else:
            self._code.append(_listing(places, place))
        return place

    def _view(self, name: str, spec: TensorSpec, there: list[str]) -> _Instruction:
        """Return the instruction that fills the slot of a tensor on memory of others."""
        tensors, place = self._program.tensors, self._places[name]
        shape, stride = spec.shape, spec.stride
        base = next((n for n in there if tensors[n].dtype == spec.dtype), None)
        if base is not None and self._program.storages[spec.storage].kind == "input":
            # A batch may be any part of more data.
            source, distance = self._places[base], spec.offset - tensors[base].offset

            def beside(values: list[Any]) -> None:
                tensor = values[source]
                values[place] = tensor.as_strided(shape, stride, tensor.storage_offset() + distance)

            return beside
        if self._program.storages[spec.storage].kind == "input":
            raise ProgramError(f"{name} reinterprets the bytes of the batch as another dtype")
        if base is not None:
            source, offset = self._places[base], spec.offset

            def view(values: list[Any]) -> None:
                values[place] = values[source].as_strided(shape, stride, offset)

            return view
        other = self._places[there[0]] if there else None
        known = self._program.storages[spec.storage]
        size, device = known.bytes, torch.device("cpu") if known.host else self._device

        def on_memory(values: list[Any]) -> None:
            if other is not None:
                values[place] = tensor_on(values[other].untyped_storage(), spec)
            else:
                values[place] = tensor_on(
                    torch.zeros(size, dtype=torch.uint8, device=device).untyped_storage(), spec
                )

        return on_memory

    def _storage(self, name: str) -> str:
        return self._program.tensors[name].storage

    def _place_of(self, name: str) -> int:
        if name not in self._places:
            self._places[name] = self._new(None)
        return self._places[name]

    def _new(self, value: Any) -> int:
        self.values.append(value)
        return len(self.values) - 1


def _calling(
    operator: Any, positional: list[int], keywords: dict[str, int], made: list[int | None]
) -> _Instruction:
    """Return what calls an operator, and puts what it makes in its place."""
    given, names = _gathering(positional), tuple(keywords)
    named = _gathering([*keywords.values()])
    wanted = [(index, place) for index, place in enumerate(made) if place is not None]
    function: Callable[..., Any] | None = None  # chosen when there are arguments to call it with
    if not keywords and len(made) == 1 and wanted:
        [(_, only)] = wanted

        def one(values: list[Any]) -> None:
            nonlocal function
            args = given(values)
            if function is None:
                function = _function(operator, args, {})
            values[only] = function(*args)

        return one

    def several(values: list[Any]) -> None:
        nonlocal function
        args = given(values)
        keyed = dict(zip(names, named(values), strict=True)) if names else {}
        if function is None:
            function = _function(operator, args, keyed)
        result = function(*args, **keyed)
        if wanted:
            flat = _flat(result)
            for index, place in wanted:
                values[place] = flat[index]

    return several


def _function(operator: Any, args: Sequence[Any], keywords: dict[str, Any]) -> Callable[..., Any]:
    if str(operator) in ASK_FOR_GRADIENTS:
        return torch.enable_grad()(operator._op)  # type: ignore[no-any-return]
    return quickest(operator, args, keywords)


def _gathering(places: list[int]) -> Callable[[list[Any]], Sequence[Any]]:
    """Return a function that picks the values in some slots."""
    if not places:
        return lambda values: ()
    if len(places) == 1:
        [place] = places
        return lambda values: (values[place],)
    return itemgetter(*places)


def _listing(places: list[int], place: int) -> _Instruction:
    gathered = _gathering(places)

    def listed(values: list[Any]) -> None:
        values[place] = list(gathered(values))

    return listed


def _reading(tensor: int, place: int) -> _Instruction:
    def read(values: list[Any]) -> None:
        values[place] = values[tensor].item()

    return read


def _forgetting(places: list[int]) -> _Instruction:
    def forget(values: list[Any]) -> None:
        for place in places:
            values[place] = None

    return forget


def _flat(value: Any) -> list[Any]:
    found: list[Any] = []
    for item in value if isinstance(value, list | tuple) else [value]:
        found += item if isinstance(item, list | tuple) else [item]
    return found


def _no_tensor(name: str) -> Tensor:
    raise AssertionError(name)
