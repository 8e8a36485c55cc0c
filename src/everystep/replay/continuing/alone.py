"""Alone: goes on with a run by its programs, without the objects that trained it.

Where programs took every step, they can take more. Nothing compares these steps with Python.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from everystep import clock
from everystep.errors import RunError, UsageError
from everystep.recording.directories import create_directory
from everystep.recording.facts import Facts, ForkFacts, ResumeFacts, TrainingFacts
from everystep.recording.recorder import Recorder
from everystep.recording.run import RecordedRun
from everystep.replay.processes import needs_worker
from everystep.replay.recorded_steps import FurtherSteps
from everystep.replay.replay import Replay
from everystep.replay.replay_stepper import ReplayStepper
from everystep.step.state import State
from everystep.training.interrupt import Interrupt, interrupt_deferred
from everystep.training.job import Outcome, Progress
from everystep.training.resumed import facts_resumed, resume_facts
from everystep.training.writer import RunWriter, now

__all__ = ["fork_alone", "reason_against", "resume_alone"]


def reason_against(run: RecordedRun) -> str | None:
    """Return why programs alone cannot go on with a run, None if they can."""
    facts = run.facts.training
    engine = facts.engine
    if engine is None or engine.eager_from is not None:
        return "Python ran its steps, or a part of them"
    if facts.schedules:
        return f"it has a schedule ({next(iter(facts.schedules.values())).class_name})"
    if facts.data.lazy or facts.data_file is None or not facts.data_file.stored:
        return "the run does not hold its data"
    return FurtherSteps(run).reason_against()


def resume_alone(run: RecordedRun, steps: int, budget: int, progress: Progress) -> Outcome:
    """Go on with a run by its programs.

    Raises:
        RunError: they cannot, or a replay differs from the recording.
        RecordingError: writing the run failed.
    """
    at = run.newest_step()
    resumed = resume_facts(run, at)
    facts = facts_resumed(run, _facts(run, at), steps, resumed)
    return _go_on(
        run,
        at,
        steps,
        lambda state: Recorder(run.directory, facts, budget, at=at, is_resumed=True),
        facts.model_copy(update={"name": run.name}),
        progress,
        resumed=resumed,
    )


def fork_alone(
    run: RecordedRun,
    at: int,
    steps: int,
    lr: float | None,
    directory: Path | None,
    runs: Path,
    budget: int,
    progress: Progress,
) -> Outcome:
    """Train a new run that equals another up to a step, and goes on by its programs.

    lr: another learning rate; None: the run's.

    Raises:
        UsageError: there is no step to take.
        RunError: they cannot go on, or a replay differs from the recording.
        RecordingError: writing the run failed.
    """
    if steps <= at:
        raise UsageError(
            f"the fork starts after step {at} but would end at step {steps}; set more steps"
        )
    # An experiment of the parent does not describe the fork.
    trained = _facts(run, at).model_copy(update={"experiment_file": None, "experiment_digest": None})
    place = create_directory(directory, f"{run.name}-fork", runs)
    changed = {} if lr is None else {"lr": lr}
    fork = ForkFacts(parent=run.name, directory=str(run.directory), at=at, changed=changed)
    facts = Facts(name=place.name, started=now(), steps=steps, trained=trained, fork=fork)
    return _go_on(
        run,
        at,
        steps,
        lambda state: Recorder(place, facts, budget, run, at, beginning=state),
        facts,
        progress,
        lr=lr,
    )


def _go_on(
    run: RecordedRun,
    at: int,
    steps: int,
    record: Callable[[State], Recorder],
    facts: Facts,
    progress: Progress,
    *,
    lr: float | None = None,
    resumed: ResumeFacts | None = None,
) -> Outcome:
    reason = reason_against(run)
    if reason is not None:
        raise RunError(f"{run.name} needs the objects that trained it: {reason}")
    if needs_worker(run.facts):
        raise RunError(
            f"{run.name} was trained under numerics that this process cannot have any more; start "
            f"Python with {_environment(run)}"
        )
    replay = Replay(run)
    with interrupt_deferred() as interrupt, replay.in_force(max(at, 1)):
        stepper = replay.go_to(at)
        if replay.diverged_at is not None:
            raise RunError(
                f"{run.name} cannot be replayed bit for bit: the loss of step {replay.diverged_at} "
                "differs"
            )
        further = FurtherSteps(run, stepper.steps.rule, lr)
        stepper.go_on(further)
        state = stepper.capture()
        recorder = record(state)
        writer = RunWriter(
            recorder,
            at,
            progress.notice,
            progress.advance,
            seconds_before=0.0 if resumed is None else resumed.seconds,
            is_finite=(run.facts.nonfinite_step or at + 1) > at,
        )
        progress.begin(recorder.directory, facts)
        lost = run.lost_experiment(run.facts.training)
        why = "" if lost is None else f"{lost.name} is missing, so "
        progress.notice(
            f"{why}programs alone take the steps, without the objects that trained the run: nothing "
            "checks them against Python, and nothing is measured on validation rows"
        )
        if lr is not None:
            recorder.measurements([("lr", at + 1, lr)])
        if at not in recorder.plan.kept:
            recorder.snapshot(state)
        try:
            stops_on_nan = facts.training.stop_on_nan
            reason = _take(stepper, further, writer, steps, stops_on_nan, interrupt)
            status = "finished" if reason is None else "stopped"
            writer.close(status, reason, {})
        except BaseException as error:
            recorder.finish({"status": "failed", "reason": str(error), "finished": now()})
            raise
        finally:
            progress.end()
    return Outcome(recorder.directory, status, reason, interrupt.is_by_user)


def _take(
    stepper: ReplayStepper,
    further: FurtherSteps,
    writer: RunWriter,
    last: int,
    stops_on_nan: bool,
    interrupt: Interrupt,
) -> str | None:
    """Take steps up to the last one, record them, and take snapshots; return why it stopped before."""
    reason, newest = None, writer.step
    while writer.step < last and not interrupt:
        writer.recorder.check()
        first, started = writer.step + 1, clock.now()
        losses = stepper.run(writer.next_stop(last, one_by_one=stops_on_nan)).tolist()
        writer.step += len(losses)
        writer.timed(started, stepper.named_state, len(losses))
        writer.taken = [further.taken(number) for number in range(first, writer.step + 1)]
        writer.write(first, losses, {})
        if writer.is_snapshot_due():
            writer.recorder.snapshot(stepper.capture())
            newest = writer.step
        writer.show_written()
        if stops_on_nan and not math.isfinite(losses[-1]):
            reason = f"the loss is {losses[-1]} at step {writer.step} (stop_on_nan)"
            break
    if newest < writer.step:
        writer.recorder.snapshot(stepper.capture())
    return reason or interrupt.reason


def _facts(run: RecordedRun, at: int) -> TrainingFacts:
    """Return the facts of the steps that programs alone take after a step."""
    stretch = [each for each in run.stretches if each.first <= at + 1][-1]
    engine = stretch.facts.engine
    assert engine is not None
    alone = {"stands_behind": "alone", "by_program": 0, "checks": 0, "verified_to": 0}
    return stretch.facts.model_copy(update={"engine": engine.model_copy(update=alone)})


def _environment(run: RecordedRun) -> str:
    return " ".join(f"{k}={v}" for k, v in run.facts.training.numerics.environment().items())
