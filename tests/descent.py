"""What small trainings of many tests have in common."""

import random
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import everystep

__all__ = [
    *("as_alone", "bits", "descend", "files_of", "looped", "noting", "of_table", "recorded_as_it_is"),
    *("seeded", "trained", "unrecorded"),
]


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


def files_of(directory, but="*-shm"):
    """Return the contents of the files in a directory, but for some, and for empty ones."""
    paths = (path for path in directory.rglob("*") if path.is_file() and not path.match(but))
    return {path: content for path in paths if (content := path.read_bytes())}


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


class Unrecorded:
    """Does what a recording does for the loop around it: it counts steps."""

    step_count = 0
    epochs = staticmethod(range)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def steps(self, batches):
        for batch in batches:
            yield batch
            self.step_count += 1

    def step(self, batch=None):
        return nullcontext()

    paused = staticmethod(nullcontext)

    def log(self, **values):
        pass


def unrecorded(**parts):
    return Unrecorded()


def bits(tensor):
    """Return shape, dtype and bytes of a tensor."""
    whole = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    flat = whole.reshape(-1).contiguous().view(torch.uint8)
    return tuple(tensor.shape), tensor.dtype, flat.numpy().tobytes()


def as_alone(place, body):
    """Run a loop without everystep and recorded: with the same results, bit for bit, which replay.

    body: is called with what makes a recording of parts; returns tensors and numbers, nested in any way.
    Return the run, and these.
    """
    known = []
    for record in (unrecorded, partial(everystep.record, run=place)):
        seeded()
        results = body(record)
        leaves = tree_leaves(results)
        known.append([bits(each) if isinstance(each, torch.Tensor) else each for each in leaves])
    assert known[0] == known[1]
    run = everystep.open(place)
    found = run.verify(processes=1, progress=False)
    assert found.is_exact, found
    return run, results


def recorded_as_it_is(place, make):
    """Train by a loop, recorded and not: with the same losses, which replay. Return the run.

    make: returns the model, the optimizer, the batches, and what a step makes a loss with: of the model,
    its batch, and the number of steps before it.
    """

    def body(record):
        model, optimizer, batches, loss_of = make()
        losses = []
        with record(model=model, optimizer=optimizer) as recording:
            for x in recording.steps(batches):
                loss = descend(optimizer, loss_of(model, x, len(losses)))
                losses.append(loss.item())
                recording.log(loss=loss)
        return losses

    run, losses = as_alone(place, body)
    assert run.losses["loss"].to_list() == losses
    return run


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
