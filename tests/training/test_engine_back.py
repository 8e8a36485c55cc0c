"""A program that ceases to hold: training goes back to the last verified step, and on eagerly."""

import math
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
from tests.training.by_hand import (
    Changed,
    assert_eager,
    bits,
    by_hand,
    by_train,
    contents,
    descent,
    mlp,
    new_training,
    validation_loss,
)
from torch import nn
from torch.optim import lr_scheduler

import everystep
from everystep.recording import snapshots
from everystep.training import loop

# What no look at Python's objects can tell: a count of calls in a file.


def counted_in_a_file():
    place = Path("calls")
    calls = int(place.read_text()) + 1 if place.exists() else 1
    place.write_text(str(calls))
    return calls


class Hidden(nn.Module):
    """Changes at a call, by a count that nobody can see; counts in training only."""

    def __init__(self, call, change):
        super().__init__()
        Path("calls").unlink(missing_ok=True)
        self.inner, self.call, self.change = mlp(), call, change

    def forward(self, x):
        h = self.inner(x)
        return self.change(h) if self.training and counted_in_a_file() >= self.call else h


def double(h):
    return 2 * h


class Told(nn.Module):
    """The same network; the loop says when it changes."""

    def __init__(self):
        super().__init__()
        self.inner, self.factor = mlp(), 1

    def forward(self, x):
        h = self.inner(x)
        return h * self.factor if self.training else h


def told_by_hand(first_doubled, steps, optimizer=None, schedule=None):
    """Return losses and states of a loop whose model changes at a step."""
    told = new_training(Told, optimizer=optimizer, schedule=schedule)
    states = [{name: bits(t) for name, t in told.model.state_dict().items()}]
    validation = []

    def before(step):
        told.model.factor = 2 if step >= first_doubled else 1

    def after(step):
        if steps <= 100:
            states.append({name: bits(t) for name, t in told.model.state_dict().items()})
            validation.append(validation_loss(told))

    losses = by_hand(told, steps=steps, before_step=before, after_step=after)
    return told, losses, states, validation


@pytest.fixture
def snapshots_at_every_step(monkeypatch):
    monkeypatch.setattr(snapshots, "REPLAY_SECONDS", 0.0)
    monkeypatch.setattr(snapshots, "TIME_SHARE", math.inf)


# The model is called where programs are checked, at the steps 1, 2, 4, 8, 16, 32, 64: the seventh call.


@pytest.mark.parametrize("evaluate_every", [None, 1, 7])
def test_a_check_that_fails_takes_back_what_was_not_verified(
    evaluate_every, capfd, snapshots_at_every_step
):
    told, losses, states, validation = told_by_hand(33, 100)
    hidden = new_training(partial(Hidden, 7, double))
    options = {} if evaluate_every is None else {"validation": (hidden.x, hidden.y)}
    run = by_train(hidden, steps=100, evaluate_every=evaluate_every, **options)
    assert_eager(run, capfd, 33, "its program gives other bits in parameter/")
    engine = run.facts["engine"]
    assert engine["reason"].endswith("at step 64")
    assert engine["verified_to"] == 32
    assert (run.status, run.losses["loss"].to_list()) == ("finished", losses)
    assert contents(hidden) == contents(told)
    assert len(run.snapshots) > 10
    for step in run.snapshots:
        assert {n: bits(t) for n, t in run.parameters(step).items()} == states[step]
    if evaluate_every is not None:
        measured = run.measurements.filter(run.measurements["name"] == "validation_loss")
        steps = [step for step in range(1, 101) if step % evaluate_every == 0 or step == 100]
        assert measured["step"].to_list() == steps
        expected = [torch.tensor(validation[step - 1]).item() for step in steps]
        assert measured["value"].to_list() == expected


def test_what_was_recorded_long_ago_is_taken_back(monkeypatch):
    monkeypatch.setattr(loop, "FLUSH_SECONDS", 0.0)
    hidden = new_training(partial(Hidden, 11, double))  # step 1024, or before
    run = by_train(hidden, steps=1300)
    engine = run.facts["engine"]
    assert engine["eager_from"] == engine["verified_to"] + 1 > 64
    told, losses, _, _ = told_by_hand(engine["eager_from"], 1300)
    assert run.losses["step"].to_list() == [*range(1, 1301)]
    assert run.losses["loss"].to_list() == losses
    assert contents(hidden) == contents(told)


