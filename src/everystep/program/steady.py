"""Steady: what a bound program need not compute again at every step.

Operations with the same results at every step run once. The step of a torch optimizer runs as
operators while its settings stay the same: torch's class computes in Python which operators to call.
If it reads no number from a tensor, that depends on settings and shapes alone: after the first step,
the operators are called directly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from everystep.program.arguments import references
from everystep.program.calls import Call, prebuilt_calls
from everystep.program.number_slots import slots_of
from everystep.program.observed import unread_inputs
from everystep.program.operators import (
    ALLOCATING,
    OperatorMode,
    computes,
    draws_random_numbers,
    has_effect,
    has_shape_of_values,
    leaves,
    writes,
)
from everystep.program.optimizer_operator import BoundOptimizer, OptimizerOperator
from everystep.program.step_program import Program

__all__ = ["SteadyOptimizer", "has_fixed_shapes", "steady_operations"]


def steady_operations(program: Program) -> set[int]:
    """Return the places of the operations of a program that have the same results at every step.

    They read only results of each other, no number of the step, and draw nothing. Each is the only one
    that writes its results, which no state name has after the step.
    """
    writes = [program.storages_of(operation.changed()) for operation in program.operations]
    writers = Counter(storage for each in writes for storage in each)
    handed_out = program.storages_of(program.ends.values())
    fixed: set[str] = set()
    found = set()
    for place, operation in enumerate(program.operations):
        unread = unread_inputs(operation)
        reads = program.storages_of(name for name in operation.reads() if name not in unread)
        is_own = all(
            program.storages[name].kind == "temporary" and writers[name] == 1 for name in writes[place]
        ) and writes[place].isdisjoint(handed_out | reads)
        operator = operation.resolved
        depends = has_effect(operator) or slots_of(operation)
        if writes[place] and is_own and reads <= fixed and not depends:
            fixed |= writes[place]
            found.add(place)
    return found


def has_fixed_shapes(program: Program) -> bool:
    """Return whether no result has a shape that depends on the numbers in tensors."""
    for each in program.operations:
        indices = references(each.given().get("indices"))
        if has_shape_of_values(each.resolved, (program.tensors[n].torch_dtype for n in indices)):
            return False
    return True


#: Steps with the same settings before operators are called directly: a scheduler changes them at each
#: step.
SAME_BEFORE = 3
#: Bytes that the results of its operators may take. With larger tensors, Python takes little of a step.
MOST_BYTES = 4_000_000


class SteadyOptimizer:
    """An optimizer of a program, on fixed tensors.

    Args:
        operator: its class.
        arguments: as of `BoundOptimizer`.
        settings: by key and param group, which may be exchanged before any step.
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
