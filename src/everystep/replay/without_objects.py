"""Continues a run by its programs, without the code that trained it.

Where programs took every step of everystep's own, they can take more. Those of a user's loop repeat its
recorded steps with something changed, up to the first that depends on what Python does with the change.
Nothing compares these steps with Python.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from everystep import clock
from everystep.errors import RunError
from everystep.experiment.batches import RowsOf
from everystep.program.interpreter import Looks
from everystep.program.step_program import Program
from everystep.recording.facts import EAGERLY, Facts, TrainingFacts
from everystep.recording.recorded_run import RecordedRun, Stretch
from everystep.recording.recorder import Recorder
from everystep.replay.changed_steps import ChangedSteps, FurtherSteps
from everystep.replay.processes import needs_worker
from everystep.replay.recorded_steps import NotReplayedError, RecordedSteps
from everystep.replay.run_replay import Replay
from everystep.step.state import State
from everystep.training.interrupt import Interrupt
from everystep.training.job import Outcome, Progress
from everystep.training.writer import RunWriter

__all__ = [
    "by_own_code",
    "check_alone",
    "check_determined",
    "check_has_rows",
    "continue_alone",
    "facts_alone",
    "fork_instead",
]


def check_alone(run: RecordedRun, stretch: Stretch, call: str, reason: str | None = None) -> None:
    """Check that the programs of a run can continue a stretch of it alone.

    call: the beginning of the user's call; reason: why they cannot, if already known.

    Raises:
        RunError: they cannot.
    """
    facts = stretch.facts
    if facts.engine is None or facts.engine.eager_from is not None:
        reason = "Python ran its steps, or a part of them"
    elif facts.schedulers:
        reason = f"it has a scheduler ({next(iter(facts.schedulers.values())).class_name})"
    elif facts.data.lazy or facts.data_file is None or not facts.data_file.stored:
        reason = "the run does not hold its data"
    else:
        # What is wrong with the run comes before what was asked of it.
        reason = FurtherSteps(run, stretch).reason_against() or reason
    if reason is None:
        return
    cure = f"pass the objects: {call}model=..., loss=..., optimizer=...)"
    if (lost := run.lost_experiment(run.facts.training)) is not None:
        what, cure = f"{lost.name} of {run.name} is missing", f"put the file back, or {cure}"
    else:
        what = f"{run.name} was trained from Python objects, which the run does not hold"
    raise RunError(f"{what}, and its programs cannot continue it alone: {reason}; {cure}")


def by_own_code(run: RecordedRun, at: int | None) -> str:
    """Return the calls by which the user's code makes a fork of its run."""
    step = "STEP" if at is None else at
    return (
        f"everystep.record(fork={str(run.directory)!r}, at={step}, ...) or, of a step function, "
        "everystep.train(step, batches, fork=..., at=..., parts=...), with the change once "
        f"recording.step_count is {step}"
    )


def fork_instead(run: RecordedRun, at: int) -> str:
    """Return the advice to fork a run, where programs alone cannot take its steps."""
    is_loop = run.facts.training.loop is not None
    return f"fork the run instead: {by_own_code(run, at) if is_loop else f'run.fork({at}, ...)'}"


def check_has_rows(run: RecordedRun, at: int | None) -> None:
    """Check that everystep makes the batches of a run from the rows of its data.

    Raises:
        RunError: other code does.
    """
    facts = run.facts.training
    if facts.loop:
        raise RunError(
            f"{run.name} was recorded from your own code, and the shapes of its batches are part of its "
            f"programs: none fits a smaller batch; leave the rows out in a fork that your code makes: "
            f"{by_own_code(run, at)}"
        )
    if facts.data.lazy:
        raise RunError(
            f"{run.name} was trained on a Dataset that is read at every step; leave the rows out there"
        )


