"""Memory: the tensors of a program on it, and a plan that lets temporary tensors share one block.

The plan reuses memory as soon as a tensor is dead. It is "greedy by size" of Y. Pisarchyk and J. Lee,
"Efficient Memory Management for Deep Neural Net Inference" (2020): the largest storage first, each at
the lowest offset that is free during its lifetime.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from itertools import accumulate
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from torch import Tensor

from everystep.bounded import free_memory
from everystep.errors import ProgramError
from everystep.program.operation import Conjugated, TensorSpec
from everystep.program.step_program import Program

__all__ = [
    "ALIGNMENT",
    "bytes_at_once",
    "check_memory",
    "copied_together",
    "copy_in_file",
    "copy_into",
    "copy_on_cpu",
    "geometry",
    "lies_as",
    "over_after",
    "plan_memory",
    "repeats",
    "shown_storages",
    "tensor_on",
    "whole_memory",
]

#: As torch aligns its own tensors, so that kernels take the same path.
ALIGNMENT = 64
#: Bytes from which on memory is checked before it is allocated.
_LARGE = 1_000_000_000


def check_memory(size: int, device: torch.device) -> None:
    """Check that a program can have so many bytes more.

    The system would grant them, and end the process once it uses them.

    Raises:
        ProgramError: it cannot.
    """
    if size >= _LARGE and device.type == "cpu" and size > (free := free_memory()):
        raise ProgramError(
            f"the program needs {size / 1e9:,.1f} GB of memory, but only {free / 1e9:,.1f} GB are free"
        )


def plan_memory(program: Program, names: Collection[str]) -> tuple[dict[str, int], int]:
    """Lay out the temporary storages `names` of a program; their content is lost within the step.

    Returns the offset of each, and the size of all memory, in bytes.
    """
    lives, offsets = _lives(program), dict[str, int]()
    # e.g. a: 100 bytes, operations 0 to 3; b: 50 bytes, 1 to 2; c: 40 bytes, 3 to 5. They become 128, 64
    # and 64 bytes; a lies at 0, b at 128, and c, which begins after b has ended, at 128 as well.
    sizes = {name: -(-program.storages[name].bytes // ALIGNMENT) * ALIGNMENT for name in names}
    for name in sorted(names, key=lambda name: (-program.storages[name].bytes, lives[name][0])):
        first, last = lives[name]
        at_once = sorted(
            (offset, other)
            for other, offset in offsets.items()
            if lives[other][0] <= last and first <= lives[other][1]
        )
        place = 0
        for start, other in at_once:
            # The first gap between those that live at the same time, from the lowest on.
            if place + sizes[name] <= start:
                break
            place = max(place, start + sizes[other])
        offsets[name] = place
    return offsets, max((offsets[name] + sizes[name] for name in names), default=0)


def shown_storages(program: Program) -> set[str]:
    """Return the storages of the results that a step shows at its end."""
    shown = (program.loss, *program.gradients.values(), *program.ends.values(), *program.logged.values())
    return program.storages_of(filter(None, shown))


def bytes_at_once(program: Program) -> int:
    """Return the bytes of temporary storages that the interpreter has at once, at most."""
    lives, shown, changes = _lives(program), shown_storages(program), Counter[int]()
    for name in program.of_kind("temporary"):
        (first, last), size = lives[name], program.storages[name].bytes
        changes[first] += size
        if name not in shown:
            changes[last + 1] -= size
    return max(accumulate(changes[place] for place in sorted(changes)), default=0)


def over_after(program: Program) -> dict[int, list[str]]:
    """Return the temporary storages that nothing needs after an operation, by its number."""
    shown, lives, found = shown_storages(program), _lives(program), dict[int, list[str]]()
    for name in program.of_kind("temporary"):
        if name not in shown:
            found.setdefault(lives[name][1], []).append(name)
    return found


def lies_as(tensor: Tensor, spec: TensorSpec) -> bool:
    """Return whether a tensor has the geometry that a program expects."""
    if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.torch_dtype:
        return False
    if tensor.layout != torch.strided or tensor.storage_offset() != spec.offset:
        return False
    if tensor.is_conj() is not spec.is_conjugated:
        return False
    # Strides of an axis with one place, or of a tensor without elements, have no effect.
    return 0 in spec.shape or all(
        one == two or size == 1
        for one, two, size in zip(tensor.stride(), spec.stride, spec.shape, strict=True)
    )


def geometry(tensor: Tensor) -> tuple[Any, ...]:
    """Return where a tensor lies in its memory: dtype, shape, stride and offset."""
    dtype: Any = tensor.dtype
    if dtype.is_complex and tensor.is_conj():
        dtype = Conjugated(dtype)
    return dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset()


def whole_memory(tensor: Tensor) -> Tensor:
    """Return all bytes of a tensor's storage."""
    whole = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return whole.set_(tensor.untyped_storage())


