"""Sizes: what differs between steps that do the same with tensors of other sizes.

Batches are padded to their longest sequence, or are graphs of any size: the steps run the same
operators, and differ only in shapes, strides, offsets, bytes of memory, and whole numbers among the
arguments. They share a program, which has the sizes of one of them. Each other step has its *sizes*,
kept as the differences from those of the program: 64-bit integers, little-endian, compressed.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from pydantic import ValidationError

from everystep.bounded import decompressed
from everystep.errors import ProgramError
from everystep.program.number_slots import slot_names
from everystep.program.operation import Operation, Storage, TensorSpec
from everystep.program.soundness import check_soundness
from everystep.program.step_program import Program

__all__ = ["packed_sizes", "resized", "sizes_of"]

# e.g. a batch of 32 sentences of 17 words, and a program of one with 20: of `x`, the shape (32, 17) in
# place of (32, 20) is the difference (0, -3), the stride (17, 1) in place of (20, 1) is (-3, 0), and its
# storage has 768 bytes fewer.
_INTEGER = "<i8"


def sizes_of(program: Program) -> list[int]:
    """Return all sizes of a program: of its storages, of its tensors, then those of its operations.

    A tensor that moves lies at 0: its place is among the numbers of a step.
    """
    found = [storage.bytes for storage in program.storages.values()]
    for name, tensor in program.tensors.items():
        found += (*tensor.shape, *tensor.stride, 0 if name in program.moves else tensor.offset)
    for operation in program.operations:
        for value in _sized(operation).values():
            found += _integers(value)
    return found


def packed_sizes(sizes: Sequence[int], of: Sequence[int]) -> bytes:
    """Return the sizes of a step as a run keeps them. of: those of its program."""
    # Most are 0, so the differences compress to almost nothing.
    difference = np.array(sizes, _INTEGER) - np.array(of, _INTEGER)
    return zlib.compress(difference.tobytes(), 1)


def resized(program: Program, packed: bytes, key: bytes) -> Program:
    """Return a program with the sizes of a step.

    packed: as `packed_sizes` returns them; a stranger may have written them; key: stands for the
    program: SHA-256 of its JSON.

    Raises:
        ProgramError: they are not sizes of this program.
    """
    own = np.array(sizes_of(program), _INTEGER)
    try:
        content = decompressed(packed, own.nbytes)
        if len(content) != own.nbytes:
            raise ValueError("they are not as many")
        left = iter((own + np.frombuffer(content, _INTEGER)).tolist())
        storages = {
            name: Storage(kind=each.kind, bytes=next(left), host=each.host)
            for name, each in program.storages.items()
        }
        tensors = {name: _tensor(each, left) for name, each in program.tensors.items()}
        operations = tuple([_operation(each, left) for each in program.operations])
        # The constructor checks everything again: other sizes make other tensors.
        parts = {name: getattr(program, name) for name in type(program).model_fields}
        found = Program(**parts | {"storages": storages, "tensors": tensors, "operations": operations})
        check_soundness(found.operations, found.tensors, found.storages, key + packed)
        return found
    except (ValueError, OverflowError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise ProgramError(f"the sizes of the step do not fit its program: {reason!s:.400}") from None


def _tensor(tensor: TensorSpec, sizes: Iterator[int]) -> TensorSpec:
    count = len(tensor.shape)
    shape, stride = (tuple([next(sizes) for _ in range(count)]) for _ in range(2))
    return TensorSpec(
        storage=tensor.storage, dtype=tensor.dtype, shape=shape, stride=stride, offset=next(sizes)
    )


def _operation(operation: Operation, sizes: Iterator[int]) -> Operation:
    known = _sized(operation)
    changed = {place: _replaced(value, sizes) for place, value in known.items()}
    if changed == known:
        return operation
    arguments = [changed.get(place, value) for place, value in enumerate(operation.arguments)]
    keywords = {key: changed.get(key, value) for key, value in operation.keywords.items()}
    return operation.model_copy(update={"arguments": tuple(arguments), "keywords": keywords})


def _sized(operation: Operation) -> dict[int | str, Any]:
    """Return the arguments of an operation that are not slots for numbers of the step, by place."""
    slots = slot_names(operation.resolved)
    return {place: value for name, place, value in operation.by_place() if name not in slots}


def _integers(value: Any) -> Iterator[int]:
    if type(value) is int:
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _integers(item)


def _replaced(value: Any, sizes: Iterator[int]) -> Any:
    if type(value) is int:
        return next(sizes)
    return [_replaced(item, sizes) for item in value] if isinstance(value, list | tuple) else value
