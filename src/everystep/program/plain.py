"""Plain: an interpreter of plain programs, which calls operators one after the other as a loop did.

A plain program describes one observed step of a loop. Its numbers (`Scalar` and `float` arguments)
belong to the step: a loop with another learning rate at every step has one program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from everystep.errors import ProgramError
from everystep.program.arguments import decode, json_floats
from everystep.program.calls import ASK_FOR_GRADIENTS
from everystep.program.memory import copy_into
from everystep.program.operation import Operation, TensorSpec
from everystep.program.operators import REFUSALS, draws_random_numbers, parameters
from everystep.program.optimizers import OptimizerOperator
from everystep.program.program import Program

__all__ = [
    "READ",
    "Environment",
    "PlainProgram",
    "PlainStep",
    "is_number",
    "is_number_slot",
    "lay_inputs",
    "lay_state",
    "lies_as",
    "tensor_on",
]

#: The operator by which Python reads a number from a tensor.
READ = "aten._local_scalar_dense.default"
#: Operators with `Scalar` arguments that decide the shape of their result.
_SHAPED_BY_NUMBERS = {"arange", "range"}
#: Whole numbers that bound a draw.
_BOUNDS = {"randint": {"low", "high"}, "randint_like": {"low", "high"}, "random_": {"from", "to"}}

Number = int | float


class PlainStep(NamedTuple):
    """The result of running a program.

    loss: None if the program has none; differs: the first deviation from the program, in words, or None.
    """

    loss: Tensor | None
    differs: str | None


@cache
def _slots(operator: Any) -> frozenset[str]:
    """Return the arguments of an operator that hold numbers which may differ at each step."""
    if isinstance(operator, OptimizerOperator):
        return frozenset(operator.settings)
    name = operator.overloadpacket.__name__
    if name in _SHAPED_BY_NUMBERS:
        return frozenset()
    bounds: set[str] = _BOUNDS.get(name, set())
    # A number may replace a tensor, too.
    kinds = ("number", "float", "Tensor")
    held = [f"{holder}[{kind}]" for holder in ("Optional", "List") for kind in kinds]
    return frozenset(
        p.name for p in parameters(operator) if p.kind in (*kinds, *held) or p.name in bounds
    )


def is_number_slot(operator: Any, name: str) -> bool:
    """Tell whether numbers in an argument of an operator belong to the step, not to its program."""
    return name in _slots(operator)


def is_number(value: Any) -> bool:
    """Tell whether an argument, as a program holds it, is a number, not a truth value."""
    is_special = isinstance(value, dict) and "float" in value
    return is_special or (isinstance(value, int | float) and not isinstance(value, bool))


class PlainProgram:
    """A plain program, ready to be run.

    Raises:
        ProgramError: an argument is not of a kind that a program holds.
    """

    def __init__(self, program: Program, device: torch.device) -> None:
        self.program = program
        self._device = device
        self._calls = [_Call(operation) for operation in program.operations]
        needed = program.state_names
        self.state = {name: spec for name, spec in program.tensors.items() if name in needed}
        self.inputs = {
            name: spec
            for name, spec in program.tensors.items()
            if program.storages[spec.storage].kind == "input"
        }

    @cached_property
    def written(self) -> list[list[str]]:
        """The names of the tensors that each operation writes into, results aside."""
        return [operation.written() for operation in self.program.operations]

    @cached_property
    def given_after(self) -> dict[str, int]:
        """See `Program.given_after`."""
        return self.program.given_after()

    def _iterated(self, numbers: Sequence[Number]) -> Iterator[Number]:
        wanted = sum(call.numbers for call in self._calls)
        if len(numbers) != wanted:
            raise ProgramError(f"the step has {len(numbers)} numbers, but its program needs {wanted}")
        return iter(numbers)

    def numbers_of(self, numbers: Sequence[Number]) -> list[list[Number]]:
        """Return the numbers of a step by operation."""
        left = self._iterated(numbers)
        return [list(islice(left, call.numbers)) for call in self._calls]

    def operation_with(self, place: int, numbers: Sequence[Number]) -> Operation:
        """Return an operation with its numbers of a step in it."""
        return self._calls[place].with_numbers(iter(numbers))

    def operations_with(self, numbers: Sequence[Number]) -> list[Operation]:
        """Return the operations with the numbers of a step in them."""
        left = self._iterated(numbers)
        return [call.with_numbers(left) for call in self._calls]

    def run(
        self,
        state: dict[str, Tensor],
        inputs: Mapping[str, Tensor],
        numbers: Sequence[Number],
        generators: Mapping[int, Tensor],
        look: Callable[[int, Environment], None] | None = None,
    ) -> PlainStep:
        """Run the step; call this inside `without_autograd`.

        Args:
            state: tensors by name; the step changes them in place, replaces, adds and removes them.
            inputs: bytes of each input storage, by its name; the step may change them.
            numbers: of the step, in the order of its operations, including those that Python read.
            generators: states to set in torch's generator before a draw, by the draw's number from 0.
            look: called before each operation with its number, and with their count at the end.

        Raises:
            ProgramError: the state or the inputs do not fit the program.
        """
        left = self._iterated(numbers)
        environment = Environment(self, state, inputs, self._device)
        differs: str | None = None
        draws = 0
        for index, call in enumerate(self._calls):
            if look is not None:
                look(index, environment)
            try:
                if call.draws and draws in generators:
                    torch.set_rng_state(generators[draws])
                draws += call.draws
                found = call.run(environment, left)
            except REFUSALS as error:
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                raise ProgramError(f"operation #{index}, {call.operation.operator}: {reason}") from None
            differs = differs or (found and f"operation #{index}, {call.operation.operator}, {found}")
        if look is not None:
            look(len(self._calls), environment)
        loss = None if self.program.loss is None else environment.tensor(self.program.loss).clone()
        ends = {name: environment.tensor(tensor) for name, tensor in self.program.ends.items()}
        for name in self.program.gone:
            state.pop(name, None)
        state.update(ends)
        return PlainStep(loss, differs)


class _Call:
    """An operation with its operator looked up; arguments are put in place at each call."""

    def __init__(self, operation: Operation) -> None:
        self.operation = operation
        operator = operation.resolved
        self._call = operator._op
        if operation.operator in ASK_FOR_GRADIENTS:
            self._call = torch.enable_grad()(operator._op)
        self._reads_number = operation.operator == READ
        self.draws = draws_random_numbers(operator)
        names = [p.name for p in parameters(operator) if p.is_positional]
        pairs = zip(names, operation.arguments, strict=False)
        self._positional = [(value, is_number_slot(operator, name)) for name, value in pairs]
        self._keywords = {
            key: (value, is_number_slot(operator, key)) for key, value in operation.keywords.items()
        }

    @property
    def numbers(self) -> int:
        """How many numbers of the step it has."""
        values = [*self._positional, *self._keywords.values()]
        return self._reads_number + sum(_count(value) for value, is_slot in values if is_slot)

    def with_numbers(self, numbers: Iterator[Number]) -> Operation:
        """Return the operation with the numbers of a step in it."""

        def put(value: Any, is_slot: bool) -> Any:
            if isinstance(value, list | tuple):
                return [put(item, is_slot) for item in value]
            is_of_step = is_slot and is_number(value)
            return json_floats(_next(numbers, value)) if is_of_step else value

        arguments = tuple(put(*each) for each in self._positional)
        keywords = {key: put(*each) for key, each in self._keywords.items()}
        if self._reads_number:
            next(numbers, None)
        return self.operation.model_copy(update={"arguments": arguments, "keywords": keywords})

    def run(self, environment: Environment, numbers: Iterator[Number]) -> str | None:
        """Call the operator; return the deviation from the program in words, or None."""

        def put(value: Any, is_slot: bool) -> Any:
            if isinstance(value, list | tuple):
                return [put(item, is_slot) for item in value]
            is_of_step = is_slot and is_number(value)
            return _next(numbers, value) if is_of_step else decode(value, environment.tensor)

        arguments = [put(*each) for each in self._positional]
        keywords = {key: put(*each) for key, each in self._keywords.items()}
        result = self._call(*arguments, **keywords)
        if self._reads_number:
            known = next(numbers)
            same = known == result or (known != known and result != result)
            return None if same else f"returns {result} to Python, but the recording has {known}"
        flat = _flat(result) if self.operation.results else []
        for name, tensor in zip(self.operation.results, flat, strict=False):
            if name is not None:
                environment.put(name, tensor)
        return None


def _count(value: Any) -> int:
    return sum(map(_count, value)) if isinstance(value, list | tuple) else int(is_number(value))


def _next(numbers: Iterator[Number], value: Any) -> Number:
    """Return the step's number for a slot in its program.

    Raises:
        ValueError, OverflowError: it is not of the kind that the program has there.
    """
    return (int if isinstance(value, int) else float)(next(numbers))


def _flat(value: Any) -> list[Any]:
    found: list[Any] = []
    for item in value if isinstance(value, list | tuple) else [value]:
        found += item if isinstance(item, list | tuple) else [item]
    return found


class Environment:
    """The memory of a step under way: storages by name, and tensors on them."""

    def __init__(
        self,
        plain: PlainProgram,
        state: dict[str, Tensor],
        inputs: Mapping[str, Tensor],
        device: torch.device,
    ) -> None:
        self._program = plain.program
        self._device = device
        self._memory: dict[str, torch.UntypedStorage] = {}
        #: The tensors that lie on each storage, by their names.
        self._tensors: dict[str, dict[str, Tensor]] = {}
        lay_state(plain, state, device)
        for name, spec in plain.state.items():
            self._memory[spec.storage] = state[name].untyped_storage()
        for name, storage in plain.program.storages.items():
            if storage.kind != "input":
                continue
            given = inputs.get(name)
            if given is None or given.nbytes < storage.bytes:
                raise ProgramError(f"the input {name} of {storage.bytes} bytes is missing")
            self._memory[name] = given.to(
                torch.device("cpu") if storage.host else device
            ).untyped_storage()

    def tensor(self, name: str) -> Tensor:
        """Return a tensor of the program, on its live memory."""
        spec = self._program.tensors[name]
        here = self._tensors.setdefault(spec.storage, {})
        if name not in here:
            if spec.storage not in self._memory:
                self._memory[spec.storage] = self._fresh(spec.storage)
            here[name] = tensor_on(self._memory[spec.storage], spec)
        return here[name]

    def is_there(self, name: str) -> bool:
        """Tell whether a tensor's memory exists yet."""
        return self._program.tensors[name].storage in self._memory

    def put(self, name: str, tensor: Any) -> None:
        """Store a tensor that an operation returned.

        Raises:
            ValueError: its geometry differs from the program's.
        """
        spec = self._program.tensors[name]
        if not isinstance(tensor, Tensor) or not lies_as(tensor, spec):
            what = f"{tuple(tensor.shape)} {tensor.dtype}" if isinstance(tensor, Tensor) else "nothing"
            raise ValueError(f"returns {what} as {name}, which should be {spec.shape} {spec.dtype}")
        storage = tensor.untyped_storage()
        known = self._memory.get(spec.storage)
        if known is not None and known.data_ptr() == storage.data_ptr():
            return  # it wrote in place
        self._memory[spec.storage] = storage
        self._tensors[spec.storage] = {name: tensor}

    def _fresh(self, storage: str) -> torch.UntypedStorage:
        known = self._program.storages[storage]
        device = torch.device("cpu") if known.host else self._device
        return torch.zeros(known.bytes, dtype=torch.uint8, device=device).untyped_storage()


