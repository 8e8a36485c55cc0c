"""What if: repeat steps of a run without some rows, at another learning rate, or with other targets.

Programs take the steps with unchanged batches, and Python those that lack rows. Each training is exact:
it has the bits of the same training by hand. At another learning rate, and with other targets, the
programs of the recorded steps run again, of any run; what your code decided stays as recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from everystep.device import select
from everystep.errors import ExpressionError, RunError, UsageError
from everystep.expression import Expression
from everystep.recording.blocks import same_number
from everystep.recording.recorded_run import RecordedRun
from everystep.replay.changed_steps import ChangedSteps
from everystep.replay.probe import check_question, opened_value
from everystep.replay.processes import Opener, process_count, shared
from everystep.replay.recorded_batches import batches_of
from everystep.replay.recorded_columns import Evaluator, read_question
from everystep.replay.recorded_steps import NotReplayedError, RecordedSteps
from everystep.replay.replay_stepper import ReplayStepper
from everystep.replay.run_replay import Replay, no_such_step
from everystep.replay.shown import Shown
from everystep.replay.trained_objects import Living
from everystep.replay.without_objects import check_determined, fork_instead
from everystep.step.generators import generators_preserved
from everystep.step.state import State
from everystep.training.objects import Objects

__all__ = ["Case", "WhatIf", "what_if"]

#: Trainings between two reports of progress.
GROUP = 8


@dataclass(frozen=True)
class Case:
    """The outcome of a training with something changed.

    rows: of the data, left out; value: of the expression, None if it has none at that step; losses: of
    the steps (steps), NaN where the step logs none that an operation returned; lr: the learning rate,
    None for the recorded ones; differs_from: the first step in which Python could read a different
    number than recorded, so that your code could act differently from there; None if there is none;
    targets: the recorded and the other one, by row; found_in: the steps with one of these rows, empty if
    a rule makes the batches.
    """

    rows: tuple[int, ...]
    value: float | None
    losses: tuple[float, ...]
    lr: float | None = None
    differs_from: int | None = None
    targets: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    found_in: tuple[int, ...] = ()


@dataclass(frozen=True)
class WhatIf(Shown):
    """Trainings from state `at` to step `until`, each with something changed.

    by: the expression that is compared at the last step; source: the name of the rows' data, empty if
    they are counted in the batch of step `at` + 1; recorded: its value without changes; cases: in order
    of their values, the smallest first.
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
    cases: Sequence[tuple[int, ...]] | Sequence[float] | Sequence[Mapping[int, float]],
    by: str,
    objects: Objects | None,
    processes: int | None = None,
    on_progress: Callable[[int], None] = lambda steps: None,
) -> WhatIf:
    """Answer `Run.what_if`.

    cases: of each training, the rows to leave out, or the learning rate, or other targets by row;
    objects: those that trained the run, if it has no experiment; on_progress: called with the number of
    steps just taken.

    Raises:
        ExpressionError: the expression is invalid, or needs what only the recorded run has.
    """
    run, without_rows, is_of_rates = opener.run, isinstance(cases[0], tuple), isinstance(cases[0], float)
    if not is_of_rates:
        run.check_alone("take its steps without rows or with other targets")
    count = run.newest_step()
    for number in (at, until):
        if not 0 <= number <= count:
            raise no_such_step(run, number)
    if until <= at:
        raise UsageError(f"the trainings start after step {at}, so they cannot end at step {until}")
    change = "at another rate" if is_of_rates else "without the rows" if without_rows else "relabelled"
    for rank in run.ranks:
        check_determined(rank, at, until, change, is_of_rates=is_of_rates)
    question = read_question(by, run)
    wanted = [
        each for each in question.references if each.kind in ("measurements", "rows") or each.is_previous
    ]
    if wanted:
        raise ExpressionError(
            f"{wanted[0]} is known of the recorded steps only; use what step {until} has"
        )
    check_question(question, opener)
    train: Callable[..., list[Case]] = _train_without if without_rows else _train_alone
    trained = opener.state(at), until, question, objects
    # Without a change first: a training that differs from its recording shows nothing of a change.
    (recorded,) = opener.call(train, [None], *trained)
    _check_recorded(run, (at, until), recorded)
    on_progress(until - at)
    others: list[Case] = []
    groups = [(cases[first : first + GROUP], *trained) for first in range(0, len(cases), GROUP)]
    threads = run.facts.training.numerics.threads
    # Each uses as many threads as the run: with fewer, nothing could show that the bits are the same.
    share = process_count(run, (until - at) * len(cases), processes, len(groups), threads)
    results = (
        shared(opener, share, threads, train, groups)
        if share > 1
        else (opener.call(train, *group) for group in groups)
    )
    for found in results:
        others += found
        on_progress((until - at) * len(found))
    # None and NaN last: they have no order.
    others.sort(key=lambda case: (case.value is None or case.value != case.value, case.value or 0.0))
    facts = run.facts.training
    source = "" if facts.loop or facts.data.lazy else batches_of(facts).source
    return WhatIf(run.name, at, until, by, source, recorded, tuple(others))


