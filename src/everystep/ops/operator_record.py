"""A record: what everystep knows of an operator."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from everystep.ops.call import Call, Made
from everystep.ops.operators import leaves
from everystep.ops.row_rules import RowsRule

__all__ = ["LATER", "Given", "LineRule", "MadeRule", "OperatorRecord", "alike", "are_dense"]

#: Returns which numbers a number was made from; raises NoRuleError.
MadeRule = Callable[[Call], Made]
#: Returns the line of an `OperatorRecord` for the arguments of a call; empty if it does not cover them.
LineRule = Callable[[Call], str]
#: The arguments of a kernel by name; its tensors have shapes, but neither memory nor numbers.
Given = dict[str, Any]
#: The later results of a forward pass, all but the first: as many as a kernel has arguments for.
LATER = range(1, 9)


# e.g. "addmm": OperatorRecord(made, rows, line), where for each number of the result
#   made(call)  is a Sum of the products of a row and a column, and of the bias;
#   rows(call)  has the rows of `mat1` in the forward pass, and a sum over rows for a weight's gradient;
#   line        is "{mat1} · {mat2} + {self}".
class OperatorRecord(NamedTuple):
    """What is known of an operator that a program may call; None: nothing.

    made: which numbers a number of a result was computed from, and how; rows: the rows of the batch that
    results belong to; line: its mathematical notation, with its arguments by name in braces, if that is
    not a call of the operator. If the kind of an operator implies a rule, its family derives it.

    Some kernels trust their arguments, so that programs are checked. fits: whether arguments fit
    together; arguments: their kinds, and the names by which `fits` knows them, for each overload except
    `out=`, with " | " between; kept: the places of the results of the forward pass that a kernel of the
    backward pass gets, in order; forward: the operator of the forward pass, without `_forward`; renamed:
    names of arguments of the backward pass, as the forward pass has them.

    by_values: whether the shapes of its results depend on the numbers in tensors, or Python gets one of
    these: a program may call only its overload `default`; has_statistics: whether its results after the
    first have the dtype of its input on a CPU, and float32 on other devices; memory_from: the first
    result that is the kernel's own memory, as all later ones are.
    """

    made: MadeRule | None = None
    rows: RowsRule | None = None
    line: str | LineRule = ""
    fits: Callable[[Given], bool] | None = None
    arguments: str = ""
    kept: Sequence[int] | None = None
    forward: str = ""
    renamed: Mapping[str, str] = MappingProxyType({})
    by_values: bool = False
    has_statistics: bool = False
    memory_from: int | None = None


def alike(
    names: str,
    made: MadeRule | None = None,
    rows: RowsRule | None = None,
    line: str | LineRule = "",
    *trust: Any,
    **more: Any,
) -> dict[str, OperatorRecord]:
    """Return the same record for several operators, by name; of names alone, no rule is known.

    names: a star adds the derivative: `mish*` is `mish` and `mish_backward`; trust, more: the other
    fields. `kept` holds for names of derivatives alone, and `forward` is by default the rest of them.
    """
    record, found = OperatorRecord(made, rows, line, *trust, **more), {}
    for name in re.sub(r"(\S+)\*", r"\1 \1_backward", names).split():
        base = name.removesuffix("_backward")
        if record.kept is None or base == name:
            found[name] = record._replace(kept=None)
        else:
            found[name] = record._replace(forward=record.forward or base)
    return found


def are_dense(given: Given, *but: str) -> bool:
    """Return whether all tensors reach as far in their memory as they have numbers, but those named."""
    tensors = leaves([value for name, value in given.items() if name not in but])
    return all(not each.numel() or _reach(each) == each.numel() for each in tensors)


def _reach(tensor: Tensor) -> int:
    return 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
