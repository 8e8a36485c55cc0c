"""Steady operations: those with the same results at every step; a bound program runs them once."""

from __future__ import annotations

from collections import Counter

import torch

from everystep.program.arguments import references
from everystep.program.number_slots import has_numbers
from everystep.program.operation import Operation
from everystep.program.operators import draws_random_numbers
from everystep.program.program import Program
from everystep.program.unset import unread_inputs

__all__ = ["has_fixed_shapes", "steady_operations"]


def steady_operations(program: Program) -> set[int]:
    """Return the places of the operations of a program that have the same results at every step.

    They read only results of each other, no number of the step, and draw nothing. Each is the only one
    that writes its results, which no state name has after the step.
    """

    def storages(names: list[str]) -> set[str]:
        return {program.tensors[name].storage for name in names}

    writes = [storages(operation.changed()) for operation in program.operations]
    writers = Counter(storage for each in writes for storage in each)
    handed_out = storages([*program.ends.values()])
    fixed: set[str] = set()
    found = set()
    for place, operation in enumerate(program.operations):
        unread = unread_inputs(operation)
        reads = storages([name for name in operation.reads() if name not in unread])
        is_own = all(
            program.storages[name].kind == "temporary" and writers[name] == 1 for name in writes[place]
        ) and writes[place].isdisjoint(handed_out | reads)
        is_same = not draws_random_numbers(operation.resolved) and not has_numbers(operation)
        if writes[place] and is_own and reads <= fixed and is_same:
            fixed |= writes[place]
            found.add(place)
    return found


def has_fixed_shapes(program: Program) -> bool:
    """Return whether no result has a shape that depends on the numbers in tensors."""
    return not any(_has_shape_of_values(each, program) for each in program.operations)


def _has_shape_of_values(operation: Operation, program: Program) -> bool:
    if torch.Tag.dynamic_output_shape not in operation.resolved.tags:
        return False
    if operation.name not in ("index", "_unsafe_index"):
        return True
    masks = references(operation.given()["indices"])
    return any(program.tensors[name].dtype in ("bool", "uint8") for name in masks)
