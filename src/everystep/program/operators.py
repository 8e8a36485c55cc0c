"""The torch operators that a step and its program may use, and their schemas."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from everystep.program.allowed import is_allowed, what_is_unknown
from everystep.program.collectives import COLLECTIVES
from everystep.program.optimizer_operator import OPTIMIZERS

__all__ = [
    "ALLOCATING",
    "BY_VALUES",
    "REFUSALS",
    "NotAllowedError",
    "OperatorMode",
    "computes",
    "draws_random_numbers",
    "flattened",
    "has_effect",
    "has_shape_of_values",
    "is_composite",
    "leaves",
    "may_have_shape_of_values",
    "out_variant",
    "parameters",
    "resolve",
    "writes",
]

#: What operators raise that refuse their arguments; an optimizer computes with Python's numbers, too.
REFUSALS = (RuntimeError, IndexError, ValueError, TypeError, ArithmeticError)
#: What `torch.ops` has for each name: all overloads of an operator.
_Packet: Any = type(torch.ops.aten.mul)
_LISTS = (list, tuple)
_NAME = re.compile(r"aten\.([A-Za-z_][A-Za-z0-9_]*)\.([A-Za-z_][A-Za-z0-9_]*)")

#: Exceptions to the rules for operators: one returns a number to Python, the result shapes of six
#: depend on numbers, up to the size of an argument, and two belong to a gradient scaler, and check their
#: inputs.
BY_VALUES = {
    *("aten._local_scalar_dense.default", "aten.nonzero.default", "aten.masked_select.default"),
    *("aten._unique2.default", "aten.unique_dim.default", "aten.unique_consecutive.default"),
    "aten._pack_padded_sequence.default",
    *("aten._amp_foreach_non_finite_check_and_unscale_.default", "aten._amp_update_scale_.default"),
}

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

#: They return memory as they find it.
ALLOCATING = frozenset(
    ("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided")
)
#: They return memory, or a view of it, although their schema does not declare a view.
_MEMORY_ONLY = {*ALLOCATING, "_unsafe_view", "unsafe_split", "unsafe_split_with_sizes"}

#: Written by the kernel, although the schema does not declare it.
_UNDECLARED_WRITES = dict.fromkeys(
    ("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"), ("running_mean", "running_var")
)


class NotAllowedError(ValueError):
    """An operator that is not an operation on tensors, or that a program may not use."""


class Parameter(NamedTuple):
    """A parameter of an operator. kind: as schemas write it; size: of a list of fixed length."""

    name: str
    kind: str
    size: int | None
    is_positional: bool
    default: Any


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
        raise NotAllowedError(f"{name:.80} is not an operator of this torch ({torch.__version__})")
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
    unsaid = set(_UNDECLARED_WRITES.get(name, ())) - {argument.name for argument in schema.arguments}
    if unsaid:
        return f"has another signature in torch {torch.__version__} than this everystep supports"
    return what_is_unknown(operator)


@cache
def may_have_shape_of_values(packet: Any) -> bool:
    """Return whether a result's shape depends on values; not all overloads with `out=` declare it."""
    overloads = (getattr(packet, name) for name in packet.overloads())
    return any(torch.Tag.dynamic_output_shape in overload.tags for overload in overloads)


def _is_run(operator: Any) -> bool:
    """Return whether torch runs an operator as it is, so that a step may contain it.

    Composites with a known derivative are not decomposed: some device has a kernel for them. TorchScript
    has operators of its own, which nothing can call.
    """
    name, has_kernel = operator.name(), torch._C._dispatch_has_kernel_for_dispatch_key
    is_own = not is_composite(operator) or has_kernel(name, "Autograd")
    return torch._C._dispatch_has_kernel(name) and is_own


def is_composite(operator: Any) -> bool:
    """Return whether torch decomposes an operator before it runs."""
    name, has_kernel = operator.name(), torch._C._dispatch_has_kernel_for_dispatch_key
    # Of an operator that only Python has, torch would raise.
    return torch._C._dispatch_has_kernel(name) and has_kernel(name, "CompositeImplicitAutograd")


@cache
def computes(operator: Any) -> bool:
    """Return whether the operator computes numbers; others return a view or memory."""
    results = operator._schema.returns
    is_view = any(r.alias_info and not r.alias_info.is_write for r in results)
    return not is_view and operator.overloadpacket.__name__ not in _MEMORY_ONLY


@cache
def parameters(operator: Any) -> tuple[Parameter, ...]:
    """Return the parameters of an operator, the positional ones first."""
    return tuple(
        Parameter(a.name, str(a.real_type), a.N, not a.kwarg_only, a.default_value)
        for a in operator._schema.arguments
    )


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
        # All else must be the same: an overload may take other arguments, too.
        rest = [(a.name, str(a.real_type)) for a in arguments if not a.is_out]
        same_results = [str(a.type) for a in outs] == [str(r.type) for r in schema.returns]
        if outs and same_results and rest == wanted:
            return candidate, tuple(a.name for a in outs)
    return None


@cache
def writes(operator: Any) -> tuple[str, ...]:
    """Return the names of the arguments that the operator writes into, in their order.

    Those of torch's collectives declare nothing, and all of their tensors may be written.
    """
    schema = operator._schema
    if schema.name.startswith("c10d::"):
        return tuple(a.name for a in schema.arguments)
    undeclared = _UNDECLARED_WRITES.get(schema.name.removeprefix("aten::"), ())
    declared = (a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write)
    known = {*declared, *undeclared}
    return tuple(a.name for a in schema.arguments if a.name in known)


#: Torch counts it among those that draw, as all attention, but it accepts no dropout.
_WITHOUT_DROPOUT = "aten._scaled_dot_product_flash_attention_for_cpu.default"


def draws_random_numbers(operator: Any) -> bool:
    """Return whether the operator draws from a random generator."""
    return torch.Tag.nondeterministic_seeded in operator.tags and str(operator) != _WITHOUT_DROPOUT


def has_effect(operator: Any) -> bool:
    """Return whether an operation matters without its results: to later draws, or to other ranks."""
    return draws_random_numbers(operator) or str(operator) in COLLECTIVES


def has_shape_of_values(operator: Any, indices: Iterable[torch.dtype]) -> bool:
    """Return whether the shapes of an operator's results depend on the numbers in tensors.

    indices: the dtypes of the tensors by which it picks elements, if it does; those of masks count.
    """
    name = operator.overloadpacket.__name__
    # torch has no tag on one of them.
    if torch.Tag.dynamic_output_shape not in operator.tags and name != "_pack_padded_sequence":
        return False
    is_picking = name in ("index", "_unsafe_index")
    return not is_picking or any(dtype in (torch.bool, torch.uint8) for dtype in indices)


def flattened(value: Any) -> list[Any]:
    """Return all items of arguments or results, in order: those of dicts, lists and tuples."""
    if isinstance(value, dict):
        value = [*value.values()]
    if isinstance(value, list | tuple):
        return [each for item in value for each in flattened(item)]
    return [value]


def leaves(value: Any) -> list[Tensor]:
    """Return the tensors in an argument or a result: itself, or those in its lists."""
    if isinstance(value, Tensor):
        return [value]
    found: list[Tensor] = []
    for item in value if isinstance(value, _LISTS) else ():
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, _LISTS):
            found += leaves(item)
    return found


class OperatorMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Enters without torch's compiler, which takes most of a second to import."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Skipping the compiler would import it.
        return False
