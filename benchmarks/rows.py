"""Does a bad row of the data show, in a step of a trained network that sees it?

In digits: a wrong label, or an image with each number 20 standard deviations off. In a table with a
number to predict: a target ten times too large, or one number 20 standard deviations off. A network is
trained without them; a fork continues with data that has them, at a learning rate so small that none
spoils the network for the next. At a step with one bad row in its batch, the rows are ranked by loss and
by gradient (`step.rows`). What the network gets right for certain, such as noise that it takes for the
digit of its label, has loss 0 and no gradient: such rows have no effect.
"""

from __future__ import annotations

import random
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import everystep
from everystep.run import Run

__all__ = ["Found", "planted", "trained"]

KINDS = ("wrong label", "outlier")
#: Bad rows of one fork.
TOGETHER = 5
BATCH = 32


class Found(NamedTuple):
    """Where a bad row ranks among those of its batch, from 1, by loss and by gradient."""

    by_loss: int
    by_gradient: int
    has_effect: bool

    @property
    def is_first(self) -> bool:
        """Whether it is the first by one of them."""
        return 1 in (self.by_loss, self.by_gradient)


def digits() -> tuple[Tensor, Tensor]:
    """Return images (N, 1, 8, 8), standardized, and classes (N)."""
    x, y = _bundled("digits", torch.int64)
    return ((x - x.mean()) / x.std()).reshape(-1, 1, 8, 8), y


def table() -> tuple[Tensor, Tensor]:
    """Return columns (N, 10), each standardized, and a number to predict (N, 1), of deviation 1."""
    x, y = _bundled("diabetes", torch.float32)
    return (x - x.mean(0)) / x.std(0), (y / y.std()).reshape(-1, 1)


def _bundled(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    with np.load(str(resources.files("everystep.experiment") / "bundled" / f"{name}.npz")) as file:
        return torch.tensor(file["x"], dtype=torch.float32), torch.tensor(file["y"], dtype=dtype)


def trained(data: str, directory: Path, epochs: int) -> Run:
    """Return a run of a network that is trained with sound data."""
    torch.manual_seed(0)
    if data == "digits":
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10)
        )
    else:
        model = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 1))
    loss = nn.CrossEntropyLoss() if data == "digits" else nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    settings: dict[str, Any] = {"epochs": epochs, "batch_size": BATCH, "run": directory}
    given = digits() if data == "digits" else table()
    return everystep.train(model, given, loss=loss, optimizer=optimizer, progress=False, **settings)


def planted(run: Run, data: str, seed: int, directory: Path) -> list[Found]:
    """Continue for an epoch with bad rows, and return where each ranks."""
    chance = random.Random(f"{data} {seed}")
    x, y = digits() if data == "digits" else table()
    bad = {
        row: KINDS[(seed + place) % 2]
        for place, row in enumerate(chance.sample(range(len(x)), TOGETHER))
    }
    for row, kind in bad.items():
        if kind == "wrong label":
            y[row] = (
                chance.choice([c for c in range(10) if c != y[row]]) if data == "digits" else 10 * y[row]
            )
        else:
            numbers = x[row].view(-1)
            for place in range(len(numbers)) if data == "digits" else [chance.randrange(len(numbers))]:
                numbers[place] += chance.choice((-20.0, 20.0))
    steps = len(run) + -(-len(x) // BATCH)
    fork = run.fork(len(run), lr=1e-7, steps=steps, data=(x, y), run=directory, progress=False)
    found: dict[int, Found] = {}
    for step in fork[len(run) + 1 :]:
        here = [row for row in bad if row in step.rows.numbers]
        if len(here) == 1:
            rows = step.rows
            place = rows.numbers.index(here[0])
            ranks = [rows.ranked(values).index(place) + 1 for values in (rows.loss, rows.gradient)]
            found[here[0]] = Found(ranks[0], ranks[1], float(rows.loss[place]) > 0)
    return [*found.values()]
