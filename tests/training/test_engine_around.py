"""Around the steps: schedules, metrics, data, and how a training by program begins and ends."""

import math
import random
import signal
import threading
from functools import partial
from itertools import count

import numpy as np
import pytest
import torch
from tests.training.by_hand import (
    Changed,
    assert_same,
    bits,
    by_hand,
    by_train,
    contents,
    descent,
    mlp,
    momentum,
    new_training,
)
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import Dataset

import everystep
from everystep.views.progress import Silent

# Schedules.


def test_an_lr_that_changes_at_a_step_changes_there():
    def schedule(optimizer):
        return lr_scheduler.LambdaLR(optimizer, lambda step: 0.1 if step >= 76 else 1.0)

    run = assert_same(lambda: new_training(optimizer=descent, schedule=schedule), 100)
    rates = run.measurements.filter(run.measurements["name"] == "lr")
    assert rates["step"].to_list() == [1, 77]
    assert rates["value"].to_list() == [0.05, 0.05 * 0.1]


class OfTheUser(lr_scheduler.LRScheduler):
    """Holds what is alive (a list, the model) and what cannot be copied (a lock)."""

    def __init__(self, optimizer, log, model):
        self.log, self.model, self.lock = log, model, threading.Lock()
        super().__init__(optimizer)

    def get_lr(self):
        with torch.no_grad():
            norm = float(sum(p.norm() for p in self.model.parameters()))
        self.log.append(norm)
        return [rate / (1 + norm) for rate in self.base_lrs]


def test_a_schedule_that_looks_at_the_model_sees_it():
    logs = []

    def make():
        trained = new_training()
        logs.append([])
        trained.schedule = OfTheUser(trained.optimizer, logs[-1], trained.model)
        return trained

    expected, trained = make(), make()
    losses = by_hand(expected, steps=50)
    run = by_train(trained, steps=50)
    assert "OfTheUser is not one of torch's schedules" in run.facts.training.engine.reason
    assert run.losses["loss"].to_list() == losses
    assert len(logs[0]) == 51
    assert logs[0] == logs[1]


# Metrics are the user's Python between steps, which may change the training, and see all of it.


@pytest.mark.parametrize("optimizer", [descent, momentum, torch.optim.Adam])
@pytest.mark.parametrize("batch_size", [None, 8])
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


@pytest.mark.parametrize("stops", [False, True])
def test_nothing_is_recorded_of_a_step_after_the_last(stops):
    trained = new_training(schedule=partial(lr_scheduler.ExponentialLR, gamma=0.5))
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


def test_ctrl_c_at_any_time_leaves_a_whole_step():
    class Interrupting(Silent):
        """Interrupts a moment after the first steps."""

        timer = None

        def advance(self, first_step, losses):
            if self.timer is None:
                self.timer = threading.Timer(0.05, signal.raise_signal, [signal.SIGINT])
                self.timer.start()

    trained, interrupting = new_training(), Interrupting()
    with pytest.raises(KeyboardInterrupt):
        by_train(trained, steps=10**7, progress=interrupting)
    interrupting.timer.join()
    (run,) = everystep.runs()
    steps = len(run.losses)
    assert run.snapshots[-1] == steps > 0
    assert {n: bits(t) for n, t in run.parameters(steps).items()} == {
        n: bits(t) for n, t in trained.model.state_dict().items()
    }
    expected = new_training()
    assert by_hand(expected, steps=min(steps, 2000)) == run.losses["loss"].to_list()[:2000]
    if steps <= 2000:
        assert contents(trained) == contents(expected)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("optimizer", [descent, momentum, partial(torch.optim.AdamW, fused=True)])
def test_few_steps(steps, optimizer):
    run = assert_same(lambda: new_training(optimizer=optimizer), steps)
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


@pytest.mark.parametrize(
    "optimizer", [momentum, partial(torch.optim.AdamW, fused=True), torch.optim.Adam]
)
def test_training_twice_goes_on(optimizer):
    expected = new_training(optimizer=optimizer)
    losses = by_hand(expected, steps=60)
    trained = new_training(optimizer=optimizer)
    first, second = by_train(trained, steps=25), by_train(trained, steps=35)
    assert first.losses["loss"].to_list() + second.losses["loss"].to_list() == losses
    assert contents(trained) == contents(expected)
    assert first.facts.training.engine.reason is second.facts.training.engine.reason is None
    assert second.facts.training.engine.by_program > 25


def test_gradients_that_are_there_already_go_on(capfd):
    """Where the optimizer does not have a parameter, nothing zeroes its gradient: it grows."""

    def make():
        trained = new_training(optimizer=lambda parameters: momentum([*parameters][2:]))
        for parameter in trained.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        return trained

    run = assert_same(make, 50)
    assert run.facts.training.engine.reason is None


# Data.


class Augmented(Dataset):
    """Other rows at every look, by autograd and by all generators."""

    def __init__(self):
        self.x, self.y = torch.randn(20, 4), torch.randn(20, 2)

    def __len__(self):
        return 20

    def __getitem__(self, row):
        x = self.x[row].clone().requires_grad_()
        x.square().sum().backward()
        noise = torch.rand(4) + random.random() + np.random.rand()
        return self.x[row] + 0.1 * x.grad.sign() + 0.1 * noise, self.y[row]


class OfAnyLength(Dataset):
    """Rows of a length that is drawn at every look."""

    def __init__(self):
        self.x = torch.randn(20, 9, 4)

    def __len__(self):
        return 20

    def __getitem__(self, row):
        length = int(torch.randint(3, 9, ()))
        return self.x[row, :length], self.x[row, 0, :2]


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = mlp()

    def forward(self, x):
        return self.inner(x).mean(1)


@pytest.mark.parametrize(
    ("dataset", "model", "batch_size"), [(Augmented, mlp, 8), (OfAnyLength, Mean, 1)]
)
def test_a_dataset_read_at_every_step_is_read_once_for_each(dataset, model, batch_size):
    def make():
        made = new_training(model)
        made.dataset = dataset()
        return made

    run = assert_same(make, 80, batch_size=batch_size)
    assert run.facts.training.data.lazy
    assert everystep.open(run.directory).verify(processes=1, progress=False).is_exact
    if dataset is OfAnyLength:
        assert len(run.facts.training.engine.programs) == 7  # the first step, and six lengths
