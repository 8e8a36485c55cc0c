"""The interpreter: runs a program operator by operator, in new memory, as Python ran the step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from itertools import islice
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from everystep.device import set_drawing_state
from everystep.errors import ProgramError
from everystep.ops.arguments import decode, json_floats
from everystep.ops.operators import REFUSALS, draws_random_numbers, flattened
from everystep.program.calls import ASK_FOR_GRADIENTS
from everystep.program.memory import check_memory, copy_into, lies_as, over_after, tensor_on
from everystep.program.number_slots import READ, Number, read_difference, slots_of
from everystep.program.operation import Operation
from everystep.program.step_program import Program

__all__ = ["Interpreter", "Look", "Looks"]

#: Looks at a step under way; it is given a function that returns a live tensor by its name.
Look = Callable[[Callable[[str], Tensor]], object]
#: What looks at a step, by the operation after which it does (-1: before all).
Looks = Mapping[int, Sequence[Look]]


class Interpreter:
    """A program, ready to be run. state, inputs: the tensors that must exist before the step, by name.

    Raises:
        ProgramError: an argument is not of a kind that a program holds.
    """

    def __init__(self, program: Program, device: torch.device) -> None:
        self.program = program
        self._device = device
        self._calls = [_Instruction(operation) for operation in program.operations]
        # Memory is freed as early as Python would free it: a step of a large model fits again.
        self._over_after = over_after(program)
        needed = program.state_names
        self.state = {name: spec for name, spec in program.tensors.items() if name in needed}
        self.inputs = {
            name: spec
            for name, spec in program.tensors.items()
            if program.storages[spec.storage].kind == "input"
        }

    def at(self, numbers: Sequence[Number]) -> tuple[Interpreter, list[Number]]:
        """Return the interpreter of one step, and the numbers of the operations of its program.

        numbers: of the step: where its tensors lie that move, and those of its operations.

        Raises:
            ProgramError: a tensor lies outside of its memory.
        """
        count = len(self.program.moves)
        if not count:
            return self, [*numbers]
        # The instructions are the same; only the tensors that move lie at other places.
        other = copy(self)
        other.program = self.program.placed(numbers[:count])
        other.inputs = {name: other.program.tensors[name] for name in self.inputs}
        return other, [*numbers[count:]]

    def numbers_of(self, numbers: Sequence[Number]) -> list[list[Number]]:
        """Return the numbers of a step by operation.

        Raises:
            ProgramError: there are more or fewer than the program needs.
        """
        wanted = sum(call.numbers for call in self._calls)
        if len(numbers) != wanted:
            raise ProgramError(f"the step has {len(numbers)} numbers, but its program needs {wanted}")
        left = iter(numbers)
        return [list(islice(left, call.numbers)) for call in self._calls]

    def operation_with(self, place: int, numbers: Sequence[Number]) -> Operation:
        """Return an operation with its numbers of a step in it."""
        return self._calls[place].with_numbers(numbers)

    def run(
        self,
        state: dict[str, Tensor],
        inputs: Mapping[str, Tensor],
        numbers: Sequence[Number],
        looks: Looks = MappingProxyType({}),
    ) -> tuple[Tensor | None, str | None]:
        """Run the step; call this inside `without_autograd`.

        Returns the loss, None if the program has none, and the first deviation from it in words.

        state: tensors by name; the step changes them in place, replaces, adds and removes them; inputs:
        as of `lay_inputs`, and `generator/N`: the state to set in torch's generators before draw N, from
        0; the step may change them; numbers: of the step, in the order of its operations, including
        those that Python read.

        Raises:
            ProgramError: the state or the inputs do not fit the program.
        """
        own = zip(self._calls, self.numbers_of(numbers), strict=True)
        environment = _Environment(self, state, self.lay_inputs(inputs))
        differs: str | None = None
        draws = 0
        for look in looks.get(-1, ()):
            look(environment.tensor)
        for index, (call, given) in enumerate(own):
            try:
                if call.draws and (generator := inputs.get(f"generator/{draws}")) is not None:
                    set_drawing_state(self._device, generator)
                draws += call.draws
                found = call.run(environment, given)
            except REFUSALS as error:
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                raise ProgramError(f"operation #{index}, {call.operation.operator}: {reason}") from None
            differs = differs or (found and f"operation #{index}, {call.operation.operator}, {found}")
            for look in looks.get(index, ()):
                look(environment.tensor)
            # After the looks, which may still read these.
            environment.free(self._over_after.get(index, ()))
        loss = None if self.program.loss is None else environment.tensor(self.program.loss).clone()
        ends = {name: environment.tensor(tensor) for name, tensor in self.program.ends.items()}
        for name in self.program.gone:
            state.pop(name, None)
        state.update(ends)
        return loss, differs

    def lay_state(self, state: dict[str, Tensor]) -> None:
        """Lay out the tensors of a state in memory as the program expects, with the same values.

        Raises:
            ProgramError: one is missing, or of another shape or dtype.
        """
        on: dict[str, list[str]] = {}
        for name, spec in self.state.items():
            given = state.get(name)
            if given is None or tuple(given.shape) != spec.shape or given.dtype != spec.torch_dtype:
                what = "missing" if given is None else f"{tuple(given.shape)} {given.dtype}"
                raise ProgramError(
                    f"{name} of the state is {what}, but the step needs {spec.shape} {spec.dtype}"
                )
            on.setdefault(spec.storage, []).append(name)
        # Tensors on one storage move together, or they would no longer share it.
        for storage, names in on.items():
            tensors = [state[name] for name in names]
            here = {(each.device.type, each.untyped_storage().data_ptr()) for each in tensors}
            is_laid = all(lies_as(state[name], self.state[name]) for name in names)
            if is_laid and [device for device, _ in here] == [self.place_of(storage).type]:
                continue
            memory = self.fresh(storage)
            for name in names:
                laid = tensor_on(memory, self.state[name])
                copy_into(laid, state[name])
                state[name] = laid

    def lay_inputs(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the bytes of each input storage of the program, by its name.

        given: tensors of the batch by `batch/name`, and the bytes of other inputs by `input/storage`.

        Raises:
            ProgramError: a tensor of the batch does not fit the program.
        """
        found = {n.removeprefix("input/"): t for n, t in given.items() if n.startswith("input/")}
        for name, spec in self.inputs.items():
            leaf = given.get(f"batch/{name}")
            if leaf is None:
                continue
            if spec.storage not in found:
                size = self.program.storages[spec.storage].bytes
                # Zeros between the numbers of a tensor with gaps, so that each replay has the same bytes
                # there.
                found[spec.storage] = torch.zeros(size, dtype=torch.uint8)
            target = tensor_on(found[spec.storage].untyped_storage(), spec)
            if target.shape != leaf.shape or target.dtype != leaf.dtype:
                raise ProgramError(f"{name} of the batch does not match the program")
            copy_into(target, leaf)
        return found

    def fresh(self, storage: str) -> torch.UntypedStorage:
        """Return memory of zeros for a storage of the program.

        Raises:
            ProgramError: there is not enough.
        """
        size, device = self.program.storages[storage].bytes, self.place_of(storage)
        check_memory(size, device)
        return torch.zeros(size, dtype=torch.uint8, device=device).untyped_storage()

    def place_of(self, storage: str) -> torch.device:
        """Return the device that a storage of the program is on."""
        return torch.device("cpu") if self.program.storages[storage].host else self._device


