"""Reads of what does not change: numbers that Python reads and that are the same at every step."""

from __future__ import annotations

from collections.abc import Container

from everystep.program.number_slots import READ
from everystep.program.operators import draws_random_numbers
from everystep.step.path import Path

__all__ = ["unchanging_reads"]


def unchanging_reads(
    path: Path, fixed: Container[str], changing_numbers: Container[int]
) -> dict[int, set[int]]:
    """Return the numbers that Python reads from tensors computed from unchanging tensors alone.

    These are in the state, in a fixed batch, or from outside, and no operation of the step writes into
    them.

    Args:
        path: of the step.
        fixed: the names of the tensors of a fixed batch.
        changing_numbers: the places of numbers that differ from step to step.

    Returns:
        The storages that each number depends on, by its place in the step.
    """
    written = {storage for operation in path.operations for storage in operation.writes}
    names = {path.tensors[tensor].storage: name for name, tensor in path.named}
    depends: dict[int, set[int]] = {}
    for storage, known in enumerate(path.storages):
        is_fixed = known.kind != "input" or storage not in names or names[storage] in fixed
        if is_fixed and storage not in written:
            depends[storage] = {storage}
    found: dict[int, set[int]] = {}
    place = 0
    for operation in path.operations:
        read = {path.tensors[number].storage for number in operation.tensors_read()}
        numbers = range(place, place + operation.numbers)
        place += operation.numbers
        sources = {source for storage in read for source in depends.get(storage, ())}
        is_unchanging = read <= depends.keys()
        if str(operation.operator) == READ:
            if is_unchanging:
                found[numbers.start] = sources
            continue
        # What only allocates memory is no operation: what has no numbers yet is not among them.
        is_unchanging &= not draws_random_numbers(operation.operator)
        if not is_unchanging or any(number in changing_numbers for number in numbers):
            for storage in operation.writes:
                depends.pop(storage, None)
        else:
            depends.update(dict.fromkeys(operation.writes, sources))
    return found
