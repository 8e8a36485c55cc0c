"""Nonfinite: the operation that made the first NaN or infinity of a run.

Every result of every operation is checked while programs run the steps; what the operation made it from
is an answer of `why`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from everystep.device import on_cpu
from everystep.errors import RunError
from everystep.program.bound import BoundProgram
from everystep.program.observed import Observed
from everystep.program.operation import Phase
from everystep.program.optimizers import OPTIMIZERS
from everystep.program.unset import unset_results
from everystep.recording.run import RecordedRun
from everystep.replay.parallel import Span, Visitor, parallel, spans
from everystep.replay.processes import Opener
from everystep.replay.replay import Replay
from everystep.replay.replay_stepper import ReplayStepper
from everystep.replay.shown import Shown
from everystep.replay.step import Step
from everystep.replay.why import Spot, Why, why

__all__ = ["NonFinite", "find_nonfinite"]

Origin = Literal["operation", "batch", "state", "between", "outside"]
#: An operation by its place and operator, or a tensor of the state by its name.
_Meant = tuple[int, str] | str


@dataclass(frozen=True)
class NonFinite(Shown):
    """The origin of the first NaN or infinity of a run.

    step: the opened step; origin: what it came from: an operation, the batch, the state before the step,
    a change of that state between two steps (`between`), or your own code (`outside`); index: of the
    operation that made it, or that put what your own code gave it into `name`; name: of the tensor;
    nans, infinities: their number in it; rows: the affected rows, if the tensor has a row for each row
    of the batch, as `step.batch.whole` numbers them.
    why: the first of these numbers, with the numbers that the operation made it from and the rows behind
    it; None if no operation made it, or an optimizer, of which only the parameters are known.
    """

    step: Step
    origin: Origin
    index: int | None
    name: str
    nans: int
    infinities: int
    rows: tuple[int, ...]

    def __repr__(self) -> str:
        what = f"{self.nans:,} NaN and {self.infinities:,} infinite in {self.name}"
        where = "from the start" if self.index is None else f"by operation #{self.index}"
        return f"<step {self.step.number:,}: {what}, {where}>"

    @property
    def operation(self) -> Observed | None:
        """The operation that made it, with its inputs."""
        return None if self.index is None else self.step.operations[self.index]

    @property
    def phase(self) -> Phase | None:
        """The phase of the operation."""
        return None if self.index is None else self.step.phases[self.index]

    @cached_property
    def why(self) -> Why | None:
        """Where the first of these numbers comes from."""
        if self.index is None or self.name not in self.step.places.tensors:
            return None
        made = self.step.operations[self.index]
        tensor = {**made.results, **made.written}[self.name]
        place = torch.nonzero(~torch.isfinite(tensor))[0].tolist()
        return why(self.step, Spot(self.name, tuple(place), self.index + 1))


class _Counts(NamedTuple):
    nans: int
    infinities: int


class FiniteCheck(Visitor):
    """Runs steps, and stops at the first with a value that is unintentionally not finite.

    meant: operations with intentional infinities, such as those of a causal mask, and tensors that an
    optimizer keeps with them, by name: there, only NaNs count.
    """

    may_share = True

    def __init__(self, meant: frozenset[_Meant]) -> None:
        self._meant = meant
        self._found: int | None = None
        self._plans: dict[BoundProgram, tuple[list[Any], Tensor]] = {}
        self._training: ReplayStepper | None = None

    @property
    def is_done(self) -> bool:  # type: ignore[override]
        """Whether it has found one."""
        return self._found is not None

    def begin(self, replay: Replay, span: Span) -> int:
        """Begin with the state before the span."""
        self._found, self._plans = None, {}
        return super().begin(replay, span)

    def some(self, replay: Replay, last: int) -> list[float]:
        """Run the next steps, up to the first that is not finite; return their losses."""
        stepper = self._training = replay.stepper
        assert stepper.state is not None
        number = stepper.state + 1
        if stepper.can_watch(number):
            losses: list[float] = stepper.watch(last, self).tolist()
            return losses
        step = replay.next_step()
        self._note(number, _first_made(step) is None)
        return [step.loss]

    def calls(self, bound: BoundProgram) -> list[Any]:
        """Return the calls of a step with a check of each result."""
        if bound not in self._plans:
            self._plans[bound] = self._plan(bound)
        return self._plans[bound][0]

    def after(self, number: int, bound: BoundProgram) -> bool:
        """Note whether everything in a step was finite; return whether it was."""
        finite = bool(self._plans[bound][1].all())
        return self._note(number, finite)

    def _note(self, number: int, finite: bool) -> bool:
        self._found = self._found if finite else number
        return finite

    def result(self) -> int | None:
        """Return the step, or None."""
        return self._found

    def _plan(self, bound: BoundProgram) -> tuple[list[Any], Tensor]:
        """Return the calls of a step with a check of each result, and where the answers are.

        A step that is opened has the operations of an optimizer in place of its step as a whole. So
        operations have other places from there on, and all infinities count: opening the step decides.
        """
        program = bound.program
        flags = torch.ones(len(program.operations) + 1, dtype=torch.bool, device=bound.loss.device)
        after: dict[int, list[Any]] = {}
        inputs = [n for n in program.tensors if program.storage_of(n).kind == "input" and "~" not in n]
        self._check(after, -1, flags, [bound.tensor(name) for name in inputs], [])
        is_same_place = True
        for index, operation in enumerate(program.operations):
            names = {*filter(None, operation.results), *operation.written()} - unset_results(operation)
            is_optimizer = operation.operator in OPTIMIZERS
            is_same_place &= not is_optimizer
            is_meant = is_same_place and (index, operation.operator) in self._meant
            meant = names if is_meant else names & self._meant if is_optimizer else set()
            both = ([bound.tensor(n) for n in each] for each in (names - meant, meant))
            self._check(after, index, flags, *both)
        return bound.calls_with(after), flags

    def _check(
        self,
        after: dict[int, list[Any]],
        index: int,
        flags: Tensor,
        tensors: list[Tensor],
        may_be_infinite: list[Tensor],
    ) -> None:
        """Add the check of tensors after an operation."""
        both = [
            [t for t in ts if t.is_floating_point() or t.is_complex()]
            for ts in (tensors, may_be_infinite)
        ]
        if any(both):
            after[index] = [partial(self._look, flags[index], *both)]

    @staticmethod
    def _look(flag: Tensor, tensors: list[Tensor], may_be_infinite: list[Tensor]) -> None:
        flag.fill_(True)
        for tensor in tensors:
            flag.logical_and_(torch.isfinite(tensor).all())
        for tensor in may_be_infinite:
            flag.logical_and_((~torch.isnan(tensor)).all())


@on_cpu()
def find_nonfinite(
    opener: Opener,
    processes: int | None = None,
    on_progress: Callable[[int], None] = lambda steps: None,
) -> NonFinite | None:
    """Return the origin of the first NaN or infinity of a run, or None if all is finite.

    It checks every result of every operation. Infinities among the arguments of an operation (a causal
    mask) do not count; results computed from them count only if they are NaN.

    Raises:
        RunError: a needed file is missing or unreadable, or the replay of a step differs from the
            recording, so that the origin cannot be determined.
    """
    run, last = opener.run, opener.run.newest_step()
    if not last:
        return None
    if opener.objects is not None:
        opener = Opener(run, opener.objects)  # with what they carry besides tensors as it was
    first = _opened(opener, 1)
    if (made := _first_made(first)) is not None:
        return made
    meant = _not_finite_in(first)
    bound, begin, made = min(last, run.facts.nonfinite_step or last), 1, None
    while made is None and begin <= bound:
        number = _first_suspect(opener, begin, bound, meant, processes, on_progress)
        if number is None:
            return None
        suspect = _opened(opener, number)
        made, begin, meant = _first_made(suspect), number + 1, meant | _not_finite_in(suspect)
    return made


def _opened(opener: Opener, number: int) -> Step:
    """Open a step that knows those before."""
    return replace(opener.step(number), earlier=opener.step)


def _first_suspect(
    opener: Opener,
    begin: int,
    bound: int,
    meant: frozenset[_Meant],
    processes: int | None,
    on_progress: Callable[[int], None],
) -> int | None:
    """Return the first step from `begin` to `bound` with a value that is not finite, or None.

    Raises:
        RunError: a replay differs from the recording before that step.
    """
    run = opener.run
    steps: dict[int, int | None] = {}
    diverged: list[int] = []
    replayed = parallel(opener, spans(run, begin, bound), FiniteCheck(meant), processes, on_progress)
    with closing(replayed):  # type: ignore[type-var]  # a generator
        for each in replayed:
            steps[each.span.first] = each.result
            diverged += [each.first_loss.step] if each.first_loss else []
            diverged += [each.stopped_at] if each.stopped_at else []
            if each.result is not None and _covers(steps, run, (begin, bound), each.result):
                break
    suspect = min((step for step in steps.values() if step is not None), default=None)
    if diverged and (suspect is None or min(diverged) <= suspect):
        raise RunError(
            f"the replay of {run.name} differs from its recording at step {min(diverged)}, or ends "
            "there, so its first NaN or infinity cannot be determined; run everystep verify for details"
        )
    return suspect


def _covers(steps: dict[int, int | None], run: RecordedRun, ends: tuple[int, int], found: int) -> bool:
    """Tell whether all spans before the step found have been replayed."""
    return all(span.first in steps for span in spans(run, *ends) if span.first <= found)


def _of_update(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a state that an optimizer changes."""
    return {n: t for n, t in state.items() if n.startswith(("parameter/", "optimizer/"))}


