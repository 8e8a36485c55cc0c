"""Precision: the same program with floating-point numbers of another dtype."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from everystep.errors import ProgramError
from everystep.ops import record_of
from everystep.ops.arguments import DTYPES, decode, references
from everystep.ops.operators import draws_random_numbers, parameters
from everystep.program.operation import Operation, Storage
from everystep.program.optimizer_operator import OPTIMIZERS
from everystep.program.soundness import results_on_meta
from everystep.program.step_program import Program

__all__ = ["Precision", "counters"]

#: They draw the same mask in every dtype; others draw different numbers.
_SAME_DRAWS = {"aten.bernoulli_.float", "aten.bernoulli.p", "aten.native_dropout.default"}
#: Arguments of fused optimizers and scalers with a fixed dtype, independent of the gradients; the steps
#: that a fused optimizer has taken are a counter by their name.
_FIXED_ARGUMENTS = {
    "_fused_": ("lr", "grad_scale", "found_inf"),
    "_amp_foreach_": ("found_inf", "inv_scale"),
    "_amp_update_": ("self", "growth_tracker", "found_inf"),
}
#: What torch's optimizers keep as one number for each parameter, in a dtype that is not the parameter's:
#: how many steps, the product of momenta of NAdam, the rate and the weight of the average of ASGD.
_COUNTERS = {"step", "mu_product", "eta", "mu"}
#: Kernels of oneDNN that compute in float32, or return gradients in float32 for any input.
_ONLY_FLOAT32 = {"mkldnn_rnn_layer", "mkldnn_rnn_layer_backward"}


class Precision:
    """A dtype for all floating-point numbers of a program, its state and its inputs.

    What an optimizer counts with, and a rate that is a tensor, keep theirs. dtype: torch.float64 or
    torch.bfloat16.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.name = str(dtype).removeprefix("torch.")
        #: Names of the state with a fixed dtype, of all programs that were cast.
        self._kept: set[str] = set()

    def tensor(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor of the state, or an input, in this precision.

        Call it when the programs have been cast: what uses a tensor may decide its dtype.
        """
        is_kept = name in self._kept or not tensor.is_floating_point()
        return tensor if is_kept else tensor.to(self.dtype)

    def program(self, program: Program) -> Program:
        """Return a program in this precision.

        Raises:
            ProgramError: it has complex numbers, reads the bits of numbers, draws random numbers that
                would differ, or has a kernel for float32 alone; names the operator.
        """
        for operation in program.operations:
            if operation.name in _ONLY_FLOAT32:
                raise ProgramError(
                    f"{operation.operator} computes in float32 only, so these steps cannot run in "
                    f"{self.name}; train with torch.backends.mkldnn.enabled = False, which computes an "
                    "LSTM by operations that do"
                )
            if _draws_others(operation, program):
                raise ProgramError(
                    f"{operation.operator} draws different random numbers in {self.name}, so these "
                    "would be different steps"
                )
        kept = counters(program)
        self._kept |= {n for n in program.state_names if program.tensors[n].storage in kept}
        self._kept |= {n for n, t in program.ends.items() if program.tensors[t].storage in kept}
        operations = tuple(self._operation(each, program, kept) for each in program.operations)
        cast = program.model_copy(update={"operations": operations})
        dtypes = self._dtypes(cast, kept)
        tensors = dict(cast.tensors)
        for name, spec in cast.tensors.items():
            if spec.storage in dtypes and spec.torch_dtype.is_floating_point:
                dtype = str(dtypes[spec.storage]).removeprefix("torch.")
                tensors[name] = spec.model_copy(update={"dtype": dtype})
        storages = {
            name: self._storage(program, name, storage, dtypes.get(name))
            for name, storage in program.storages.items()
        }
        cast = cast.model_copy(update={"tensors": tensors, "storages": storages})
        return Program.from_json(cast.to_json())  # reading checks it again

    def _dtypes(self, program: Program, kept: set[str]) -> dict[str, torch.dtype]:
        """Return the dtypes of storages that have floating-point numbers, by name.

        Some operations return another dtype than they are given, so each is asked, on tensors without
        memory.
        """
        found = {n: own if n in kept else self.dtype for n, own in _recorded_dtypes(program).items()}

        def on_meta(name: str) -> Tensor:
            spec = program.tensors[name]
            dtype = found.get(spec.storage, spec.torch_dtype)
            return torch.empty_strided(spec.shape, spec.stride, dtype=dtype, device="meta")

        for operation in program.operations:
            try:
                results = results_on_meta(operation, {name: on_meta(name) for name in operation.reads()})
            except (RuntimeError, NotImplementedError, ValueError, TypeError):
                continue  # what does not fit is found when the program is checked
            is_attention = operation.name.startswith("_scaled_dot_product")
            has_statistics = record_of(operation.name).has_statistics
            if has_statistics or (is_attention and self.dtype == torch.float64):
                results = results[:1]  # torch 2.9 takes those of attention for float32 on meta
            for result, tensor in zip(operation.results, results, strict=False):
                if result is None or tensor is None or not tensor.is_floating_point():
                    continue
                place = program.tensors[result].storage
                if place in found and program.storages[place].kind == "temporary":
                    found[place] = tensor.dtype
        return found

    def contents(self, program: Program, contents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the bytes of storages in this precision, by their names; others unchanged.

        program: as recorded.
        """
        found, dtypes = dict(contents), _recorded_dtypes(program)
        for name in (contents.keys() & dtypes.keys()) - counters(program):
            # Memory may end with a part of a number.
            count = len(found[name]) // dtypes[name].itemsize * dtypes[name].itemsize
            numbers = found[name][:count].clone().view(dtypes[name])
            found[name] = numbers.to(self.dtype).view(torch.uint8)
        return found

    def _storage(
        self, program: Program, name: str, storage: Storage, dtype: torch.dtype | None
    ) -> Storage:
        dtypes = {spec.torch_dtype for spec in program.tensors.values() if spec.storage == name}
        if any(known.is_complex for known in dtypes):
            raise ProgramError(f"{name} has complex numbers, which cannot be replayed in {self.name}")
        if dtype is None or dtypes == {dtype}:
            return storage
        if len(dtypes) > 1:
            raise ProgramError(f"{name} is read as {len(dtypes)} dtypes, which no other precision has")
        count = -(-storage.bytes // dtypes.pop().itemsize)
        return storage.model_copy(update={"bytes": count * dtype.itemsize})

    def _operation(self, operation: Operation, program: Program, kept: set[str]) -> Operation:
        made = program.storages_of(filter(None, operation.results))
        # What counts steps has its dtype, and so have its constants.
        if made and made <= kept:
            return operation
        keywords = {key: self._argument(value) for key, value in operation.keywords.items()}
        arguments = tuple(map(self._argument, operation.arguments))
        return operation.model_copy(update={"arguments": arguments, "keywords": keywords})

    def _argument(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [*map(self._argument, value)]
        if isinstance(value, dict) and "dtype" in value and DTYPES[value["dtype"]].is_floating_point:
            return {"dtype": self.name}
        return value


def _recorded_dtypes(program: Program) -> dict[str, torch.dtype]:
    """Return the dtypes of the storages of a program that have floating-point numbers, by name."""
    specs = program.tensors.values()
    return {spec.storage: spec.torch_dtype for spec in specs if spec.torch_dtype.is_floating_point}


def _draws_others(operation: Operation, program: Program) -> bool:
    if not draws_random_numbers(operation.resolved) or operation.operator in _SAME_DRAWS:
        return False
    used = (program.tensors[name].torch_dtype for name in (*operation.reads(), *operation.changed()))
    if not any(dtype.is_floating_point for dtype in used):  # an order of rows, or rows to pick
        return False
    given = operation.given()
    if given.get("training") is False:  # a randomized ReLU that is evaluated
        return False
    may_drop = any(each.name == "dropout_p" for each in parameters(operation.resolved))
    return not (may_drop and given.get("dropout_p", 0.0) == 0.0)  # attention


def _is_counter(name: str) -> bool:
    return name.startswith("optimizer/") and name.rpartition("/")[2] == "step"


def counters(program: Program) -> set[str]:
    """Return the storages that optimizers count with, or that have a fixed dtype."""
    found = [*filter(_is_counter, program.tensors)]
    found += [tensor for name, tensor in program.ends.items() if _is_counter(name)]
    for operation in program.operations:
        if operation.operator in OPTIMIZERS:
            # A rate that is a tensor keeps its number, as one that is a number does.
            found += [*_counted_with(operation), *references([*operation.keywords.values()])]
        fixed = (names for kind, names in _FIXED_ARGUMENTS.items() if operation.name.startswith(kind))
        for name in next(fixed, ()):
            found += references(operation.given().get(name))
    return program.storages_of(found)


def _counted_with(operation: Operation) -> Iterator[str]:
    """Yield the tensors that the step of one of torch's optimizers counts with."""
    _, _, kept, made = decode(operation.arguments, str)
    for items in chain.from_iterable(kept):
        pairs = zip(items[::2], items[1::2], strict=True)
        yield from (name for key, name in pairs if key in _COUNTERS)
    named = zip(made, operation.results, strict=True)
    yield from (name for (_, _, key), name in named if name is not None and key in _COUNTERS)
