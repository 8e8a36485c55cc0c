"""Soundness: whether torch's kernels may run on the tensors that a program passes to them.

First, the operations run on torch's meta device, which has shapes but neither memory nor values. Shapes
and dtypes of the results must agree with the program. Most kernels check the rest themselves. Some trust
their arguments, and could read and write anywhere:

- Kernels of the backward pass trust that their arguments come from the forward pass: matching shapes,
  and values that are positions in a tensor. So a matching forward operation must come before them, and
  its saved tensors must be unchanged.
- Some others trust that shapes match; their requirements are listed here.

The check imports torch's compiler for its shape kernels, which takes a second. So programs that passed
it on this machine are cached: an empty file per program in the user's cache directory, named by a digest
of the program and of the checker.
"""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from platformdirs import user_cache_path
from torch import Tensor

from everystep.program import allowed
from everystep.program.allowed import (
    FORWARD,
    KEPT_OF_ATTENTION,
    OF_BACKWARD_ALONE,
    RENAMED,
    known_names,
)
from everystep.program.arguments import decode, references
from everystep.program.operation import Operation, Storage, TensorSpec
from everystep.program.operators import BY_VALUES, flattened, parameters
from everystep.program.optimizer_operator import OptimizerOperator

__all__ = ["WITH_STATISTICS", "check_soundness", "note_sound", "results_on_meta"]

META = torch.device("meta")
Given = dict[str, Any]

#: Kernels with results after the first that depend on the device or that meta does not know.
_VAGUE = re.compile(r"mkldnn_\w+|_?cudnn_\w+|miopen_\w+|_embedding_bag\w*|_scaled_dot_product_\w+")

#: Their results after the first are statistics, with the dtype of the input on a CPU, and float32 on
#: other devices and on meta.
WITH_STATISTICS = {
    *("native_batch_norm", "native_layer_norm", "native_group_norm", "_native_batch_norm_legit"),
    "_fused_rms_norm",
}

