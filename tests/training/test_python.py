"""Optimizers, schedules, losses, models and data sets of the user's train as in the loop by hand.

Each counts, keeps, exchanges, draws or raises in a way of its own, and changes what it does at step AT,
which is between two checks of a program.
"""

import random

import numpy as np
import pytest
import torch
from tests.training.by_hand import Changed, by_hand, by_train, contents, mlp, momentum, new_training
from torch import nn
from torch.nn import functional
from torch.optim import SGD, Optimizer, lr_scheduler
from torch.utils.data import Dataset

import everystep
from everystep.errors import EverystepError

AT, STEPS = 11, 20
#: A step that no training reaches.
NEVER = 10**9

OPTIMIZERS, SCHEDULERS, LOSSES, MODELS, DATASETS = {}, {}, {}, {}, {}


def one_of(table):
    def add(made):
        table[made.__name__] = made
        return made

    return add


class Counting(SGD):
    """Counts its steps, and changes at one of them."""

    def __init__(self, parameters, at):
        super().__init__(parameters, lr=0.02, momentum=0.9)
        self.at, self.calls = at, 0

    @property
    def all(self):
        return self.param_groups[0]["params"]

    def step(self, closure=None):
        self.calls += 1
        super().step(closure)


@one_of(OPTIMIZERS)
class CountsInAStateOfNoParameter(Counting):
    def step(self, closure=None):
        state = self.state["all"]
        state["calls"] = state.get("calls", torch.zeros(())) + 1
        with torch.no_grad():
            for parameter in self.all:
                parameter.add_(parameter.grad, alpha=-0.05 * (2 if state["calls"] >= self.at else 1))


@one_of(OPTIMIZERS)
class Wraps(Optimizer):
    """Holds another optimizer, of which it shows the groups and the state."""

    def __init__(self, parameters, at):
        self.inner = SGD(parameters, lr=0.02, momentum=0.9)
        super().__init__(self.inner.param_groups, self.inner.defaults)
        self.param_groups, self.state = self.inner.param_groups, self.inner.state
        self.at, self.calls = at, 0

    def zero_grad(self, set_to_none=True):
        self.inner.zero_grad(set_to_none)

    def step(self, closure=None):
        self.calls += 1
        if self.calls >= self.at:
            for parameter in self.param_groups[0]["params"]:
                parameter.grad *= 2
        self.inner.step()


class OfTheUser(lr_scheduler.LRScheduler):
    def __init__(self, optimizer, at):
        self.at = at
        super().__init__(optimizer)

    def get_lr(self):
        return [group["lr"] for group in self.optimizer.param_groups]


@one_of(SCHEDULERS)
class LooksAtGradientsAndParameters(OfTheUser):
    def get_lr(self):
        parameters = self.optimizer.param_groups[0]["params"]
        norm = sum(float(p.grad.norm()) for p in parameters if p.grad is not None)
        if self.last_epoch >= self.at:
            with torch.no_grad():
                for parameter in parameters:
                    parameter.mul_(0.99)
        return [rate / (1 + norm * (self.last_epoch >= self.at)) for rate in self.base_lrs]


def doubled_from(at):
    """Return a function that returns 2.0 from its call `at` on, and 1.0 before."""
    calls = []
    return lambda: 2.0 if calls.append(1) or len(calls) >= at else 1.0