def _train_without(
    replay: Replay,
    cases: Sequence[tuple[int, ...] | None],
    state: State,
    until: int,
    question: Expression,
    objects: Objects | None,
) -> list[Case]:
    """Train from a state, once without each choice of rows."""
    run, at = replay.run, state.step
    stretch = replay.stretches[replay.stretch_of(at + 1)]
    batches = batches_of(stretch.facts)
    found = []
    with replay.in_force(at + 1), generators_preserved(select(stretch.facts.device)):
        training = Living(run, stretch, objects or Objects(), state)
        for rows in cases:
            training.begin(batches.without_rows(rows, at + 1, until) if rows else batches)
            found.append(Case(rows or (), *_outcome(run, question, (at, until), training)))
        engine = stretch.facts.engine
        if (engine is None or engine.eager_from is not None) and cases != [None]:
            # What a function keeps outside of the parts would pass from training to training.
            training.begin(batches)
            again = Case((), *_outcome(run, question, (at, until), training))
            _check_recorded(run, (at, until), again, "again, ")
    return found


def _check_recorded(run: RecordedRun, states: tuple[int, int], found: Case, how: str = "") -> None:
    """Check that a training without a change is the recorded one. how: it was taken."""
    at, until = states
    if not all(map(same_number, found.losses, run.losses_between(at + 1, until))):
        kept = "the model or the loss keeps something that no state has; " if how else ""
        raise RunError(
            f"steps {at + 1:,} to {until:,} of {run.name} cannot be replayed {how}bit for bit, so a "
            "training with a change cannot be compared with them; "
            f"{kept}run everystep verify for details"
        )


def _train_alone(
    replay: Replay,
    cases: Sequence[float | Mapping[int, float] | None],
    state: State,
    until: int,
    question: Expression,
    objects: Objects | None,
) -> list[Case]:
    """Let programs train from a state, once at each learning rate, or with each choice of targets."""
    run, at = replay.run, state.step
    place = replay.stretch_of(at + 1)
    taken, found = range(at + 1, until + 1), list[Case]()
    device = select(replay.stretches[place].facts.device)
    with replay.in_force(at + 1):
        # Not `state` alone: with several ranks, each begins with its own.
        states = replay.go_to(at, place).capture_ranks()
    with replay.in_force(at + 1), generators_preserved(device):
        for change in cases:
            differing: dict[int, str] = {}
            steps_of: Callable[..., RecordedSteps] = RecordedSteps
            if change is not None:
                lr, targets = (change, {}) if isinstance(change, float) else (None, change)
                steps_of = partial(ChangedSteps, steps=taken, lr=lr, relabelled=targets)
            stepper = replay.stepper_for(place, steps_of, differing.setdefault)
            stepper.load(*states)
            steps = stepper.steps
            if change is not None:
                _check_loss(run, steps, until, question)
            try:
                outcome = _outcome(run, question, (at, until), stepper)
            except NotReplayedError as error:
                if change is None:
                    raise
                end = f"end at step {stepper.state}, or " if stepper.state > at else ""
                raise RunError(f"{error}; {end}{fork_instead(run, at)}") from None
            case = Case((), *outcome, steps.lr, min(differing, default=None))
            if isinstance(steps, ChangedSteps):
                case = replace(case, targets=steps.targets, found_in=steps.steps_with(taken))
            found.append(case)
    return found


def _check_loss(run: RecordedRun, steps: RecordedSteps, until: int, question: Expression) -> None:
    """Check that a question about the loss has an answer: NaN would say that the training diverges."""
    is_asked = any(each.kind == "loss" for each in question.references)
    if not is_asked or steps.program_of(steps.row(until)).program.loss is not None:
        return
    if math.isnan(RecordedSteps.loss(steps, until)):  # as in the recording
        return
    raise RunError(
        f"your code computes the loss of step {until} of {run.name}, not an operation of torch, so no "
        "program can compute it after a change; compare another number (by, --by), such as "
        "\"norm(gradients['0.weight'])\", or log the loss as the tensor that the step computes"
    )


def _outcome(
    run: RecordedRun,
    question: Expression,
    states: tuple[int, int],
    training: Living | ReplayStepper,
) -> tuple[float | None, tuple[float, ...]]:
    """Train from a state to another one; return the answer to a question there, and the losses."""
    # The last step is opened only if the question needs more than its loss: that takes longer.
    is_of_loss = all(each.kind in ("loss", "step") for each in question.references)
    at, until = states
    count = until - at if is_of_loss else until - at - 1
    losses: list[float] = []
    while len(losses) < count:
        # A step that cannot be taken ends the call before it, and the next call raises why.
        losses += training.run(at + count)
    evaluator = Evaluator(question, run)
    if is_of_loss:
        return evaluator.answer(until, (None, losses[-1])), tuple(losses)
    last = training.open()
    answer = evaluator.answer(until, (None, last.loss), partial(opened_value, last))
    return answer, (*losses, last.loss)
