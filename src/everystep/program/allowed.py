"""Which operators a program may call, for torch 2.9 to 2.15: those with a record, and their variants.

These operators have no record: those on tensors that programs do not have (sparse, quantized, nested);
those that use values of a tensor as memory offsets, or as a duration, without checking them; those that
write to memory other than their arguments; and kernels that only other operators call. So a new
operator is refused until it was reviewed: `shallow_copy_data_` of torch 2.15 gives a tensor the memory
of another.

Arguments of kernels that trust them are known by position and kind, and by the names in their records,
which torch may change: `aten._cdist_backward` calls its first argument `grad` up to torch 2.14, and
`grad_output` since. A kernel with arguments of other kinds is refused.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import torch

from everystep.ops import PERMITTED, is_allowed, record_of
from everystep.ops.operators import (
    UNDECLARED_WRITES,
    NotAllowedError,
    draws_random_numbers,
    is_composite,
    may_have_shape_of_values,
)
from everystep.program.collectives import COLLECTIVES
from everystep.program.optimizer_operator import OPTIMIZERS

__all__ = ["BY_VALUES", "OF_BACKWARD_ALONE", "has_effect", "known_names", "resolve"]

#: What `torch.ops` has for each name: all overloads of an operator.
_Packet: Any = type(torch.ops.aten.mul)
_NAME = re.compile(r"aten\.([A-Za-z_][A-Za-z0-9_]*)\.([A-Za-z_][A-Za-z0-9_]*)")

#: Exceptions to the rules for operators: one returns a number to Python, the result shapes of six
#: depend on numbers, up to the size of an argument, and two belong to a gradient scaler, and check their
#: inputs.
BY_VALUES = {f"aten.{name}.default" for name, record in PERMITTED.items() if record.by_values}

#: Types of arguments and results, as schemas write them, of an operation on tensors.
_ARGUMENT_TYPES = re.compile(
    r"(Optional\[|List\[)*(Tensor|number|int|float|bool|str|ScalarType|Layout|MemoryFormat|Device"
    r"|Generator)\]*"
)
#: A result that is a whole number (of attention on a GPU) is a size, or the tag says that it is not.
_RESULT_TYPES = re.compile(r"(List\[)?Tensor\]?|int")

#: In these, a string names a variant of the computation; in others, it might name a file.
_TEXT_ARGUMENTS = {"approximate", "rounding_mode", "reduce", "side", "mode", "driver", "UPLO"}

#: The internals of torch that programs need to be captured, checked and run.
_NEEDED = (
    *("_C._AutoDispatchBelowAutograd", "_C._dispatch_has_kernel"),
    "_C._dispatch_has_kernel_for_dispatch_key",
    *("_C._set_grad_enabled", "Tag.data_dependent_output", "Tag.dynamic_output_shape"),
    *("Tag.inplace_view", "Tag.nondeterministic_seeded", "Tag.view_copy"),
)

#: Parameters of the backward pass that the forward pass does not have. They must agree with the shapes
#: of the results, or `soundness` checks them.
OF_BACKWARD_ALONE = {"bias_sizes", "num_weights", "output_mask", "grad_input_mask", "max_q", "max_k"}


@cache
def resolve(name: str) -> Any:
    """Return an operator that a program may have.

    That is `aten.name.overload` of `torch.ops`; `optim.name.step`, the step of one of torch's
    optimizers; or one of `COLLECTIVES`. It computes tensors from tensors and numbers alone: it reads no
    file, starts no process, and changes no tensor's shape or memory. Except for `BY_VALUES`, the shapes
    of its results do not depend on the numbers in its tensors. A program contains only those that
    compute, see `computes`.

    Raises:
        NotAllowedError: it is unknown, or not such an operation.
    """
    for needed in _NEEDED:
        owner, _, attribute = needed.partition(".")
        if not hasattr(getattr(torch, owner), attribute):
            lacking = f"torch {torch.__version__} has no torch.{needed}, which everystep needs"
            raise NotAllowedError(lacking)
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    if name in COLLECTIVES:
        return COLLECTIVES[name]
    match = _NAME.fullmatch(name)
    packet = getattr(torch.ops.aten, match[1], None) if match else None
    if match is None or not isinstance(packet, _Packet):
        raise NotAllowedError(f"{name:.80} is not an ATen operator of this torch ({torch.__version__})")
    if match[2] not in packet.overloads():
        raise NotAllowedError(f"{name:.80}: {match[1]} has no overload {match[2]:.80}")
    operator = getattr(packet, match[2])
    reason = None if name in BY_VALUES else _reason_against(match[1], operator)
    if reason:
        raise NotAllowedError(f"{name} {reason}")
    return operator


def _reason_against(name: str, operator: Any) -> str | None:
    schema, tags = operator._schema, operator.tags
    if torch.Tag.data_dependent_output in tags or any(
        not _RESULT_TYPES.fullmatch(str(result.type)) for result in schema.returns
    ):
        return "returns a number to Python, which may branch on it"
    if name != "index" and may_have_shape_of_values(operator.overloadpacket):
        return "returns a result of a shape that depends on values"
    if torch.Tag.inplace_view in tags:
        return "changes the shape or the memory of an existing tensor"
    for argument in schema.arguments:
        kind = str(argument.real_type)
        is_text = "str" in kind and argument.name not in _TEXT_ARGUMENTS
        if is_text or not _ARGUMENT_TYPES.fullmatch(kind):
            return f"takes {argument.name}, a {kind}, so it is not an operation on tensors only"
    if not is_allowed(name) or torch.Tag.view_copy in tags or not _is_run(operator):
        return "is not on the list of allowed operators"
    unsaid = set(UNDECLARED_WRITES.get(name, ())) - {argument.name for argument in schema.arguments}
    if unsaid:
        return f"has another signature in torch {torch.__version__} than this everystep supports"
    return _what_is_unknown(operator)


def _is_run(operator: Any) -> bool:
    """Return whether torch runs an operator as it is, so that a step may contain it.

    Composites with a known derivative are not decomposed: some device has a kernel for them. TorchScript
    has operators of its own, which nothing can call.
    """
    name, has_kernel = operator.name(), torch._C._dispatch_has_kernel_for_dispatch_key
    is_own = not is_composite(operator) or has_kernel(name, "Autograd")
    return torch._C._dispatch_has_kernel(name) and is_own


def has_effect(operator: Any) -> bool:
    """Return whether an operation matters without its results: to later draws, or to other ranks."""
    return draws_random_numbers(operator) or str(operator) in COLLECTIVES


def _what_is_unknown(operator: Any) -> str | None:
    """Return what is unknown about a trusting kernel, None if everystep knows enough."""
    record = record_of(operator.overloadpacket.__name__)
    if record.arguments and known_names(operator) is None:
        return f"has another signature in torch {torch.__version__} than this everystep supports"
    if record.kept is not None:
        base = record.forward
        known = _names_of(base) | _names_of(f"{base}_forward") | OF_BACKWARD_ALONE
        for argument in _given(operator):
            is_tensor = "Tensor" in str(argument.real_type)
            if not is_tensor and record.renamed.get(argument.name, argument.name) not in known:
                return (
                    f"takes {argument.name} in torch {torch.__version__}, which this everystep does "
                    f"not support: {base} has no such argument"
                )
    return None


@cache
def known_names(operator: Any) -> dict[str, str] | None:
    """Return the names of a kernel's arguments in its record, by torch's; None if they are others."""
    given = _given(operator)
    kinds = [str(argument.real_type) for argument in given]
    for signature in record_of(operator.overloadpacket.__name__).arguments.split(" | "):
        pairs = [argument.split() for argument in signature.split(", ")]
        if [kind for kind, _ in pairs] == kinds:
            return {argument.name: ours for argument, (_, ours) in zip(given, pairs, strict=True)}
    return None


def _given(operator: Any) -> list[Any]:
    """Return the arguments of an operator in the order of its schema, without those of `out=`."""
    return [argument for argument in operator._schema.arguments if not argument.is_out]


def _names_of(name: str) -> set[str]:
    packet = getattr(torch.ops.aten, name, None)
    overloads = (getattr(packet, each) for each in packet.overloads()) if packet else ()
    return {argument.name for overload in overloads for argument in overload._schema.arguments}
