"""Around the steps: metrics, and how a training by program begins and ends."""

import math
import signal
from functools import partial
from itertools import count

import pytest
import torch
from tests.training.by_hand import (
    Changed,
    assert_same,
    by_hand,
    by_train,
    contents,
    momentum,
    new_training,
)
from torch.optim import lr_scheduler

import everystep

# Metrics are the user's Python between steps, which may change the training, and see all of it.


@pytest.mark.parametrize(("optimizer", "batch_size"), [(momentum, None), (torch.optim.Adam, 8)])
def test_a_metric_sees_the_gradients_of_the_step(optimizer, batch_size):
    def norms(trained):
        return [float(parameter.grad.norm()) for parameter in trained.model.parameters()]

    expected, seen = new_training(optimizer=optimizer), []
    options = {"steps": 60, "batch_size": batch_size}
    by_hand(expected, **options, after_step=lambda step: seen.append(norms(expected)))
    trained = new_training(optimizer=optimizer)
    metrics = {"norm": lambda p, t: max(norms(trained))}
    run = by_train(trained, **options, metrics=metrics, evaluate_every=7)
    assert run.facts.training.engine.reason is None
    measured = run.measurements.filter(run.measurements["name"] == "norm")
    assert measured["step"].to_list() == [*range(7, 61, 7), 60]
    assert measured["value"].to_list() == [max(seen[step - 1]) for step in measured["step"]]


@pytest.mark.parametrize("every", [1, 7])
def test_a_metric_may_drop_the_gradients(every):
    expected, trained = new_training(), new_training()
    drop = {"none": lambda p, t: trained.model.zero_grad() or 0.0}
    losses = by_hand(
        expected, steps=42, after_step=lambda step: step % every or expected.model.zero_grad()
    )
    run = by_train(trained, steps=42, metrics=drop, evaluate_every=every)
    assert (run.losses["loss"].to_list(), contents(trained)) == (losses, contents(expected))
    assert run.facts.training.engine.reason is None


@pytest.mark.parametrize("stops", [False, True])
def test_nothing_is_recorded_of_a_step_after_the_last(stops):
    trained = new_training(scheduler=partial(lr_scheduler.ExponentialLR, gamma=0.5))
    if stops:
        trained.loss = lambda prediction, target: (prediction - target).log().sum()
    metrics = {"largest": lambda prediction, target: prediction.max()}
    run = by_train(trained, steps=4, metrics=metrics, evaluate_every=1, stop_on_nan=True)
    assert len(run) == (1 if stops else 4)
    assert list(run.measured("lr")) == list(range(1, len(run) + 1))
    assert run.table().frame["step"].to_list() == run.losses["step"].to_list()


# How a training ends.


def diverging(parameters):
    return everystep.GradientDescent(parameters, lr=4.0)


def test_stop_on_nan_stops_at_the_first_loss_that_is_not_finite():
    expected = new_training(optimizer=diverging)
    losses = by_hand(expected, steps=100)
    first = next(step for step, loss in enumerate(losses, 1) if not math.isfinite(loss))
    assert 16 < first < 64
    assert first & (first - 1), "at a power of two there is a check"
    expected = new_training(optimizer=diverging)
    losses = by_hand(expected, steps=first)
    trained = new_training(optimizer=diverging)
    run = by_train(trained, steps=100, stop_on_nan=True)
    assert (run.status, run.losses["loss"].to_list()) == ("stopped", losses)
    assert run.facts.reason == f"the loss is {losses[-1]} at step {first} (stop_on_nan)"
    assert run.facts.training.engine.reason is None
    assert contents(trained) == contents(expected)
    assert run.snapshots[-1] == first


def test_ctrl_c_in_a_metric_ends_after_the_step():
    expected = new_training()
    losses = by_hand(expected, steps=70)
    trained = new_training()
    calls = count(1)

    def metric(prediction, target):
        if next(calls) == 7:
            signal.raise_signal(signal.SIGINT)
        return 0.0

    with pytest.raises(KeyboardInterrupt, match=r"everystep\.open\('runs/sequential-1'\)"):
        by_train(trained, steps=1000, metrics={"mine": metric}, evaluate_every=10)
    (run,) = everystep.runs()
    assert (run.status, run.facts.reason) == ("stopped", "by the user (Ctrl-C)")
    assert run.losses["loss"].to_list() == losses
    assert run.facts.training.engine.verified_to == 64
    assert contents(trained) == contents(expected)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_few_steps(steps):
    run = assert_same(lambda: new_training(optimizer=torch.optim.Adam), steps)
    engine = run.facts.training.engine
    assert engine.reason is None
    assert engine.verified_to == (steps if steps > 1 else 0)
    assert engine.by_program == (1 if steps > 3 else 0)  # Python takes steps 1, 2, 4 and the last


def test_a_program_that_cannot_be_is_refused_where_it_is_demanded():
    trained = new_training()
    trained.model.register_forward_hook(lambda *_: None)
    with pytest.raises(everystep.TrainingError, match=r"the model has a forward hook; engine=\"auto\""):
        by_train(trained, steps=5, engine="program")
    deciding = new_training(lambda: Changed(lambda _, h: h if h.sum() > 0 else 2 * h))
    with pytest.raises(everystep.TrainingError, match=r"reads a number from a tensor.* at step 1"):
        by_train(deciding, steps=5, engine="program")
    assert [run.status for run in everystep.runs()] == ["failed", "failed"]


def test_gradients_that_are_there_already_go_on():
    """Where the optimizer does not have a parameter, nothing zeroes its gradient: it grows."""

    def make():
        trained = new_training(optimizer=lambda parameters: momentum([*parameters][2:]))
        for parameter in trained.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        return trained

    run = assert_same(make, 50)
    assert run.facts.training.engine.reason is None
