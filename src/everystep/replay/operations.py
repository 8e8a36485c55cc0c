"""Compares two steps operation by operation, down to the numbers that differ."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from everystep.program.execute import Observed
from everystep.program.operators import draws_random_numbers, resolve
from everystep.replay.step import Step
from everystep.step.check import as_integers, distance, same_bits

__all__ = [
    "COMPUTED_OTHERWISE",
    "OperationDifference",
    "TensorDifference",
    "compare_steps",
    "draws",
]

#: What made a result differ where its inputs do not.
COMPUTED_OTHERWISE = "the same inputs give other bits"
#: Positions of differing numbers that are named.
NAMED = 10


class TensorDifference(NamedTuple):
    """How two tensors of the same name differ.

    elements: the number of differing elements, of how many; positions: of the first of them; values:
    there, in both; largest: the largest distance in units in the last place, None if that has no
    meaning.
    """

    name: str
    elements: int
    of: int
    positions: list[tuple[int, ...]]
    values: list[tuple[float, float]]
    largest: int | None


@dataclass(frozen=True)
class OperationDifference:
    """The first operation with another result, and why.

    step, index: its position; one, other: the operation in each run (None if one run has no such
    operation); results: those that differ; inputs: those that already differ; rows: of the batch, as
    (position, row in the first run, row in the second); causes: in words, differences in the operation
    itself.
    """

    step: int
    index: int
    one: Observed | None
    other: Observed | None
    results: list[TensorDifference] = field(default_factory=list)
    inputs: list[TensorDifference] = field(default_factory=list)
    rows: list[tuple[int, int, int]] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)


def compare_steps(one: Step, other: Step) -> OperationDifference | None:
    """Return the first operation of a step with another result, or which only one of them has."""
    for index in range(max(len(one.operations), len(other.operations))):
        pair = [s.operations[index] if index < len(s.operations) else None for s in (one, other)]
        a, b = pair
        if a is None or b is None or _outline(a) != _outline(b):
            return OperationDifference(one.number, index, a, b, causes=["another operation"])
        results = _different(a.results, b.results)
        if results:
            return _explained(one, other, index, a, b, results)
    return None


def _explained(
    one: Step, other: Step, index: int, a: Observed, b: Observed, results: list[TensorDifference]
) -> OperationDifference:
    inputs = _different(a.inputs, b.inputs)
    names = {difference.name for difference in inputs}
    is_of_batch = any(name.partition("~")[0] in one.batch.tensors for name in names)
    rows = _different_rows(one, other) if is_of_batch else []
    causes = _causes(one, other, a, b, names)
    return OperationDifference(one.number, index, a, b, results, inputs, rows, causes)


def _different_rows(one: Step, other: Step) -> list[tuple[int, int, int]]:
    """Return the positions of a batch that differ, with their row numbers in the data."""
    tensors = one.batch.tensors, other.batch.tensors
    if not tensors[0] or tensors[0].keys() != tensors[1].keys():
        return []
    pairs = [(tensor, tensors[1][name]) for name, tensor in tensors[0].items()]
    if any(a.shape != b.shape or not a.ndim for a, b in pairs):
        return []
    count = len(pairs[0][0])
    different = torch.zeros(count, dtype=torch.bool)
    for a, b in pairs:
        if len(a) == count:
            different |= (as_integers(a) != as_integers(b)).reshape(count, -1).any(1).cpu()
    rows = [step.batch.rows if step.batch.rows is not None else range(count) for step in (one, other)]
    places = torch.nonzero(different).flatten().tolist()
    return [(place, int(rows[0][place]), int(rows[1][place])) for place in places]


def _causes(one: Step, other: Step, a: Observed, b: Observed, inputs: set[str]) -> list[str]:
    """Return differences of the operation itself that explain its result."""
    changed = [
        f"{name} {value!r} and {other.hyperparameters.get(name)!r}"
        for name, value in one.hyperparameters.items()
        if value != other.hyperparameters.get(name)
    ]
    given = _arguments(a), _arguments(b)
    arguments = [
        f"{name} {value!r} and {given[1].get(name)!r}"
        for name, value in given[0].items()
        if value != given[1].get(name)
    ]
    if any(name.startswith("hyperparameter/") for name in inputs):
        return ["another hyperparameter: " + ", ".join(changed)]
    if arguments:
        return ["other arguments: " + ", ".join(arguments)]
    if inputs:
        return []
    if changed and a.operation.phase == "update":
        return ["another hyperparameter: " + ", ".join(changed)]
    return ["another random draw" if draws(a.operation.operator) else COMPUTED_OTHERWISE]


def _arguments(observed: Observed) -> dict[str, Any]:
    is_operator = observed.operation.operator.startswith("aten.")
    return observed.operation.given() if is_operator else {}


def draws(operator: str) -> bool:
    """Tell whether an operator draws random numbers."""
    return operator.startswith("aten.") and draws_random_numbers(resolve(operator))


def _outline(observed: Observed) -> tuple[Any, ...]:
    operation = observed.operation
    return operation.phase, operation.module, operation.operator


def _different(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[TensorDifference]:
    found = []
    for name in one.keys() & other.keys() if one.keys() != other.keys() else one:
        a, b = one[name], other[name]
        if not same_bits(a, b):
            found.append(_tensor_difference(name, a, b))
    return found


def _tensor_difference(name: str, one: Tensor, other: Tensor) -> TensorDifference:
    if one.shape != other.shape or one.dtype != other.dtype:
        return TensorDifference(name, one.numel(), one.numel(), [], [], None)
    where = torch.nonzero(as_integers(one) != as_integers(other))
    positions = [tuple(position) for position in where[:NAMED].tolist()]
    values = [(one[p].item(), other[p].item()) for p in positions]
    return TensorDifference(name, len(where), one.numel(), positions, values, distance(one, other))
