"""What if: steps of a run once more, from a state, without some rows of the data.

Programs take the steps with batches that are as recorded, and Python those that lack rows. Each training
is exact: it has the bits of the same training by hand without those rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass

from torch.optim.lr_scheduler import ReduceLROnPlateau

from everystep.device import select
from everystep.errors import ExpressionError, RunError, UsageError
from everystep.recording.run import RecordedRun
from everystep.replay.batches import batches_of
from everystep.replay.columns import Evaluator, check_question, read_question
from everystep.replay.expression import Expression
from everystep.replay.hooks import Probe
from everystep.replay.living import Living
from everystep.replay.processes import Opener, cores, in_worker, recorded_numerics, workers
from everystep.replay.replay import Replay, no_such_step, same_number
from everystep.replay.shown import Shown
from everystep.step.generators import generators_preserved
from everystep.step.state import State
from everystep.training.objects import Objects

__all__ = ["Case", "WhatIf", "check_has_rows", "what_if"]

#: Trainings between two reports of progress.
GROUP = 8
#: If all trainings take less than this, this process takes them alone: others must start first.
ALONE_SECONDS = 4.0

#: The rows of a training, its value and its losses, as a `Case` has them.
_Trained = tuple[tuple[int, ...], float | None, tuple[float, ...]]


@dataclass(frozen=True)
class Case:
    """What became of a training without some rows.

    rows: of the data; value: of the expression, None if it has none at that step; losses: of the steps
    (steps).
    """

    rows: tuple[int, ...]
    value: float | None
    losses: tuple[float, ...]


@dataclass(frozen=True)
class WhatIf(Shown):
    """Trainings from state `at` to step `until`, each without some rows.

    by: the expression that is compared at the last step; source: what the rows are of; recorded: what
    it is with all rows; cases: in order of their values, the smallest first.
    """

    name: str
    at: int
    until: int
    by: str
    source: str
    recorded: Case
    cases: tuple[Case, ...]

    def __repr__(self) -> str:
        count = len(self.cases)
        trainings = "1 training" if count == 1 else f"{count} trainings"
        return f"<what if: {trainings} of {self.name}, steps {self.at + 1:,} to {self.until:,}>"


def what_if(
    opener: Opener,
    at: int,
    until: int,
    cases: Sequence[tuple[int, ...]],
    by: str,
    objects: Objects | None,
    processes: int | None = None,
    on_progress: Callable[[int], None] = lambda steps: None,
) -> WhatIf:
    """Train from a state to a step, once for each choice of rows to leave out.

    Args:
        opener: of the run.
        at: the state.
        until: the last step.
        cases: the rows to leave out.
        by: an expression of the last step.
        objects: those that trained the run, if it has no experiment.
        processes: number of processes, each with the threads of the run; default: as many as there are
            cores for, if worth their start.
        on_progress: called with the number of steps just taken.

    Raises:
        StepError: the run has no such step.
        UsageError: rows do not exist, are in no batch, or a batch would be empty.
        ExpressionError: the expression is invalid, or needs what only the recorded run has.
        RunError: the steps cannot be taken again without the rows; gives the reason.
    """
    run = opener.run
    count = run.newest_step()
    for number in (at, until):
        if not 0 <= number <= count:
            raise no_such_step(run, number)
    if until <= at:
        raise UsageError(f"the trainings start after step {at}, so they cannot end at step {until}")
    _check(run, at, until)
    question = read_question(by, run)
    wanted = [
        each for each in question.references if each.kind in ("measurements", "rows") or each.is_previous
    ]
    if wanted:
        raise ExpressionError(
            f"{wanted[0]} is known of the recorded steps only; use what step {until} has"
        )
    check_question(question, opener)
    state = opener.state(at)
    (with_all,) = (Case(*each) for each in opener.call(_train, state, until, [()], question, objects))
    recorded = run.losses_between(at + 1, until)
    if not all(map(same_number, with_all.losses, recorded)):
        raise RunError(
            f"steps {at + 1:,} to {until:,} of {run.name} cannot be replayed bit for bit, so trainings "
            "without rows cannot be compared with them; run everystep verify for details"
        )
    on_progress(until - at)
    others: list[Case] = []
    groups = [cases[first : first + GROUP] for first in range(0, len(cases), GROUP)]
    share = _processes(run, (until - at) * len(cases), processes, len(groups))
    for found in _shared(opener, share, groups, (state, until), (question, objects)):
        others += [Case(*each) for each in found]
        on_progress((until - at) * len(found))
    others.sort(key=lambda case: (case.value is None or case.value != case.value, case.value or 0.0))
    source = batches_of(run.facts.training).source
    return WhatIf(run.name, at, until, by, source, with_all, tuple(others))


def check_has_rows(run: RecordedRun) -> None:
    """Check that everystep makes the batches of a run from the rows of its data.

    Raises:
        RunError: something else does.
    """
    facts = run.facts.training
    if facts.loop:
        raise RunError(
            f"{run.name} was recorded from your own loop, and its programs take batches of their own "
            "size; leave the rows out in the loop"
        )
    if facts.data.lazy:
        raise RunError(
            f"{run.name} was trained on a Dataset that is read at every step; leave the rows out there"
        )


def _check(run: RecordedRun, at: int, until: int) -> None:
    """Check that the run decides what its steps see and do, once rows are left out.

    Raises:
        RunError: something else does.
    """
    stretches = [each for each in run.stretches if each.first <= until]
    facts, name = stretches[-1].facts, run.name
    if at < stretches[-1].first - 1:
        raise RunError(
            f"step {until} of {name} was trained with different settings than state {at}; start later"
        )
    for each in facts.schedules.values():
        if each.class_name == ReduceLROnPlateau.__name__ or not each.is_torchs:
            raise RunError(
                f"the learning rate of {name} follows {each.class_name}, which may depend on losses; "
                "fork the run instead: run.fork(at, without_rows=[...])"
            )
    changed = [step for step in run.change_files() if at <= step < until]
    if changed:
        raise RunError(
            f"after step {changed[0]}, code between the steps changed tensors of {name}, and may change "
            "others without the rows; fork the run instead"
        )


def _processes(run: RecordedRun, steps: int, asked: int | None, groups: int) -> int:
    """Return how many processes share the trainings.

    None computes with fewer threads than the run: nothing could show that this gives other bits.
    """
    facts = run.facts
    if facts.training.device != "cpu":
        return 1
    if asked is None:
        seconds = (facts.seconds or 0.0) * steps / max(1, run.newest_step())
        if seconds < ALONE_SECONDS:
            return 1
        asked = cores() // recorded_numerics(facts).threads
    return max(1, min(asked, groups))


def _shared(
    opener: Opener,
    count: int,
    groups: Sequence[Sequence[tuple[int, ...]]],
    ends: tuple[State, int],
    asked: tuple[Expression, Objects | None],
) -> Iterator[list[_Trained]]:
    """Train all groups in so many processes, and yield each when it is done."""
    if count == 1:
        for group in groups:
            yield opener.call(_train, *ends, group, *asked)
        return
    run = opener.run
    threads = recorded_numerics(run.facts).threads
    place = run.directory, opener.objects, threads
    with workers(run.facts, count, threads) as executor:
        futures = [executor.submit(in_worker, *place, _train, *ends, group, *asked) for group in groups]
        for future in as_completed(futures):
            yield future.result()


def _train(
    replay: Replay,
    state: State,
    until: int,
    cases: Sequence[tuple[int, ...]],
    question: Expression,
    objects: Objects | None,
) -> list[_Trained]:
    """Train from a state, once for each case; return its rows, its value and its losses."""
    run, at = replay.run, state.step
    stretch = replay.stretches[replay.stretch_of(at + 1)]
    batches = batches_of(stretch.facts)
    tensors = {each for each in question.references if each.kind not in ("loss", "step")}
    found = []
    with replay.in_force(at + 1), generators_preserved(select(stretch.facts.device)):
        stepper = Living(run, stretch, objects or Objects())
        stepper.load(state)
        saved = stepper.save()
        evaluator, values = Evaluator(question, run, False), list[float | None]()

        def answer(number: int, loss: float) -> bool:
            values.append(evaluator.answer(number, loss, probe))
            return True

        probe = Probe(stepper, tensors, answer)
        for rows in cases:
            stepper.use(batches.without_rows(rows, at + 1, until) if rows else batches)
            stepper.restore(at, saved)
            if tensors:
                losses = [*stepper.run(until - 1).tolist(), probe.observe()]
            else:
                losses = stepper.run(until).tolist()
                answer(until, losses[-1])
            found.append((rows, values[-1], tuple(losses)))
    return found
