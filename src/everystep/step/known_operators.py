"""Properties of a torch operator, looked up once: whether and how a watch sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from everystep.program.number_slots import READ, slot_names
from everystep.program.observed import uses_only_shape
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
from everystep.step.mode_formulas import is_decomposed

__all__ = [
    "JOINING",
    "PICKING",
    "KnownOperator",
    "gathers_data",
    "is_shaped_by_numbers",
    "known_operator",
    "run_counted",
]

#: They change a tensor's geometry or memory, which its next use shows.
_OTHER_GEOMETRY = {
    *("as_strided_", "detach_", "squeeze_", "swapaxes_", "swapdims_", "t_", "transpose_"),
    *("unsqueeze_", "set_"),
}
#: What operators return that ask how tensors lie, and not which numbers are in them.
_ANSWERS = {"int", "bool", "List[int]"}
#: They pick numbers by an index, or lay parts of data side by side.
PICKING, JOINING = {"gather", "index", "index_select", "take"}, {"cat", "stack"}


class KnownOperator(NamedTuple):
    """Everything known about an operator, looked up once.

    how: `pass` (it computes nothing), `make` (it only allocates memory), `see`, `decompose` (its
    component operations are seen), or why it is not seen; places: its parameters, and whether each is a
    slot for numbers; resizes: whether it gives its `out` a shape that depends on numbers; may_gather:
    whether `gathers_data` must be asked, and may_be_shaped: `is_shaped_by_numbers`; reads_only_shape: of
    its first argument.
    """

    how: str
    name: str
    writes: tuple[str, ...] = ()
    places: Mapping[str, bool] = MappingProxyType({})
    gives: bool = True
    draws: bool = False
    makes_dtype: bool = False
    has_out: bool = False
    resizes: bool = False
    is_read: bool = False
    writes_list: bool = False
    may_gather: bool = True
    may_be_shaped: bool = False
    reads_only_shape: bool = False


@cache
def known_operator(func: Any) -> KnownOperator:
    """Return the properties of an operator."""
    name = func.overloadpacket.__name__
    how, text = "see", str(func)
    if is_decomposed(func):
        how = "decompose"
    elif func.namespace in ("prim", "profiler") or name in _OTHER_GEOMETRY or _asks(func):
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
            name,
            writes(func),
            {p.name: p.name in slot_names(func) for p in parameters(func)},
            bool(func._schema.returns) and text != READ,
            draws_random_numbers(func),
            _makes_dtype(func),
            has_out,
            has_out and may_have_shape_of_values(func.overloadpacket),
            text == READ,
            "foreach" in name and bool(writes(func)),
            how == "pass" or name == "copy_" or name in PICKING | JOINING,
            has_shape_of_values(func, [torch.bool]),
            uses_only_shape(text),
        )
    except (AttributeError, RuntimeError):  # an operator without a schema that can be read
        return KnownOperator("has no schema" if how == "see" else how, name)


def _asks(func: Any) -> bool:
    """Return whether an operator returns only how tensors lie, such as sizes."""
    if func.namespace != "aten":  # one of another package may read numbers
        return False
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
    copies = known.name == "copy_"
    read = [*tensors][: 1 if copies else None]
    if any(not is_plain(tensor) or tensor.requires_grad for tensor in read):
        return False
    met = [tensor for tensor in read if is_met(tensor)]
    if known.name in JOINING:
        return 2 * len(met) < len(read) and all(map(is_drawn, met))
    if copies and not met:
        return read[0].untyped_storage().nbytes() > read[0].numel() * read[0].itemsize
    indices = [each for each in met if not (each.is_floating_point() or each.is_complex())]
    are_drawn = known.name in PICKING and len(indices) == len(met) and all(map(is_drawn, indices))
    return len(met) < len(read) and (are_drawn or not met)


def is_shaped_by_numbers(func: Any, args: Any) -> bool:
    """Return whether the shapes of an operation's results depend on numbers."""
    return has_shape_of_values(func, (each.dtype for each in leaves(args[1:2])))


def run_counted(func: Any, *args: Any, **keywords: Any) -> Any:
    """Run an operator on lists; torch counts its writes as it does without a watch.

    Its kernel may write each tensor by a separate operator, which torch does not count below a mode.
    """
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return func(*args, **keywords)
