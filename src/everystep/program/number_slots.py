"""Number slots: the arguments of operations with numbers that belong to a step, not to its program.

These are the `Scalar` and `float` arguments, numbers in place of a tensor, the settings of an optimizer,
and the numbers that the step read from tensors. A training with a different learning rate at every step
has one program.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from everystep.program.operation import Operation
from everystep.program.operators import parameters
from everystep.program.optimizer_operator import OptimizerOperator

__all__ = [
    "READ",
    "Number",
    "is_number",
    "is_number_slot",
    "numbers_in",
    "read_difference",
]

Number = int | float
#: The operator by which Python reads a number from a tensor.
READ = "aten._local_scalar_dense.default"
#: Operators with `Scalar` arguments that decide the shape of their result.
_SHAPED_BY_NUMBERS = {"arange", "range"}
#: Whole numbers that bound a draw, or that only say which part of a tensor a gradient belongs to.
_INTEGERS = {
    **{"randint": {"low", "high"}, "randint_like": {"low", "high"}, "random_": {"from", "to"}},
    **{"select_backward": {"index"}, "slice_backward": {"start", "end"}},
}


@cache
def _slots(operator: Any) -> frozenset[str]:
    """Return the arguments of an operator that hold numbers which may differ at each step."""
    if isinstance(operator, OptimizerOperator):
        return frozenset(operator.settings)
    name = operator.overloadpacket.__name__
    if name in _SHAPED_BY_NUMBERS:
        return frozenset()
    integers: set[str] = _INTEGERS.get(name, set())
    # A number may replace a tensor, too.
    kinds = ("number", "float", "Tensor")
    held = [f"{holder}[{kind}]" for holder in ("Optional", "List") for kind in kinds]
    return frozenset(
        p.name for p in parameters(operator) if p.kind in (*kinds, *held) or p.name in integers
    )


def is_number_slot(operator: Any, name: str) -> bool:
    """Return whether numbers in an argument of an operator belong to the step, not to its program."""
    return name in _slots(operator)


def is_number(value: Any) -> bool:
    """Return whether an argument, as a program holds it, is a number, not a truth value."""
    is_special = isinstance(value, dict) and "float" in value
    return is_special or (isinstance(value, int | float) and not isinstance(value, bool))


def _count_numbers(value: Any) -> int:
    """Return how many numbers an argument, as a program holds it, has."""
    return sum(map(_count_numbers, value)) if isinstance(value, list | tuple) else int(is_number(value))


def numbers_in(operation: Operation) -> list[str]:
    """Return which argument each number of a step for an operation is in, by name and in order."""
    operator = operation.resolved
    given = operation.given().items()
    counts = ((name, _count_numbers(value)) for name, value in given if is_number_slot(operator, name))
    return [name for name, count in counts for _ in range(count)]


def read_difference(found: Number, known: Number) -> str | None:
    """Return how a number that Python reads differs from the recorded one, in words."""
    is_same = found == known or (found != found and known != known)
    return None if is_same else f"returns {found} to Python, but the recording has {known}"
