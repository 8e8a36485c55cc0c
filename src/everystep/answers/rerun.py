"""Rerun: repeats the steps of a run under different conditions, and reports where they diverge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from everystep.answers.diff import BEFORE, in_lockstep
from everystep.answers.operations import OperationDifference, StepPair
from everystep.answers.other_process import Conditions, OtherProcess, opened, other_process
from everystep.answers.rounding import Apart, apart, tolerance
from everystep.device import on_cpu
from everystep.errors import RunError, UsageError
from everystep.program.number_slots import READ
from everystep.program.observed import Observed
from everystep.program.precision import counters
from everystep.program.step_program import Program
from everystep.recording.keep import kept_text
from everystep.recording.recorded_run import RecordedRun
from everystep.replay.parallel import Replayed, Span, Visitor, replay_span, spans
from everystep.replay.processes import Opener
from everystep.replay.recorded_steps import RecordedSteps, read_program
from everystep.replay.run_replay import Replay
from everystep.replay.shown import Shown
from everystep.step.state import State

if TYPE_CHECKING:
    import polars

__all__ = ["Rerun", "relative_distance", "rerun"]

#: Steps that are replayed before their losses are fetched.
STRIDE = 256
#: Steps that are compared operation by operation, spread over the run, and bytes of them.
COMPARED, MOST_BYTES = 12, 1_000_000_000
#: Operations that are named as the farthest apart.
FARTHEST = 5


@dataclass(frozen=True, repr=False, eq=False)
class Rerun(Shown):
    """The steps of a run under different conditions.

    place: its conditions; changed: what bits depend on and differs there, by name, recorded
    and there; first: the first step; recorded, losses: of all steps (steps), recorded and there;
    has_loss: whether the run has losses; diverges_at: the first step with a different loss or state,
    None if all bits are the same, or in another precision; operation: the first with different bits, in
    that step; compared: steps that were compared from the recorded state before each; rounding: how far
    apart numbers are by rounding alone; beyond: the first result of these steps that is farther apart;
    residue: the first result that is zero but for rounding: it is not among these; farthest: the
    operations that are farthest apart; others: losses of other runs that were asked for, by name;
    problems: what could not be compared, or was taken from the recording.
    """

    name: str
    place: Conditions
    changed: dict[str, tuple[Any, Any]]
    first: int
    recorded: NDArray[np.float64]
    losses: NDArray[np.float64]
    has_loss: bool
    diverges_at: int | None
    operation: OperationDifference | None
    compared: tuple[int, ...]
    rounding: float
    beyond: Apart | None
    residue: Apart | None
    farthest: tuple[Apart, ...]
    others: dict[str, NDArray[np.float64]]
    problems: tuple[str, ...]

    @property
    def relative(self) -> NDArray[np.float64]:
        """How far the loss of each step is from the recorded one, relative to that (steps)."""
        return relative_distance(self.recorded, self.losses)

    @property
    def has_same_bits(self) -> bool:
        """Whether all losses, and all states that could be compared, are bit-identical."""
        return self.place.precision is None and self.diverges_at is None and not self.relative.any()

    @property
    def distances(self) -> dict[str, dict[str, float]]:
        """How far the losses of each run are from those of the rerun, relative to these, by name."""
        count = min(map(len, (self.losses, *self.others.values())))
        found = {}
        for name, losses in ({self.name: self.recorded} | self.others).items():
            relative = relative_distance(self.losses[:count], losses[:count])
            found[name] = {"median": float(np.median(relative)), "largest": float(relative.max())}
        return found

    @property
    def curves(self) -> dict[str, polars.DataFrame]:
        """The losses of the recording, the rerun and the other runs, by name: columns step and loss."""
        import polars as pl

        there = self.place.precision or "rerun"
        losses = {self.name: self.recorded, f"{self.name}, {there}": self.losses} | self.others
        steps = np.arange(self.first, self.first + len(self.losses))
        return {
            name: pl.DataFrame({"step": steps[: len(each)], "loss": each[: len(steps)]})
            for name, each in losses.items()
        }


def relative_distance(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how far numbers are from others, relative to the first; infinite if only one is finite."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        found = np.abs(other - one) / np.abs(one)
    both = np.isfinite(one) & np.isfinite(other)
    is_same = (one == other) | (np.isnan(one) & np.isnan(other))
    return np.where(is_same, 0.0, np.where(both, found, np.inf))


@on_cpu()
def rerun(
    opener: Opener,
    conditions: Conditions,
    others: Sequence[RecordedRun] = (),
    on_progress: Callable[[int], None] = lambda steps: None,
) -> Rerun:
    """Answer `Run.rerun`, from the first state of the run.

    For a fork, the steps are those since it began; of a recording with `keep`, the last kept ones in a
    row. Then single steps run from recorded states.

    on_progress: called with the number of steps just taken.
    """
    opener.run.check_alone("repeat such a run under different conditions")
    conditions.check()
    run = opener.run
    facts, begin = run.facts, run.stretches[-1].first
    kept = [steps for steps in facts.kept(run.newest_step()) if steps[1] >= begin]
    if not kept:
        raise UsageError(f"{run.name} has no steps to repeat")
    first, last = max(kept[-1][0], begin), kept[-1][1]
    known = facts.training.numerics
    recorded = np.array(run.losses_between(first, last))
    with other_process(conditions, conditions.environment(known)) as process:
        threads = conditions.threads or known.threads
        process.call(opened, run.directory.absolute(), opener.data, threads, conditions.precision)
        replayed = _replayed(process, run, (first, last), on_progress)
        # In another precision, all bits differ, from the first step on.
        differ = range(0) if conditions.precision is not None else _suspicious(replayed)
        operation, diverges_at = None, _parting_step(opener, process, differ)
        if diverges_at is not None:
            operation = _taken_twice(opener, process, diverges_at).first_difference()
        size = max(1, opener.step(first).bytes)
        # At least the first and the last one. Of a large model, each takes much memory.
        count = min(max(2, min(COMPARED, MOST_BYTES // size)), last - first + 1)
        steps = np.linspace(first, last, count).round().astype(int).tolist()
        own = "float64" if facts.loss_dtype == "float64" else "float32"
        dtypes = (own,) if conditions.precision is None else (own, conditions.precision)
        limit = tolerance(*(getattr(torch, dtype) for dtype in dtypes))
        found: list[Apart] = []
        # From recorded states: so each operation shows the difference that it adds, not that of all
        # steps before.
        for step in steps:
            found += apart(*_taken_twice(opener, process, step).steps, limit)
    numbers = [each for each in found if not each.is_residue]
    changed = {"precision": ("as recorded", conditions.precision)} if conditions.precision else {}
    return Rerun(
        name=run.name,
        place=conditions,
        changed=changed | known.differences(replayed[0].numerics),
        first=first,
        recorded=recorded,
        losses=np.array([loss for each in replayed for loss in each.losses]),
        has_loss=facts.has_loss,
        diverges_at=diverges_at,
        operation=operation,
        compared=tuple(steps),
        rounding=limit,
        beyond=next((each for each in numbers if not each.relative <= limit), None),
        residue=next((each for each in found if each.is_residue and not each.follows), None),
        farthest=_farthest(numbers),
        others={each.name: np.array(each.losses_between(first, last)) for each in others},
        problems=tuple(dict.fromkeys([*_notes(opener, range(first, last + 1)), *opener.problems])),
    )


def _replayed_span(replay: Replay, span: Span) -> Replayed:
    """Replay a span from the current state, or raise why a step cannot be replayed."""
    found = replay_span(replay, span, Visitor())
    if found.stopped_at is not None:
        raise RunError(found.problems[-1])
    return found


def _replayed(
    process: OtherProcess,
    run: RecordedRun,
    steps: tuple[int, int],
    on_progress: Callable[[int], None],
) -> list[Replayed]:
    """Replay the first to the last of some steps of a run there, one span after the other."""
    found = []
    for whole in spans(run, *steps):
        for first in range(whole.first, whole.last + 1, STRIDE):
            # In short spans, so that the progress is shown.
            span = whole._replace(first=first, last=min(first + STRIDE - 1, whole.last))
            found.append(process.call(_replayed_span, span))
            on_progress(span.steps)
    return found


def _suspicious(replayed: Sequence[Replayed]) -> range:
    """Return the range with the first step that has a different result; empty if all are the same."""
    first = replayed[0].span.first
    for each in replayed:
        if not each.is_exact:
            last = each.first_loss.step if each.first_loss else each.span.last
            return range(first, last + 1)
        # Losses can agree where a state does not: only a compared state clears the steps before it.
        first = each.span.last + 1 if each.compared else first
    return range(0)


def _step_from(
    replay: Replay, state: State
) -> tuple[float, list[tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]]]:
    """Replay the step after a state; return its loss, and what its operations read and made."""
    found = replay.step_after(state)
    return found.loss, [(seen.inputs, seen.results, seen.written) for seen in found.operations]


def _taken_twice(opener: Opener, process: OtherProcess, number: int) -> StepPair:
    """Return a step as this process replays it, and there from the same state."""
    own = opener.step(number)
    loss, rows = process.call(_step_from, opener.state(number - 1))
    if len(rows) != len(own.operations):
        raise RunError(f"step {number} has different operations in the rerun: the run was changed")
    pairs = zip(own.operations, rows, strict=True)
    operations = tuple(Observed(seen.operation, *row, line=seen.line) for seen, row in pairs)
    return StepPair(own, replace(own, operations=operations, loss=loss))


def _parting_step(opener: Opener, process: OtherProcess, steps: range) -> int | None:
    """Return the first of some steps with a different result, None if it cannot be found again."""
    for step, one, other in in_lockstep((opener, process), steps.start, steps.stop - 1):
        # There, too, they begin with the recorded state: the losses before them are the same.
        if one | {BEFORE: ""} != other | {BEFORE: ""}:
            return step
    return None


def _farthest(found: Sequence[Apart]) -> tuple[Apart, ...]:
    """Return the results that are farthest apart, only one for each place in the program."""
    kinds: dict[tuple[str, str | None, str], Apart] = {}
    for each in sorted(found, key=lambda each: -each.relative):
        kinds.setdefault((each.operator, each.module, each.phase), each)
    return tuple(kinds.values())[:FARTHEST]


def _reads_numbers(program: Program) -> bool:
    """Return whether Python read numbers of a step, other than counters of steps."""
    if program.left_out:
        return True
    # How many steps an optimizer has taken does not depend on the conditions.
    known = counters(program)
    read = (name for each in program.operations if each.operator == READ for name in each.reads())
    return any(program.tensors[name].storage not in known for name in read)


def _notes(opener: Opener, steps: range) -> Iterator[str]:
    """Yield what a rerun takes from the recording instead of computing, and if a replay here differs."""
    run, stretch = opener.run, opener.run.stretches[-1]
    programs = (read_program(run, number) for number in stretch.facts.programs)
    if any(_reads_numbers(program) for program in programs):
        yield ("Python read numbers from tensors; the repeated steps use the recorded numbers")
    if (name := RecordedSteps(run, stretch, None).brought_later(steps)) is not None:
        yield (
            f"steps after the first read a tensor that is in no part and no batch ({name}), which your "
            "code may compute; the repeated steps use the recorded ones"
        )
    if stretch.facts.loop is not None and stretch.facts.loop.has_computed_batches:
        yield "a model in training computes the batches; the repeated steps use the recorded ones"
    if any(each.class_name == ReduceLROnPlateau.__name__ for each in stretch.facts.schedulers.values()):
        yield "the learning rates follow losses; the repeated steps use the recorded ones"
    if run.facts.not_kept:
        yield f"{kept_text(run.facts, run.newest_step())}; the last of these in a row are repeated"
    if run.change_files():
        yield "code between steps changed tensors; the repeated steps use the recorded changes"
    if opener.diverged_at is not None:
        yield (
            "a replay under the recorded conditions also differs from the recording, from step "
            f"{opener.diverged_at:,} on; run everystep verify for details"
        )
