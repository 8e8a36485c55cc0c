"""Nonfinite: the operation that made the first NaN or infinity of a run.

Every result of every operation is checked while programs run the steps; `why` returns the inputs of that
number.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from everystep.answers.measure import until
from everystep.answers.why import Spot, Why, why
from everystep.device import on_cpu
from everystep.errors import RunError
from everystep.ops.arguments import decode
from everystep.program.interpreter import Look
from everystep.program.observed import Observed, unset_results
from everystep.program.operation import Phase
from everystep.program.optimizer_operator import OPTIMIZERS
from everystep.program.step_program import Program
from everystep.replay.opened_step import Step
from everystep.replay.parallel import Span, Visitor, spans
from everystep.replay.processes import Opener
from everystep.replay.recorded_steps import NotReplayedError, check_kept
from everystep.replay.run_replay import Replay
from everystep.replay.shown import Shown
from everystep.step.state import comparable

__all__ = ["NonFinite", "find_nonfinite"]

_Cause = Literal["operation", "batch", "state", "between", "outside"]
#: An operation by its place and operator, or a tensor of the state by its name.
_Meant = tuple[int, str] | str
#: Stands for the numbers among the arguments of an operation, where tensors stand by name.
_NUMBERS = "~numbers"


@dataclass(frozen=True)
class NonFinite(Shown):
    """The origin of the first NaN or infinity of a run.

    step: the opened step; origin: its source: an operation, the batch, the state before the step, a
    change of that state between two steps (`between`), or your own code (`outside`); index: of the
    operation that made it, or that copied a number of your own code into `name`; name: of the tensor;
    nans, infinities: their number in it; rows: the affected rows, if the tensor has a row for each row
    of the batch, as `step.batch.whole` numbers them. why: the first of these numbers, with the inputs
    and the rows that it was computed from; None if no operation made it.
    """

    step: Step
    origin: _Cause
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
        if self.index is None:
            return None
        tensor = comparable(self.step.operations[self.index].made[self.name])
        place = torch.nonzero(~torch.isfinite(tensor))[0].tolist()
        return why(self.step, Spot(self.name, tuple(place), self.index + 1))


# How it is found: the steps run with a check of each result (fast, and in parallel). The first step with
# a value that is not finite is opened, and either an operation made it by mistake, or all that it has is
# meant, such as -inf in a mask: then these places are noted, and the search continues after it.
class FiniteCheck(Visitor):
    """Runs steps, and stops at the first with a value that is unintentionally not finite.

    meant: operations with intentional infinities, such as those of a causal mask, and tensors that an
    optimizer keeps with them, by name: there, only NaNs count.
    """

    may_share = True

    def __init__(self, meant: frozenset[_Meant]) -> None:
        self._meant = meant
        self._found: int | None = None
        #: Whether all is finite so far in the step under way.
        self._is_finite = torch.tensor(True)

    @property
    def is_done(self) -> bool:  # type: ignore[override]
        """Whether it has found one."""
        return self._found is not None

    def begin(self, replay: Replay, span: Span) -> int:
        """Begin with the state before the span."""
        self._found = None
        return super().begin(replay, span)

    def run(self, replay: Replay, last: int) -> list[float]:
        """Run the next steps, up to the first that is not finite; return their losses."""
        return replay.stepper.run(last, self)

    def after(self, number: int, loss: float) -> bool:
        """Note whether everything in a step was finite; return whether it was."""
        if not bool(self._is_finite):
            self._found = number
        return self._found is None

    def result(self) -> int | None:
        """Return the step, or None."""
        return self._found

    def looks(self, program: Program) -> dict[int, list[Look]]:
        """Return what checks each result of a step: see `Hook`."""
        inputs = [n for n in program.tensors if program.storage_of(n).kind == "input" and "~" not in n]
        found: dict[int, list[Look]] = {-1: [self._begin_step, *self._checks(program, inputs, ())]}
        # An opened step has the single operations of an optimizer. So later operations have different
        # numbers there, and all infinities count here: opening the step decides.
        is_same_place = True
        for index, operation in enumerate(program.operations):
            names = {*operation.changed()} - unset_results(operation)
            is_optimizer = operation.operator in OPTIMIZERS
            is_same_place &= not is_optimizer
            is_meant = is_same_place and (index, operation.operator) in self._meant
            meant = names if is_meant else names & self._meant if is_optimizer else ()
            found[index] = self._checks(program, names, meant)
        return found

    def _begin_step(self, tensor_of: Callable[[str], Tensor]) -> None:
        self._is_finite = torch.tensor(True)

    def _checks(self, program: Program, names: Collection[str], meant: Collection[str]) -> list[Look]:
        """Return what checks tensors. meant: those in which only NaNs count."""
        dtypes = {name: program.tensors[name].torch_dtype for name in names}
        return [
            partial(self._check, name, (lambda t: ~torch.isnan(t)) if name in meant else torch.isfinite)
            for name, dtype in dtypes.items()
            if dtype.is_floating_point or dtype.is_complex
        ]

    def _check(
        self, name: str, test: Callable[[Tensor], Tensor], tensor_of: Callable[[str], Tensor]
    ) -> None:
        # A tensor, not a number of Python: on an accelerator, each `bool` would wait for it.
        self._is_finite = self._is_finite & test(comparable(tensor_of(name))).all()


@on_cpu()
def find_nonfinite(
    opener: Opener,
    open_step: Callable[[int], Step],
    processes: int | None = None,
    on_progress: Callable[[int], None] = lambda steps: None,
) -> NonFinite | None:
    """Answer `Run.first_nonfinite`. open_step: returns a step that knows those before, and all ranks.

    It checks every result of every operation. Infinities among the arguments of an operation (a causal
    mask) do not count; results computed from them count only if they are NaN.

    Raises:
        RunError: also if the replay of a step differs from the recording, so that the origin cannot be
            determined.
    """
    run, last = opener.run, opener.run.newest_step()
    if not last:
        return None
    bound = min(last, run.facts.nonfinite_step or last)  # where the loss shows it at the latest
    meant: frozenset[_Meant] = frozenset()
    if run.facts.nonfinite_step:
        check_kept(run, bound)
    # The first step has the operations with intentional infinities.
    suspect = begin = next((first for first, _ in run.facts.kept(bound)), bound)
    while True:
        step = open_step(suspect)
        if (made := _first_made(step)) is not None:
            return made
        if begin > bound:
            return None
        meant |= _not_finite_in(step)
        due, check = spans(run, begin, bound), FiniteCheck(meant)
        done = until(lambda each: each.result is not None, opener, due, check, processes, on_progress)
        found = min((each.result for each in done if each.result is not None), default=None)
        diverged = [each.first_loss.step for each in done if each.first_loss]
        diverged += [each.stopped_at for each in done if each.stopped_at]
        # After a step that differs, the values are not those of the recording.
        if diverged and (found is None or min(diverged) <= found):
            differs = f"the replay of {run.name} differs from its recording at step {min(diverged)}"
            raise RunError(
                f"{differs}, or ends there, so its first NaN or infinity cannot be determined; "
                "run everystep verify for details"
            )
        if found is None:
            return None
        suspect, begin = found, found + 1


def _not_finite_in(step: Step) -> frozenset[_Meant]:
    """Return the operations of a step with non-finite results, and such tensors of its end state."""
    operations = (
        (index, each.operation.operator)
        for index, each in enumerate(step.operations)
        if any(map(_count, each.made.values()))
    )
    kept = (n for n, t in step.end.items() if n.startswith(("parameter/", "optimizer/")) and _count(t))
    return frozenset((*operations, *kept))


def _first_made(step: Step) -> NonFinite | None:
    """Return what made the first NaN or infinity in a step, or brought it in, if anything did."""
    for name, tensor in step.batch.tensors.items():
        if found := _count(tensor):
            return NonFinite(step, "batch", None, name, *found, _rows(step, tensor))
    for name, tensor in step.parameters.items():
        if _count(tensor):
            return _from_state(step, f"parameter/{name}", tensor)
    tensors = step.places.tensors
    names = [name for name in tensors if name.startswith(("parameter/", "gradient/"))]
    names += [name for place in step.places.gradients.values() for name in place.names]
    names += [step.places.loss or ""]
    # Where parameters and gradients are, and the loss, no infinity is meant.
    kept = {tensors[name].storage for name in names if name in tensors}
    for index, observed in enumerate(step.operations):
        read = {**observed.read, _NUMBERS: _number_arguments(observed)}
        given = {name: found for name, tensor in read.items() if (found := _count(tensor))}
        for name, tensor in observed.made.items():
            found = _count(tensor)
            is_kept = name in tensors and tensors[name].storage in kept
            if found is None or (not found.nans and given and not is_kept):
                continue
            # No earlier operation made one that counts, so an input of the step has it, or an argument.
            brought = (n for n, each in given.items() if (each.nans if found.nans else each.infinities))
            source = next(brought, "")
            base = source.partition("~")[0]
            if base in step.state and _count(step.state[base]):
                return _from_state(step, base, step.state[base])
            # `w[1] = nan` gives a number, or a tensor; those of an update are of its optimizer.
            is_outside = (source == _NUMBERS and step.phases[index] != "update") or (
                source in tensors and step.places.storages[tensors[source].storage].kind == "input"
            )
            origin: _Cause = "outside" if is_outside else "operation"
            return NonFinite(step, origin, index, name, *found, _rows(step, tensor))
    return None


def _from_state(step: Step, name: str, tensor: Tensor) -> NonFinite:
    before = None
    if step.earlier and step.number > 1:
        with suppress(NotReplayedError):  # where it was not kept
            before = step.earlier(step.number - 1)
    left = None if before is None else before.end.get(name)
    is_changed = left is not None and _count(left) is None
    found = _count(tensor)
    assert found is not None
    origin: _Cause = "between" if is_changed else "state"
    return NonFinite(step, origin, None, name.removeprefix("parameter/"), *found, ())


def _number_arguments(observed: Observed) -> Tensor:
    operation = observed.operation
    given = [decode(value, str) for value in (*operation.arguments, *operation.keywords.values())]
    return torch.tensor([value for value in given if isinstance(value, float)], dtype=torch.float64)


class _Counts(NamedTuple):
    nans: int
    infinities: int


def _count(tensor: Tensor) -> _Counts | None:
    """Return how many numbers of a tensor are not finite, None if all are finite."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return None
    tensor = comparable(tensor)
    if bool(tensor.isfinite().all()):
        return None
    return _Counts(int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum()))


def _rows(step: Step, tensor: Tensor) -> tuple[int, ...]:
    """Return the rows of the data in which a tensor with a row for each of the batch is not finite."""
    if tensor.ndim == 0 or len(tensor) != step.batch.count:
        return ()
    places = torch.nonzero(~torch.isfinite(comparable(tensor)).reshape(len(tensor), -1).all(1)).flatten()
    return tuple(map(step.batch.number, places.tolist()))
