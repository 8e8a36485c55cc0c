"""How far apart two replays of a step are, operation by operation, relative to their numbers."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from everystep.replay.step import Step
from everystep.step.check import FOLD_TOLERANCE

__all__ = ["Apart", "apart", "relative_difference", "tolerance"]


class Apart(NamedTuple):
    """How far apart the results of an operation are.

    step, operation: its place, by numbers; operator, phase, module: what it is; name: of the result;
    relative: the largest difference of two numbers, divided by the largest number of that tensor;
    infinite where only one of the two is finite, or for whole numbers that differ.
    """

    step: int
    operation: int
    operator: str
    phase: str
    module: str | None
    name: str
    relative: float


def apart(own: Step, there: Step) -> list[Apart]:
    """Return how far apart two replays of a step from the same state are, in order of operations."""
    found = []
    for index, (one, other) in enumerate(zip(own.operations, there.operations, strict=True)):
        operation = one.operation
        theirs = other.made
        for name, tensor in one.made.items():
            relative = relative_difference(tensor, theirs[name])
            place = own.number, index, operation.operator, operation.phase, operation.module
            found.append(Apart(*place, name, relative))
    return found


def tolerance(*dtypes: torch.dtype) -> float:
    """Return how far apart numbers of these dtypes are by rounding alone, relative to the largest."""
    return max((FOLD_TOLERANCE[dtype] for dtype in dtypes if dtype in FOLD_TOLERANCE), default=1e-4)


def relative_difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference of two numbers, divided by the largest number of the first tensor.

    Infinite for other shapes, other whole numbers, or where only one of two is finite. The tensors may
    be on different devices.
    """
    if one.shape != other.shape:
        return math.inf
    other = other.to(one.device)
    if one.is_complex():
        one, other = torch.view_as_real(one), torch.view_as_real(other)
    if not one.is_floating_point():
        return 0.0 if torch.equal(one, other) else math.inf
    a, b = one.double(), other.double()
    if not torch.equal(a.isfinite(), b.isfinite()):
        return math.inf
    is_finite = a.isfinite()
    a, b = a[is_finite], b[is_finite]
    largest = float(a.abs().max()) if a.numel() else 0.0
    difference = float((a - b).abs().max()) if a.numel() else 0.0
    return difference / largest if largest else (math.inf if difference else 0.0)
