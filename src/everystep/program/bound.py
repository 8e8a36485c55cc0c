"""Bound: a program bound to memory, where it runs one step after the other.

Binding does everything that is the same at every step: place the tensors on their storages, look up the
operators, fill in the arguments. What remains is a list of calls without arguments, each of which writes
into existing memory. Numbers of the step are put in their places before a run.

Operations with the same results at every step run once. The step of a torch optimizer runs as
operators while its settings stay the same: torch's class computes in Python which operators to call.
If it reads no number from a tensor, that depends on settings and shapes alone: after the first step,
the operators are called directly.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from everystep.errors import ProgramError
from everystep.ops.arguments import decode, references
from everystep.ops.operators import (
    ALLOCATING,
    REFUSALS,
    OperatorMode,
    computes,
    draws_random_numbers,
    has_shape_of_values,
    leaves,
    without_autograd,
    writes,
)
from everystep.program.allowed import has_effect
from everystep.program.calls import Call, prebuilt_calls
from everystep.program.memory import (
    check_memory,
    copy_into,
    geometry,
    plan_memory,
    shown_storages,
    tensor_on,
    whole_memory,
)
from everystep.program.number_slots import READ, Number, slots_of
from everystep.program.observed import unread_inputs
from everystep.program.operation import Operation, extent_of
from everystep.program.optimizer_operator import BoundOptimizer, OptimizerOperator
from everystep.program.step_program import Program

__all__ = ["BoundProgram", "has_fixed_shapes"]

#: Puts a number of the step where an operation finds it.
_Put = Callable[[Number], None]
#: A storage of torch, and where in it a storage of a program begins, in bytes.
_Anchor = tuple[torch.UntypedStorage, int]
#: Steps with the same settings before operators are called directly: a scheduler changes them at each
#: step.
SAME_BEFORE = 3
#: Bytes that the results of its operators may take. With larger tensors, Python takes little of a step.
MOST_BYTES = 4_000_000


# Where the tensors of a bound program lie; `_Anchor` is where a storage of the program begins:
#   state        on the live tensors of the training, which must not move
#   batch        on memory of its own, which `load` fills
#   inputs       on the bytes that are given
#   temporary    in one block, which is used again within the step; what is shown at its end, or
#                computed once for all steps, has memory of its own
class BoundProgram:
    """A program, bound to the live tensors of a training, and to its own memory for all others.

    A step is `put`, if its numbers differ from those of the previous step; `load`, if its batch does;
    and `run`.

    state: the tensors of the training by name; their memory must not move; inputs: bytes of each input
    storage that does not belong to the batch, by the storage's name; batch: the names of the tensors of
    the batch; device: of the memory that the program allocates.

    loss: the live tensor of the loss, or a NaN to be set from outside if the program has none; logged:
    the live tensors of all numbers that the step logs, by name; ends: the tensors that state names have
    after the step. The next step writes into all of them again. numbers: of the step, with those that
    it read after it ran; reads: the places of these among the numbers; draws: whether the step draws
    random numbers; calls: of a step, in order; temporary_bytes: the memory that the program itself uses.

    Raises:
        ProgramError: the program cannot be bound to these tensors, or memory is exhausted; gives the
            reason.
    """

    def __init__(
        self,
        program: Program,
        state: Mapping[str, Tensor],
        inputs: Mapping[str, Tensor],
        batch: Collection[str],
        device: torch.device,
    ) -> None:
        self.program = program
        self.numbers: list[Number] = []
        self.reads: list[int] = []
        self._puts: list[_Put] = []
        self._optimizers: list[_SteadyOptimizer] = []
        steady = _steady_operations(program)
        self._batch = [name for name in batch if name in program.tensors]
        _check_batch(program, self._batch)
        temporary, self.temporary_bytes = _temporary(program, device, steady)
        own = _memory_of(program, program.storages_of(self._batch), device)
        given = {program.tensors[name].storage: state[name] for name in program.state_names}
        given |= inputs
        anchors = own | temporary
        for name in program.storages.keys() - anchors.keys():
            if name not in given:
                raise ProgramError(f"{name} is missing, but the program needs it")
            anchors[name] = given[name].untyped_storage(), 0
        self._tensors = {}
        for name, spec in program.tensors.items():
            memory, start = anchors[spec.storage]
            self._tensors[name] = tensor_on(memory, spec, start)
        others = program.storages_of(program.tensors.keys() - {*self._batch})
        #: Storages of views of the batch, which may include bytes between the numbers of a tensor.
        self._viewed = program.storages_of(self._batch) & others
        # A tensor of its own, which a stepper fills with the recorded loss: see `loss`.
        nan = torch.full((), math.nan, dtype=torch.float64)
        self.loss = nan if program.loss is None else self.tensor(program.loss)
        logged = {} if program.loss is None else {"loss": program.loss}
        self.logged = {n: self.tensor(tensor) for n, tensor in (logged | program.logged).items()}
        self.ends = {name: self.tensor(tensor) for name, tensor in program.ends.items()}
        self.draws = any(draws_random_numbers(each.resolved) for each in program.operations)
        with without_autograd():
            # By operation, so that `calls_with` can put what looks at the step in between.
            self._calls_of = [self._bound(each) for each in program.operations]
            # In their order, since they read results of each other.
            for place in sorted(steady):
                self._run_once(place)
        self.calls = [*chain.from_iterable(self._calls_of)]

    def load(self, batch: Mapping[str, Tensor]) -> None:
        """Copy the tensors of a batch, of the geometry of the program, to where it reads them."""
        for name in self._batch:
            target, source = self.tensor(name), batch[name]
            if self.program.tensors[name].storage in self._viewed:
                _bytes_of(target).copy_(_bytes_of(source))
            else:
                copy_into(target, source)

    def put(self, numbers: Sequence[Number]) -> None:
        """Put the numbers of a step where its operations find them.

        numbers: in the order of the operations, with one for each that the step reads.

        Raises:
            ValueError: there are more or fewer than the program needs.
        """
        self.numbers = [*numbers]
        for put, number in zip(self._puts, numbers, strict=True):
            put(number)
        # Only when all numbers are in place: the settings are compared as a whole.
        for optimizer in self._optimizers:
            optimizer.settle()

    def run(self) -> None:
        """Run the step on the current memory; call it inside `without_autograd`.

        Raises:
            RuntimeError: a kernel rejects its arguments (or IndexError, ValueError, TypeError).
        """
        for call in self.calls:
            call()

    def calls_with(self, after: Mapping[int, Sequence[Call]]) -> list[Call]:
        """Return the calls of an observed step: `after` runs after operation i (-1: before all)."""
        found = list(after.get(-1, ()))
        for index, calls in enumerate(self._calls_of):
            found += [*calls, *after.get(index, ())]
        return found

    def tensor(self, name: str) -> Tensor:
        """Return a tensor of the program, on its live memory."""
        return self._tensors[name]

    def _run_once(self, place: int) -> None:
        """Run a steady operation, now instead of at each step."""
        calls, self._calls_of[place] = self._calls_of[place], []
        try:
            for call in calls:
                call()
        except REFUSALS as error:
            raise ProgramError(f"{self.program.operations[place].operator}: {error}") from None

    def _bound(self, operation: Operation) -> list[Call]:
        """Return the calls of an operation, and note where they find the numbers of the step."""
        operator = operation.resolved
        arguments = [decode(value, self.tensor) for value in operation.arguments]
        keywords = {key: decode(value, self.tensor) for key, value in operation.keywords.items()}
        slots = slots_of(operation)
        self._puts += [partial(slot.put, arguments, keywords) for slot in slots]
        if operation.operator == READ:
            return self._reading(arguments[0])
        results = [None if name is None else self.tensor(name) for name in operation.results]
        if isinstance(operator, OptimizerOperator):
            if results:
                raise ProgramError(
                    f"{operator} creates tensors, which only the first step of a training does"
                )
            self._optimizers.append(_SteadyOptimizer(operator, arguments, keywords))
            return [self._optimizers[-1]]
        # `put` writes numbers into the arguments, which a call has read before unless it is late.
        return prebuilt_calls(operator, arguments, keywords, results, is_late=bool(slots))

    def _reading(self, tensor: Tensor) -> list[Call]:
        place = len(self._puts)
        self.reads.append(place)
        # It has a place among the numbers of the step, but the run finds its value.
        self._puts.append(lambda number: None)

        def read() -> None:
            self.numbers[place] = tensor.item()

        return [read]


def _check_batch(program: Program, names: Sequence[str]) -> None:
    """Check that a program reads nothing around the tensors of its batch, which may be of more data.

    Raises:
        ProgramError: it does.
    """
    for storage in program.storages_of(names):
        on = {name for name, spec in program.tensors.items() if spec.storage == storage}
        extents = [program.tensors[name].extent for name in names if name in on]
        begin, end = min(b for b, _ in extents), max(e for _, e in extents)
        if any(not begin <= b <= e <= end for b, e in (program.tensors[name].extent for name in on)):
            raise ProgramError("the step reads memory around its batch")


def _bytes_of(tensor: Tensor) -> Tensor:
    """Return all memory between the first and the last number of a tensor."""
    begin, end = extent_of(geometry(tensor))
    return whole_memory(tensor)[begin:end]


def _temporary(
    program: Program, device: torch.device, steady: Collection[int]
) -> tuple[dict[str, _Anchor], int]:
    """Return the temporary storages, and their bytes: one block holds all that need not persist.

    steady: places of operations that do not run at each step.
    """
    names = program.of_kind("temporary")
    # What runs once must keep its results for all steps.
    made = (name for place in steady for name in program.operations[place].changed())
    kept = shown_storages(program) | program.storages_of(made)
    # The shared block is on the device, and its content is lost within the step.
    alone = {name for name in names if name in kept or program.storages[name].host}
    offsets, size = plan_memory(program, [name for name in names if name not in alone])
    whole = size + sum(program.storages[name].bytes for name in alone)
    check_memory(whole, device)
    shared = _empty(size, device)
    own = _memory_of(program, alone, device)
    return own | {name: (shared, start) for name, start in offsets.items()}, whole


def _memory_of(program: Program, names: Iterable[str], device: torch.device) -> dict[str, _Anchor]:
    found = {}
    for name in names:
        storage = program.storages[name]
        found[name] = _empty(storage.bytes, torch.device("cpu") if storage.host else device), 0
    return found


def _empty(size: int, device: torch.device) -> torch.UntypedStorage:
    try:
        return torch.empty(size, dtype=torch.uint8, device=device).untyped_storage()
    except RuntimeError as error:
        raise ProgramError(f"not enough memory for the program: {error}") from None


def has_fixed_shapes(program: Program) -> bool:
    """Return whether no result has a shape that depends on the numbers in tensors."""
    for each in program.operations:
        indices = references(each.given().get("indices"))
        if has_shape_of_values(each.resolved, (program.tensors[n].torch_dtype for n in indices)):
            return False
    return True


def _steady_operations(program: Program) -> set[int]:
    """Return the places of the operations of a program that have the same results at every step.

    They read only results of each other, no number of the step, and draw nothing. Each is the only one
    that writes its results, which no state name has after the step.
    """
    written = [program.storages_of(operation.changed()) for operation in program.operations]
    writers = Counter(storage for each in written for storage in each)
    handed_out = program.storages_of(program.ends.values())
    fixed: set[str] = set()
    found = set()
    for place, operation in enumerate(program.operations):
        unread = unread_inputs(operation)
        reads = program.storages_of(name for name in operation.reads() if name not in unread)
        is_own = all(
            program.storages[name].kind == "temporary" and writers[name] == 1 for name in written[place]
        ) and written[place].isdisjoint(handed_out | reads)
        operator = operation.resolved
        depends = has_effect(operator) or slots_of(operation)
        if written[place] and is_own and reads <= fixed and not depends:
            fixed |= written[place]
            found.add(place)
    return found


class _SteadyOptimizer:
    """An optimizer of a program, on fixed tensors.

    arguments: as of `BoundOptimizer`; settings: by key and param group, which may be exchanged before
    any step.
    """

    def __init__(
        self, operator: OptimizerOperator, arguments: Sequence[Any], settings: Mapping[str, Any]
    ) -> None:
        self._optimizer = BoundOptimizer(operator, *arguments)
        self._settings = settings
        self._known = ""
        self._same = 0
        self._is_steady = True
        self._calls: list[Call] | None = None

    def settle(self) -> None:
        """Note that settings may have been exchanged."""
        # Of a tensor, which one it is: operators read its number themselves.
        now = repr(
            [[id(v) if isinstance(v, Tensor) else v for v in each] for each in self._settings.values()]
        )
        if now != self._known:
            self._known, self._same, self._calls = now, 0, None

    def __call__(self) -> None:
        """Take a step; call this below autograd."""
        if self._calls is not None:
            for call in self._calls:
                call()
            return
        # Three steps by torch's class, the fourth is watched, and from the fifth on its operators are
        # called, as long as `settle` finds the settings as they were.
        self._same += 1
        if self._same <= SAME_BEFORE or not self._is_steady:
            self._optimizer.step(self._settings)
            return
        seen = _Seen()
        kept = self._optimizer.kept()
        with seen:
            self._optimizer.step(self._settings)
        # A step that exchanges tensors of the state writes into others the next time.
        is_kept = [*map(id, kept)] == [*map(id, self._optimizer.kept())]
        given = _memory([*kept, *self._optimizer.given()])
        self._calls = seen.calls(given) if is_kept else None
        self._is_steady = self._calls is not None


class _Seen(OperatorMode):  # type: ignore[no-untyped-call]
    """Sees the operators that are called, and keeps their arguments and results: no memory is reused."""

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # A list of arguments may be changed after the call.
        self._operations.append((func, _held(args), dict(kwargs or {}), result))
        return result

    def calls(self, given: set[int]) -> list[Call] | None:
        """Return calls that repeat the operators on the same memory; None if anything else may differ.

        given: the memory of the tensors of the optimizer, which the operators may write.
        """
        made: set[int] = set()
        found: list[Call] = []
        size = 0
        for operator, arguments, keywords, result in self._operations:
            results = [*leaves(result)]
            if (not results and operator._schema.returns) or draws_random_numbers(operator):
                return None  # it gave a number to Python
            named = dict(zip((a.name for a in operator._schema.arguments), arguments, strict=False))
            written = _memory([v for n, v in (named | keywords).items() if n in writes(operator)])
            if not written <= given | made:
                return None  # a constant, which the next step finds changed
            if not written and (computes(operator) or operator.overloadpacket.__name__ in ALLOCATING):
                own = _memory(results)
                # A result on the memory of an argument is not the operator's own, to write into again.
                if not own.isdisjoint(_memory([*arguments, *keywords.values()])):
                    return None
                made |= own
                size += sum(tensor.nbytes for tensor in results)
            if size > MOST_BYTES:
                return None
            if computes(operator):
                found += prebuilt_calls(operator, [*arguments], dict(keywords), results)
        return found


def _held(value: Any) -> Any:
    return type(value)(map(_held, value)) if type(value) in (list, tuple) else value


def _memory(values: Any) -> set[int]:
    """Return where the memory of tensors in lists is."""
    return {tensor.untyped_storage().data_ptr() for tensor in leaves(values)}