def tensor_on(storage: torch.UntypedStorage, spec: TensorSpec, start: int = 0) -> Tensor:
    """Return a tensor on memory.

    start: where the storage of the program begins in it, in bytes.

    Raises:
        ProgramError: it would exceed the memory.
    """
    # `set_` would enlarge the storage, which is then other memory than that of the program; an empty
    # tensor needs none of it.
    if 0 not in spec.shape and start + spec.end > storage.nbytes():
        size = storage.nbytes() - start
        raise ProgramError(f"a tensor needs {spec.end} bytes, but the storage has {size}")
    # `start` is aligned, so it is a whole number of elements.
    offset = spec.offset + start // spec.torch_dtype.itemsize
    empty = torch.empty(0, dtype=spec.torch_dtype, device=storage.device)
    found = empty.set_(storage, offset, spec.shape, spec.stride)
    return found.conj() if spec.is_conjugated else found


def repeats(tensor: Tensor) -> bool:
    """Return whether a tensor has the same element at several positions (stride 0)."""
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    return any(stride == 0 and size > 1 for stride, size in pairs)


def copy_into(target: Tensor, source: Tensor) -> None:
    """Copy a tensor of the same shape; write each element once if the target repeats it."""
    if repeats(target):
        for dimension, stride in enumerate(target.stride()):
            if stride == 0 and target.shape[dimension] > 1:
                target, source = target.narrow(dimension, 0, 1), source.narrow(dimension, 0, 1)
    target.copy_(source)


def copied_together(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of tensors that share memory as these do, by name."""
    memory: dict[int, torch.UntypedStorage] = {}
    found = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        copy = memory.get(storage._cdata)
        if copy is None:
            copy = memory[storage._cdata] = storage.clone()  # type: ignore[no-untyped-call]
        empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        found[name] = empty.set_(copy, tensor.storage_offset(), tensor.shape, tensor.stride())
    return found


def copy_on_cpu(tensor: Tensor) -> Tensor:
    """Return a copy without autograd, on the CPU."""
    return tensor.detach().to("cpu", copy=True)


def copy_in_file(tensor: Tensor) -> Tensor:
    """Return a copy as `copy_on_cpu` does, on a temporary file, which the system reads when it is used.

    In memory if there is no room for the file. The file has lost its name, and ends with the tensor.
    """
    own = tensor.detach().cpu()
    like = torch.empty_like(own, device="meta")
    # The file gets the numbers without gaps, as `like` has them.
    if like.stride() != own.stride():
        own = own.clone()
    size = like.untyped_storage().nbytes()
    try:
        flat = own.as_strided((size // own.itemsize,), (1,)).view(torch.uint8)
        with NamedTemporaryFile(prefix="everystep-") as file:
            file.write(flat.numpy().data)
            file.flush()
            storage: Any = torch.UntypedStorage.from_file(file.name, True, size)
    except (OSError, RuntimeError):
        return copy_on_cpu(own)
    return torch.empty(0, dtype=own.dtype).set_(storage, 0, like.shape, like.stride())


def _lives(program: Program) -> dict[str, tuple[int, int]]:
    """Return the first and the last operation that needs each storage."""
    end = len(program.operations)
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for index, operation in enumerate(program.operations):
        for tensor in filter(None, (*operation.reads(), *operation.results)):
            storage = program.tensors[tensor].storage
            first.setdefault(storage, index)
            last[storage] = index
    for path, names in program.activations.items():
        for storage in program.storages_of(names):
            last[storage] = max(last.get(storage, end), program.done[path] - 1)  # they are read then
    return {name: (first.get(name, 0), last.get(name, end)) for name in program.storages}
