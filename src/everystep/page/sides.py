"""The operation at which two runs diverge, in both, with the numbers that differ."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor

from everystep.answers.operations import OperationDifference
from everystep.program.observed import Observed
from everystep.run import Run
from everystep.step.state import as_integers, distance
from everystep.views.formatting import dtype_text
from everystep.views.mathematics import mathematics

__all__ = ["sides"]

#: Rows and columns that are sent at most, around the first difference.
WINDOW = 64


def sides(
    found: OperationDifference | None, runs: tuple[Run, Run]
) -> list[dict[str, Any] | None] | None:
    """Return the operation of each run as plain data, None if it has none; None if none was found.

    Tensors are rows and columns: the leading dimensions of one with several are rows, too, and a vector
    is one row. Tensors of both runs have their names in the first. `window` are the rows and the columns
    that `values` has, as first and one after the last; `different` the places within it, counted in the
    whole, at which the runs differ; `units` how far the numbers at the positions of the difference are
    apart, in units in the last place, None where that has no meaning.
    """
    if found is None:
        return None
    pair = found.one, found.other
    return [
        None if own is None else _side(found, place, own, other or Observed(own.operation, {}, {}), run)
        for place, (own, other, run) in enumerate(zip(pair, pair[::-1], runs, strict=True))
    ]


def _side(
    found: OperationDifference, place: int, own: Observed, other: Observed, run: Run
) -> dict[str, Any]:
    line = mathematics(run[found.step].operations)[found.index]
    differing = {"input": found.inputs, "result": found.results}
    positions = {(role, e.name): e.positions for role, each in differing.items() for e in each}
    return {
        "number": found.index,
        "mathematics": str(line),
        "operator": own.operation.operator,
        "phase": own.operation.phase,
        "module": own.operation.module,
        "line": None if own.line is None else str(own.line),
        "tensors": [
            {"name": (name, its_name or name)[place], "called": called.get(name, name), "role": role}
            | _tensor(tensor, its, positions.get((role, (name, its_name or name)[place]), []))
            for role, called, mine, others in (
                ("input", line.given, own.read, other.read),
                ("result", line.made, own.made, other.made),
            )
            # Those at the same place belong together; the other run may have fewer.
            for (name, tensor), (its_name, its) in zip(
                mine.items(), chain(others.items(), repeat(("", None))), strict=False
            )
        ],
    }


def _tensor(
    tensor: Tensor, other: Tensor | None, positions: Sequence[tuple[int, ...]]
) -> dict[str, Any]:
    numbers, places = _rows(tensor), torch.empty(0, 2, dtype=torch.long)
    units: list[int | None] = [None] * len(positions)
    if other is not None and other.shape == tensor.shape and other.dtype == tensor.dtype:
        if tensor.dtype in (torch.float32, torch.float64):
            pairs = (torch.stack([tensor[place], other[place]]) for place in positions)
            # NaN and infinities have no distance.
            units = [distance(*pair) if pair.isfinite().all() else None for pair in pairs]
        # By bits: NaN equals itself, and 0.0 differs from -0.0.
        differs = as_integers(tensor) != as_integers(other)
        places = torch.nonzero(_rows(differs.any(-1) if tensor.is_complex() else differs))
    # In the order of the tensor, the first difference.
    row, column = places[0].tolist() if len(places) else (0, 0)
    window = (top, bottom), (left, right) = _around(row, len(numbers)), _around(column, numbers.shape[1])
    within = [[i, j] for i, j in places.tolist() if top <= i < bottom and left <= j < right]
    return {
        "shape": list(tensor.shape),
        "dtype": dtype_text(tensor),
        "values": numbers[top:bottom, left:right].tolist(),
        "window": window,
        "different": within,
        "units": units,
    }


def _rows(tensor: Tensor) -> Tensor:
    numbers = (tensor.abs() if tensor.is_complex() else tensor).detach().cpu()
    if numbers.dim() < 2 or not numbers.numel():
        return numbers.reshape(1, -1)
    return numbers.reshape(-1, numbers.shape[-1])


def _around(place: int, size: int) -> tuple[int, int]:
    """Return the first, and one after the last, of a stretch that contains a place."""
    first = max(0, min(place - WINDOW // 2, size - WINDOW))
    return first, min(size, first + WINDOW)
