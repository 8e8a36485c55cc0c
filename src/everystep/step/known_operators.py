"""Properties of a torch operator, looked up once: whether and how a watch sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from everystep.program.number_slots import READ, is_number_slot
from everystep.program.observed import OVERWRITING
from everystep.program.operators import (
    NotAllowedError,
    computes,
    draws_random_numbers,
    has_shape_of_values,
    leaves,
    may_have_shape_of_values,
    parameters,
    resolve,
    writes,
)
from everystep.step.met_tensors import is_plain

__all__ = ["KnownOperator", "gathers_data", "is_shaped_by_numbers", "known_operator", "run_counted"]

#: They change a tensor's geometry or memory, which its next use shows.
_OTHER_GEOMETRY = {
    *("as_strided_", "detach_", "squeeze_", "swapaxes_", "swapdims_", "t_", "transpose_"),
    *("unsqueeze_", "set_"),
}
#: What operators return that ask how tensors lie, and not which numbers are in them.
_ANSWERS = {"int", "bool", "List[int]"}
_ZEROING = {"zero_", "_foreach_zero_"}
#: They pick numbers by an index.
_PICKING = {"gather", "index", "index_select", "take"}
#: They lay parts of data side by side.
_JOINING = {"cat", "stack"}


class KnownOperator(NamedTuple):
    """Everything known about an operator, looked up once.

    how: `pass` (it computes nothing), `make` (it only allocates memory), `see`, `decompose` (its
    component operations are seen), or why it is not seen; places: its parameters, and whether each is a
    slot for numbers; resizes: whether it gives its `out` a shape that depends on numbers.
    """

    how: str
    writes: tuple[str, ...] = ()
    places: Mapping[str, bool] = MappingProxyType({})
    gives: bool = True
    draws: bool = False
    makes_dtype: bool = False
    has_out: bool = False
    resizes: bool = False
    is_read: bool = False
    is_zeroing: bool = False
    writes_list: bool = False
    picks: bool = False
    joins: bool = False
    copies: bool = False
    overwrites: bool = False


@cache
def known_operator(func: Any) -> KnownOperator:
    """Return the properties of an operator."""
    name = func.overloadpacket.__name__
    how, text = "see", str(func)
    if func.namespace in ("prim", "profiler") or name in _OTHER_GEOMETRY or _asks(func):
        how = "pass"
    else:
        try:
            resolve(text)
        except NotAllowedError as error:
            how = str(error).removeprefix(f"{text} ")
            if _is_composite(func):  # it arrives whole in inference mode alone
                how = "decompose"
        else:
            if not computes(func):
                is_view = any(r.alias_info for r in func._schema.returns) or "unsafe" in name
                how = "pass" if is_view else "make"
    try:
        has_out = any(argument.is_out for argument in func._schema.arguments)
        return KnownOperator(
            how,
            tuple(writes(func)),
            {p.name: is_number_slot(func, p.name) for p in parameters(func)},
            bool(func._schema.returns) and text != READ,
            draws_random_numbers(func),
            _makes_dtype(func),
            has_out,
            has_out and may_have_shape_of_values(func.overloadpacket),
            text == READ,
            name in _ZEROING,
            "foreach" in name and bool(writes(func)),
            name in _PICKING,
            name in _JOINING,
            name == "copy_",
            name in OVERWRITING,
        )
    except (AttributeError, RuntimeError):  # an operator without a schema that can be read
        return KnownOperator("has no schema" if how == "see" else how)


def _asks(func: Any) -> bool:
    """Return whether an operator returns only how tensors lie, such as sizes."""
    types = {str(result.type) for result in func._schema.returns}
    is_of_values = torch.Tag.data_dependent_output in func.tags or "is_nonzero" in str(func)
    return bool(types) and types <= _ANSWERS and not is_of_values


def _makes_dtype(func: Any) -> bool:
    """Return whether an operator creates a tensor without inputs, by default in the process's dtype."""
    kinds = {p.name: p.kind for p in parameters(func)}
    return "dtype" in kinds and not any("Tensor" in kind for kind in kinds.values())


def _is_composite(func: Any) -> bool:
    """Return whether torch decomposes an operator before it runs."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    try:
        return bool(has_kernel(func.name(), "CompositeImplicitAutograd"))
    except RuntimeError:  # only Python has it; where torch asks from C++, an error ends the process
        return False


def gathers_data(
    known: KnownOperator,
    tensors: Iterable[Tensor],
    is_met: Callable[[Tensor], bool],
    is_drawn: Callable[[Tensor], bool],
) -> bool:
    """Return whether an operation cuts numbers out of data from outside, or writes into a part of it.

    A loop without a loader cuts its batches out of one long tensor, at different places at each step.
    The result is an input of the step, kept by content as a batch is, and the operation is left out: so
    steps that read different places have the same path, and the long tensor itself is not kept.

    A read counts if its places may change: numbers picked by an index; or tensors that are joined, most
    of them from outside, as samples out of a memory are. A view is left out: what reads it has a part of
    the data.

    Args:
        known: its operator.
        tensors: its inputs.
        is_met: whether a tensor is on memory that the step knows.
        is_drawn: whether the step has drawn a tensor at random, without other inputs.
    """
    if known.how != "pass" and not (known.picks or known.joins or known.copies):
        return False
    is_outside, tensors = False, [*tensors]
    if known.joins and all(is_plain(tensor) and not tensor.requires_grad for tensor in tensors):
        met = [tensor for tensor in tensors if is_met(tensor)]
        return 2 * len(met) < len(tensors) and all(map(is_drawn, met))
    for tensor in tensors:
        if not is_plain(tensor) or tensor.requires_grad or known.joins:
            return False
        if is_met(tensor):
            is_index = not (tensor.is_floating_point() or tensor.is_complex())
            if not (known.picks and is_index and is_drawn(tensor)):
                return False
            continue
        is_outside = True
        if known.copies:
            return tensor.untyped_storage().nbytes() > tensor.numel() * tensor.itemsize
    return is_outside


def is_shaped_by_numbers(func: Any, args: Any) -> bool:
    """Return whether the shapes of an operation's results depend on numbers."""
    return has_shape_of_values(func, (each.dtype for each in leaves(args[1:2])))


def run_counted(func: Any, *args: Any, **keywords: Any) -> Any:
    """Run an operator on lists; torch counts its writes as it does without a watch.

    Its kernel may write each tensor by a separate operator, which torch does not count below a mode.
    """
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return func(*args, **keywords)