def check_determined(run: RecordedRun, at: int, until: int, change: str, *, is_of_rates: bool) -> None:
    """Check that the run alone determines its steps after a change, in words.

    Raises:
        RunError: other code does.
    """
    stretches = [each for each in run.stretches if each.first <= until]
    facts, name = stretches[-1].facts, run.name
    if at < (since := stretches[-1].first - 1):
        raise RunError(
            f"{name} was forked or resumed after step {since:,}, so its steps after state {at:,} are "
            f"not all of one training; start at step {since:,} or later"
        )
    cure = fork_instead(run, at)
    if facts.loop is not None and facts.loop.has_computed_batches:
        raise RunError(
            f"a model that {name} trains computes its batches as they are drawn, so {change} they would "
            f"differ; {cure}"
        )
    for each in facts.schedulers.values():
        if is_of_rates:
            raise RunError(f"the learning rate of {name} follows {each.class_name}; {cure}")
        if each.class_name == ReduceLROnPlateau.__name__ or not each.is_torchs:
            raise RunError(
                f"the learning rate of {name} follows {each.class_name}, which may depend on losses; "
                f"{cure}"
            )
    if is_of_rates and facts.loop:
        rates = (run.values_of(each) for each in run.measurement_names if facts.is_setting(each))
        changed = sorted(step for rate in rates for step in rate if at + 1 < step <= until)
        if changed:
            raise RunError(f"your code changes the learning rate of {name} at step {changed[0]}; {cure}")
    changed = [step for step in run.change_files() if at <= step < until]
    if changed:
        raise RunError(
            f"after step {changed[0]}, code between the steps changed tensors of {name}, and may change "
            f"others {change}; end at step {changed[0]}, or {cure}"
        )


def continue_alone(
    run: RecordedRun,
    at: int,
    steps_of: Callable[[RecordedRun, Stretch, RowsOf | None], ChangedSteps],
    record: Callable[[RecordedRun, State], tuple[Recorder, Facts]],
    progress: Progress,
) -> Outcome:
    """Take steps of a run by its programs, and record them.

    run: its steps are a user's loop, or programs can continue it alone, see `check_alone`; at: the step
    before the first of them; steps_of: as of `Replay.stepper_for`; record: returns the recorder of a
    rank and the facts of its training, given its run and its state after `at`; it is called for rank 0
    first.

    Raises:
        RunError: this process cannot compute as the run did, a replay differs from the recording, or no
            step can be taken.
    """
    _check_numerics(run)
    replay = Replay(run)
    with Interrupt() as interrupt, replay.in_force(at + 1):
        reached = replay.go_to(at)
        if replay.diverged_at is not None:
            raise RunError(
                f"{run.name} cannot be replayed bit for bit: the loss of step {replay.diverged_at} "
                "differs"
            )
        beginning = reached.capture_ranks()
        del reached  # the states of a large model take much memory
        taken = _StepsAlone(replay, at, steps_of)
        taken.begin(*beginning)
        # One step is tried before there is a run: a fork without a step of its own is of no use.
        if taken.is_loop:
            count, reason = taken.run(at + 1)
            if not count:
                raise RunError(
                    f"the programs of {run.name} alone cannot fork it: {reason}; fork it in your code: "
                    f"{by_own_code(run, at)}"
                )
            taken.begin(*beginning)
        del beginning
        taken.begin_runs(at, record, progress)
        top = taken.ranks[0]
        writer, steps, place = top.writer, top.steps, top.writer.recorder.directory
        progress.begin(place, top.facts)
        lost = run.lost_experiment(run.facts.training)
        why = "" if lost is None else f"{lost.name} is missing, so "
        without = (
            "your code: its batches, the numbers that it passes to torch, and what it did outside of "
            "torch or between steps stay as recorded"
            if taken.is_loop
            else "the objects that trained the run: nothing checks them against Python, and nothing is "
            "measured on validation rows"
        )
        progress.notice(f"{why}programs alone take the steps, without {without}")
        try:
            reason = taken.record(interrupt)
            status = "finished" if reason is None else "stopped"
            if steps.targets:
                count = len(steps.steps_with(range(at + 1, writer.step + 1)))
                progress.notice(
                    f"{count:,} of {writer.step - at:,} steps have a relabelled row in their batch"
                )
            for rank in taken.ranks:
                rank.writer.close(status, reason, {"steps": rank.writer.step} if taken.is_loop else {})
        except BaseException as error:
            for rank in taken.ranks:
                rank.writer.close_failed(error)
            raise
        finally:
            progress.end()
    return Outcome(place, reason, interrupt.is_by_user)