@one_of(LOSSES)
def a_module_with_a_buffer(at):
    class Averaged(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("average", torch.ones(()))
            self.factor = doubled_from(at)

        def forward(self, prediction, target):
            found = functional.mse_loss(prediction, target)
            with torch.no_grad():
                self.average.lerp_(found, 0.1)
            return found / self.average * self.factor()

    return Averaged()


@one_of(LOSSES)
def that_changes_the_prediction_and_draws(at):
    factor = doubled_from(at)

    def noisy(prediction, target):
        noise = torch.randn_like(prediction) * random.random() * float(np.random.rand())
        return prediction.mul_(factor()).sub(target).add(noise).square().mean()

    return noisy


@one_of(MODELS)
def that_changes_what_it_trains(at):
    """Weights are clamped in place, and others exchanged."""

    def forward(model, h):
        with torch.no_grad():
            model.inner[0].weight.clamp_(-0.4, 0.4)
            weight = model.inner[2].weight
            weight.data = functional.normalize(weight.data, dim=1)
        return h * factor()

    factor = doubled_from(at)
    return Changed(forward)


@one_of(MODELS)
def that_takes_gradients_inside(at):
    def forward(model, h):
        h.square().mean().backward(retain_graph=True)
        x = h.detach().requires_grad_()
        (slope,) = torch.autograd.grad(x.pow(3).sum(), x, create_graph=True)
        return (h + 0.1 * slope + 0.1 * model.inner[0].weight.grad.sum()) * factor()

    factor = doubled_from(at)
    return Changed(lambda model, h: forward(model, h) if h.requires_grad else h)


@one_of(MODELS)
def that_grows(at):
    """It makes a buffer at its first call, another layer later, and unfreezes one."""

    def forward(model, h):
        if not hasattr(model, "scale"):
            model.register_buffer("scale", 1 / h.detach().std())
        if factor() == 2.0:
            model.inner[0].requires_grad_(True)
            h = model.more(h)
        return h * model.scale

    factor, made = doubled_from(at), Changed(forward)
    made.more = nn.Linear(2, 2)
    made.inner[0].requires_grad_(False)
    return made


class Rows(Dataset):
    """Rows that change once; 8 are read at each step."""

    def __init__(self, at):
        self.x, self.y = torch.randn(20, 4), torch.randn(20, 2)
        self.at, self.calls = at, 0
        self.generator, self.random = torch.Generator().manual_seed(1), random.Random(1)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, row):
        self.calls += 1
        return self.row(self.x[row], row), self.y[row]

    def row(self, x, row):
        return 2 * x if self.is_changed else x

    @property
    def is_changed(self):
        return self.calls > 8 * self.at


DATASETS["ChangesOnTheWay"] = Rows


@one_of(DATASETS)
class ChangesItsTensors(Rows):
    def row(self, x, row):
        return super().row(x.mul_(1.001), row)


def of_dataset(kind, at):
    made = new_training(mlp)
    made.dataset = kind(at)
    return made


def with_a_metric(at):
    """Evaluations are calls of the model too."""
    factor = doubled_from(at)
    made = new_training(lambda: Changed(lambda model, h: h * factor()))
    made.metrics = {"mine": lambda prediction, target: 0.0}
    return made


def with_a_plateau(at):
    """Evaluations decide the lr."""
    factor = doubled_from(at)
    return new_training(
        lambda: Changed(lambda model, h: h * factor()),
        scheduler=lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
    )


CASES = {
    **{
        name: lambda at, kind=kind: new_training(optimizer=lambda p: kind(p, at))
        for name, kind in OPTIMIZERS.items()
    },
    **{
        f"scheduler {name}": lambda at, kind=kind: new_training(scheduler=lambda o: kind(o, at))
        for name, kind in SCHEDULERS.items()
    },
    **{
        f"loss {name}": lambda at, make=make: new_training(loss=lambda: make(at))
        for name, make in LOSSES.items()
    },
    **{
        f"model {name}": lambda at, make=make: new_training(lambda: make(at), optimizer=momentum)
        for name, make in MODELS.items()
    },
    **{
        f"data set {name}": lambda at, kind=kind: of_dataset(kind, at) for name, kind in DATASETS.items()
    },
    "a metric": with_a_metric,
    "a plateau": with_a_plateau,
}


def outcome(train, made, **options):
    """Return losses and all else that a training leaves behind."""
    return train(made, steps=STEPS, **options), contents(made)


@pytest.mark.sweep(every=2)
@pytest.mark.parametrize("name", CASES)
def test_python_does_what_it_does_in_the_loop(name):
    def losses_by_train(made, **options):
        run = by_train(made, **options)
        assert run.verify(progress=False, processes=1).is_exact
        return run.losses["loss"].to_list()

    options = {"batch_size": 8} if name.startswith("data set") else {}
    expected = outcome(by_hand, CASES[name](AT), **options)
    assert outcome(losses_by_train, CASES[name](AT), **options) == expected
    assert outcome(by_hand, CASES[name](NEVER), **options) != expected  # or the case would show nothing


def test_an_optimizer_that_raises_is_named():
    class Raising(Counting):
        def step(self, closure=None):
            super().step(closure)
            if self.calls == self.at:
                raise ZeroDivisionError("on the way")

    made = new_training(optimizer=lambda parameters: Raising(parameters, AT))
    with pytest.raises(EverystepError, match=r"Raising\.step\(\) raises ZeroDivisionError: on the way"):
        by_train(made, steps=STEPS)
    assert len(everystep.runs()[0]) == AT - 1
