"""Modules that carry something from step to step, as people write them."""

import random

import torch
from tests.training.by_hand import Changed, momentum, new_training
from tests.training.python_cases.case import WHEN, Case, Network, Table
from tests.training.python_cases.own import COUNTS, factor_of
from torch import nn
from torch.nn import functional as F  # noqa: N812  # as people write
from torch.optim import lr_scheduler

__all__ = ["CARRYING_CASES"]

MODELS = model = Table()


@model
class WarmsUp(Network):
    """Counts its steps in a number, and is another from the tenth on."""

    def __init__(self, warmup_steps=10):
        super().__init__()
        self.step, self.warmup_steps = 0, warmup_steps

    def forward(self, x):
        if self.training:
            self.step += 1
        h = self.inner(x)
        return h * min(1.0, self.step / self.warmup_steps)


@model
class CarriesItsHiddenState(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.GRUCell(4, 5), nn.Linear(5, 2)
        self.hidden = None

    def forward(self, x):
        if self.hidden is None or self.hidden.size(0) != x.size(0):
            self.hidden = x.new_zeros(x.size(0), 5)
        h = self.cell(x, self.hidden)
        self.hidden = h.detach()
        return self.out(h)


@model
class MovingAverageInABuffer(Network):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, x):
        h = self.inner(x)
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * h.mean(0))
        return h - self.mean


@model
class MovingAverageInNoBuffer(Network):
    def __init__(self):
        super().__init__()
        self.mean = torch.zeros(2)

    def forward(self, x):
        h = self.inner(x)
        self.mean.lerp_(h.detach().mean(0), 0.1)
        return h - self.mean


@model
class QueueWithAPointer(Network):
    """Keeps the last predictions, as momentum contrast does."""

    def __init__(self):
        super().__init__()
        self.register_buffer("queue", torch.zeros(60, 2))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    def forward(self, x):
        h = self.inner(x)
        start = int(self.pointer)
        self.queue[start : start + len(h)] = h.detach()
        self.pointer[0] = (start + len(h)) % 60
        return h + 0.1 * self.queue.mean(0)


@model
class CountsBatches(Network):
    """Weighs by a count in a buffer, which no Python reads."""

    def __init__(self):
        super().__init__()
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, x):
        self.batches.add_(1)
        return self.inner(x) * torch.clamp(self.batches / 15, max=1.0)


@model
class SetsItsMaskAtTheFirstCall(Network):
    def forward(self, x):
        h = self.inner(x)
        if not hasattr(self, "scale"):
            self.register_buffer("scale", 1 / h.detach().std())
        return h * self.scale


@model
class ClampsItsWeights(Network):
    def forward(self, x):
        with torch.no_grad():
            for parameter in self.inner.parameters():
                parameter.clamp_(-0.4, 0.4)
        return self.inner(x)


@model
class NormalizesItsWeights(Network):
    """A new tensor in the place of the old one."""

    def forward(self, x):
        weight = self.inner[2].weight
        weight.data = F.normalize(weight.data, dim=1)
        return self.inner(x)


@model
class Teacher(Network):
    """A copy that follows slowly."""

    def __init__(self):
        super().__init__()
        self.teacher = Network().requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.parameters(), strict=False):
                slow.mul_(0.95).add_(fast, alpha=0.05)
            target = self.teacher(x)
        return self.inner(x) + 0.1 * target


@model
class StochasticDepth(Network):
    def __init__(self):
        super().__init__()
        self.block = nn.Linear(4, 4)

    def forward(self, x):
        if not self.training or torch.rand(1).item() > 0.3:
            x = x + self.block(x)
        return self.inner(x)


@model
class TeacherForcing(Network):
    def forward(self, x):
        h = self.inner(x)
        if random.random() < 0.5:
            h = h + x[:, :2]
        return h


@model
class GrowsItsLayers(Network):
    """Progressive growing: a layer more at the tenth call."""

    def __init__(self):
        super().__init__()
        self.layers, self.calls = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), 0

    def forward(self, x):
        self.calls += 1
        for layer in self.layers[: 1 + self.calls // 10]:
            x = x + layer(x)
        return self.inner(x)


@model
class UnfreezesOnTheWay(Network):
    def __init__(self):
        super().__init__()
        self.calls = 0
        self.inner[0].requires_grad_(False)

    def forward(self, x):
        self.calls += 1
        if self.calls == 9:
            self.inner[0].requires_grad_(True)
        return self.inner(x)


@model
class SwitchesItsMode(Network):
    """Batch norm is frozen from the thirteenth call on."""

    def __init__(self):
        super().__init__()
        self.norm, self.calls = nn.BatchNorm1d(4), 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 13:
            self.norm.eval()
        return self.inner(self.norm(x))


@model
class AsksForTheGradientOfItsInput(Network):
    def forward(self, x):
        x.requires_grad_()
        return self.inner(x)


@model
class ChangesItsInput(Network):
    def forward(self, x):
        return self.inner(x.mul_(0.99))


@model
class TakesTheGradientInside(Network):
    def forward(self, x):
        x = x.detach().requires_grad_()
        h = self.inner(x)
        (slope,) = torch.autograd.grad(h.sum(), x, create_graph=True)
        return h + 0.1 * slope[:, :2]


@model
class BackwardInside(Network):
    """Calls backward itself: gradients that are zeroed before the step's own."""

    def forward(self, x):
        h = self.inner(x)
        if self.training:
            h.square().mean().backward(retain_graph=True)
        return h + 0.1 * self.inner[0].weight.grad.sum() if self.training else h


@model
class BranchesOnTheSizeOfItsBatch(Network):
    def forward(self, x):
        h = self.inner(x)
        return 2 * h if x.shape[0] < 8 else h


@model
class KeepsItsActivations(Network):
    def __init__(self):
        super().__init__()
        self.activations = {}

    def forward(self, x):
        h = self.inner[1](self.inner[0](x))
        self.activations["hidden"] = h
        return self.inner[2](h)


def counting(at):
    """Return a model that computes something else from its call `at` on."""
    factor = factor_of(COUNTS["a closure"], WHEN["from"], at)
    return Changed(lambda model, h: h * factor())


def evaluated_and_counting(at):
    """Evaluations are calls too."""
    trained = new_training(lambda: counting(at))
    trained.metrics = {"mine": lambda prediction, target: 0.0}
    return trained


def scheduled_by_validation(at):
    """Evaluations decide the lr."""

    def schedule(optimizer):
        return lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, factor=0.5)

    return new_training(lambda: counting(at), schedule=schedule)


def _cases():
    for name, kind in MODELS.items():

        def make(at, kind=kind):
            return new_training(kind, optimizer=momentum)

        options = {"batch_size": 8 if kind is BranchesOnTheSizeOfItsBatch else None}
        yield Case(f"a module that carries something, {name}", make, options=options)
    yield Case("a count of steps and evaluations", evaluated_and_counting, 12)
    yield Case("a count of steps and evaluations for a schedule", scheduled_by_validation, 12)


CARRYING_CASES = [*_cases()]
