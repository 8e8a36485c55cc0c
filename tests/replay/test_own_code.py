"""Runs in which the user's own code ran between steps, or at every step, replay exactly."""

import copy
import pickle
from functools import partial

import pytest
import torch
from tests.training.by_hand import by_hand, by_train, contents, new_training
from torch import nn, optim
from torch.optim import lr_scheduler

import everystep
from everystep import numerics

STEPS = 24


def with_dropout():
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.BatchNorm1d(8), nn.Linear(8, 2))


new = partial(new_training, with_dropout)


def verified(run):
    """Open a run again, without the objects that trained it; assert that all of it replays."""
    opened = everystep.open(run.directory)
    found = opened.verify(processes=1, progress=False)
    assert found.is_exact, found
    for number in (STEPS // 2 + 1, 3, STEPS):
        assert opened[number].is_exact
        assert opened[number].loss == run.losses["loss"][number - 1]
    return opened


# Metrics.


@pytest.mark.parametrize("batch_size", [None, 8])
def test_data_that_a_metric_writes_into_is_kept_from_there_on(batch_size, capfd):
    def make():
        made = new()

        def metric(prediction, target):
            made.x.mul_(1.01)
            return 0.0

        made.metrics = {"mine": metric}
        return made

    settings = {"steps": STEPS, "evaluate_every": 10, "batch_size": batch_size}
    losses = by_hand(make(), **settings)
    run = by_train(make(), **settings)
    assert run.losses["loss"].to_list() == losses
    verified(run)
    err = capfd.readouterr().err
    assert (
        "from step 11 on: your code changes the data" in err and "begin with the data as it was" in err
    )


# Schedules.


class Everything(lr_scheduler.LRScheduler):
    """Sets whatever a param group has, and now and then a parameter."""

    def get_lr(self):
        for group in self.optimizer.param_groups:
            group["weight_decay"] = 0.001 * self.last_epoch
            if "betas" in group:
                group["betas"] = (0.9, 1 - 0.01 / (1 + self.last_epoch))
            if "momentum" in group:
                group["momentum"] = 0.9 - 0.005 * self.last_epoch
        if self.last_epoch % 7 == 3:
            with torch.no_grad():
                self.optimizer.param_groups[0]["params"][0].mul_(0.99)
        return [0.01 / (1 + self.last_epoch) for _ in self.optimizer.param_groups]


def test_what_a_scheduler_sets_is_recorded_by_step():
    parts = {"optimizer": partial(optim.AdamW, lr=0.01), "scheduler": Everything}
    expected = new(**parts)
    losses = by_hand(expected, steps=STEPS)
    left = contents(expected)
    made = new(**parts)
    run = by_train(made, steps=STEPS)
    assert run.losses["loss"].to_list() == losses
    assert contents(made) == left
    verified(run)
    assert run.measured("optimizer.weight_decay")[STEPS] == 0.001 * (STEPS - 1)


def test_a_hook_acts_on_the_original_alone():
    made = new()
    made.model[0].weight.register_hook(lambda gradient: 3 * gradient)
    run = by_train(made, steps=STEPS)
    verified(run)
    with pytest.raises(everystep.RunError, match="has a hook, which acts on the original alone"):
        run.fork(3, steps=STEPS, progress=False)


# Optimizers with state of their own.


class Averaging(optim.SGD):
    """Keeps averages, a count, a generator, and gradients of the last step in its attributes."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr=lr)
        self.averages = [p.detach().clone() for p in self.param_groups[0]["params"]]
        self.calls, self.kept, self.generator = 0, [], torch.Generator().manual_seed(5)

    @torch.no_grad()
    def step(self, closure=None):
        self.calls += 1
        for p, kept in zip(self.param_groups[0]["params"], self.kept, strict=False):
            p.grad.add_(kept, alpha=0.1)
        self.kept = [p.grad for p in self.param_groups[0]["params"]]
        super().step()
        for p, average in zip(self.param_groups[0]["params"], self.averages, strict=True):
            average.lerp_(p, 1 / (1 + self.calls))
            p.add_(torch.randn(p.shape, generator=self.generator), alpha=1e-3)


class Accumulating(optim.SGD):
    """Updates every third step, with the gradients of all three."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr=lr, momentum=0.9)
        self.calls = 0

    def zero_grad(self, set_to_none=True):
        if self.calls % 3 == 0:
            super().zero_grad(set_to_none)

    def step(self, closure=None):
        self.calls += 1
        if self.calls % 3 == 0:
            super().step()


OWN = {"averaging": partial(Averaging, lr=0.05), "accumulating": partial(Accumulating, lr=0.05)}


@pytest.mark.parametrize("optimizer", OWN)
def test_an_optimizer_with_state_of_its_own_opens_verifies_and_forks(optimizer):
    expected = new(optimizer=OWN[optimizer])
    losses = by_hand(expected, steps=STEPS)
    made = new(optimizer=OWN[optimizer])
    run = by_train(made, steps=STEPS)
    assert run.losses["loss"].to_list() == losses
    assert contents(made) == contents(expected)
    assert "is not one of torch's optimizers" in run.facts.training.engine.reason
    verified(run)
    fork = run.fork(13, steps=STEPS, progress=False)
    assert fork.losses["loss"].to_list() == losses
    assert made.optimizer.calls == STEPS


# Models that carry something.


@pytest.mark.parametrize("optimizer", [*OWN.values(), partial(optim.Adam, lr=0.01)])
def test_what_was_trained_can_be_copied_and_trained_again(optimizer):
    expected, made = new(optimizer=optimizer), new(optimizer=optimizer)
    torch.manual_seed(2)
    by_hand(expected, steps=5)
    torch.manual_seed(2)
    by_train(made, steps=5)
    model = copy.deepcopy(made.model)
    assert pickle.loads(pickle.dumps(made.model)).state_dict().keys() == model.state_dict().keys()
    # It continues as if it had never been here.
    torch.manual_seed(1)
    losses = by_hand(expected, steps=5)
    torch.manual_seed(1)
    run = by_train(made, steps=5)
    assert run.losses["loss"].to_list() == losses
    assert contents(made) == contents(expected)


def test_a_training_within_a_metric_is_a_training_of_its_own():
    inner = []

    def metric(prediction, target):
        with numerics.in_force(1), torch.enable_grad():
            state = torch.get_rng_state()
            inner.append(by_train(new(), steps=7, run=f"inner-{len(inner)}"))
            torch.set_rng_state(state)
        return 0.0

    expected = by_hand(new(), steps=20)
    run = by_train(new(), steps=20, metrics={"mine": metric}, evaluate_every=10)
    assert run.losses["loss"].to_list() == expected
    assert inner[0].losses["loss"].to_list() == expected[:7]


def test_nothing_of_torchs_may_be_in_force_around_the_call():
    made = new()
    for around, name in [
        (torch.autocast("cpu", torch.bfloat16), "torch.autocast"),
        (torch.device("meta"), "the default device is meta here"),
        (torch.inference_mode(), "torch.inference_mode"),
        (torch.no_grad(), r"torch.no_grad\(\)"),
    ]:
        with around, pytest.raises(everystep.UsageError, match=name):
            by_train(made, steps=3)
