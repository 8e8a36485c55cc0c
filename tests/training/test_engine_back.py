"""A program that ceases to hold: training goes back to the last verified step, or ends."""

import math
from functools import partial

import pytest
import torch
from tests.training.by_hand import (
    assert_eager,
    bits,
    by_hand,
    by_train,
    contents,
    descent,
    new_training,
    validation_loss,
)
from torch.optim import lr_scheduler

import everystep
from everystep.recording import snapshots
from everystep.recording.recorder import Recorder
from everystep.step.stand_in import StandIn
from everystep.training import writer
from everystep.training.stepper import Stepper


@pytest.fixture
def failing_check(monkeypatch):
    """Let the first check at or after a step find different bits, as a faulty kernel would."""

    def fail_from(first):
        watch, compare, steps = Stepper.watch, StandIn.difference, []

        def noting(self, number, x, y):
            steps.append(number)
            return watch(self, number, x, y)

        def failing(self, *given):
            reason = compare(self, *given)
            return "its program gives different bits" if steps[-1] >= first else reason

        monkeypatch.setattr(Stepper, "watch", noting)
        monkeypatch.setattr(StandIn, "difference", failing)

    return fail_from


def states_by_hand(steps, **parts):
    """Return a training by hand, its losses, and its states and validation losses by step."""
    made = new_training(**parts)
    states = [{name: bits(t) for name, t in made.model.state_dict().items()}]
    validation = []

    def after(step):
        states.append({name: bits(t) for name, t in made.model.state_dict().items()})
        validation.append(validation_loss(made))

    return made, by_hand(made, steps=steps, after_step=after), states, validation


@pytest.fixture
def snapshots_at_every_step(monkeypatch):
    monkeypatch.setattr(snapshots, "REPLAY_SECONDS", 0.0)
    monkeypatch.setattr(snapshots, "TIME_SHARE", math.inf)
    monkeypatch.setattr(Recorder, "is_behind", False)


@pytest.mark.parametrize("evaluate_every", [None, 7])
def test_a_check_that_fails_takes_back_what_was_not_verified(
    evaluate_every, capfd, snapshots_at_every_step, failing_check
):
    expected, losses, states, validation = states_by_hand(40)
    failing_check(32)
    made = new_training()
    options = {} if evaluate_every is None else {"validation": (made.x, made.y)}
    run = by_train(made, steps=40, evaluate_every=evaluate_every, **options)
    assert_eager(run, capfd, 17, "its program gives different bits")
    engine = run.facts.training.engine
    assert engine.reason.endswith("at step 32")
    assert engine.verified_to == 16
    assert (run.status, run.losses["loss"].to_list()) == ("finished", losses)
    assert contents(made) == contents(expected)
    assert len(run.snapshots) > 10
    for step in run.snapshots:
        assert {n: bits(t) for n, t in run.parameters(step).items()} == states[step]
    if evaluate_every is not None:
        measured = run.measurements.filter(run.measurements["name"] == "validation_loss")
        steps = [step for step in range(1, 41) if step % evaluate_every == 0 or step == 40]
        assert measured["step"].to_list() == steps
        assert measured["value"].to_list() == [torch.tensor(validation[s - 1]).item() for s in steps]


@pytest.mark.parametrize(
    "scheduler",
    [
        partial(lr_scheduler.StepLR, step_size=10, gamma=0.5),
        partial(lr_scheduler.ReduceLROnPlateau, patience=0, threshold=0.01),
    ],
    ids=["steps", "plateau"],
)
@pytest.mark.parametrize("seconds", [0.0, 1.0], ids=["written", "not-written"])
def test_a_scheduler_goes_back_too(scheduler, seconds, failing_check, monkeypatch):
    monkeypatch.setattr(writer, "FLUSH_SECONDS", seconds)
    monkeypatch.setattr(writer, "STRETCH_SECONDS", seconds)
    expected, losses, _, _ = states_by_hand(40, optimizer=descent, scheduler=scheduler)
    failing_check(32)
    made = new_training(optimizer=descent, scheduler=scheduler)
    run = by_train(made, steps=40)
    assert run.facts.training.engine.eager_from == 17
    assert run.losses["step"].to_list() == [*range(1, 41)]
    assert run.losses["loss"].to_list() == losses
    assert contents(made) == contents(expected)
    if scheduler.func is lr_scheduler.StepLR:
        rates = {step: 0.05 * 0.5 ** (step // 10) for step in (1, *range(11, 41, 10))}
        assert run.measured("lr") == rates


def test_where_a_program_is_demanded_only_verified_steps_are_kept(
    monkeypatch, snapshots_at_every_step, failing_check
):
    monkeypatch.setattr(writer, "FLUSH_SECONDS", 0.0)
    _, losses, states, _ = states_by_hand(32)
    failing_check(64)
    with pytest.raises(everystep.TrainingError, match=r"different bits at step 64; engine"):
        by_train(new_training(), steps=100, engine="program")
    (run,) = everystep.runs()
    assert run.status == "failed"
    assert "different bits" in run.facts.reason
    assert run.losses["loss"].to_list() == losses
    assert max(run.snapshots) <= 32
    for step in run.snapshots:
        assert {n: bits(t) for n, t in run.parameters(step).items()} == states[step]


def test_where_the_users_code_has_run_there_is_no_way_back(failing_check):
    _, losses, _, _ = states_by_hand(64)
    failing_check(64)
    metrics = {"mine": lambda p, t: 0.0}
    with pytest.raises(everystep.TrainingError, match=r"step 64 cannot be trusted.*Steps up to 32"):
        by_train(new_training(), steps=100, metrics=metrics, evaluate_every=10)
    (run,) = everystep.runs()
    assert (run.status, run.facts.training.engine.verified_to) == ("failed", 32)
    assert run.losses["loss"].to_list() == losses
