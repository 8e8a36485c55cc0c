"""A fork by the programs of a run, without the code that trained it.

They repeat recorded steps with something changed, up to the first that depends on what Python does with
the change. Nothing compares these steps with Python.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from everystep import clock
from everystep.errors import RunError
from everystep.program.interpreter import Looks
from everystep.program.step_program import Program
from everystep.recording.directories import create_directory
from everystep.recording.facts import EAGERLY, Facts, ForkFacts, TrainingFacts
from everystep.recording.recorded_run import RecordedRun
from everystep.recording.recorder import Recorder
from everystep.replay.changed_steps import ChangedSteps, by_own_code
from everystep.replay.processes import needs_worker, recorded_numerics
from everystep.replay.recorded_steps import NotReplayedError, RecordedSteps
from everystep.replay.replay_stepper import ReplayStepper
from everystep.replay.run_replay import Replay
from everystep.step.state import State
from everystep.training.interrupt import Interrupt
from everystep.training.job import Outcome, Progress
from everystep.training.writer import RunWriter, now

__all__ = ["fork_by_programs", "objects_needed"]


def objects_needed(run: RecordedRun, call: str) -> str:
    """Return why a run cannot be continued as asked, and what to pass. call: begins the user's call."""
    cure = f"pass the objects: {call}model=..., loss=..., optimizer=...)"
    if (lost := run.lost_experiment(run.facts.training)) is not None:
        return f"{lost.name} of {run.name} is missing; put the file back, or {cure}"
    return f"{run.name} was trained from Python objects, which the run does not hold; {cure}"


def fork_by_programs(
    run: RecordedRun,
    fork: ForkFacts,
    last: int,
    lr: float | None,
    targets: Mapping[int, float],
    directory: Path | None,
    budget: int,
    progress: Progress,
) -> Outcome:
    """Repeat recorded steps with something changed, and record them as a fork.

    Args:
        run, fork: the parent, and the facts about the fork of it.
        last: the last step.
        lr: the learning rate of the steps; None: the recorded ones.
        targets: other targets, by row.
        directory: of the fork; None: the next free one.
        budget: maximum bytes of snapshots.
        progress: receives progress.

    Raises:
        RunError: this process cannot compute as the run did, a replay differs from the recording, or no
            step can be taken.
        RecordingError: writing the run failed.
    """
    if needs_worker(run.facts):
        environment = recorded_numerics(run.facts).environment()
        error = RunError(
            f"{run.name} was trained under numerics that this process can no longer have; start "
            f"Python with {' '.join(f'{name}={value}' for name, value in environment.items())}"
        )
        error.environment = environment
        raise error
    at, replay = fork.at, Replay(run)
    with Interrupt() as interrupt, replay.in_force(at + 1):
        state = replay.go_to(at).capture()
        if replay.diverged_at is not None:
            raise RunError(
                f"{run.name} cannot be replayed bit for bit: the loss of step {replay.diverged_at} "
                "differs"
            )
        place = replay.stretch_of(at + 1)
        stretch, rule = replay.stretches[place], replay.stepper_of(place).steps.rule
        steps = ChangedSteps(run, stretch, rule, range(at + 1, last + 1), lr, targets)
        losses, reason = _ByPrograms(steps, state).run(at + 1)
        if not losses:
            own = f"fork it in your code: {by_own_code(run, at)}"
            cure = own if stretch.facts.loop else objects_needed(run, "fork(..., ")
            raise RunError(f"the programs of {run.name} alone cannot fork it: {reason}; {cure}")
        taken = _ByPrograms(steps, state)
        state = taken.stepper.capture()  # with the rate of the steps
        own_place = create_directory(directory, f"{run.name}-fork")
        trained = _facts_of(stretch.facts, lr)
        facts = Facts(name=own_place.name, started=now(), steps=last, trained=trained, fork=fork)
        # Only what changed is new: all batches are as far within a budget as the parent's.
        recorder = Recorder(own_place, facts, budget, run, at, math.inf, beginning=state)
        writer = RunWriter(recorder, at, facts, progress.notice, progress.advance, run.facts)
        progress.begin(own_place, facts)
        lost = run.lost_experiment(run.facts.training)
        why = "" if lost is None else f"{lost.name} is missing, so "
        progress.notice(
            f"{why}programs alone take the steps, without your code: what it did outside of torch, and "
            "between steps, stays as recorded"
        )
        taken.note_rates(at, last)
        if at not in recorder.plan.kept:
            recorder.snapshot(state)
        try:
            reason = taken.record(writer, facts, interrupt)
            status = "finished" if reason is None else "stopped"
            if targets:
                count = len(steps.steps_with(range(at + 1, writer.step + 1)))
                progress.notice(
                    f"{count:,} of {writer.step - at:,} steps have a relabelled row in their batch"
                )
            writer.close(status, reason, {"steps": writer.step})
        except BaseException as error:
            writer.close_failed(error)
            raise
        finally:
            progress.end()
    return Outcome(own_place, status, reason, interrupt.is_by_user)


