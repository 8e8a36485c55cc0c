"""Soundness: whether torch's kernels may run on the tensors that a program passes to them.

First, the operations run on torch's meta device, which has shapes but neither memory nor values. Shapes
and dtypes of the results must agree with the program. Most kernels check the rest themselves. Some trust
their arguments, and could read and write anywhere:

- Kernels of the backward pass trust that their arguments come from the forward pass: matching shapes,
  and values that are positions in a tensor. So a matching forward operation must come before them, and
  its saved tensors must be unchanged.
- Some others trust that shapes match.

The record of an operator has what its kernel trusts (`everystep.ops`).

The check imports torch's compiler for its shape kernels, which takes a second. So programs that passed
it on this machine are cached: an empty file per program in the user's cache directory, named by a digest
of the program and of the checker.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path
from torch import Tensor

from everystep.ops import record_of
from everystep.ops.arguments import decode, references
from everystep.ops.operator_record import OperatorRecord
from everystep.ops.operators import flattened, parameters
from everystep.program.allowed import BY_VALUES, OF_BACKWARD_ALONE, known_names
from everystep.program.collectives import FITS
from everystep.program.operation import Operation, Storage, TensorSpec
from everystep.program.optimizer_operator import OptimizerOperator

__all__ = ["check_soundness", "note_sound", "results_on_meta"]

META = torch.device("meta")

#: Kernels with results after the first that depend on the device or that meta does not know.
_VAGUE = re.compile(r"mkldnn_\w+|_?cudnn_\w+|miopen_\w+|_embedding_bag\w*|_scaled_dot_product_\w+")


def check_soundness(
    operations: Sequence[Operation],
    tensors: Mapping[str, TensorSpec],
    storages: Mapping[str, Storage],
    text: bytes,
) -> None:
    """Check the operations of a program, in order of execution, unless they have passed before.

    text: stands for the program.

    Raises:
        ValueError: an operator rejects its arguments, or does not return what the program declares.
    """
    if _is_known_sound(text):
        return
    check = _Check(operations, tensors, storages)
    # Below autograd, where a program runs: the kernels are those that will run.
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for index, operation in enumerate(operations):
            try:
                check.operation(index)
            except Exception as error:  # torch may raise anything
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                place = f"operations.{index}: {operation.operator}"
                raise ValueError(f"{place}: {reason:.200}") from None
    note_sound(text)


class _Check:
    def __init__(
        self,
        operations: Sequence[Operation],
        tensors: Mapping[str, TensorSpec],
        storages: Mapping[str, Storage],
    ) -> None:
        self._operations = operations
        self._specs = tensors
        self._bytes = sum(storage.bytes for storage in storages.values())
        self._given = [operation.given() for operation in operations]
        self._by_name: dict[str, list[int]] = {}
        #: The operations that write on a storage: what a backward pass was left must not be changed
        #: since.
        self._writers: dict[str, list[int]] = {}
        for index, operation in enumerate(operations):
            self._by_name.setdefault(operation.name, []).append(index)
            for name in {*operation.changed()}:
                self._writers.setdefault(tensors[name].storage, []).append(index)
        # Storages of meta have sizes, but take nothing.
        memory = {
            name: torch.empty(storage.bytes, dtype=torch.uint8, device=META).untyped_storage()
            for name, storage in storages.items()
        }
        self._meta = {
            name: torch.empty(0, dtype=spec.torch_dtype, device=META).set_(
                memory[spec.storage], spec.offset, spec.shape, spec.stride
            )
            for name, spec in tensors.items()
        }

    def operation(self, index: int) -> None:
        """Check one operation.

        Raises:
            Exception: any error of torch; ValueError for errors found here.
        """
        operation = self._operations[index]
        record = record_of(operation.name)
        if record.kept is not None:
            self._check_forward(index, record)
        names = known_names(operation.resolved) or {} if record.arguments else {}
        given = {names.get(name, name): value for name, value in self._given[index].items()}
        # The row swaps of a factorization, by which the kernel moves rows; others may write such.
        if "pivots" in names.values():
            self._check_factorization(index, given["factors"], given["pivots"])
        fits = record.fits or FITS.get(operation.name)
        if fits and not fits({name: self._on_meta(value) for name, value in given.items()}):
            raise ValueError("its tensors do not fit together")
        try:
            found = results_on_meta(operation, self._meta)
        except NotImplementedError:
            # It makes no more than a few times what it reads.
            self._check_size(self._meta[name] for name in operation.reads())
        else:
            self._check_results(operation, found)

    def _on_meta(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._meta[value]
        return [*map(self._on_meta, value)] if isinstance(value, list | tuple) else value

    def _check_results(self, operation: Operation, found: list[Any]) -> None:
        if len(found) != len(operation.results):
            raise ValueError(f"returns {len(found)} results, not {len(operation.results)}")
        is_vague = _VAGUE.fullmatch(operation.name)
        for place, (name, tensor) in enumerate(zip(operation.results, found, strict=True)):
            if not isinstance(tensor, Tensor):
                if name is not None:
                    raise ValueError(f"returns no tensor as {name}")
                continue
            self._check_size([tensor])
            if name is None or is_vague:
                continue
            wanted = self._specs[name]
            dtypes = {tensor.dtype}
            if place and record_of(operation.name).has_statistics:
                dtypes.add(self._specs[next(operation.reads())].torch_dtype)
            if wanted.torch_dtype not in dtypes or tuple(tensor.shape) != wanted.shape:
                dtype = str(tensor.dtype).removeprefix("torch.")
                raise ValueError(
                    f"returns {dtype} {list(tensor.shape)} as {name}, which should be {wanted.dtype} "
                    f"{list(wanted.shape)}"
                )

    def _check_size(self, tensors: Iterable[Tensor]) -> None:
        """Check that tensors take no more than the program has: an expanded one may take any memory."""
        # A stranger's program of a few bytes could take all memory of the machine.
        if any(tensor.numel() * tensor.itemsize > self._bytes for tensor in tensors):
            raise ValueError("reads or returns more bytes than all storages of the program have")

    def _check_forward(self, index: int, record: OperatorRecord) -> None:
        # e.g. for `aten.nll_loss_backward`: is there an `aten.nll_loss_forward` before it, with the same
        # target, and is `total_weight` its result?
        base = record.forward
        places = (*self._by_name.get(base, ()), *self._by_name.get(f"{base}_forward", ()))
        if not any(place < index and self._is_forward(place, index, record) for place in places):
            raise ValueError(f"has no matching {base} before it")

    def _is_forward(self, place: int, index: int, record: OperatorRecord) -> bool:
        """Return whether the operation at `index` is of the backward pass of that at `place`."""
        forward, operation = self._operations[place], self._operations[index]
        known = {p.name: p for p in parameters(forward.resolved)}
        theirs = {n: p.default for n, p in known.items()} | self._given[place]
        gradients, kept = [], []
        for parameter in parameters(operation.resolved):
            value = self._given[index].get(parameter.name, parameter.default)
            name = record.renamed.get(parameter.name, parameter.name)
            # An argument that both passes have, e.g. the target, must be the same.
            if name in known:
                if _listed(value, known[name].size) != _listed(theirs[name], known[name].size):
                    return False
                # Integers are positions, which the kernel trusts; with other numbers, it only computes.
                tensors = references(value)
                integers = [n for n in tensors if not self._specs[n].torch_dtype.is_floating_point]
                if self._is_changed(integers, place, index):
                    return False
            # A gradient of a result: its shape is compared, below.
            elif name.startswith("grad") and "Tensor" in parameter.kind:
                gradients.append(value)
            # What the forward pass has kept: exactly its results, and unchanged.
            elif "Tensor" in parameter.kind:
                kept.append(value)
            elif name not in OF_BACKWARD_ALONE:
                return False
            # The kernel makes a gradient of so many rows, and writes at the positions that are looked
            # up.
            elif name == "num_weights":
                weight = theirs.get("weight")
                if not isinstance(weight, str) or self._specs[weight].shape[0] != value:
                    return False
        places = (record.kept or ())[: len(kept)]
        storages = [self._specs[name].storage for name in forward.results if name]
        return (
            kept == [forward.results[each] for each in places]
            and theirs.get("compute_log_sumexp", True)
            # On shared memory, the forward kernel would overwrite one result with another.
            and len(storages) == len(set(storages))
            and not self._is_changed(kept, place, index)
            and all(map(self._is_gradient, gradients, forward.results))
        )

    def _check_factorization(self, index: int, matrix: str, pivots: str) -> None:
        """Check that the pivots come from an operation that also returned a matrix of this shape."""
        for place in range(index):
            results = self._operations[place].results
            if "linalg" not in self._operations[place].name or pivots not in results[1:]:
                continue
            own = results[results.index(pivots) - 1]
            if (
                own is not None
                and self._specs[own].shape == self._specs[matrix].shape
                and self._specs[own].storage != self._specs[pivots].storage
                and not self._is_changed([pivots], place, index)
            ):
                return
        raise ValueError("has no matching factorization before it")

    def _is_gradient(self, gradient: str | None, result: str | None) -> bool:
        if gradient is None or result is None:
            return gradient is None
        return self._specs[gradient].shape == self._specs[result].shape

    def _is_changed(self, names: list[str], place: int, index: int) -> bool:
        """Return whether an operation between two places writes to the memory of these tensors."""
        writers = (w for name in names for w in self._writers.get(self._specs[name].storage, ()))
        return any(place < writer < index for writer in writers)


def _listed(value: Any, size: int | None) -> Any:
    """Return a list instead of the number that abbreviates it."""
    return [value] * size if size and isinstance(value, int) else value


def results_on_meta(operation: Operation, tensors: Mapping[str, Tensor]) -> list[Any]:
    """Return the results of an operation on tensors without memory, by name.

    Raises:
        NotImplementedError: they depend on numbers, or torch has no kernel for shapes alone.
        Exception: any other error of torch for tensors that do not fit.
    """
    operator = operation.resolved
    if isinstance(operator, OptimizerOperator) or operation.operator in BY_VALUES:
        raise NotImplementedError
    arguments = [decode(value, tensors.__getitem__) for value in operation.arguments]
    keywords = {k: decode(v, tensors.__getitem__) for k, v in operation.keywords.items()}
    if operation.name == "_grouped_mm":
        return [_grouped_mm(*arguments, **keywords)]
    known = parameters(operator)
    devices = [place for place, p in enumerate(known) if p.kind == "Optional[Device]"]
    # Neither a tensor nor an argument would keep it on meta, so it would allocate real memory.
    if not devices and not any(True for _ in operation.reads()):
        raise ValueError("has no tensor argument")
    for place in devices:
        if place < len(arguments):
            arguments[place] = META
        else:
            keywords[known[place].name] = META
    found = operator(*arguments, **keywords)
    return flattened(found) if operator._schema.returns else []


def _grouped_mm(
    one: Tensor,
    two: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the result of a product of groups of rows, for which torch 2.13 knows bfloat16 alone.

    offs: where each group ends, among the rows, the columns or the summed numbers.
    """
    shape = [*one.shape[-2:-1], *two.shape[-1:]]
    if one.dim() == two.dim():
        shape.insert(0, len(offs) if offs is not None else len(one))
    return one.new_empty(shape, dtype=out_dtype)


def _is_known_sound(text: bytes) -> bool:
    with suppress(OSError):
        return _mark(text).is_file()
    return False


def note_sound(text: bytes) -> None:
    """Note that a program with this text is sound; do nothing if the cache is not writable."""
    with suppress(OSError):
        mark = _mark(text)
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def _mark(text: bytes) -> Path:
    folder: Path = user_cache_path("everystep") / "sound"
    return folder / hashlib.sha256(_checker() + text).hexdigest()


@cache
def _checker() -> bytes:
    package = Path(__file__).parents[1]
    # With another check, or other records, all programs are checked again.
    files = sorted([*package.glob("program/*.py"), *package.glob("ops/*.py")])
    source = b"".join(file.read_bytes() for file in files)
    return f"{version('everystep')} {torch.__version__} ".encode() + hashlib.sha256(source).digest()
