"""A loop that tries to make one step pass for another, and what the loops are made of."""

import torch
from tests.descent import descend
from torch import nn
from torch.nn import functional

__all__ = ["STEPS", "Loops", "batches", "network", "sgd", "trained", "update"]

STEPS = 28


class Loops(dict):
    """Loops by name, each with how many of its steps must be followed at least."""

    def __call__(self, least):
        def noted(function):
            self[function.__name__] = function, least
            return function

        return noted


def network():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def batches(count=STEPS, rows=8):
    generator = torch.Generator().manual_seed(1)
    made = torch.randn(count, rows, 9, generator=generator)
    return [(each[:, :6].clone(), each[:, 6:].clone()) for each in made]


def sgd(model, **settings):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.05} | settings)


def update(model, optimizer, x, y):
    return descend(optimizer, functional.mse_loss(model(x), y))


def trained(record, body, model=None, optimizer=None, given=None, between=None, **parts):
    """Run a loop around a body that is called with model, optimizer, x, y and the step's number."""
    model = model or network()
    optimizer = optimizer or sgd(model)
    with record(model=model, optimizer=optimizer, **parts) as recording:
        for number, (x, y) in enumerate(given or batches(), start=1):
            if between is not None:
                between(model, optimizer, number)
            with recording.step((x, y)):
                recording.log(loss=body(model, optimizer, x, y, number))
    return model
