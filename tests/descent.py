"""What small trainings of many tests have in common."""

import random
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
from torch import nn

import everystep

__all__ = ["descend", "looped", "noting", "of_table", "recorded_as_it_is", "seeded", "trained"]


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


_sgd = partial(torch.optim.SGD, lr=0.1)


def looped(model, batches, loss_of, *, run=None, optimizer=_sgd, **others):
    """Record a loop over batches, and return its run.

    loss_of: makes a loss of the model and a batch; optimizer: is made of the parameters, None: the loop
    trains nothing; others: further parts and options of the recording.
    """
    parts = {"model": model} | ({"optimizer": optimizer(model.parameters())} if optimizer else {})
    with everystep.record(**parts, run=run, **others) as recording:
        for batch in recording.steps(batches):
            loss = loss_of(model, batch)
            recording.log(loss=descend(parts["optimizer"], loss) if optimizer else loss)
    return recording.run


def recorded_as_it_is(place, make):
    """Train by a loop, recorded and not: with the same losses, which replay. Return the run.

    make: returns the model, the optimizer, the batches, and what a step makes a loss with: of the model,
    its batch, and the number of steps before it.
    """
    known = []
    for run in (place, None):
        seeded()
        model, optimizer, batches, loss_of = make()
        record = everystep.record(model=model, optimizer=optimizer, run=run) if run else nullcontext()
        with record as recording:
            losses = []
            for x in batches if recording is None else recording.steps(batches):
                loss = descend(optimizer, loss_of(model, x, len(losses)))
                losses.append(loss.item())
                if recording is not None:
                    recording.log(loss=loss)
        known.append(losses)
    found = everystep.open(place)
    assert found.losses["loss"].to_list() == known[0] == known[1]
    assert found.verify(processes=1, progress=False).is_exact
    return found


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
