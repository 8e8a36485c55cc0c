"""Live: a plain program that is bound to memory, and runs one step after the other there.

It is bound to the live tensors of a training, and to memory of its own for the batch and for what the
step makes. Numbers of the step are put in their places before a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from everystep.errors import ProgramError
from everystep.program.arguments import decode, references
from everystep.program.calls import Call, late_calls, prebuilt_calls
from everystep.program.execute import BoundProgram, Memory
from everystep.program.memory import ALIGNMENT, copy_into
from everystep.program.operation import Operation
from everystep.program.operators import draws_random_numbers, parameters
from everystep.program.optimizers import OptimizerOperator
from everystep.program.plain import READ, is_number, is_number_slot
from everystep.program.program import Program
from everystep.program.steady_optimizer import SteadyOptimizer
from everystep.program.unset import unread_inputs

__all__ = ["LiveProgram", "LiveStep", "has_fixed_shapes"]

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

    A step is `put`, if its numbers differ from those of the step before; `load`, if its batch does; and
    `run`. `take` does the first and the last, and returns copies.

    Args:
        program: the program to run.
        state: the tensors of the training by name; their memory must not move.
        inputs: bytes of each input storage that does not belong to the batch, by the storage's name.
        batch: the names of the tensors of the batch.
        device: the device of memory that the program allocates.
        fixed: tensors of a batch that is the same at every step, by name. The program reads them where
            they are, if they lie as it expects, and a copy if not: see `in_place`.

    loss: the live tensor of the loss, or a NaN to be set from outside if the program has none; logged:
    the live tensors of all numbers that the step logs, by name; ends: the tensors that state names have
    after the step. The next step writes into all of them again. numbers: of the step, with those that
    it read after it ran; reads: the places of these among the numbers; in_place: the names of tensors of
    the batch that the program reads where they are; draws: whether the step draws random numbers.

    Raises:
        ProgramError: the program cannot be bound to these tensors; gives the reason.
    """

    is_plain = True
    _repeats = False  # its numbers change

    def __init__(
        self,
        program: Program,
        state: Mapping[str, Tensor],
        inputs: Mapping[str, Tensor],
        batch: Collection[str],
        device: torch.device,
        *,
        fixed: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        self.numbers: list[Number] = []
        self.reads: list[int] = []
        self._puts: list[_Put] = []
        self._optimizers: list[SteadyOptimizer] = []
        known = {program.tensors[name].storage: state[name] for name in program.state_names}
        given = [name for name in batch if name in program.tensors]
        here = _in_place(program, {name: fixed[name] for name in given if name in fixed}, device)
        self.in_place = frozenset(n for n in given if program.tensors[n].storage in here)
        self._batch = _BatchMemory(program, [n for n in given if n not in self.in_place], device)
        super().__init__(
            program, known | dict(inputs), device, own=self._batch.memory | here, steady=_steady(program)
        )
        if program.loss is None:
            self.loss = torch.full((), math.nan, dtype=torch.float64)
        self._batch.bind(self.tensor)
        if fixed:
            self.load(fixed)
        logged = {} if program.loss is None else {"loss": program.loss}
        self.logged = {n: self.tensor(tensor) for n, tensor in (logged | program.logged).items()}
        self.ends = {name: self.tensor(tensor) for name, tensor in program.ends.items()}
        self.draws = any(draws_random_numbers(each.resolved) for each in program.operations)

    def load(self, batch: Mapping[str, Tensor]) -> None:
        """Copy the tensors of a batch, of the geometry of the program, to where it reads them."""
        self._batch.load(batch)

    def put(self, numbers: Sequence[Number]) -> None:
        """Put the numbers of a step where its operations find them.

        numbers: in the order of the operations, with one for each that the step reads.

        Raises:
            ProgramError: there are more or fewer than the program needs.
        """
        if len(numbers) != len(self._puts):
            raise ProgramError(
                f"the step has {len(numbers)} numbers, but its program needs {len(self._puts)}"
            )
        self.numbers = [*numbers]
        for put, number in zip(self._puts, numbers, strict=True):
            put(number)
        for optimizer in self._optimizers:
            optimizer.settle()

    def take(self, numbers: Sequence[Number]) -> LiveStep:
        """Run a step on the loaded batch; call it inside `without_autograd`.

        numbers: of the step, in the order of its operations.

        Raises:
            RuntimeError: a kernel rejects its arguments (or IndexError, ValueError, TypeError).
        """
        self.put(numbers)
        self.run()
        return LiveStep({name: t.clone() for name, t in self.logged.items()}, self.numbers)

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
            self._optimizers.append(_stepping(operator, arguments, keywords, results))
            return [self._optimizers[-1]]
        made = late_calls if slots else prebuilt_calls
        return made(operator, arguments, keywords, results)

    def _reading(self, tensor: Tensor) -> list[Call]:
        """Return what reads a number from a tensor."""
        place = len(self._puts)
        self.reads.append(place)
        self._puts.append(lambda number: None)

        def read() -> None:
            self.numbers[place] = tensor.item()

        return [read]

    def _decoded(self, value: Any) -> Any:
        try:
            return decode(value, self.tensor)
        except ValueError as error:
            raise ProgramError(str(error)) from None


def has_fixed_shapes(program: Program) -> bool:
    """Tell whether no result has a shape that depends on the numbers in tensors."""
    return not any(_has_shape_of_values(each, program) for each in program.operations)


def _has_shape_of_values(operation: Operation, program: Program) -> bool:
    if torch.Tag.dynamic_output_shape not in operation.resolved.tags:
        return False
    if operation.name not in ("index", "_unsafe_index"):
        return True
    masks = references(operation.given()["indices"])
    return any(program.tensors[name].dtype in ("bool", "uint8") for name in masks)


def _steady(program: Program) -> list[int]:
    """Return the operations that have the same results at every step.

    They read only results of each other, no number of the step, and draw nothing. Each is the only one
    that writes its results, which no state name has after the step.
    """
    writers: dict[str, int] = {}
    for operation in program.operations:
        for storage in {program.tensors[name].storage for name in _written(operation)}:
            writers[storage] = writers.get(storage, 0) + 1
    handed_out = {program.tensors[name].storage for name in program.ends.values()}
    fixed: set[str] = set()
    found = []
    for place, operation in enumerate(program.operations):
        unread = unread_inputs(operation)
        reads = {program.tensors[name].storage for name in operation.reads() if name not in unread}
        writes = {program.tensors[name].storage for name in _written(operation)}
        is_own = all(
            program.storages[name].kind == "temporary"
            and writers[name] == 1
            and name not in handed_out | reads
            for name in writes
        )
        if writes and is_own and reads <= fixed and not _has_numbers(operation):
            fixed |= writes
            found.append(place)
    return found


def _written(operation: Operation) -> list[str]:
    return [*filter(None, operation.results), *operation.written()]


def _has_numbers(operation: Operation) -> bool:
    """Tell whether an operation has numbers of the step, or draws some."""
    operator = operation.resolved
    given = operation.given().items()
    return draws_random_numbers(operator) or any(
        is_number_slot(operator, name) and _holds_number(value) for name, value in given
    )


def _holds_number(value: Any) -> bool:
    return any(map(_holds_number, value)) if isinstance(value, list | tuple) else is_number(value)


def _stepping(
    operator: OptimizerOperator,
    arguments: Sequence[Any],
    settings: Mapping[str, Any],
    results: Sequence[Tensor | None],
) -> SteadyOptimizer:
    """Return what takes the step of an optimizer, with the settings that it finds."""
    if results:
        raise ProgramError(f"{operator} creates tensors, which only the first step of a training does")
    try:
        return SteadyOptimizer(operator, arguments, settings)
    except ValueError as error:
        raise ProgramError(f"{operator}: {error}") from None


def _slots(value: Any, target: Any, place: Any) -> Iterator[_Put]:
    """Yield what puts the numbers of a step into an argument, which is at some place of a list."""
    if isinstance(value, list | tuple):
        target[place] = items = [*target[place]]
        for index, item in enumerate(value):
            yield from _slots(item, items, index)
    elif is_number(value):
        kind = int if isinstance(value, int) else float

        def put(number: Number) -> None:
            target[place] = kind(number)

        yield put


def _in_place(program: Program, fixed: Mapping[str, Tensor], device: torch.device) -> dict[str, Memory]:
    """Return the memory of tensors of a batch that a program can read where they are, by storage."""
    written = {program.tensors[name].storage for op in program.operations for name in _written(op)}
    found = {}
    for name, tensor in fixed.items():
        spec = program.tensors[name]
        begin = spec.offset * tensor.itemsize
        others = [t for n, t in program.tensors.items() if t.storage == spec.storage and n != name]
        is_alone = all(begin <= t.offset * t.torch_dtype.itemsize and t.end <= spec.end for t in others)
        place = torch.device("cpu") if program.storages[spec.storage].host else device
        lies_so = (tensor.dtype, tuple(tensor.shape), tuple(tensor.stride())) == (
            spec.torch_dtype,
            spec.shape,
            spec.stride,
        )
        # Where kernels meet other boundaries of memory, they may add up in another order.
        is_aligned = (tensor.data_ptr() - begin) % ALIGNMENT == 0
        is_here = tensor.device.type == place.type and tensor.layout == torch.strided
        if is_alone and lies_so and is_aligned and is_here and spec.storage not in written:
            start = int(tensor.storage_offset()) * tensor.itemsize - begin
            found[spec.storage] = Memory(tensor.untyped_storage(), start)
    return found


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