def _not_finite_in(step: Step) -> frozenset[_Meant]:
    """Return the operations of a step with results that are not finite, and what an optimizer has so."""
    operations = (
        (index, each.operation.operator)
        for index, each in enumerate(step.operations)
        if _count(each.made.values()) != (0, 0)
    )
    kept = (name for name, tensor in _of_update(step.end).items() if _count([tensor]) != (0, 0))
    return frozenset((*operations, *kept))


def _first_made(step: Step) -> NonFinite | None:
    """Return what made the first NaN or infinity in a step, or brought it in, if anything did."""
    for name, tensor in step.batch.tensors.items():
        counts = _count([tensor])
        if counts != (0, 0):
            return NonFinite(step, "batch", None, name, *counts, _rows(step, tensor))
    for name, tensor in step.parameters.items():
        if _count([tensor]) != (0, 0):
            return _from_state(step, f"parameter/{name}", tensor)
    kept = _kept_storages(step)
    for index, observed in enumerate(step.operations):
        inputs, results = observed.read, observed.made
        may_be_meant = _count(inputs.values()) != (0, 0) or _is_among_arguments(observed)
        for name, tensor in results.items():
            nans, infinities = _count([tensor])
            spec = step.places.tensors.get(name)
            is_kept = spec is not None and spec.storage in kept
            if not nans and (not infinities or (may_be_meant and not is_kept)):
                continue
            # No operation before has made one that counts: what has one already was brought in.
            given = _given_as(inputs, is_nan=nans > 0)
            base = (given or "").partition("~")[0]
            if base in step.state and _count([step.state[base]]) != (0, 0):
                return _from_state(step, base, step.state[base])
            is_outside = given is not None and _is_from_outside(step, given)
            origin: Origin = "outside" if is_outside else "operation"
            return NonFinite(step, origin, index, name, nans, infinities, _rows(step, tensor))
    return None