def _check_numerics(run: RecordedRun) -> None:
    if needs_worker(run.facts):
        environment = run.facts.training.numerics.environment()
        error = RunError(
            f"{run.name} was trained under numerics that this process can no longer have; start "
            f"Python with {' '.join(f'{name}={value}' for name, value in environment.items())}"
        )
        # The command line runs the same command again in such a process.
        error.environment = environment
        raise error


def facts_alone(run: RecordedRun, at: int, lr: float | None = None) -> TrainingFacts:
    """Return the facts of the steps that programs alone take after a step. lr: if it is another one."""
    facts = run.facts.training_of(at + 1)
    engine = facts.engine or EAGERLY.model_copy(update={"eager_from": None})
    alone = {"stands_behind": "alone", "by_program": 0, "checks": 0, "verified_to": 0}
    optimizers = {
        name: each.model_copy(update={"groups": tuple(group | {"lr": lr} for group in each.groups)})
        for name, each in facts.optimizers.items()
        if lr is not None
    }
    changed = {"engine": engine.model_copy(update=alone), "optimizers": facts.optimizers | optimizers}
    return facts.model_copy(update=changed)


class _RankAlone:
    """Notes what the steps of a rank return and log, as a hook.

    together: the steps of all ranks; losses: of the steps that are not recorded yet, None of one without
    a loss; facts: of its new run; writer: writes that.
    """

    facts: Facts
    writer: RunWriter

    def __init__(self, steps: RecordedSteps, together: _StepsAlone) -> None:
        assert isinstance(steps, ChangedSteps)
        self.steps = steps
        self.losses: dict[int, float | None] = {}
        self._together = together
        self._known = {*steps.run.measurement_names}
        self._logged: dict[str, float] = {}
        #: Measurements by step.
        self._measured: dict[int, list[tuple[str, int, float]]] = {}

    def looks(self, program: Program) -> Looks:
        """Return what notes the numbers that a program logs."""

        def look(tensor_of: Callable[[str], Tensor]) -> None:
            # Now, since the next step writes into the same tensors.
            self._logged = {name: float(tensor_of(each)) for name, each in program.logged.items()}

        return {len(program.operations) - 1: [look]}

    def after(self, number: int, loss: float) -> bool:
        """Note what a step returned and logged; end if Python computed its loss."""
        has_loss = self.steps.program_of(self.steps.row(number)).program.loss is not None
        self.losses[number] = loss if has_loss else None
        if self._logged:
            found = self._measured.setdefault(number, [])
            for name, value in self._logged.items():
                # The plain name of a rate is for the one that the update used.
                title = f"{name} (logged)"
                found.append((title if title in self._known else name, number, value))
        # A step without a loss has NaN in the run: nothing was computed that could change.
        if not has_loss and not math.isnan(RecordedSteps.loss(self.steps, number)):
            reason = f"your code computes the loss of step {number}, not an operation of torch"
            self._together.note_end(number, reason)
        return self._together.end is None

    def note_rates(self, names: Collection[str], at: int) -> None:
        """Note the learning rates of the steps after `at`: one for all, or the recorded ones."""
        last, lr = self.facts.steps or 0, self.steps.lr
        for name in names:
            known = self.steps.run.values_of(name) if lr is None else {at + 1: lr}
            # Recorded rates end with the recorded steps; one for all steps holds until the last.
            end = min(last, self.steps.last) if lr is None else last
            for step, rate in known.items():
                if at < step <= end:
                    self._measured.setdefault(step, []).append((name, step, rate))

    def write(self, first: int, last: int) -> None:
        """Write steps, as far as the rank has them: it may have fewer batches than others."""
        writer = self.writer
        last = min(last, self.steps.last) if self._together.is_loop else last
        taken = range(first, last + 1)
        writer.taken = [self.steps.taken(number) for number in taken]
        writer.measured += [row for step in taken for row in self._measured.pop(step, ())]
        writer.losses = [self.losses.pop(number) for number in taken]
        writer.step = max(writer.step, last)
        writer.flush()


