"""Properties of a torch operator, looked up once: whether and how a watch sees it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch

from everystep.ops.operators import (
    NotAllowedError,
    computes,
    draws_random_numbers,
    has_shape_of_values,
    is_composite,
    may_have_shape_of_values,
    parameters,
    writes,
)
from everystep.program.allowed import resolve
from everystep.program.number_slots import READ, slot_names
from everystep.program.observed import FILLING, uses_only_shape
from everystep.step.mode_formulas import is_decomposed

__all__ = [
    "JOINING",
    "PICKING",
    "KnownOperator",
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


# e.g. pass: view, t_, sym_size; make: empty; see: mul, nonzero, item's `_local_scalar_dense`;
# decompose: equal, item, to_sparse; "is not on the list of allowed operators": quantize_per_tensor.
class KnownOperator(NamedTuple):
    """Everything known about an operator, looked up once.

    how: `pass` (it computes nothing), `make` (it only allocates memory), `see`, `decompose` (its
    component operations are seen), or why it is not seen; places: its parameters, and whether each is a
    slot for numbers; resizes: whether it gives its `out` a shape that depends on numbers; may_gather:
    whether it may cut numbers out of data; may_be_shaped: whether numbers may determine the shapes of
    its results; reads_only_shape: of its first argument; computes_in_place: whether it reads all that it
    writes into.
    """

    how: str
    name: str
    writes: tuple[str, ...]
    places: Mapping[str, bool]
    gives: bool
    draws: bool
    makes_dtype: bool
    has_out: bool
    resizes: bool
    is_read: bool
    writes_list: bool
    may_gather: bool
    may_be_shaped: bool
    reads_only_shape: bool
    computes_in_place: bool


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
            if is_composite(func):  # it arrives whole in inference mode alone
                how = "decompose"
        else:
            if not computes(func):
                is_view = any(r.alias_info for r in func._schema.returns) or "unsafe" in name
                how = "pass" if is_view else "make"
    has_out = any(argument.is_out for argument in func._schema.arguments)
    kinds = {p.name: p.kind for p in parameters(func)}
    return KnownOperator(
        how=how,
        name=name,
        writes=writes(func),
        places={name: name in slot_names(func) for name in kinds},
        # What it gives to Python is a number, and no tensor of the step.
        gives=bool(func._schema.returns) and text != READ,
        draws=draws_random_numbers(func),
        # It creates a tensor without inputs, by default in the process's dtype.
        makes_dtype="dtype" in kinds and not any("Tensor" in kind for kind in kinds.values()),
        has_out=has_out,
        resizes=has_out and may_have_shape_of_values(func.overloadpacket),
        is_read=text == READ,
        writes_list="foreach" in name and bool(writes(func)),
        may_gather=how == "pass" or name == "copy_" or name in PICKING | JOINING,
        # An index may be a mask: the number of its ones determines the shape.
        may_be_shaped=has_shape_of_values(func, [torch.bool]),
        reads_only_shape=uses_only_shape(text),
        computes_in_place=writes(func) == ("self",) and not has_out and name not in FILLING,
    )


def _asks(func: Any) -> bool:
    """Return whether an operator returns only how tensors lie, such as sizes."""
    if func.namespace != "aten":  # one of another package may read numbers
        return False
    types = {str(result.type) for result in func._schema.returns}
    is_of_values = torch.Tag.data_dependent_output in func.tags or "is_nonzero" in str(func)
    return bool(types) and types <= _ANSWERS and not is_of_values


def run_counted(func: Any, *args: Any, **keywords: Any) -> Any:
    """Run an operator on lists; torch counts its writes as it does without a watch.

    Its kernel may write each tensor by a separate operator, which torch does not count below a mode.
    """
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return func(*args, **keywords)
