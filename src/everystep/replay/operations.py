"""Compares two steps operation by operation, down to the numbers that differ."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from everystep.program.observed import Observed
from everystep.replay.given import Sources, other_sources, pairs_of_inputs, source_texts
from everystep.replay.step import Step
from everystep.step.check import Size, as_integers, bytes_of, same_bits, size_of_difference

__all__ = [
    "OperationDifference",
    "TensorDifference",
    "first_difference",
    "tensor_difference",
]

#: Positions of differing numbers that are named.
NAMED = 10
#: Numbers among which they are looked for at a time.
BLOCK = 1 << 20


class TensorDifference(NamedTuple):
    """How two tensors of the same name differ.

    elements: the number of differing elements, of how many; positions: of the first of them; values:
    there, in both; largest, absolute, relative: how far they are apart at most, as in `Size`.
    """

    name: str
    elements: int
    of: int
    positions: list[tuple[int, ...]]
    values: list[tuple[float, float]]
    largest: int | None
    absolute: float | None = None
    relative: float | None = None

    @property
    def size(self) -> Size:
        """How far they are apart."""
        return Size(self.largest, self.absolute, self.relative)


@dataclass(frozen=True)
class OperationDifference:
    """The first operation with another result, and why.

    step, index: its position; one, other: the operation in each run (None if one run has no such
    operation); results: those that differ, and what else it wrote; inputs: those that already differ;
    rows: of the batch, as (position, row in the first run, row in the second); rows_of: what their
    numbers are of; causes: in words, what differs in all that the operation is given, and where that was
    set; others: in words, inputs that the other run takes from another source, of both.
    """

    step: int
    index: int
    one: Observed | None
    other: Observed | None
    results: list[TensorDifference] = field(default_factory=list)
    inputs: list[TensorDifference] = field(default_factory=list)
    rows: list[tuple[int, int, int]] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)
    others: tuple[list[str], ...] = ()
    rows_of: str = "the batch"

    @property
    def is_one_operation(self) -> bool:
        """Whether both runs have the same operator there, for the same purpose."""
        return (
            self.one is not None
            and self.other is not None
            and _outline(self.one) == _outline(self.other)
        )


def first_difference(one: Step, other: Step, *, has_rows: bool = False) -> OperationDifference | None:
    """Return the first operation of a step with another result, or which only one of them has.

    Its causes are not known yet.

    has_rows: whether batches are rows of data that the runs know by their numbers.
    """
    for index in range(max(len(one.operations), len(other.operations))):
        pair = [s.operations[index] if index < len(s.operations) else None for s in (one, other)]
        a, b = pair
        if a is None or b is None or _outline(a) != _outline(b):
            return OperationDifference(one.number, index, a, b)
        results = _different(_in_order(a.made, b.made))
        if results:
            sources = Sources(one), Sources(other)
            inputs = _different(pairs_of_inputs(a, b, sources))
            others = source_texts(other_sources(a, b, sources), sources)
            names = {each.name.partition("~")[0] for each in inputs}
            is_of_batch = any(name in one.batch.tensors for name in names)
            rows = _different_rows(one, other, has_rows) if is_of_batch else []
            if len(a.results) != len(b.results):  # of lists of tensors, which do not belong together
                results = []
            rows_of = " | ".join(dict.fromkeys(step.batch.whole for step in (one, other)))
            shown = others if any(others) else ()
            return OperationDifference(
                one.number, index, a, b, results, inputs, rows, others=shown, rows_of=rows_of
            )
    return None


def _different_rows(one: Step, other: Step, has_rows: bool) -> list[tuple[int, int, int]]:
    """Return the positions of a batch that differ, with their row numbers in the data.

    Where runs do not know these, rows have the numbers of their positions in the first run's batch, if
    the second run's batch has the same rows in another order.
    """
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
            different |= _rows_that_differ(a, b)
    places = torch.nonzero(different).flatten().tolist()
    rows = [range(count) if step.batch.rows is None else step.batch.rows for step in (one, other)]
    if not has_rows:
        moved = [(a, b) for a, b in pairs if len(a) == count and bool(_rows_that_differ(a, b).any())]
        contents = [
            [tuple(bytes_of(pair[side][place]).tobytes() for pair in moved) for place in places]
            for side in (0, 1)
        ]
        if sorted(contents[0]) == sorted(contents[1]):
            known = dict(zip(contents[0], places, strict=True))
            return [(place, place, known[each]) for place, each in zip(places, contents[1], strict=True)]
    return [(place, int(rows[0][place]), int(rows[1][place])) for place in places]


def _rows_that_differ(one: Tensor, other: Tensor) -> Tensor:
    differs = as_integers(one) != as_integers(other.to(one.device))
    return differs.reshape(len(one), -1).any(1).cpu()


def _outline(observed: Observed) -> tuple[Any, ...]:
    operation = observed.operation
    return operation.phase, operation.module, operation.operator


def _in_order(
    one: dict[str, Tensor], other: dict[str, Tensor]
) -> Iterable[tuple[str, Tensor, Tensor | None]]:
    """Yield results at the same place, whatever each run calls them."""
    others = list(other.values())
    for place, (name, tensor) in enumerate(one.items()):
        yield name, tensor, others[place] if place < len(others) else None
    for name, tensor in list(other.items())[len(one) :]:
        yield name, tensor, None


def _different(pairs: Iterable[tuple[str, Tensor, Tensor | None]]) -> list[TensorDifference]:
    return [tensor_difference(n, a, b) for n, a, b in pairs if b is None or not same_bits(a, b)]


def tensor_difference(name: str, one: Tensor, other: Tensor | None) -> TensorDifference:
    """Return how two tensors differ. other: None if only one run has it."""
    if other is None or one.shape != other.shape or one.dtype != other.dtype:
        return TensorDifference(name, one.numel(), one.numel(), [], [], None)
    other = other.to(one.device)
    differs = as_integers(one) != as_integers(other)
    differs = differs.any(-1) if one.is_complex() else differs
    positions = _first_places(differs)
    values = [(one[p].item(), other[p].item()) for p in positions]
    size = size_of_difference(one, other)
    return TensorDifference(name, int(differs.sum()), one.numel(), positions, values, *size)


def _first_places(differs: Tensor) -> list[tuple[int, ...]]:
    """Return the first places that are true; a list of all of them may be larger than the tensor."""
    found: list[int] = []
    for first, part in enumerate(torch.split(differs.flatten(), BLOCK)):
        found += (torch.nonzero(part).flatten()[: NAMED - len(found)] + first * BLOCK).tolist()
        if len(found) == NAMED:
            break
    if not differs.ndim:
        return [()] * len(found)
    places = np.unravel_index(np.asarray(found, dtype=np.int64), differs.shape)
    return list(zip(*(axis.tolist() for axis in places), strict=True))
