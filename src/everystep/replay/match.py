"""Match: aligns a step of two trainings that are written differently, by the values of their tensors.

Two programs of the same mathematics have the same tensors up to rounding, in whatever order, with other
shapes of the same numbers, and with other results in between. So a tensor of one is looked for among all
tensors of the other. A result that the other does not have is suspect if nothing that is computed from
it is found there either: else it only is another way to the same.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from everystep.errors import RunError
from everystep.program.execute import Observed
from everystep.replay.processes import Opener
from everystep.replay.rounding import relative_difference, tolerance
from everystep.replay.shown import Shown
from everystep.replay.step import Step

__all__ = ["Match", "Suspect", "match"]


class Suspect(NamedTuple):
    """The first result of a step that the other does not have, nor anything that is computed from it.

    operation: its number; name: of the result; has_known_inputs: whether the other has all that
    the operation was given; nearest, distance: the operation of the other with the nearest result of as
    many numbers, and how far that is, relative to the largest number; None if there is none.
    """

    operation: int
    observed: Observed
    name: str
    has_known_inputs: bool
    nearest: int | None
    distance: float


@dataclass(frozen=True)
class Match(Shown):
    """How a step of two runs matches, up to rounding.

    step: its number; losses: in both; rounding: how far apart numbers are by rounding, relative to the
    largest; begin: the tensors that the first run has before the step (state and batch) and the second
    does not; end: the gradients and the state after the step that the first has and the second does not,
    in order; found, of: how many of these there are; suspects: the first suspect result in each run.
    """

    names: tuple[str, str]
    step: int
    losses: tuple[float, float]
    rounding: float
    begin: tuple[str, ...]
    end: tuple[str, ...]
    found: int
    of: int
    suspects: tuple[Suspect | None, Suspect | None]

    def __repr__(self) -> str:
        what = "match" if self.is_match else "do not match"
        return f"<match: step {self.step:,} of {self.names[0]} and {self.names[1]} {what}>"

    @property
    def is_match(self) -> bool:
        """Whether the second run has all that the first one ends with, up to rounding."""
        return not self.begin and not self.end


def match(one: Opener, other: Opener, step: int | None = None) -> Match:
    """Return how a step of two runs matches: by values, whatever their programs look like.

    Args:
        one: the first run, to which the second is compared.
        other: the second run.
        step: its number; None: the first that does not match, or else the last that both have.

    Raises:
        StepError: a run has no such step.
        RunError: a step cannot be opened.
    """
    if step is not None:
        return _match(one, other, step)
    last = min(each.run.summary().steps for each in (one, other))
    if last < 1:
        raise RunError("one of the runs has no steps to match")
    found = _match(one, other, 1)
    if not found.is_match or last == 1:
        return found
    high = _match(one, other, last)
    if high.is_match:
        return high
    # What has left the other stays away from it, so the first such step is found by halving.
    low, wrong = 1, last
    while wrong - low > 1:
        middle = (low + wrong) // 2
        found = _match(one, other, middle)
        if found.is_match:
            low = middle
        else:
            wrong, high = middle, found
    return high


def _match(one: Opener, other: Opener, number: int) -> Match:
    steps = one.step(number), other.step(number)
    dtypes = {t.dtype for step in steps for t in step.parameters.values()}
    limit = tolerance(*dtypes)
    values = [_Values(step, limit) for step in steps]
    begin = tuple(n for n, t in _before(steps[0]) if values[1].nearest(t)[1] > limit)
    ends = dict(_after(steps[0]))
    end = tuple(n for n, t in ends.items() if values[1].nearest(t)[1] > limit)
    return Match(
        names=(one.run.name, other.run.name),
        step=number,
        losses=(steps[0].loss, steps[1].loss),
        rounding=limit,
        begin=begin,
        end=end,
        found=len(ends) - len(end),
        of=len(ends),
        suspects=(values[0].suspect(values[1]), values[1].suspect(values[0])),
    )


def _before(step: Step) -> Iterator[tuple[str, Tensor]]:
    """Yield what a step is given: parameters, buffers and the batch."""
    yield from ((f"parameters[{n!r}]", t) for n, t in step.parameters.items())
    yield from ((f"buffers[{n!r}]", t) for n, t in step.buffers.items())
    yield from ((f"batch.{n}", t) for n, t in step.batch.tensors.items())


def _after(step: Step) -> Iterator[tuple[str, Tensor]]:
    """Yield what a step leaves: gradients, then parameters and buffers."""
    yield from ((f"gradients[{n!r}]", t) for n, t in reversed(step.gradients.items()))
    for name, tensor in step.end.items():
        kind, _, path = name.partition("/")
        if kind in ("parameter", "buffer"):
            yield f"{kind}s[{path!r}] after the step", tensor


class _Values:
    """All tensors of a step, to look others up among them."""

    def __init__(self, step: Step, limit: float) -> None:
        self._operations = step.operations
        self._storage = {name: spec.storage for name, spec in step.places.tensors.items()}
        self._limit = limit
        self._by_size: dict[int, list[tuple[int | None, Tensor]]] = defaultdict(list)
        given = (*step.state.values(), *step.batch.tensors.values())
        for tensor in (*given, *step.gradients.values(), *step.end.values()):
            self._by_size[tensor.numel()].append((None, tensor))
        for index, seen in enumerate(step.operations):
            for tensor in (*seen.results.values(), *seen.written.values()):
                self._by_size[tensor.numel()].append((index, tensor))

    def nearest(self, tensor: Tensor) -> tuple[int | None, float]:
        """Return the operation with the nearest result, and how far that is; None: no operation's.

        Numbers count, not their shape; a matrix may be transposed.
        """
        best: tuple[int | None, float] = (None, math.inf)
        if not tensor.numel() or not tensor.any():
            return None, 0.0  # what is empty or zero says nothing
        for index, candidate in self._by_size[tensor.numel()]:
            for view in _views(tensor, candidate):
                distance = relative_difference(view.flatten(), candidate.flatten())
                if distance < best[1]:
                    best = index, distance
            if best[1] == 0:
                break
        return best

    def suspect(self, others: _Values) -> Suspect | None:
        """Return the first result that others do not have, nor anything that is computed from it."""
        known = [
            any(others.nearest(tensor)[1] <= self._limit for tensor in seen.results.values())
            or not any(t.is_floating_point() for t in seen.results.values())
            for seen in self._operations
        ]
        for index in reversed(range(len(known))):
            known[index] = known[index] or any(known[later] for later in self._consumers(index))
        for index, seen in enumerate(self._operations):
            if known[index] or not seen.results:
                continue
            name, tensor = next(iter(seen.results.items()))
            given = all(
                others.nearest(each)[1] <= self._limit
                for each in seen.inputs.values()
                if each.is_floating_point()
            )
            nearest, distance = others.nearest(tensor)
            return Suspect(index, seen, name, given, nearest, distance)
        return None

    def _consumers(self, index: int) -> Iterator[int]:
        """Yield the operations that read what an operation wrote, until it is overwritten."""
        made = self._places(self._operations[index].results) | self._places(
            self._operations[index].written
        )
        for later in range(index + 1, len(self._operations)):
            if self._places(self._operations[later].inputs) & made:
                yield later
            made -= self._places(self._operations[later].results)
            if not made:
                return

    def _places(self, tensors: dict[str, Tensor]) -> set[str]:
        return {self._storage.get(name, name) for name in tensors}


def _views(tensor: Tensor, candidate: Tensor) -> Iterator[Tensor]:
    """Yield a tensor, and transposed if that is another matrix."""
    if tensor.is_floating_point() == candidate.is_floating_point():
        yield tensor
        if tensor.ndim >= 2 and min(tensor.shape[-2:]) > 1:
            yield tensor.mT