def test_with_the_eager_engine_no_count_is_too_well_hidden():
    _, losses, _, _ = told_by_hand(100, 110)
    run = by_train(new_training(partial(Hidden, 100, double)), steps=110, engine="eager")
    assert run.losses["loss"].to_list() == losses
    engine = run.facts["engine"]
    assert (engine["eager_from"], engine["reason"], engine["checks"]) == (1, "it was asked for", 0)


def test_a_schedule_goes_back_too():
    halving = partial(lr_scheduler.StepLR, step_size=10, gamma=0.5)
    told, losses, _, _ = told_by_hand(33, 100, descent, halving)
    hidden = new_training(partial(Hidden, 7, double), optimizer=descent, schedule=halving)
    run = by_train(hidden, steps=100)
    assert run.facts["engine"]["eager_from"] == 33
    assert run.losses["loss"].to_list() == losses
    assert contents(hidden) == contents(told)
    rates = run.measurements.filter(run.measurements["name"] == "lr")
    assert rates["step"].to_list() == [1, *range(11, 101, 10)]
    assert rates["value"].to_list() == [0.05 * 0.5**k for k in range(10)]


def test_a_schedule_that_follows_the_validation_loss_goes_back_too():
    plateau = partial(lr_scheduler.ReduceLROnPlateau, patience=0, threshold=0.01)
    told, losses, _, _ = told_by_hand(33, 100, descent, plateau)
    hidden = new_training(partial(Hidden, 7, double), optimizer=descent, schedule=plateau)
    run = by_train(hidden, steps=100)
    assert run.facts["engine"]["eager_from"] == 33
    assert run.losses["loss"].to_list() == losses
    assert contents(hidden) == contents(told)


def test_what_is_not_finite_stops_where_the_steps_are_taken_again():
    """The seventh call (step 64) gives other numbers; the tenth, step 35 taken again, infinity."""

    def change(h):
        return h * (math.inf if Path("calls").read_text() == "10" else 2)

    run = by_train(new_training(partial(Hidden, 7, change)), steps=100, stop_on_nan=True)
    assert run.facts["engine"]["eager_from"] == 33
    losses = run.losses["loss"].to_list()
    assert (run.status, len(losses)) == ("stopped", 35)
    assert run.facts["reason"] == f"the loss is {losses[-1]} at step 35 (stop_on_nan)"
    assert not math.isfinite(losses[-1])
    assert all(map(math.isfinite, losses[:-1]))


def test_where_a_program_is_demanded_only_verified_steps_are_kept(monkeypatch, snapshots_at_every_step):
    monkeypatch.setattr(loop, "FLUSH_SECONDS", 0.0)
    _, losses, states, _ = told_by_hand(33, 32)
    hidden = new_training(partial(Hidden, 7, double))
    with pytest.raises(everystep.TrainingError, match=r"other bits in .* at step 64; engine"):
        by_train(hidden, steps=100, engine="program")
    (run,) = everystep.runs()
    assert run.status == "failed"
    assert "other bits" in run.facts["reason"]
    assert run.losses["loss"].to_list() == losses
    assert max(run.snapshots) <= 32
    for step in run.snapshots:
        assert {n: bits(t) for n, t in run.parameters(step).items()} == states[step]


def test_what_the_users_forward_raises_in_a_check_comes_through():
    def failing(h):
        raise ZeroDivisionError("mine")

    expected = new_training()
    losses = by_hand(expected, steps=31)
    hidden = new_training(partial(Hidden, 6, failing))  # the sixth call: step 32
    with pytest.raises(ZeroDivisionError, match="mine"):
        by_train(hidden, steps=100)
    (run,) = everystep.runs()
    assert (run.status, run.facts["reason"]) == ("failed", "mine")
    assert run.losses["loss"].to_list() == losses
    left = zip(hidden.model.parameters(), expected.model.parameters(), strict=True)
    assert all(bits(a) == bits(b) for a, b in left)


def test_what_the_users_forward_raises_at_its_thirtieth_call_comes_through():
    def make():
        calls = count(1)

        def failing(_, h):
            if next(calls) == 30:
                raise ZeroDivisionError("mine")
            return h

        return Changed(failing)

    expected = by_hand(new_training(), steps=29)
    with pytest.raises(ZeroDivisionError, match="mine"):
        by_train(new_training(make), steps=100)
    (run,) = everystep.runs()
    assert run.losses["loss"].to_list() == expected