#: They trust the numbers in their second argument: the row swaps of the first.
_OF_A_FACTORIZATION = {"linalg_lu_solve", "linalg_ldl_solve", "lu_unpack"}


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
        if operation.name in FORWARD:
            self._check_forward(index)
        if operation.name in _OF_A_FACTORIZATION:
            self._check_factorization(index)
        fits = _SHAPES.get(operation.name)
        if fits is not None and not fits(self._as_known(index)):
            raise ValueError("its tensors do not fit together")
        try:
            found = results_on_meta(operation, self._meta)
        except NotImplementedError:
            # It makes no more than a few times what it reads.
            self._check_size(self._meta[name] for name in operation.reads())
        else:
            self._check_results(operation, found)

    def _as_known(self, index: int) -> Given:
        """Return the specs and numbers that an operation receives, by the names that are known here."""
        names = known_names(self._operations[index].resolved) or {}
        given = self._given[index].items()
        return {names.get(name, name): self._spec(value) for name, value in given}

    def _spec(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._specs[value]
        return [*map(self._spec, value)] if isinstance(value, list | tuple) else value

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
            if place and operation.name in WITH_STATISTICS:
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

    def _check_forward(self, index: int) -> None:
        # e.g. for `aten.nll_loss_backward`: is there an `aten.nll_loss_forward` before it, with the same
        # target, and is `total_weight` its result?
        base, _ = FORWARD[self._operations[index].name]
        places = (*self._by_name.get(base, ()), *self._by_name.get(f"{base}_forward", ()))
        if not any(place < index and self._is_forward(place, index) for place in places):
            raise ValueError(f"has no matching {base} before it")

    def _is_forward(self, place: int, index: int) -> bool:
        """Return whether the operation at `index` is of the backward pass of that at `place`."""
        forward, operation = self._operations[place], self._operations[index]
        renamed = RENAMED.get(operation.name, {})
        known = {p.name: p for p in parameters(forward.resolved)}
        theirs = {n: p.default for n, p in known.items()} | self._given[place]
        gradients, kept = [], []
        for parameter in parameters(operation.resolved):
            value = self._given[index].get(parameter.name, parameter.default)
            name = renamed.get(parameter.name, parameter.name)
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
        base, first = FORWARD[operation.name]
        places = KEPT_OF_ATTENTION.get(base) or range(first, first + len(kept))
        storages = [self._specs[name].storage for name in forward.results if name]
        return (
            kept == [forward.results[each] for each in places]
            and theirs.get("compute_log_sumexp", True)
            # On shared memory, the forward kernel would overwrite one result with another.
            and len(storages) == len(set(storages))
            and not self._is_changed(kept, place, index)
            and all(map(self._is_gradient, gradients, forward.results))
        )

    def _check_factorization(self, index: int) -> None:
        """Check that the pivots come from an operation that also returned a matrix of this shape."""
        matrix, pivots = list(self._given[index].values())[:2]
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


def _is_dense(spec: TensorSpec) -> bool:
    return spec.end == (spec.offset + math.prod(spec.shape)) * spec.torch_dtype.itemsize


def _are_dense(given: Given, *but: str) -> bool:
    """Return whether all tensors fill their memory without gaps or overlaps."""
    specs = (value for name, value in given.items() if name not in but)
    return all(_is_dense(spec) for spec in specs if isinstance(spec, TensorSpec))


def _none_repeats(given: Given) -> bool:
    specs = (value for value in given.values() if isinstance(value, TensorSpec))
    return not any(
        stride == 0 and size > 1
        for spec in specs
        for stride, size in zip(spec.stride, spec.shape, strict=True)
    )


def _mask_fits(given: Given) -> bool:
    """Only one of them is expanded, so that the result has no more numbers than the other."""
    shapes = given["self"].shape, given["mask"].shape
    return np.broadcast_shapes(*shapes) in shapes


def _dimensions_fit(given: Given) -> bool:
    """The dimensions of a Fourier transform, counted from the front."""
    dimensions = given["dim"]
    return len(set(dimensions)) == len(dimensions) and all(
        0 <= dim < len(given["self"].shape) for dim in dimensions
    )


def _fused_fit(given: Given) -> bool:
    """Each list has a tensor for each parameter: of its size, and without gaps."""
    whole = given["self"]
    for name, specs in given.items():
        if name == "state_steps":
            fits = all(math.prod(spec.shape) == 1 and spec.dtype == "float32" for spec in specs)
        elif isinstance(specs, list):
            fits = all(
                math.prod(spec.shape) == math.prod(own.shape) and spec.dtype == own.dtype
                for spec, own in zip(specs, whole, strict=False)
            ) and all(map(_is_dense, specs))
        else:
            fits = not isinstance(specs, TensorSpec) or math.prod(specs.shape) == 1
            specs = whole
        may_be_empty = {"max_exp_avg_sqs": "amsgrad", "momentum_buffer_list": "momentum"}
        is_left_out = not specs and name in may_be_empty and not given[may_be_empty[name]]
        if not fits or not (is_left_out or len(specs) == len(whole)):
            return False
    return True


def _attention_fits(given: Given) -> bool:
    q, k, v = (given[name].shape for name in ("query", "key", "value"))
    # (N, heads, length, size) each; several heads of queries may share one of keys and values.
    if not len(q) == len(k) == len(v) == 4 or not k[1] or q[1] % k[1] or k[:3] != v[:3]:
        return False
    ends = [given[name].stride[3] for name in ("query", "key", "value")]
    mask = given.get("attn_mask")
    whole = (*q[:3], k[2])
    mask_fits = mask is None or (
        len(mask.shape) in (2, 4)
        and all(size in (1, full) for size, full in zip(mask.shape[::-1], whole[::-1], strict=False))
    )
    return q[0] == k[0] and q[3] == k[3] == v[3] and set(ends) <= {1} and mask_fits


def _batch_norm_fits(given: Given) -> bool:
    channels = given["input"].shape[1:2]
    vectors = (given.get(name) for name in ("weight", "bias", "running_mean", "running_var"))
    return all(vector is None or vector.shape == channels for vector in vectors)


def _weight_norm_fits(given: Given) -> bool:
    v, g, dim = given["v"].shape, given["g"].shape, given.get("dim", 0)
    norms = tuple(size if place == dim else 1 for place, size in enumerate(v))
    # The kernel knows norms over all dimensions but the first, or but the last.
    return dim in (0, len(v) - 1) and g == norms and _are_dense(given)


def _rnn_fits(given: Given) -> bool:
    """An LSTM's layer: four gates."""
    x, hidden = given["input"].shape, given["hidden_size"]
    # As cuDNN counts them: 2 is an LSTM, 3 a GRU; with batch sizes, a sequence would be packed.
    if len(x) != 3 or hidden < 1 or given["mode"] != 2 or given["batch_sizes"]:
        return False
    shapes = [given[f"weight{number}"].shape for number in range(4)]
    gates = 4 * hidden
    biases = not given["has_biases"] or shapes[2] == shapes[3] == (gates,)
    states = all(math.prod(given[name].shape) == x[1] * hidden for name in ("hx_", "cx_"))
    return biases and states and _are_dense(given) and shapes[:2] == [(gates, x[2]), (gates, hidden)]


def _distances_fit(given: Given) -> bool:
    one, two, distances = (given[name].shape for name in ("x1", "x2", "cdist"))
    return (
        given["grad"].shape == distances == (*one[:-1], *two[-2:-1])
        and (one[:-2], one[-1:]) == (two[:-2], two[-1:])
        and len(one) > 1
    )


def _exchanged_fit(given: Given, results: int = 1, each: int = 1) -> bool:
    """Ranks exchange as many bytes as tensors have numbers, from the first on.

    results, each: how many times the numbers of all results those of what is given are; of the ranks, 0.
    """
    lists = (value if isinstance(value, list) else [value] for value in given.values())
    specs = [spec for specs in lists for spec in specs if isinstance(spec, TensorSpec)]
    are_alike = len({spec.dtype for spec in specs}) == 1 and all(map(_is_dense, specs))
    if "given" not in given or not are_alike:
        return are_alike
    *written, own = (math.prod(spec.shape) for spec in specs)
    count = len(given["ranks"])
    return sum(written) * (each or count) == own * (results or count)


#: What kernels that trust shapes need, of the specs and numbers that they are given.
_SHAPES: dict[str, Callable[[Given], bool]] = {
    **dict.fromkeys(("all_reduce_", "all_reduce_coalesced_", "reduce_", "broadcast_"), _exchanged_fit),
    **dict.fromkeys(("all_gather_", "all_gather_into_"), partial(_exchanged_fit, results=0)),
    "reduce_scatter_from_": partial(_exchanged_fit, each=0),
    "all_to_all_from_": _are_dense,
    "_cdist_backward": _distances_fit,
    "_embedding_bag": lambda given: _are_dense(given, "weight"),
    **dict.fromkeys(("_fft_c2c", "_fft_c2r", "_fft_r2c"), _dimensions_fit),
    **dict.fromkeys(("_fused_adagrad_", "_fused_adam_", "_fused_adamw_", "_fused_sgd_"), _fused_fit),
    **dict.fromkeys(
        ("_log_softmax_backward_data", "_softmax_backward_data"),
        lambda given: given["grad_output"].shape == given["output"].shape,
    ),
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit"), _batch_norm_fits),
    "_native_batch_norm_legit_no_training": _batch_norm_fits,
    "_scaled_dot_product_flash_attention_for_cpu": _attention_fits,
    "_weight_norm_interface": _weight_norm_fits,
    "masked_select": _mask_fits,
    **dict.fromkeys(("median", "nanmedian"), _none_repeats),
    "mkldnn_rnn_layer": _rnn_fits,
    "native_group_norm": _are_dense,
}


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
    files = (__file__, allowed.__file__)
    # With another check, all programs are checked again.
    source = b"".join(Path(file).read_bytes() for file in files)
    return f"{version('everystep')} {torch.__version__} ".encode() + hashlib.sha256(source).digest()
