"""Models and losses of the user's that compute by how often they were called, in every way of Python.

Each kind is a function of a factor, which is 1 or 2 and counts how often it is asked for, or of the step
at which the kind changes.
"""

import functools
import random

import numpy as np
import torch
from tests.training.by_hand import Changed, mlp, new_training
from tests.training.python_cases.case import WHEN, Case, Network, Table, moments
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize

__all__ = ["COUNTS", "MODELS", "OWN_CASES", "factor_of"]

COUNTS = count = Table()
MODELS = model = Table()
LOSSES = loss = Table()


# Where calls are counted. Each returns a function that increments a count, and returns it.


@count
def an_attribute(owner):
    owner.calls = 0

    def counted():
        owner.calls += 1
        return owner.calls

    return counted


@count
def a_closure(owner):
    calls = 0

    def counted():
        nonlocal calls
        calls += 1
        return calls

    return counted


CALLS = 0


@count
def a_global(owner):
    global CALLS
    CALLS = 0

    def counted():
        global CALLS
        CALLS += 1
        return CALLS

    return counted


@count
def a_generator(owner):
    return functools.partial(next, iter(range(1, 10**6)))


@count
def an_array(owner):
    calls = np.zeros(1)

    def counted():
        calls[0] += 1
        return int(calls[0])

    return counted


@count
def a_buffer(owner):
    owner.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def counted():
        owner.calls.add_(1)
        return int(owner.calls)

    return counted


@count
def a_tensor_that_numpy_counts_in(owner):
    owner.calls = torch.zeros(1)

    def counted():
        owner.calls.numpy()[0] += 1
        return int(owner.calls.numpy()[0])

    return counted


# How a model asks for the factor.


@model
def a_forward(factor):
    return Changed(lambda model, h: h * factor())


@model
def a_branch(factor):
    return Changed(lambda model, h: h * 2 if factor() == 2.0 else h)


@model
def a_property(factor):
    class Scaled(Network):
        scale = property(lambda self: factor())

        def forward(self, x):
            return self.inner(x) * self.scale

    return Scaled()


@model
def a_linear_of_ones_own(factor):
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * factor()

    network = mlp()
    network[2] = Scaled(8, 2)
    return network


@model
def a_forward_that_was_replaced(factor):
    network = mlp()
    usual = network[2].forward
    network[2].forward = lambda x: usual(x) * factor()
    return network


@model
def a_parametrization(factor):
    class Scaled(nn.Module):
        def forward(self, weight):
            return weight * factor()

    network = mlp()
    parametrize.register_parametrization(network[2], "weight", Scaled(), unsafe=True)
    return network


@model
def a_forward_hook(factor):
    network = mlp()
    network.register_forward_hook(lambda module, inputs, output: output * factor())
    return network


@model
def a_hook_of_an_activation(factor):
    def change(model, h):
        h.register_hook(lambda gradient: gradient * factor())
        return h

    return Changed(change)


@model
def a_backward_of_ones_own(factor):
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(context, h):
            return h.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient * factor()

    return Changed(lambda model, h: Scale.apply(h))


def factor_of(place, when, at):
    """Return a function that counts its calls at a place, and returns 2.0 when told so, else 1.0."""
    counted = place(nn.Module())
    return lambda: 2.0 if when(counted(), at) else 1.0


# Losses.


def from_call(at):
    """Return a function that returns 2.0 from its call `at` on, and 1.0 before."""
    return factor_of(COUNTS["a closure"], WHEN["from"], at)


@loss
def a_function(at):
    factor = from_call(at)
    return lambda prediction, target: functional.mse_loss(prediction, target) * factor()


@loss
def a_partial(at):
    factor = from_call(at)

    def scaled(prediction, target, power):
        return (prediction - target).abs().pow(power).mean() * factor()

    return functools.partial(scaled, power=2)


@loss
def a_module_with_a_buffer(at):
    class Averaged(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("average", torch.ones(()))
            self.factor = from_call(at)

        def forward(self, prediction, target):
            found = functional.mse_loss(prediction, target)
            with torch.no_grad():
                self.average.lerp_(found, 0.1)
            return found / self.average * self.factor()

    return Averaged()


@loss
def derived_from_torchs(at):
    class Scaled(nn.MSELoss):
        factor = staticmethod(from_call(at))

        def forward(self, prediction, target):
            return super().forward(prediction, target) * self.factor()

    return Scaled()


@loss
def that_changes_the_prediction(at):
    factor = from_call(at)
    return lambda prediction, target: prediction.mul_(factor()).sub(target).square().mean()


@loss
def that_draws(at):
    factor = from_call(at)

    def noisy(prediction, target):
        noise = torch.randn_like(prediction) * random.random() * float(np.random.rand())
        return functional.mse_loss(prediction + noise, target) * factor()

    return noisy


@loss
def that_raises(at):
    factor = from_call(at)

    def raising(prediction, target):
        if factor() == 2.0:
            raise RuntimeError("on the way")
        return functional.mse_loss(prediction, target)

    return raising


def _cases():
    moment = moments()
    models, places = [*MODELS], [*COUNTS]
    for number in range(max(len(models), len(places))):
        name, place = models[number % len(models)], places[number % len(places)]
        when, step = next(moment)

        def make(at, how=MODELS[name], place=COUNTS[place], when=WHEN[when]):
            return new_training(lambda: how(factor_of(place, when, at)))

        yield Case(f"{name} that counts in {place}, {when} {step}", make, step)
    for name, how in LOSSES.items():

        def train(at, how=how):
            return new_training(loss=lambda: how(at))

        yield Case(f"a loss: {name}", train, 11, raises=name == "that raises")


OWN_CASES = [*_cases()]
