"""Match: aligns a step of two trainings that are written differently, by the values of their tensors.

Two programs of the same mathematics have the same tensors up to rounding, in any order, with different
shapes of the same numbers, and with different intermediate results. So a tensor of one is searched among
all tensors of the other. A result that the other does not have is suspect if nothing computed from it is
found there either: else it is only a different intermediate result.

If one of them rounds more, as in bfloat16, rounding hides mistakes. Then both programs take the step in
double precision, from the same state.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from everystep.answers.rounding import relative_difference, tolerance
from everystep.errors import ProgramError, RunError
from everystep.ops.operators import draws_random_numbers
from everystep.program.observed import Observed
from everystep.program.precision import Precision
from everystep.replay.opened_step import Step
from everystep.replay.processes import Opener
from everystep.replay.run_replay import Replay
from everystep.replay.shown import Shown
from everystep.step.state import State

__all__ = ["Match", "Suspect", "match"]


#: How far apart numbers are by rounding, if both programs compute in double precision: numbers that
#: Python computed in single precision, such as a factor, are the same in both.
ROUNDING_IN_DOUBLE = 1e-7


# Which results are suspect, e.g. where both programs have the same forward pass, A fuses bias and
# product, and B forgets a factor of 2 in the backward pass:
#   A addmm        B has it (its add)                   fine
#   B mm           A does not have it, but the add that is computed from it is there: intermediate
#   B d_output     A does not have it, and nothing computed from it is there: suspect
class Suspect(NamedTuple):
    """The first result of a step that the other does not have, and no result computed from it either.

    operation: its number; name: of the result; has_known_inputs: whether the other has all inputs of the
    operation; nearest, distance: the operation of the other with the nearest result of as many numbers,
    and how far that is, relative to the largest number; None if there is none.
    """

    operation: int
    observed: Observed
    name: str
    has_known_inputs: bool
    nearest: int | None
    distance: float


@dataclass(frozen=True, repr=False)
class Match(Shown):
    """How a step of two runs matches, up to rounding.

    step: its number; losses: in both, as recorded; precisions: the coarsest that each computes in, if
    these differ: both steps are then compared in double precision, from the tensors of the first run
    where the second has one of that name and shape; rounding: how far apart numbers are by rounding,
    relative to the largest; begin: the tensors that the first run has before the step (state and batch)
    and the second does not; end: the gradients and the state after the step that are only in the first,
    in order; found, of: how many of these there are; suspects: the first suspect result in each run.
    """

    names: tuple[str, str]
    step: int
    losses: tuple[float, float]
    precisions: tuple[str, str] | None
    rounding: float
    begin: tuple[str, ...]
    end: tuple[str, ...]
    found: int
    of: int
    suspects: tuple[Suspect | None, Suspect | None]

    @property
    def is_match(self) -> bool:
        """Whether the second run has all final tensors of the first one, up to rounding."""
        return not self.begin and not self.end


def match(one: Opener, other: Opener, step: int | None = None) -> Match:
    """Answer `Run.match`; without a step, for the first kept one that does not match, or the last."""
    # Bisection and the answer ask for the same steps.
    matches = cache(partial(_match, one, other))
    if step is None:
        last = min(each.run.newest_step() for each in (one, other))
        if last < 1:
            raise RunError("one of the runs has no steps to match")
        kept = one.run.facts.kept_with(other.run.facts, last)
        if not kept:
            raise RunError(f"{one.run.name} and {other.run.name} keep no common step to match")
        for first, step in kept:
            if not matches(first).is_match:
                return matches(first)
            if not matches(step).is_match:
                # Runs that diverged stay apart, so bisection finds the first such step.
                steps = range(first + 1, step)
                step = steps.start + bisect_left(steps, True, key=lambda n: not matches(n).is_match)
                return matches(step)
    return matches(step)


def _match(one: Opener, other: Opener, number: int) -> Match:
    steps = one.step(number), other.step(number)
    losses = steps[0].loss, steps[1].loss
    coarsest = _coarsest(steps[0]), _coarsest(steps[1])
    limit = tolerance(*(t.dtype for step in steps for t in step.parameters.values()))
    before, precisions = [*_before(steps[0])], None
    if coarsest[0] != coarsest[1]:
        one_name, other_name = (str(dtype).removeprefix("torch.") for dtype in coarsest)
        precisions, limit = (one_name, other_name), tolerance(*coarsest)
        # At later steps, rounding has led to different states, so both steps start from the same one.
        before = [(n, t) for n, t in before if number == 1 or n.startswith("batch")]
    others = _Values(steps[1], limit)
    begin = tuple(name for name, tensor in before if not others.has(tensor))
    if precisions is not None:
        # After `begin`, which compares what the two programs were really given.
        steps, limit = _in_double(one, other, number, limit), ROUNDING_IN_DOUBLE
    values = [_Values(step, limit) for step in steps]
    ends = [*_after(steps[0])]
    end = tuple(name for name, tensor, before in ends if not values[1].has(tensor, before))
    return Match(
        names=(one.run.name, other.run.name),
        step=number,
        losses=losses,
        precisions=precisions,
        rounding=limit,
        begin=begin,
        end=end,
        found=len(ends) - len(end),
        of=len(ends),
        suspects=(values[0].suspect(values[1]), values[1].suspect(values[0])),
    )


def _coarsest(step: Step) -> torch.dtype:
    """Return the dtype of the results of a step that rounds most."""
    results = (tensor.dtype for seen in step.operations for tensor in seen.results.values())
    given = (tensor.dtype for tensor in step.parameters.values())
    found = {dtype for dtype in (*results, *given) if dtype.is_floating_point}
    return max(found, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def _in_double(one: Opener, other: Opener, number: int, limit: float) -> tuple[Step, Step]:
    """Return a step of two runs in double precision, both from the state of the first.

    limit: how far apart numbers are by rounding, as the runs compute.
    """
    first, own = one.state(number - 1), other.state(number - 1)
    names = _counterparts(other.state(0), one.state(0), limit)
    second = replace(
        own,
        parameters=_shared(own.parameters, first.parameters, names),
        rest=_shared(own.rest, first.rest, names),
    )
    try:
        return one.call(_step_in_double, first), other.call(_step_in_double, second)
    except ProgramError as error:
        raise RunError(
            f"{one.run.name} and {other.run.name} compute in different precisions, so step {number} "
            f"would be compared in double precision, which is not possible: {error}"
        ) from None


def _counterparts(own: State, first: State, limit: float) -> dict[str, str]:
    """Return what tensors of a model are called in the first run, by another name in its own.

    own, first: states 0, in which both have the same numbers; of several alike, such as biases of zeros,
    the first one in the order of the model.
    """
    left = {name: tensor for name, tensor in first.parameters.items() if name not in own.parameters}
    found: dict[str, str] = {}
    for name, tensor in own.parameters.items():
        if name not in first.parameters:
            alike = (n for n, each in left.items() if relative_difference(each, tensor) <= limit)
            if (known := next(alike, None)) is not None:
                found[name] = known
                del left[known]
    return found


def _shared(
    own: dict[str, Tensor], others: dict[str, Tensor], names: Mapping[str, str]
) -> dict[str, Tensor]:
    """Return tensors, those of the same shape and name from others; names: the other names there."""
    found = {}
    for name, tensor in own.items():
        # e.g. `optimizer/first.weight/exp_avg` is `optimizer/0.weight/exp_avg` there.
        there = others.get("/".join(names.get(part, part) for part in name.split("/")))
        found[name] = there if there is not None and there.shape == tensor.shape else tensor
    return found


def _step_in_double(replay: Replay, state: State) -> Step:
    return Replay(replay.run, replay.data, conversion=Precision(torch.float64)).step_after(state)


def _before(step: Step) -> Iterator[tuple[str, Tensor]]:
    """Yield the inputs of a step: parameters, buffers and the batch."""
    yield from ((f"parameters[{n!r}]", t) for n, t in step.parameters.items())
    yield from ((f"buffers[{n!r}]", t) for n, t in step.buffers.items())
    yield from ((f"batch.{n}", t) for n, t in step.batch.tensors.items())


def _after(step: Step) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Yield the final tensors of a step, and what they were before it: gradients, then the state."""
    # Reversed, as a backward pass computes them: what comes first may be the cause of the rest.
    yield from ((f"gradients[{n!r}]", t, None) for n, t in reversed(step.gradients.items()))
    for name, tensor in step.end.items():
        kind, _, path = name.partition("/")
        if kind in ("parameter", "buffer"):
            yield f"{kind}s[{path!r}] after the step", tensor, step.state.get(name)


