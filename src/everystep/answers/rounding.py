"""How far apart two replays of a step are, operation by operation, relative to their numbers."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from everystep.ops.arguments import references
from everystep.program.observed import Observed
from everystep.program.operation import CodeLine
from everystep.replay.opened_step import Step
from everystep.step.state import comparable

__all__ = ["Apart", "Residue", "apart", "relative_difference", "tolerance"]

#: How far apart numbers are by rounding alone, relative to the largest number of a tensor.
_TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


class Residue(NamedTuple):
    """Numbers that are zero except for rounding, which remains when the terms of a sum cancel.

    argument: the parameter of the operation that receives them, None if they are its result; own, there:
    the largest of them in both replays; of: the largest number of that input, or of all inputs.
    """

    argument: str | None
    own: float
    there: float
    of: float


class Apart(NamedTuple):
    """How far apart the results of an operation are.

    step, operation: its place, by numbers; operator, phase, module: what it is; name: of the result;
    relative: the largest difference of two numbers, divided by the largest number of that tensor;
    infinite if only one of the two is finite, or for integers that differ. residue: if that is beyond
    rounding, the numbers that are zero except for rounding: the result itself, or those of an input.
    follows: whether it is computed from a result that is such a residue; line: of the code that called
    the operation.
    """

    step: int
    operation: int
    operator: str
    phase: str
    module: str | None
    name: str
    relative: float
    residue: Residue | None = None
    follows: bool = False
    line: CodeLine | None = None

    @property
    def is_residue(self) -> bool:
        """Whether rounding alone makes the result, so that the difference has no meaning."""
        return self.follows or (self.residue is not None and self.residue.argument is None)


def apart(own: Step, there: Step, limit: float) -> list[Apart]:
    """Return how far apart two replays of a step from the same state are, in order of operations.

    limit: how far apart numbers are by rounding alone.
    """
    found = []
    residues: set[str] = set()
    for index, (one, other) in enumerate(zip(own.operations, there.operations, strict=True)):
        operation, theirs = one.operation, other.made
        for name, tensor in one.made.items():
            relative = relative_difference(tensor, theirs[name])
            place = own.number, index, operation.operator, operation.phase, operation.module
            each = Apart(*place, name, relative, line=one.line)
            if not relative <= limit:
                follows = any(read.partition("~")[0] in residues for read in one.read)
                each = each._replace(residue=_residue(one, other, name, limit), follows=follows)
            found.append(each)
            # By its memory: a view of a residue is one, until something else is written there.
            (residues.add if each.is_residue else residues.discard)(name.partition("~")[0])
    return found


def _residue(one: Observed, other: Observed, name: str, limit: float) -> Residue | None:
    """Return the numbers that are zero except for rounding: the result, or its inputs."""
    result, there = one.made[name], other.made[name]
    read = {n: comparable(t) for n, t in one.read.items() if t.is_floating_point() and t.numel()}
    if not result.is_floating_point() or result.shape != there.shape or not result.numel():
        return None
    a, b = result.double(), there.double()
    sizes, distance = (_largest(a), _largest(b)), (a - b).abs()
    of = max(map(_largest, read.values()), default=0.0)
    # Only where terms are added up can they cancel.
    is_sum = any(tensor.numel() > result.numel() for tensor in read.values())
    # With more digits, nothing would be left of it.
    if is_sum and min(sizes) <= limit * max(sizes) and max(sizes) <= limit * of:
        return Residue(None, *sizes, of)
    beyond = ~(distance <= limit * sizes[0])
    if not bool(beyond.any()):  # only one of the two is infinite
        return None
    for given, tensor in read.items():
        if tensor.shape != result.shape:
            continue
        x, y = tensor[beyond].double(), comparable(other.read[given])[beyond].double()
        # Where the results differ beyond rounding, this input does, too, in relation to its own size.
        if bool(((x - y).abs() > limit * torch.maximum(x.abs(), y.abs())).all()):
            return Residue(_argument(one, given), _largest(x), _largest(y), _largest(tensor))
    return None


def _largest(tensor: Tensor) -> float:
    """Return the largest magnitude in a tensor."""
    return float(tensor.abs().max())


def _argument(seen: Observed, name: str) -> str:
    """Return the parameter of an operation that is given a tensor."""
    given = seen.operation.given().items()
    return next((key for key, value in given if name in references(value)), name)


def tolerance(*dtypes: torch.dtype) -> float:
    """Return how far apart numbers of these dtypes are by rounding alone, relative to the largest."""
    return max((_TOLERANCE[dtype] for dtype in dtypes if dtype in _TOLERANCE), default=1e-4)


def relative_difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference of two numbers, divided by the largest number of the first tensor.

    Infinite for other shapes, other whole numbers, or where two numbers that are not both finite are not
    the same: NaN is NaN. The tensors may be on different devices.
    """
    if one.shape != other.shape:
        return math.inf
    other = other.to(one.device)
    if one.is_complex():
        one, other = torch.view_as_real(one), torch.view_as_real(other)
    if not one.is_floating_point():
        return 0.0 if torch.equal(one, other) else math.inf
    a, b = one.double(), other.double()
    is_finite = a.isfinite()
    if not torch.equal(is_finite, b.isfinite()):
        return math.inf
    rest = ~is_finite
    # No distance tells infinities of two signs apart, nor an infinity and NaN.
    if bool(rest.any()) and not bool(torch.isclose(a[rest], b[rest], equal_nan=True).all()):
        return math.inf
    a, b = a[is_finite], b[is_finite]
    largest = float(a.abs().max()) if a.numel() else 0.0
    difference = float((a - b).abs().max()) if a.numel() else 0.0
    return difference / largest if largest else (math.inf if difference else 0.0)
