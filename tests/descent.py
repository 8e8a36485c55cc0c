"""What small trainings of many tests have in common."""

import random

import numpy as np
import torch
from torch import nn

import everystep

__all__ = ["descend", "noting", "of_table", "seeded", "trained"]


def seeded():
    """Seed every generator that a loop may draw from."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def noting(function, calls):
    """Return a function that notes what it is called with."""

    def noted(*args):
        calls.append(args)
        return function(*args)

    return noted


def descend(optimizer, loss):
    """Zero the gradients, compute and use them, and return the loss."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


def trained(model, data, **options):
    """Train by mean squares and gradient descent, unless the options are others; return the run."""
    settings = {"loss": nn.MSELoss(), "progress": False} | options
    settings.setdefault("optimizer", torch.optim.SGD(model.parameters(), lr=0.1))
    return everystep.train(model, data, **settings)


def of_table(path, target, *layers, loss="MSELoss", data=None, **settings):
    """Return a short experiment on a table."""
    experiment = {
        "steps": 3,
        "data": {"source": "table", "path": str(path), "target": target} | (data or {}),
        "model": {"layers": [*layers]},
        "loss": {"name": loss},
        "optimizer": {"name": "SGD", "lr": 0.01},
    }
    return experiment | settings