def _given_as(inputs: Mapping[str, Tensor], *, is_nan: bool) -> str | None:
    """Return the first input with a NaN, or with an infinity."""
    counts = {name: _count([tensor]) for name, tensor in inputs.items()}
    return next((n for n, each in counts.items() if (each.nans if is_nan else each.infinities)), None)


def _is_from_outside(step: Step, name: str) -> bool:
    """Tell whether no operation made a tensor, and it is not of the state."""
    spec = step.places.tensors.get(name)
    kind = None if spec is None else step.places.storages[spec.storage].kind
    return kind in ("input", "constant")


def _from_state(step: Step, name: str, tensor: Tensor) -> NonFinite:
    """Return the answer for a tensor of the state before a step."""
    before = step.earlier(step.number - 1) if step.earlier and step.number > 1 else None
    left = None if before is None else before.end.get(name)
    is_changed = left is not None and _count([left]) == (0, 0)
    origin: Origin = "between" if is_changed else "state"
    return NonFinite(step, origin, None, name.removeprefix("parameter/"), *_count([tensor]), ())


def _kept_storages(step: Step) -> set[str]:
    """Return where parameters and gradients are: there, no infinity is meant."""
    names = [name for name in step.places.tensors if name.startswith(("parameter/", "gradient/"))]
    names += [name for place in step.places.gradients.values() for name in place.names]
    return {step.places.tensors[name].storage for name in names if name in step.places.tensors}


def _is_among_arguments(observed: Observed) -> bool:
    """Tell whether an infinity is among the arguments."""
    text = (*observed.operation.arguments, *observed.operation.keywords.values())
    return any(
        (isinstance(value, dict) and value.get("float") in ("inf", "-inf"))
        or (isinstance(value, float) and math.isinf(value))
        for value in text
    )


def _count(tensors: Any) -> _Counts:
    floats = [t for t in tensors if t.is_floating_point() or t.is_complex()]
    nans = sum(int(torch.isnan(tensor).sum()) for tensor in floats)
    return _Counts(nans, sum(int(torch.isinf(tensor).sum()) for tensor in floats))


def _rows(step: Step, tensor: Tensor) -> tuple[int, ...]:
    """Return the rows of the data in which a tensor with a row for each of the batch is not finite."""
    first = next(iter(step.batch.tensors.values()), None)
    rows = len(first) if first is not None and first.ndim else 0
    if tensor.ndim == 0 or len(tensor) != rows:
        return ()
    places = torch.nonzero(~torch.isfinite(tensor).reshape(rows, -1).all(1)).flatten()
    return tuple((places if step.batch.rows is None else step.batch.rows[places.cpu()]).tolist())
