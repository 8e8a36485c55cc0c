"""Which row of the batch each number of a tensor belongs to.

A label is the place of a row in the batch (0..N-1), or one of three others. Labels of a tensor have its
shape, expanded (stride 0) along axes on which they are constant, so that most take little memory and
time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "MIXED",
    "SHARED",
    "SUM",
    "Reason",
    "Tracked",
    "all_are",
    "broadcast",
    "compressed",
    "gathered",
    "reduced",
    "rows_in",
]

# Labels of x (3 rows of 2 numbers), of a weight, and of what is made of them:
#   x            [[0, 0], [1, 1], [2, 2]]        in memory 3 numbers: the stride of the second axis is 0
#   weight       [-1, -1]                        SHARED
#   x * weight   [[0, 0], [1, 1], [2, 2]]        SHARED joins any row
#   x.sum(0)     [-3, -3]                        SUM: terms(1) is what row 1 adds
#   x * x.sum(0) [[-2, -2], [-2, -2], [-2, -2]]  MIXED: of several rows, and no sum over them
#: Of no row: parameters, constants, random numbers.
SHARED = -1
#: Of several rows, in a way that is not a sum over them.
MIXED = -2
#: A sum with a known term for each row, and one of no row.
SUM = -3

#: Above all labels, which are int32.
_ABOVE = 2**31 - 1


class Reason(NamedTuple):
    """Why rows cannot be separated, and the number and operator of the operation, if any."""

    why: str
    operation: int | None = None
    operator: str = ""

    def __str__(self) -> str:
        if self.operation is None:
            return self.why
        return f"operation #{self.operation} ({self.operator}) {self.why}"

    @staticmethod
    def first(reasons: Iterable[Reason | None]) -> Reason | None:
        """Return the reason of the first operation, None if there is none."""
        known = (each for each in reasons if each is not None)
        return min(known, key=lambda e: math.inf if e.operation is None else e.operation, default=None)

    def then(self, later: Reason) -> Reason:
        """Return why rows cannot be separated if a sum over rows enters a later operation."""
        why = later.why.replace("mixes rows", "is not linear in the sum")
        return self._replace(
            why=f"{self.why}, and operation #{later.operation} ({later.operator}) {why}"
        )


class Tracked(NamedTuple):
    """A tensor of the step, and the rows that its numbers belong to.

    value: as recorded; labels: of the same shape; terms: returns the term of a row of the sum, by its
    place or SHARED, meaningful where the label is SUM; is_mean: whether the sum is a mean of numbers;
    reason: why some labels are MIXED; is_data: whether it was computed without the state, so that no
    gradient passes through it; summed: which operation first added up rows, where some labels are SUM.
    """

    value: Tensor
    labels: Tensor
    terms: Callable[[int], Tensor] | None = None
    is_mean: bool = False
    reason: Reason | None = None
    is_data: bool = False
    summed: Reason | None = None

    def has(self, label: int) -> bool:
        """Return whether any number has the label."""
        return bool((_core(self.labels) == label).any())

    @property
    def is_shared(self) -> bool:
        """Whether all numbers belong to no row."""
        return all_are(self.labels, SHARED)

    def term(self, row: int) -> Tensor:
        """Return the part of the tensor that a row makes, or no row (SHARED); the parts add up to it."""
        mine = torch.where(self.labels == row, self.value, torch.zeros_like(self.value))
        if self.terms is None:
            return mine
        return torch.where(self.labels == SUM, self.terms(row).reshape(mine.shape), mine)


def all_are(labels: Tensor, label: int) -> bool:
    """Return whether all labels are the same."""
    return bool((_core(labels) == label).all())


def broadcast(labels: Sequence[Tensor], *, is_sum: bool = False, is_strict: bool = False) -> Tensor:
    """Return the labels of numbers that are each made from one number of each tensor, broadcast.

    is_sum, is_strict: see `reduced`.
    """
    shape = torch.broadcast_tensors(*labels)[0].shape  # type: ignore[no-untyped-call]
    # Narrowed first: labels that are the same along an axis are compared once, not for each number.
    together = torch.stack(_narrow([each.expand(shape) for each in labels]))
    return reduced(together, [0], is_sum=is_sum, is_strict=is_strict).expand(shape)


def reduced(
    labels: Tensor,
    axes: Sequence[int],
    *,
    keepdim: bool = False,
    is_sum: bool = False,
    is_strict: bool = False,
) -> Tensor:
    """Return the labels of numbers that each depend on all numbers along some axes.

    is_sum: whether they are added up; is_strict: whether numbers of no row are then a separate term.
    """
    axes = [axis % labels.dim() for axis in axes] if labels.dim() else []
    if not axes:  # `broadcast` makes MIXED of SUM: what is made from a sum has no terms
        return labels if is_sum else broadcast([labels])
    core = labels
    for axis in axes:
        if core.stride(axis) == 0 and core.size(axis):
            core = core.narrow(axis, 0, 1)
    # amin refuses an empty axis; what is made from no numbers belongs to no row.
    if 0 in core.shape:
        shape = [1 if a in axes else n for a, n in enumerate(core.shape)]
        found = labels.new_full(shape, SHARED)
    else:
        # All are of one row where the least label and the largest are the same; SHARED must not be the
        # least.
        low = torch.where(core == SHARED, _ABOVE, core).amin(axes, keepdim=True)
        high = core.amax(axes, keepdim=True)
        many = torch.where((core == MIXED).any(axes, keepdim=True), MIXED, SUM if is_sum else MIXED)
        is_one = (low >= 0) & (low == high)
        if is_strict:
            is_one &= ~(core == SHARED).any(axes, keepdim=True)
        found = torch.where(is_one, high, many.to(low.dtype))
        found = torch.where(low == _ABOVE, SHARED, found)
    return found if keepdim else found.squeeze(axes)


def gathered(labels: Tensor, cells: Tensor, count: int, *, is_strict: bool = False) -> Tensor:
    """Return the labels (count) of cells to which numbers with labels are added.

    cells: the number of the cell of each, of the labels' shape; is_strict: see `reduced`.
    """
    flat, given = cells.reshape(-1), labels.expand(cells.shape).reshape(-1).to(torch.int64)
    # As in `reduced`, but by cell.
    low = torch.full((count,), _ABOVE).scatter_reduce(
        0, flat, torch.where(given == SHARED, _ABOVE, given), "amin"
    )
    high = torch.full((count,), SHARED).scatter_reduce(0, flat, given, "amax")
    is_one = (low >= 0) & (low == high)
    if is_strict:
        is_one &= ~torch.zeros(count, dtype=torch.bool).index_put(
            (flat[given == SHARED],), torch.tensor(True)
        )
    found = torch.where(is_one, high, SUM)
    return torch.where(low == _ABOVE, SHARED, found).to(labels.dtype)


def compressed(labels: Tensor) -> Tensor:
    """Return the same labels, expanded along every axis on which they do not change."""
    core = labels
    for axis in range(core.dim()):
        if core.size(axis) > 1:
            first = core.narrow(axis, 0, 1)
            # The stride decides without a look at the numbers.
            if core.stride(axis) == 0 or bool((core == first).all()):
                core = first
    return core.contiguous().expand(labels.shape)


def rows_in(labels: Tensor) -> dict[int, Tensor]:
    """Return where each label is in a vector of labels, by label."""
    # Stable: the places of a row stay in the order of the batch.
    values, order = torch.sort(labels, stable=True)
    found, counts = torch.unique_consecutive(values, return_counts=True)
    return dict(zip(found.tolist(), torch.split(order, counts.tolist()), strict=True))


def _core(labels: Tensor) -> Tensor:
    return _narrow([labels])[0]


def _narrow(labels: list[Tensor]) -> list[Tensor]:
    """Narrow tensors of one shape to their first entry along axes on which none changes."""
    for axis in range(labels[0].dim()):
        if all(each.stride(axis) == 0 for each in labels) and labels[0].size(axis) > 1:
            labels = [each.narrow(axis, 0, 1) for each in labels]
    return labels
