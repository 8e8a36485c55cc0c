"""What torch declares of its operators, and how a step calls them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "ALLOCATING",
    "REFUSALS",
    "UNDECLARED_WRITES",
    "NotAllowedError",
    "OperatorMode",
    "computes",
    "draws_random_numbers",
    "flattened",
    "has_shape_of_values",
    "is_composite",
    "leaves",
    "may_have_shape_of_values",
    "out_variant",
    "parameters",
    "without_autograd",
    "writes",
]

#: What operators raise that refuse their arguments; an optimizer computes with Python's numbers, too.
REFUSALS = (RuntimeError, IndexError, ValueError, TypeError, ArithmeticError)
_LISTS = (list, tuple)

#: They return memory as they find it.
ALLOCATING = frozenset(
    ("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided")
)
#: They return memory, or a view of it, although their schema does not declare a view.
_MEMORY_ONLY = {*ALLOCATING, "_unsafe_view", "unsafe_split", "unsafe_split_with_sizes"}

#: Written by the kernel, although the schema does not declare it.
UNDECLARED_WRITES = dict.fromkeys(
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
def may_have_shape_of_values(packet: Any) -> bool:
    """Return whether a result's shape depends on values; not all overloads with `out=` declare it."""
    overloads = (getattr(packet, name) for name in packet.overloads())
    return any(torch.Tag.dynamic_output_shape in overload.tags for overload in overloads)


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
    undeclared = UNDECLARED_WRITES.get(schema.name.removeprefix("aten::"), ())
    declared = (a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write)
    known = {*declared, *undeclared}
    return tuple(a.name for a in schema.arguments if a.name in known)


#: Torch counts it among those that draw, as all attention, but it accepts no dropout.
_WITHOUT_DROPOUT = "aten._scaled_dot_product_flash_attention_for_cpu.default"


def draws_random_numbers(operator: Any) -> bool:
    """Return whether the operator draws from a random generator."""
    return torch.Tag.nondeterministic_seeded in operator.tags and str(operator) != _WITHOUT_DROPOUT


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


class without_autograd:  # noqa: N801  # used as a function, and much faster than a generator
    """Bypass autograd within: programs hold its operations already."""

    __slots__ = ("_before", "_guard")

    def __enter__(self) -> None:
        self._before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        # Without gradients alone, each call would still go through the kernels of autograd.
        self._guard = torch._C._AutoDispatchBelowAutograd()
        self._guard.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: object) -> None:
        self._guard.__exit__(None, None, None)
        torch._C._set_grad_enabled(self._before)
