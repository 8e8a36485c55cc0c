"""Which of torch's operators a program may use, and what their schemas say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "NotAllowedError",
    "draws_random_numbers",
    "leaves",
    "out_variant",
    "resolve",
    "writes",
]

_NAME = re.compile(r"aten\.([A-Za-z_][A-Za-z0-9_]*)\.([A-Za-z_][A-Za-z0-9_]*)")

#: Types of arguments and results, as schemas write them, of an operation on tensors.
_ARGUMENT_TYPES = re.compile(
    r"(Optional\[|List\[)*(Tensor|number|int|float|bool|str|ScalarType|Layout|MemoryFormat|Device"
    r"|Generator)\]*"
)
_RESULT_TYPES = re.compile(r"(List\[)?Tensor\]?")

#: A text is the name of a variant of the computation in these, and might be a file's in others.
_TEXT_ARGUMENTS = {"approximate", "rounding_mode", "reduce", "indexing", "side", "norm"}

#: They compute on tensors, but in ways that a program does not: they move a tensor to other memory,
#: look at numbers to decide, print or stop the process.
_NOT_ALLOWED = re.compile(
    r"(set|resize|from_file|record_stream|rename|refine_names|align|pin_memory|data|requires_grad"
    r"|retain_grad|swap|sym_|sparse|to_sparse|to_mkldnn|mkldnn_reorder|quantize|dequantize|q_|fbgemm"
    r"|choose_qparams|is_|nonzero|unique|masked_select)"
)

#: Operators whose names begin with an underscore are torch's own affair; these are kernels of steps.
_PRIVATE_KERNELS = (
    "_adaptive_avg_pool",
    "_addmm_activation",
    "_batch_norm",
    "_cdist",
    "_ctc_loss",
    "_embedding_bag",
    "_euclidean_dist",
    "_fft_",
    "_foreach_",
    "_fused_adagrad_",
    "_fused_adam_",
    "_fused_adamw_",
    "_fused_dropout",
    "_fused_rms_norm",
    "_fused_sgd_",
    "_log_softmax",
    "_native_batch_norm_legit",
    "_pdist",
    "_prelu_kernel",
    "_reshape_alias",
    "_reshape_copy",
    "_safe_softmax",
    "_scaled_dot_product",
    "_softmax",
    "_thnn_",
    "_to_copy",
    "_trilinear",
    "_unsafe_",
    "_upsample_",
    "_weight_norm",
    "_conj",
    "_neg_view",
    "_cudnn_rnn",
    "_linalg_",
    "_convolution",
)

#: Written by the kernel, though the schema does not say so.
_UNDECLARED_WRITES = {
    "native_batch_norm": ("running_mean", "running_var"),
    "cudnn_batch_norm": ("running_mean", "running_var"),
    "miopen_batch_norm": ("running_mean", "running_var"),
}


class NotAllowedError(ValueError):
    """An operator that is no operation on tensors, or one that a program cannot use."""


@cache
def resolve(name: str) -> Any:
    """Return the operator `aten.name.overload` of `torch.ops`, if a program may use it.

    Allowed is what computes tensors from tensors and numbers alone: it reads no file, starts
    nothing, and its results' shapes do not depend on the numbers in its tensors.

    Raises:
        NotAllowedError: it is unknown, or no such operation.
    """
    match = _NAME.fullmatch(name)
    packet = getattr(torch.ops.aten, match[1], None) if match else None
    if match is None or not isinstance(packet, torch._ops.OpOverloadPacket):
        raise NotAllowedError(f"{name} is no operator of this torch ({torch.__version__})")
    if match[2] not in packet.overloads():  # type: ignore[no-untyped-call]
        raise NotAllowedError(f"{name}: {match[1]} has no overload {match[2]}")
    operator = getattr(packet, match[2])
    reason = _reason_against(match[1], operator)
    if reason:
        raise NotAllowedError(f"{name} {reason}")
    return operator


def _reason_against(name: str, operator: Any) -> str | None:
    schema = operator._schema
    if torch.Tag.data_dependent_output in operator.tags or any(
        not _RESULT_TYPES.fullmatch(str(result.type)) for result in schema.returns
    ):
        return "gives a number to Python, which may decide by it what to do"
    if torch.Tag.dynamic_output_shape in operator.tags and name != "index":
        return "gives a result whose shape depends on numbers"
    for argument in schema.arguments:
        kind = str(argument.real_type)
        is_text = "str" in kind and argument.name not in _TEXT_ARGUMENTS
        if is_text or not _ARGUMENT_TYPES.fullmatch(kind):
            return f"takes {argument.name}, a {kind}, and so is not an operation on tensors alone"
    allowed = name.startswith(_PRIVATE_KERNELS) if name.startswith("_") else not _NOT_ALLOWED.match(name)
    return None if allowed else "is not on the list of operators that a program may use"


@cache
def out_variant(operator: Any) -> tuple[Any, tuple[str, ...]] | None:
    """Return the overload that writes its results into given tensors, and their names, or None."""
    schema = operator._schema
    wanted = [(a.name, str(a.real_type)) for a in schema.arguments]
    packet = operator.overloadpacket
    for overload in packet.overloads():
        candidate = getattr(packet, overload)
        arguments = candidate._schema.arguments
        outs = [a for a in arguments if a.is_out]
        rest = [(a.name, str(a.real_type)) for a in arguments if not a.is_out]
        same_results = [str(a.type) for a in outs] == [str(r.type) for r in schema.returns]
        if outs and same_results and rest == wanted:
            return candidate, tuple(a.name for a in outs)
    return None


@cache
def writes(operator: Any) -> frozenset[str]:
    """Return the names of the arguments that the operator writes into."""
    schema = operator._schema
    declared = {a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write}
    undeclared = _UNDECLARED_WRITES.get(schema.name.removeprefix("aten::"), ())
    return frozenset(declared | set(undeclared))


def draws_random_numbers(operator: Any) -> bool:
    """Tell whether the operator draws from a random generator."""
    return torch.Tag.nondeterministic_seeded in operator.tags


def leaves(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in an argument or a result: itself, or those in its lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
