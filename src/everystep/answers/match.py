"""Match: aligns a step of two trainings that are written differently, by the values of their tensors.

Two programs of the same mathematics have the same tensors up to rounding, in any order, with different
shapes of the same numbers, and with different intermediate results. So a tensor of one is searched among
all tensors of the other. A result that the other does not have is suspect if nothing computed from it is
found there either: else it is only a different intermediate result.

Rounding hides mistakes: a weight decay may change an update by less than single precision keeps of it.
So what matches as computed is computed again, by both programs in double precision and from the same
state. If one of them rounds more, as in bfloat16, only this comparison counts.
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
from everystep.program.number_slots import READ
from everystep.program.observed import Observed
from everystep.program.precision import Precision
from everystep.replay.opened_step import Step
from everystep.replay.processes import Opener
from everystep.replay.run_replay import Replay
from everystep.replay.shown import Shown
from everystep.step.state import State

__all__ = ["Match", "Suspect", "match"]


#: How far apart numbers are by rounding, if both programs compute in double precision: constants of the
#: programs were rounded to single precision.
_ROUNDING_IN_DOUBLE = 1e-7
#: The same, if Python read numbers of the step, such as a norm: they are as recorded, with the rounding
#: of what they were computed from.
_ROUNDING_OF_READ = 1e-6


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

    step: its number; losses: in both, as recorded; precisions: the coarsest that each computes in;
    is_double: whether both steps were compared in double precision, from the state of the first run, as
    they are where all matches as computed, or where the precisions differ; problem: why a match could
    not be compared in this way, or None; rounding: how far apart numbers are by rounding, relative to
    the largest; begin: the tensors that the first run has before the step (state and batch) and the
    second does not; end: the gradients and the state after the step that are only in the first, in
    order; found, of: how many of these there are; suspects: the first suspect result in each run.
    """

    names: tuple[str, str]
    step: int
    losses: tuple[float, float]
    precisions: tuple[str, str]
    is_double: bool
    problem: str | None
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
    """Compare a step as computed, and in double precision where that cannot decide."""
    steps = one.step(number), other.step(number)
    coarsest = _coarsest(steps[0]), _coarsest(steps[1])
    before = [*_before(steps[0])]
    if coarsest[0] != coarsest[1]:
        limit = tolerance(*coarsest)
        # At later steps, rounding has led to different states, so both steps start from the same one.
        before = [(n, t) for n, t in before if number == 1 or n.startswith("batch")]
    else:
        limit = tolerance(*(t.dtype for step in steps for t in step.parameters.values()))
    others = _Values(steps[1], limit)
    found = Match(
        names=(one.run.name, other.run.name),
        step=number,
        losses=(steps[0].loss, steps[1].loss),
        precisions=(_name_of(coarsest[0]), _name_of(coarsest[1])),
        is_double=False,
        problem=None,
        rounding=limit,
        begin=tuple(name for name, tensor in before if not others.has(tensor)),
        end=(),
        found=0,
        of=0,
        suspects=(None, None),
    )
    if coarsest[0] == coarsest[1]:
        found = _with_ends(found, steps, change=math.sqrt(limit))
        if not found.is_match or limit <= _ROUNDING_IN_DOUBLE:
            return found
        if not all(others.nearest(tensor)[1] == 0 for tensor in steps[0].batch.tensors.values()):
            return replace(found, problem="the batches are the same only up to rounding")
    try:
        in_double = _in_double(one, other, found)
    except ProgramError as error:
        if coarsest[0] == coarsest[1]:
            return replace(found, problem=str(error))
        raise RunError(
            f"{one.run.name} and {other.run.name} compute in different precisions, so step {number} "
            f"would be compared in double precision, which is not possible: {error}"
        ) from None
    limit = _ROUNDING_OF_READ if any(map(_reads_numbers, steps)) else _ROUNDING_IN_DOUBLE
    return _with_ends(replace(found, is_double=True, rounding=limit), in_double, change=10 * limit)


def _with_ends(found: Match, steps: tuple[Step, Step], change: float) -> Match:
    """Return an answer with what the second step lacks, and the suspects.

    change: how far apart the changes of a tensor are by rounding, relative to their norm.
    """
    values = [_Values(step, found.rounding, change) for step in steps]
    ends = [*_after(steps[0])]
    end = tuple(name for name, tensor, before in ends if not values[1].has(tensor, before))
    suspects = values[0].suspect(values[1]), values[1].suspect(values[0])
    return replace(found, end=end, found=len(ends) - len(end), of=len(ends), suspects=suspects)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _reads_numbers(step: Step) -> bool:
    """Return whether Python read numbers of a step other than the loss."""
    reads = (seen for seen in step.operations if seen.operation.operator == READ)
    return any(step.places.loss not in seen.read for seen in reads)


def _coarsest(step: Step) -> torch.dtype:
    """Return the dtype of the results of a step that rounds most."""
    results = (tensor.dtype for seen in step.operations for tensor in seen.results.values())
    given = (tensor.dtype for tensor in step.parameters.values())
    found = {dtype for dtype in (*results, *given) if dtype.is_floating_point}
    return max(found, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def _in_double(one: Opener, other: Opener, found: Match) -> tuple[Step, Step]:
    """Return a step of two runs in double precision, both from the state of the first.

    Raises:
        ProgramError: one of the programs has no double precision.
    """
    first, own = one.state(found.step - 1), other.state(found.step - 1)
    if found.precisions[0] == found.precisions[1]:
        there = {**first.parameters, **first.rest}
        parameters = {n: _closest(n, t, there, found.rounding) for n, t in own.parameters.items()}
        rest = {n: _closest(n, t, there, found.rounding) for n, t in own.rest.items()}
    else:
        names = _counterparts(other.state(0), one.state(0), found.rounding)
        parameters = _shared(own.parameters, first.parameters, names)
        rest = _shared(own.rest, first.rest, names)
    second = replace(own, parameters=parameters, rest=rest)
    return one.call(_step_in_double, first), other.call(_step_in_double, second)


def _closest(name: str, tensor: Tensor, others: Mapping[str, Tensor], limit: float) -> Tensor:
    """Return the tensor of another state that is this one up to rounding; this one if there is none.

    name: what it is called there, if the same.
    """
    if not tensor.is_floating_point():
        return tensor
    named = [others[name]] if name in others else []
    for candidates in (named, others.values()):
        alike = (t for t in candidates if t.dtype == tensor.dtype and t.numel() == tensor.numel())
        views = [view for each in alike for view in _views(each, tensor)]
        closest = min(views, key=lambda view: relative_difference(tensor, view), default=None)
        if closest is not None and relative_difference(tensor, closest) <= limit:
            return closest.clone(memory_format=torch.contiguous_format)
    return tensor


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

    def __init__(self, step: Step, limit: float, change: float = 0.0) -> None:
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
        self._limit, self._change = limit, change
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
        allowed = self._change * (new - old).norm()
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
