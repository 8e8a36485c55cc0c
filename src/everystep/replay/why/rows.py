"""The rows of the batch that a number of a step was made from, through all operations of the step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from everystep.ops import Made, NoRuleError, Piece, Sum, how_made
from everystep.replay.step import Step
from everystep.replay.why.trace import Before, Halves, Spot, Trace, Written

if TYPE_CHECKING:
    from everystep.replay.why.answer import Number
    from everystep.replay.why.session import Session

__all__ = ["batch_rows", "row_at", "rows_behind"]

#: Numbers that are followed before giving up.
MOST = 20_000


def rows_behind(session: Session, number: Number) -> tuple[int, ...] | None:
    """Return the rows that went into a number, by their place in the batch, None if that is not known.

    By the rules of the operators alone; a rule may be missing, or the way too long.
    """
    trace = session.trace(number.step)
    found: set[int] = set()
    seen: set[Written | Before | Halves] = set()
    waiting = [number.spot]
    while waiting:
        spot = waiting.pop()
        origin = trace.origin(spot)
        if origin in seen:
            continue
        seen.add(origin)
        if len(seen) > MOST:
            return None
        if isinstance(origin, Halves):
            waiting += [origin.real, origin.imaginary]
            continue
        if isinstance(origin, Before):
            found |= _rows(trace, Piece(spot.name, spot.index))
            continue
        try:
            made = how_made(session.call(trace.step, origin))
        except NoRuleError:
            return None
        for piece in _pieces(made):
            after = origin.operation + piece.is_result
            if trace.is_written(piece.name, after):
                waiting += [Spot(piece.name, piece.at(k), after) for k in range(piece.size)]
            else:
                found |= _rows(trace, piece)
        if len(found) == batch_rows(trace.step):
            break
    return tuple(sorted(found))


def _pieces(made: Made) -> list[Piece]:
    parts = made.terms if isinstance(made, Sum) else (made,)
    return [piece for part in parts for piece in part.given.values()]


def batch_rows(step: Step) -> int:
    """Return how many rows the batch of a step has: as many as its first tensor."""
    return next((len(t) for t in step.batch.tensors.values() if t.dim()), 0)


def row_at(step: Step, name: str, index: tuple[int, ...]) -> int | None:
    """Return the place in the batch of the row that a number of a tensor of the batch belongs to."""
    tensor = step.batch.tensors.get(name.removeprefix("batch/"))
    has_rows = tensor is not None and index and len(tensor) == batch_rows(step)
    return index[0] if has_rows else None


def _rows(trace: Trace, piece: Piece) -> set[int]:
    """Return the rows of the numbers of a piece, if it is of the batch."""
    if not piece.size:
        return set()
    spec = trace.spec(piece.name)
    storage = trace.step.places.storages.get(spec.storage)
    if storage is None or storage.kind != "input":
        return set()
    offsets = np.full(piece.size, spec.offset)
    for axis, stride in zip(piece.places, spec.stride, strict=True):
        offsets = offsets + np.asarray(axis) * stride
    found = set()
    for offset in np.unique(offsets).tolist():
        origin = trace.before(piece.name, offset * spec.torch_dtype.itemsize)
        row = None if origin is None else row_at(trace.step, origin.name, origin.index)
        found |= set() if row is None else {row}
    return found
