"""Continues a run by its programs, without the objects that trained it.

Where programs took every step, they can take more. Nothing compares these steps with Python.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from everystep import clock
from everystep.errors import RunError
from everystep.recording.facts import Facts, TrainingFacts
from everystep.recording.recorded_run import RecordedRun, stretch_at
from everystep.recording.recorder import Recorder
from everystep.replay.processes import needs_worker, recorded_numerics
from everystep.replay.recorded_steps import FurtherSteps
from everystep.replay.replay_stepper import ReplayStepper
from everystep.replay.run_replay import Replay
from everystep.step.state import State
from everystep.training.interrupt import Interrupt, interrupt_deferred
from everystep.training.job import Outcome, Progress
from everystep.training.writer import RunWriter, now

__all__ = ["continue_alone", "facts_alone", "reason_against"]


def reason_against(run: RecordedRun) -> str | None:
    """Return why programs alone cannot continue a run, None if they can."""
    facts = run.facts.training
    engine = facts.engine
    if engine is None or engine.eager_from is not None:
        return "Python ran its steps, or a part of them"
    if facts.schedulers:
        return f"it has a scheduler ({next(iter(facts.schedulers.values())).class_name})"
    if facts.data.lazy or facts.data_file is None or not facts.data_file.stored:
        return "the run does not hold its data"
    return FurtherSteps(run).reason_against()


def continue_alone(
    run: RecordedRun,
    at: int,
    facts: Facts,
    record: Callable[[State], Recorder],
    progress: Progress,
    lr: float | None = None,
) -> Outcome:
    """Take steps of a run by its programs, and record them.

    Args:
        run: one that programs can continue alone, see `reason_against`.
        at: the step before the first of them.
        facts: of the training.
        record: returns the recorder, given the state after `at`.
        progress: receives progress.
        lr: another learning rate; None: the run's.

    Raises:
        RunError: this process cannot compute as the run did, or a replay differs from the recording.
        RecordingError: writing the run failed.
    """
    if needs_worker(run.facts):
        environment = " ".join(f"{k}={v}" for k, v in recorded_numerics(run.facts).environment().items())
        raise RunError(
            f"{run.name} was trained under numerics that this process can no longer have; start "
            f"Python with {environment}"
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
        stepper.continue_with(further)
        state = stepper.capture()
        recorder = record(state)
        writer = RunWriter(
            recorder,
            at,
            progress.notice,
            progress.advance,
            seconds_before=facts.resumed[-1].seconds if facts.resumed else 0.0,
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
            reason = _take(stepper, further, writer, facts, interrupt)
            status = "finished" if reason is None else "stopped"
            writer.close(status, reason, {})
        except BaseException as error:
            recorder.finish({"status": "failed", "reason": str(error), "finished": now()})
            raise
        finally:
            progress.end()
    return Outcome(recorder.directory, status, reason, interrupt.is_by_user)


def facts_alone(run: RecordedRun, at: int) -> TrainingFacts:
    """Return the facts of the steps that programs alone take after a step."""
    stretches = run.stretches
    facts = stretches[stretch_at(stretches, at + 1)].facts
    engine = facts.engine
    assert engine is not None
    alone = {"stands_behind": "alone", "by_program": 0, "checks": 0, "verified_to": 0}
    return facts.model_copy(update={"engine": engine.model_copy(update=alone)})


def _take(
    stepper: ReplayStepper,
    further: FurtherSteps,
    writer: RunWriter,
    facts: Facts,
    interrupt: Interrupt,
) -> str | None:
    """Take steps up to the last one, record them, and take snapshots; return why it stopped before."""
    reason, newest, last = None, writer.step, facts.steps or 0
    stops_on_nan = facts.training.stop_on_nan
    while writer.step < last and not interrupt:
        writer.recorder.check()
        first, started = writer.step + 1, clock.now()
        losses = stepper.run(writer.next_stop(last, one_by_one=stops_on_nan))
        writer.step += len(losses)
        writer.timed(started, stepper.named_state, len(losses))
        writer.taken = [further.taken(number) for number in range(first, writer.step + 1)]
        writer.losses = losses
        writer.flush()
        if writer.is_snapshot_due():
            writer.recorder.snapshot(stepper.capture())
            newest = writer.step
        if stops_on_nan and not math.isfinite(losses[-1]):
            reason = f"the loss is {losses[-1]} at step {writer.step} (stop_on_nan)"
            break
    if newest < writer.step:
        writer.recorder.snapshot(stepper.capture())
    return reason or interrupt.reason
