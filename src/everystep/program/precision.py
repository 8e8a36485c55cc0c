"""Precision: the same program with floating-point numbers of another dtype."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from everystep.errors import ProgramError
from everystep.program.arguments import DTYPES, references
from everystep.program.operators import draws_random_numbers
from everystep.program.program import Operation, Program, Storage, TensorSpec

__all__ = ["Precision", "counters"]

#: They draw the same mask in every dtype; others draw other numbers.
_SAME_DRAWS = {"aten.bernoulli_.float", "aten.bernoulli.p", "aten.native_dropout.default"}
#: Arguments of fused optimizers with a dtype of their own, whatever that of the parameters is.
_FIXED_ARGUMENTS = ("state_steps", "lr", "grad_scale", "found_inf")
_RATE = "hyperparameter/"


class Precision:
    """A dtype for all floating-point numbers of a program, its state and its inputs.

    What counts steps keeps its dtype, and learning rates have at least float32, as in torch.

    Args:
        dtype: torch.float64 or torch.bfloat16.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.name = str(dtype).removeprefix("torch.")

    def tensor(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor of the state, or an input, in this precision."""
        is_kept = _is_counter(name) or not tensor.is_floating_point()
        return tensor if is_kept else tensor.to(self.dtype)

    def program(self, program: Program) -> Program:
        """Return a program in this precision.

        Raises:
            ProgramError: it has complex numbers, reads the bits of numbers, or draws random numbers that
                would be others; names what.
        """
        for operation in program.operations:
            if draws_random_numbers(operation.resolved) and operation.operator not in _SAME_DRAWS:
                raise ProgramError(
                    f"{operation.operator} draws other random numbers in {self.name}, so these would be "
                    "other steps"
                )
        kept = counters(program)
        names = {name: self._rate(name) for name in program.of_kind("hyperparameter")}
        storages = {
            names.get(name, name): self._storage(program, name, storage, is_kept=name in kept)
            for name, storage in program.storages.items()
        }
        tensors = {
            names.get(name, name): self._spec(spec, names, is_kept=spec.storage in kept)
            for name, spec in program.tensors.items()
        }

        def is_of_kept(operation: Operation) -> bool:
            places = {program.tensors[name].storage for name in operation.results if name}
            return bool(places) and places <= kept

        def changed_in(operations: tuple[Operation, ...]) -> tuple[Operation, ...]:
            return tuple(
                each if is_of_kept(each) else self._operation(each, names) for each in operations
            )

        changed = program.model_copy(
            update={
                "storages": storages,
                "tensors": tensors,
                "once": changed_in(program.once),
                "operations": changed_in(program.operations),
            }
        )
        return Program.from_json(changed.to_json())  # which checks it again

    def contents(self, program: Program, contents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the bytes of storages in this precision, by their names; others unchanged.

        program: as it was recorded.
        """
        kept = counters(program)
        dtypes = {
            spec.storage: spec.torch_dtype
            for spec in program.tensors.values()
            if spec.torch_dtype.is_floating_point and spec.storage not in kept
        }
        return {
            name: self._content(content, dtypes[name]) if name in dtypes else content
            for name, content in contents.items()
        }

    def _content(self, content: Tensor, dtype: torch.dtype) -> Tensor:
        count = len(content) // dtype.itemsize * dtype.itemsize
        return content[:count].clone().view(dtype).to(self.dtype).view(torch.uint8)

    def _storage(self, program: Program, name: str, storage: Storage, *, is_kept: bool) -> Storage:
        dtypes = {spec.torch_dtype for spec in program.tensors.values() if spec.storage == name}
        if any(dtype.is_complex for dtype in dtypes):
            raise ProgramError(f"{name} has complex numbers, which cannot be replayed in {self.name}")
        floats = {dtype for dtype in dtypes if dtype.is_floating_point}
        if is_kept or not floats:
            return storage
        if storage.kind == "hyperparameter":
            size = storage.bytes if self._rate(name) == name else 2 * storage.bytes
            return storage.model_copy(update={"bytes": size})
        if len(dtypes) > 1:
            raise ProgramError(f"{name} is read as {len(dtypes)} dtypes, which no other precision has")
        count = -(-storage.bytes // floats.pop().itemsize)
        return storage.model_copy(update={"bytes": count * self.dtype.itemsize})

    def _spec(self, spec: TensorSpec, names: Mapping[str, str], *, is_kept: bool) -> TensorSpec:
        if spec.storage in names:
            place = names[spec.storage]
            return spec.model_copy(update={"storage": place, "dtype": place.rpartition("/")[2]})
        if is_kept or not spec.torch_dtype.is_floating_point:
            return spec
        return spec.model_copy(update={"dtype": self.name})

    def _rate(self, name: str) -> str:
        """Return the name of a learning rate in this precision: a float32 one would be rounded."""
        place, _, dtype = name.rpartition("/")
        return f"{place}/float64" if self.dtype == torch.float64 and dtype == "float32" else name

    def _operation(self, operation: Operation, names: Mapping[str, str]) -> Operation:
        keywords = {key: self._argument(value, names) for key, value in operation.keywords.items()}
        arguments = tuple(self._argument(value, names) for value in operation.arguments)
        return operation.model_copy(update={"arguments": arguments, "keywords": keywords})

    def _argument(self, value: Any, names: Mapping[str, str]) -> Any:
        if isinstance(value, str):
            return names.get(value, value)
        if isinstance(value, list | tuple):
            return [self._argument(each, names) for each in value]
        if isinstance(value, dict) and "dtype" in value and DTYPES[value["dtype"]].is_floating_point:
            return {"dtype": self.name}
        return value


def _is_counter(name: str) -> bool:
    """Tell whether a tensor of the state counts the steps of an optimizer."""
    return name.startswith("optimizer/") and name.rpartition("/")[2] == "step"


def counters(program: Program) -> set[str]:
    """Return the storages that count the steps of optimizers, or have a dtype of their own."""
    return {program.tensors[name].storage for name in _kept(program)}


def _kept(program: Program) -> Iterator[str]:
    yield from filter(_is_counter, program.tensors)
    yield from (tensor for name, tensor in program.ends.items() if _is_counter(name))
    for operation in program.operations:
        if operation.name.startswith("_fused_"):
            given = operation.given()
            for name in _FIXED_ARGUMENTS:
                tensors = references(given.get(name))
                yield from (each for each in tensors if not each.startswith(_RATE))
