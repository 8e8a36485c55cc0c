"""Live: a plain program that runs steps of a training in place of the recorded Python.

It is bound to the live tensors of the training, and to memory of its own for the batch and for what the
step makes. Numbers of the step are put in their places before each run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from everystep.errors import ProgramError
from everystep.program.arguments import decode
from everystep.program.calls import Call, late_calls, prebuilt_calls
from everystep.program.execute import BoundProgram, Memory
from everystep.program.memory import ALIGNMENT, copy_into
from everystep.program.operation import Operation
from everystep.program.operators import parameters
from everystep.program.optimizers import BoundOptimizer, OptimizerOperator
from everystep.program.plain import READ, is_number, is_number_slot
from everystep.program.program import Program

__all__ = ["LiveProgram", "LiveStep"]

Number = int | float
#: Puts a number of the step where an operation finds it.
_Put = Callable[[Number], None]


class LiveStep(NamedTuple):
    """The results of a step.

    given: copies of the loss, if the program has one, and of other logged numbers, by name; numbers: of
    the step, including those that it read.
    """

    given: dict[str, Tensor]
    numbers: list[Number]


class LiveProgram(BoundProgram):
    """A plain program, bound to the live tensors of a training.

    Args:
        program: the program to run.
        state: the tensors of the training by name; their memory must not move.
        inputs: bytes of each input storage that does not belong to the batch, by the storage's name.
        batch: the names of the tensors of the batch.
        device: the device of memory that the program allocates.

    ends: the tensors that state names have after the step. The next step writes into them again.

    Raises:
        ProgramError: the program cannot be bound to these tensors; gives the reason.
    """

    is_plain = True

    def __init__(
        self,
        program: Program,
        state: Mapping[str, Tensor],
        inputs: Mapping[str, Tensor],
        batch: Collection[str],
        device: torch.device,
    ) -> None:
        self._numbers: list[Number] = []
        self._puts: list[_Put] = []
        known = {program.tensors[name].storage: state[name] for name in program.state_names}
        self._batch = _BatchMemory(program, [name for name in batch if name in program.tensors], device)
        super().__init__(program, known | dict(inputs), device, own=self._batch.memory)
        self._batch.bind(self.tensor)
        logged = {} if program.loss is None else {"loss": program.loss}
        self._logged = {n: self.tensor(tensor) for n, tensor in (logged | program.logged).items()}
        self.ends = {name: self.tensor(tensor) for name, tensor in program.ends.items()}

    def load(self, batch: Mapping[str, Tensor]) -> None:
        """Copy the tensors of a batch, of the geometry of the program, to where it reads them."""
        self._batch.load(batch)

    def take(self, numbers: Sequence[Number]) -> LiveStep:
        """Run a step on the loaded batch; call it inside `without_autograd`.

        numbers: of the step, in the order of its operations.

        Raises:
            RuntimeError: a kernel rejects its arguments (or IndexError, ValueError, TypeError).
        """
        self._numbers = [*numbers]
        for put, number in zip(self._puts, self._numbers, strict=True):
            put(number)
        self.run()
        return LiveStep({name: t.clone() for name, t in self._logged.items()}, self._numbers)

    def _calls(self, operation: Operation) -> list[Call]:
        operator = operation.resolved
        names = [p.name for p in parameters(operator) if p.is_positional]
        arguments = [self._decoded(value) for value in operation.arguments]
        keywords = {key: self._decoded(value) for key, value in operation.keywords.items()}
        slots: list[_Put] = []
        for place, (name, value) in enumerate(zip(names, operation.arguments, strict=False)):
            if is_number_slot(operator, name):
                slots += _slots(value, arguments, place)
        for name, value in operation.keywords.items():
            if is_number_slot(operator, name):
                slots += _slots(value, keywords, name)
        self._puts += slots
        if operation.operator == READ:
            return self._reading(arguments[0])
        results = [None if name is None else self.tensor(name) for name in operation.results]
        if isinstance(operator, OptimizerOperator):
            return [_stepping(operator, arguments, keywords, results)]
        made = late_calls if slots else prebuilt_calls
        return made(operator, arguments, keywords, results)

    def _reading(self, tensor: Tensor) -> list[Call]:
        """Return what reads a number from a tensor."""
        place = len(self._puts)
        self._puts.append(lambda number: None)

        def read() -> None:
            self._numbers[place] = tensor.item()

        return [read]

    def _decoded(self, value: Any) -> Any:
        try:
            return decode(value, self.tensor)
        except ValueError as error:
            raise ProgramError(str(error)) from None


def _stepping(
    operator: OptimizerOperator,
    arguments: Sequence[Any],
    settings: Mapping[str, Any],
    results: Sequence[Tensor | None],
) -> Call:
    """Return what takes the step of an optimizer, with the settings that it finds."""
    if results:
        raise ProgramError(f"{operator} creates tensors, which only the first step of a training does")
    try:
        return partial(BoundOptimizer(operator, *arguments).step, settings)
    except ValueError as error:
        raise ProgramError(f"{operator}: {error}") from None


def _slots(value: Any, target: Any, place: Any) -> Iterator[_Put]:
    """Yield what puts the numbers of a step into an argument, which is at some place of a list."""
    if isinstance(value, list | tuple):
        target[place] = items = [*target[place]]
        for index, item in enumerate(value):
            yield from _slots(item, items, index)
    elif is_number(value):

        def put(number: Number) -> None:
            target[place] = number

        yield put


class _BatchMemory:
    """Memory for the batch of each step. A batch may be any part of more data, at any place of it.

    Args:
        program: the program.
        names: the tensors of the batch that the program has.
        device: where it runs.

    Raises:
        ProgramError: the program reads memory around the tensors of the batch.
    """

    def __init__(self, program: Program, names: Sequence[str], device: torch.device) -> None:
        self.memory: dict[str, Memory] = {}
        self._whole: list[str] = []
        self._begins = {n: _extent(program, n)[0] for n in names}
        self._each: list[str] = []
        self._tensors: dict[str, Tensor] = {}
        on: dict[str, list[str]] = {}
        for name in names:
            on.setdefault(program.tensors[name].storage, []).append(name)
        for storage, mine in on.items():
            extents = [_extent(program, name) for name in mine]
            begin, end = min(b for b, _ in extents), max(e for _, e in extents)
            begin -= begin % ALIGNMENT
            others = [n for n, t in program.tensors.items() if t.storage == storage and n not in names]
            if any(not begin <= b <= e <= end for b, e in (_extent(program, n) for n in others)):
                raise ProgramError("the step reads memory around its batch")
            known = program.storages[storage]
            place = torch.device("cpu") if known.host else device
            memory = torch.empty(end - begin, dtype=torch.uint8, device=place).untyped_storage()
            self.memory[storage] = Memory(memory, -begin)
            if others:  # views of the batch, perhaps of what lies between the numbers of a tensor
                self._whole += mine
            else:
                self._each += mine

    def bind(self, tensor: Callable[[str], Tensor]) -> None:
        """Note where the tensors are. tensor: returns one of the program's, by name."""
        self._tensors = {name: tensor(name) for name in self._begins}

    def load(self, batch: Mapping[str, Tensor]) -> None:
        """Copy a batch."""
        for name in self._each:
            copy_into(self._tensors[name], batch[name])
        for name in self._whole:
            _bytes_of(self._tensors[name]).copy_(_bytes_of(batch[name]))


def _bytes_of(tensor: Tensor) -> Tensor:
    """Return all memory between the first and the last number of a tensor."""
    begin = int(tensor.storage_offset()) * tensor.itemsize
    count = sum((s - 1) * d for s, d in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    size = count * tensor.itemsize if tensor.numel() else 0
    whole = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return whole.set_(tensor.untyped_storage(), begin, (size,), (1,))


def _extent(program: Program, name: str) -> tuple[int, int]:
    """Return the first and the last byte (excluded) of a tensor in its storage."""
    spec = program.tensors[name]
    return spec.offset * spec.torch_dtype.itemsize, spec.end