def _facts_of(facts: TrainingFacts, lr: float | None) -> TrainingFacts:
    """Return the facts of steps that programs alone take again. lr: if it is another one."""
    alone = {"stands_behind": "alone", "by_program": 0, "checks": 0, "verified_to": 0}
    engine = (facts.engine or EAGERLY).model_copy(update={**alone, "eager_from": None, "reason": None})
    optimizers = {
        name: each.model_copy(update={"groups": tuple(group | {"lr": lr} for group in each.groups)})
        for name, each in facts.optimizers.items()
        if lr is not None
    }
    # An experiment of the parent does not describe the fork.
    return facts.model_copy(
        update={
            "engine": engine,
            "optimizers": facts.optimizers | optimizers,
            "experiment_file": None,
        }
    )


class _ByPrograms:
    """Steps that programs take, as a hook that notes what they log besides the loss.

    stepper: takes them.
    """

    def __init__(self, steps: ChangedSteps, state: State) -> None:
        self._steps = steps
        self.stepper = ReplayStepper(steps, self._note_difference)
        self.stepper.load(state)
        self._known = {*steps.run.measurement_names}
        self._logged: dict[str, float] = {}
        self._difference: str | None = None
        #: Why no more steps can be taken.
        self._end: str | None = None
        #: Measurements by step.
        self._measured: dict[int, list[tuple[str, int, float]]] = {}

    def looks(self, program: Program) -> Looks:
        """Return what notes the numbers that a program logs."""

        def look(tensor_of: Callable[[str], Tensor]) -> None:
            self._logged = {name: float(tensor_of(each)) for name, each in program.logged.items()}

        return {len(program.operations) - 1: [look]}

    def after(self, number: int, loss: float) -> bool:
        """Note what a step logged; end if Python would have read or computed another number."""
        if self._logged:
            found = self._measured.setdefault(number, [])
            for name, value in self._logged.items():
                title = f"{name} (logged)"  # of a rate; this name is for the one that was used
                found.append((title if title in self._known else name, number, value))
        if self._difference is not None:
            self._end = f"{self._difference}; your code could act differently from there"
        elif not self._has_loss(number) and not math.isnan(RecordedSteps.loss(self._steps, number)):
            self._end = f"your code computes the loss of step {number}, not an operation of torch"
        return self._end is None

    def _note_difference(self, number: int, difference: str) -> None:
        self._difference = difference

    def _has_loss(self, number: int) -> bool:
        """Return whether an operation returns the loss of a step."""
        return self._steps.program_of(self._steps.row(number)).program.loss is not None

    def note_rates(self, at: int, last: int) -> None:
        """Note the learning rates of the steps after `at`: one for all, or the recorded ones."""
        lr = self._steps.lr
        for name in self.stepper.rates():
            known = self._steps.run.measured(name) if lr is None else {at + 1: lr}
            for step, rate in known.items():
                if at < step <= last:
                    self._measured.setdefault(step, []).append((name, step, rate))

    def run(self, last: int) -> tuple[list[float], str | None]:
        """Run the steps up to `last`; return their losses, and why there are no more, if so.

        They end before one that depends on what Python does with another number.
        """
        stepper, begin = self.stepper, self.stepper.state
        assert begin is not None
        saved = stepper.save()
        try:
            losses = stepper.run(last, self)
        except NotReplayedError as error:
            return [], str(error)
        if self._end is not None:
            losses = losses[:-1]
            stepper.restore(begin, saved)
            if losses:
                stepper.run(begin + len(losses))
        return losses, self._end

    def record(self, writer: RunWriter, facts: Facts, interrupt: Interrupt) -> str | None:
        """Take the steps up to the last one, record them, and take snapshots.

        Returns:
            Why it stopped before the last one, None if it did not.
        """
        stepper, steps, reason = self.stepper, self._steps, None
        newest, last, stops_on_nan = writer.step, facts.steps or 0, facts.training.stop_on_nan
        while writer.step < last and not (interrupt or reason):
            writer.recorder.wait()
            first, started = writer.step + 1, clock.now()
            losses, reason = self.run(writer.next_stop(last, one_by_one=stops_on_nan))
            if not losses:
                break
            writer.step += len(losses)
            writer.timed(started, stepper.named_state, len(losses))
            taken = range(first, writer.step + 1)
            writer.taken = [steps.taken(number) for number in taken]
            writer.measured += [row for step in taken for row in self._measured.pop(step, ())]
            pairs = zip(taken, losses, strict=True)
            writer.losses = [loss if self._has_loss(number) else None for number, loss in pairs]
            writer.flush()
            if writer.is_snapshot_due():
                writer.recorder.snapshot(stepper.capture())
                newest = writer.step
            if stops_on_nan and not math.isfinite(losses[-1]):
                reason = f"the loss is {losses[-1]} at step {writer.step} (stop_on_nan)"
        if newest < writer.step:
            writer.recorder.snapshot(stepper.capture())
        return reason or interrupt.reason