class _Instruction:
    """An operation with its operator looked up; arguments are put in place at each call."""

    def __init__(self, operation: Operation) -> None:
        self.operation = operation
        operator = operation.resolved
        self._call = operator._op
        if operation.operator in ASK_FOR_GRADIENTS:
            self._call = torch.enable_grad()(operator._op)
        self._reads_number = operation.operator == READ
        self.draws = draws_random_numbers(operator)
        self._slots = slots_of(operation)
        #: How many numbers of the step it has.
        self.numbers = self._reads_number + len(self._slots)

    def with_numbers(self, numbers: Sequence[Number]) -> Operation:
        """Return the operation with its numbers of a step in it."""
        arguments, keywords = self._given(numbers, json_floats)
        changed = {"arguments": tuple(json_floats(arguments)), "keywords": json_floats(keywords)}
        return self.operation.model_copy(update=changed)

    def _given(
        self, numbers: Sequence[Number], convert: Callable[[Any], Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments, in new lists, with its numbers. convert: converts the others."""
        arguments = [convert(value) for value in self.operation.arguments]
        keywords = {key: convert(value) for key, value in self.operation.keywords.items()}
        own = numbers[: len(self._slots)]  # the one that Python reads has no slot
        for slot, number in zip(self._slots, own, strict=True):
            slot.put(arguments, keywords, number)
        return arguments, keywords

    def run(self, environment: _Environment, numbers: Sequence[Number]) -> str | None:
        """Call the operator; return a deviation from the program as text, or None."""
        arguments, keywords = self._given(numbers, lambda value: decode(value, environment.tensor))
        result = self._call(*arguments, **keywords)
        if self._reads_number:
            return read_difference(result, numbers[-1])
        # An operator that writes in place returns what it was given, which has a name already.
        for name, tensor in zip(self.operation.results, flattened(result), strict=False):
            if name is not None:
                environment.put(name, tensor)
        return None


class _Environment:
    """The memory of a step under way: storages by name, and tensors on them."""

    def __init__(
        self,
        interpreter: Interpreter,
        state: dict[str, Tensor],
        inputs: Mapping[str, Tensor],
    ) -> None:
        self._interpreter = interpreter
        self._program = interpreter.program
        #: None of a storage that is over.
        self._memory: dict[str, torch.UntypedStorage | None] = {}
        #: The tensors on each storage, by their names.
        self._tensors: dict[str, dict[str, Tensor]] = {}
        interpreter.lay_state(state)
        for name, spec in interpreter.state.items():
            self._memory[spec.storage] = state[name].untyped_storage()
        for name in self._program.of_kind("input"):
            given, size = inputs.get(name), self._program.storages[name].bytes
            if given is None or given.nbytes < size:
                raise ProgramError(f"the input {name} of {size} bytes is missing")
            self._memory[name] = given.to(interpreter.place_of(name)).untyped_storage()

    def tensor(self, name: str) -> Tensor:
        """Return a tensor of the program, on its live memory."""
        spec = self._program.tensors[name]
        here = self._tensors.setdefault(spec.storage, {})
        if name not in here:
            if spec.storage not in self._memory:
                self._memory[spec.storage] = self._interpreter.fresh(spec.storage)
            memory = self._memory[spec.storage]
            assert memory is not None
            here[name] = tensor_on(memory, spec)
        return here[name]

    def free(self, storages: Iterable[str]) -> None:
        """Let go of storages that nothing needs any more."""
        for storage in storages:
            self._memory[storage] = None
            self._tensors.pop(storage, None)

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
        # Tensors on the memory of an earlier result are no longer on this storage.
        self._tensors[spec.storage] = {name: tensor}
