"""Number slots: the arguments of operations with numbers that belong to a step, not to its program.

These are the `Scalar` and `float` arguments, numbers in place of a tensor, the settings of an optimizer,
and the numbers that the step read from tensors. A training with a different learning rate at every step
has one program.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from everystep.ops.operators import parameters
from everystep.program.operation import Operation

__all__ = ["READ", "Number", "Slot", "read_difference", "slot_names", "slots_of"]

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
def slot_names(operator: Any) -> frozenset[str]:
    """Return the arguments of an operator that hold numbers which may differ at each step."""
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


# e.g. in `aten.add.Tensor(x, y, alpha=0.5)`: Slot("alpha", ("alpha",)); in the settings of an optimizer
# with two param groups, lr=[0.1, 0.01]: Slot("lr", ("lr", 0)), Slot("lr", ("lr", 1)).
class Slot(NamedTuple):
    """A number of a step among the arguments of an operation.

    name: of the argument; path: its position or keyword, and its place in lists within.
    """

    name: str
    path: tuple[int | str, ...]

    def put(self, arguments: list[Any], keywords: dict[str, Any], number: Number) -> None:
        """Put a number into its place."""
        target: Any = keywords if isinstance(self.path[0], str) else arguments
        for place in self.path[:-1]:
            target = target[place]
        # As it is: a rate may be 1 in the program, and 0.5 in the step.
        target[self.path[-1]] = number


def slots_of(operation: Operation) -> list[Slot]:
    """Return where an operation has the numbers of a step, in their order."""
    wanted = slot_names(operation.resolved)
    given = operation.by_place()
    return [s for name, place, value in given if name in wanted for s in _within(value, name, (place,))]


def _within(value: Any, name: str, path: tuple[int | str, ...]) -> Iterator[Slot]:
    """Yield the slots of the numbers in an argument, or in a list of it, as a program holds it."""
    if isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from _within(item, name, (*path, place))
    # A flag decides which operations there are, so it stays with the program.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # Infinity or NaN: see `encode`.
    if is_number or (isinstance(value, dict) and "float" in value):
        yield Slot(name, path)


def read_difference(found: Number, known: Number) -> str | None:
    """Return how a number that Python reads differs from the recorded one, in words."""
    is_same = found == known or (found != found and known != known)
    return None if is_same else f"returns {found} to Python, but the recording has {known}"