class _StepsAlone:
    """Steps that programs take, of all ranks.

    stepper: takes them; ranks: what each notes, that of the stepper first; is_loop: whether they are of
    a user's code, which may depend on numbers that it read; end: the first step that cannot be kept, and
    why, None if there is none.
    """

    def __init__(
        self,
        replay: Replay,
        at: int,
        steps_of: Callable[[RecordedRun, Stretch, RowsOf | None], ChangedSteps],
    ) -> None:
        # The new stepper has a state of its own; a large one may not fit twice.
        replay.let_go()
        self.stepper = replay.stepper_for(replay.stretch_of(at + 1), steps_of, self._note_difference)
        self.is_loop = self.stepper.steps.facts.loop is not None
        self.ranks: list[_RankAlone] = []
        self.end: tuple[int, str] | None = None

    def begin(self, *states: State) -> None:
        """Begin with the states of all ranks, and forget what steps before have done."""
        self.stepper.load(*states)
        ranks = self.stepper.others
        self.ranks = [_RankAlone(each.steps, self) for each in (self.stepper, *ranks.values())]
        self.stepper.hooks = dict(zip(ranks, self.ranks[1:], strict=True))
        self.end = None

    def begin_runs(
        self,
        at: int,
        record: Callable[[RecordedRun, State], tuple[Recorder, Facts]],
        progress: Progress,
    ) -> None:
        """Begin to write the run of each rank after step `at`; the others as in `continue_alone`."""
        top, rates = self.ranks[0], self.stepper.rates()
        states = self.stepper.capture_ranks()  # with the rate of the steps
        for rank, state in zip(self.ranks, states, strict=True):
            recorder, rank.facts = record(rank.steps.run, state)
            shown = progress.notice, progress.advance if rank is top else None
            rank.writer = RunWriter(recorder, at, rank.facts, *shown, rank.steps.run.facts)
            rank.note_rates(rates, at)
            if at not in recorder.plan.kept:
                recorder.snapshot(state)

    def _note_difference(self, number: int, difference: str) -> None:
        self.note_end(number, f"{difference}; your code could act differently from there")

    def note_end(self, number: int, reason: str) -> None:
        """Note a step that cannot be kept, if it is of a user's code."""
        if self.is_loop and (self.end is None or number < self.end[0]):
            self.end = number, reason

    def run(self, last: int) -> tuple[int, str | None]:
        """Run the steps up to `last`; return how many, and why there are no more, if so.

        Those of a loop end before one that depends on what Python does with another number.
        """
        stepper = self.stepper
        # Only code of the user's may act differently after another number that it reads.
        if not self.is_loop:
            return len(stepper.run(last, self.ranks[0])), None
        # Where a step turns out to depend on Python, those before it are taken again from here.
        beginning = stepper.capture_ranks()
        try:
            count = len(stepper.run(last, self.ranks[0]))
        except NotReplayedError as error:
            return 0, str(error)
        if self.end is None:
            return count, None
        number, reason = self.end
        stepper.load(*beginning)
        # The steps that stay have been noted already.
        stepper.hooks = {}
        return len(stepper.run(number - 1)), reason

    def record(self, interrupt: Interrupt) -> str | None:
        """Take and record the steps; return why it stopped before the last one, None if it did not."""
        facts, writer, reason = self.ranks[0].facts, self.ranks[0].writer, None
        newest, last, stops_on_nan = writer.step, facts.steps or 0, facts.training.stop_on_nan
        while writer.step < last and not (interrupt or reason):
            for rank in self.ranks:
                rank.writer.recorder.wait()
            begin, started = writer.step, clock.now()
            count, reason = self.run(writer.next_stop(last, one_by_one=stops_on_nan))
            if not count:
                break
            # Before `write`, which takes the losses out.
            loss = self.ranks[0].losses[begin + count]
            for rank in self.ranks:
                rank.write(begin + 1, begin + count)
            writer.timed(started, self.stepper.named_state, count)
            if writer.is_snapshot_due():
                self._write_states()
                newest = writer.step
            if stops_on_nan and loss is not None and not math.isfinite(loss):
                reason = f"the loss is {loss} at step {writer.step} (stop_on_nan)"
        if newest < writer.step:
            self._write_states()
        return reason or interrupt.reason

    def _write_states(self) -> None:
        for rank, state in zip(self.ranks, self.stepper.capture_ranks(), strict=True):
            rank.writer.recorder.snapshot(state)