class _Values:
    """All tensors of a step, for look-up by values."""

    def __init__(self, step: Step, limit: float) -> None:
        self._operations = step.operations
        self._storage = {name: spec.storage for name, spec in step.places.tensors.items()}
        self._kinds = {name: storage.kind for name, storage in step.places.storages.items()}
        # A count of steps, or a power of a beta, is one number.
        counters = [
            name
            for name, tensor in (*step.state.items(), *step.end.items())
            if tensor.numel() == 1 and not name.startswith(("parameter/", "buffer/", "gradient/"))
        ]
        self._counters = self._places([*counters, *filter(None, map(step.places.ends.get, counters))])
        self._limit = limit
        self._changed = [(step.state[n], tensor) for n, tensor in step.end.items() if n in step.state]
        #: Only tensors with as many numbers can be equal, whatever their shapes.
        self._by_size: dict[int, list[tuple[int | None, Tensor]]] = defaultdict(list)
        given = (*step.state.values(), *step.batch.tensors.values())
        for tensor in (*given, *step.gradients.values(), *step.end.values()):
            self._by_size[tensor.numel()].append((None, tensor))
        for index, seen in enumerate(step.operations):
            for tensor in seen.made.values():
                self._by_size[tensor.numel()].append((index, tensor))

    def has(self, tensor: Tensor, before: Tensor | None = None) -> bool:
        """Return whether an equal tensor exists, up to rounding. before: what it was before the step."""
        is_there = self.nearest(tensor)[1] <= self._limit
        if not is_there or before is None or not tensor.is_floating_point():
            return is_there
        # At a small learning rate, parameters after a step are those before it up to rounding, so the
        # change of what the other has in their place counts, too.
        changes = [
            self._is_same_change(old, new, own, changed)
            for own, changed in self._changed
            if own.numel() == before.numel() and changed.shape == own.shape
            for old, new in zip(_views(before, own), _views(tensor, own), strict=True)
            if relative_difference(old.flatten(), own.flatten()) <= self._limit
        ]
        return not changes or any(changes)

    def _is_same_change(self, *tensors: Tensor) -> bool:
        """Return whether two changes are the same: tensors before and after one, and the other."""
        old, new, own, changed = (tensor.flatten().double() for tensor in tensors)
        # An optimizer may enlarge what rounding does to single gradients: the sum of all counts.
        allowed = math.sqrt(self._limit) * (new - old).norm()
        allowed += 4 * torch.finfo(tensors[1].dtype).eps * new.norm()
        return not bool((new - old - (changed - own)).norm() > allowed)

    def nearest(self, tensor: Tensor) -> tuple[int | None, float]:
        """Return the operation with the nearest result, and how far that is; None: no operation's."""
        best: tuple[int | None, float] = (None, math.inf)
        if not tensor.numel() or not tensor.any():
            return None, 0.0  # empty and zero tensors match anything
        for index, candidate in self._by_size[tensor.numel()]:
            # Numbers count, not their shape; a matrix may be transposed.
            for view in _views(tensor, candidate):
                distance = relative_difference(view.flatten(), candidate.flatten())
                if distance < best[1]:
                    best = index, distance
            if best[1] == 0:
                break
        return best

    def suspect(self, others: _Values) -> Suspect | None:
        """Return the first result that others do not have, and no result computed from it either."""
        # Another program may count steps, or make constants, without tensors.
        constant = self._of_constants()
        mains = [_main_result(seen).values() for seen in self._operations]
        known = [all(map(others.has, tensors)) for tensors in mains]
        for index in reversed(range(len(known))):
            # From the end on, so that what uses an operation has been decided before it.
            known[index] = known[index] or any(known[later] for later in self._consumers(index))
        for index, seen in enumerate(self._operations):
            if known[index] or not seen.results or index in constant:
                continue
            name, tensor = next(iter(seen.results.items()))
            given = all(others.has(t) for t in seen.inputs.values() if t.is_floating_point())
            return Suspect(index, seen, name, given, *others.nearest(tensor))
        return None

    def _of_constants(self) -> set[int]:
        """Return the operations that compute from constants and counters alone."""
        found: set[int] = set()
        written: set[str] = set()
        constant = set(self._counters)
        for index, seen in enumerate(self._operations):
            made = self._places(seen.made)
            is_new = all(self._kinds.get(place) == "temporary" for place in made) and not made & written
            given = self._places(seen.read) <= constant and (is_new or made <= constant)
            if given and not draws_random_numbers(seen.operation.resolved):
                found.add(index)
                constant |= made
            else:
                constant -= made
            written |= made
        return found

    def _consumers(self, index: int) -> Iterator[int]:
        """Yield the operations that use what an operation is for, until it is overwritten."""
        made = self._places(_main_result(self._operations[index])) | self._places(
            self._operations[index].written
        )
        for later in range(index + 1, len(self._operations)):
            seen = self._operations[later]
            # Not those of optimizers: Adam, for one, makes the same first update of other gradients.
            if seen.operation.phase != "update" and self._places(seen.read) & made:
                yield later
            made -= self._places(self._operations[later].results)
            if not made:
                return

    def _places(self, tensors: Iterable[str]) -> set[str]:
        return {self._storage.get(name, name) for name in tensors}


def _main_result(seen: Observed) -> dict[str, Tensor]:
    """Return the result that an operation is for, if it has numbers: another may be only a count."""
    results = [(name, tensor) for name, tensor in seen.results.items() if tensor.is_floating_point()]
    return dict(results[:1])


def _views(tensor: Tensor, candidate: Tensor) -> Iterator[Tensor]:
    """Yield a tensor, and transposed if that is another matrix."""
    if tensor.is_floating_point() == candidate.is_floating_point():
        yield tensor
        if tensor.ndim >= 2 and min(tensor.shape[-2:]) > 1:
            yield tensor.mT
