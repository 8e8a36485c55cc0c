"""What an operation is given in two runs: tensors, side by side, and all arguments that are none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from everystep.program.execute import Observed
from everystep.program.operation import Operation
from everystep.program.operators import draws_random_numbers, parameters, resolve
from everystep.program.unset import unread_inputs
from everystep.recording.asked import same_value

__all__ = ["Argument", "draws", "other_arguments", "pairs_of_inputs"]


class Argument(NamedTuple):
    """An argument that an operation has otherwise in two runs.

    name: of its parameter; values: in both, a default where none is given.
    """

    name: str
    values: tuple[Any, Any]


def other_arguments(one: Operation, other: Operation) -> list[Argument]:
    """Return the arguments of an operator that differ, except for the content of tensors."""
    if not one.operator.startswith("aten."):
        return []
    pair = _all_given(one), _all_given(other)
    return [
        Argument(name, (pair[0][name], pair[1][name]))
        for name in pair[0]
        if not _same(pair[0][name], pair[1][name])
    ]


def pairs_of_inputs(one: Observed, other: Observed) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the tensors at the same place among the arguments: the first one's name, and both.

    Those of the same shape are left out if the operation does not read their numbers.
    """
    operation = one.operation
    if not operation.operator.startswith("aten."):
        yield from ((n, t, other.inputs[n]) for n, t in one.inputs.items() if n in other.inputs)
        return
    unread = unread_inputs(operation)
    seen = set()
    given = _all_given(operation), _all_given(other.operation)
    for a, b in _pairs([*given[0].values()], [*given[1].values()]):
        if (a, b) in seen or a not in one.inputs or b not in other.inputs:
            continue
        seen.add((a, b))
        x, y = one.inputs[a], other.inputs[b]
        if a not in unread or (x.shape, x.dtype) != (y.shape, y.dtype):
            yield a, x, y


def draws(operator: str) -> bool:
    """Tell whether an operator draws random numbers."""
    return operator.startswith("aten.") and draws_random_numbers(resolve(operator))


class _Reference(str):
    """The name of a tensor among arguments."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "a tensor"


def _all_given(operation: Operation) -> dict[str, Any]:
    """Return all arguments by the name of their parameter, defaults included."""
    given = operation.given()
    found = {}
    for parameter in parameters(operation.resolved):
        is_given = parameter.name in given
        value = _decoded(given[parameter.name]) if is_given else parameter.default
        if parameter.size and isinstance(value, int) and not isinstance(value, bool):
            value = [value] * parameter.size
        found[parameter.name] = value
    return found


def _decoded(value: Any) -> Any:
    """Return an argument of a program as a plain value; what names a kind, by its name."""
    if isinstance(value, str):
        return _Reference(value)
    if isinstance(value, list | tuple):
        return [_decoded(item) for item in value]
    if isinstance(value, dict) and len(value) == 1:
        ((kind, name),) = value.items()
        return float(name) if kind == "float" else name
    return value


def _same(one: Any, other: Any) -> bool:
    """Tell whether two arguments are the same; of tensors, only whether both are there."""
    if isinstance(one, _Reference) or isinstance(other, _Reference):
        return isinstance(one, _Reference) and isinstance(other, _Reference)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return same_value(one, other)


def _pairs(one: Any, other: Any) -> Iterator[tuple[str, str]]:
    """Yield the names of tensors at the same place of both."""
    if isinstance(one, _Reference) and isinstance(other, _Reference):
        yield str(one), str(other)
    elif isinstance(one, list) and isinstance(other, list):
        for a, b in zip(one, other, strict=False):
            yield from _pairs(a, b)