def lay_state(plain: PlainProgram, state: dict[str, Tensor], device: torch.device) -> None:
    """Lay out the tensors of a state in memory as the program expects, with the same values.

    Raises:
        ProgramError: one is missing, or of another shape or dtype.
    """
    on: dict[str, list[str]] = {}
    for name, spec in plain.state.items():
        given = state.get(name)
        if given is None or tuple(given.shape) != spec.shape or given.dtype != spec.torch_dtype:
            what = "missing" if given is None else f"{tuple(given.shape)} {given.dtype}"
            raise ProgramError(
                f"{name} of the state is {what}, but the step needs {spec.shape} {spec.dtype}"
            )
        on.setdefault(spec.storage, []).append(name)
    for storage, names in on.items():
        places = {state[name].untyped_storage().data_ptr() for name in names}
        if len(places) == 1 and all(lies_as(state[name], plain.state[name]) for name in names):
            continue
        known = plain.program.storages[storage]
        place = torch.device("cpu") if known.host else device
        memory = torch.zeros(known.bytes, dtype=torch.uint8, device=place).untyped_storage()
        for name in names:
            laid = tensor_on(memory, plain.state[name])
            copy_into(laid, state[name])
            state[name] = laid


def lay_inputs(plain: PlainProgram, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the bytes of each input storage of a program, by its name.

    given: tensors of the batch by `batch/name`, and the bytes of other inputs by `input/storage`.

    Raises:
        ProgramError: a tensor of the batch does not fit the program.
    """
    found = {n.removeprefix("input/"): t for n, t in given.items() if n.startswith("input/")}
    for name, spec in plain.inputs.items():
        leaf = given.get(f"batch/{name}")
        if leaf is None:
            continue
        if spec.storage not in found:
            size = plain.program.storages[spec.storage].bytes
            found[spec.storage] = torch.zeros(size, dtype=torch.uint8)
        target = tensor_on(found[spec.storage].untyped_storage(), spec)
        if target.shape != leaf.shape or target.dtype != leaf.dtype:
            raise ProgramError(f"{name} of the batch does not match the program")
        copy_into(target, leaf)
    return found


def lies_as(tensor: Tensor, spec: TensorSpec) -> bool:
    """Tell whether a tensor has the geometry that a program expects."""
    if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.torch_dtype:
        return False
    if tensor.layout != torch.strided or tensor.storage_offset() != spec.offset:
        return False
    return 0 in spec.shape or all(
        one == two or size == 1
        for one, two, size in zip(tensor.stride(), spec.stride, spec.shape, strict=True)
    )


def tensor_on(storage: torch.UntypedStorage, spec: TensorSpec) -> Tensor:
    """Return a tensor on memory.

    Raises:
        ProgramError: it would exceed the memory.
    """
    if spec.end > storage.nbytes():
        raise ProgramError(f"a tensor needs {spec.end} bytes, but the storage has {storage.nbytes()}")
    empty = torch.empty(0, dtype=spec.torch_dtype, device=storage.device)
    return empty.set_(storage, spec.offset, spec.shape, spec.stride)
