"""Does a bad row of the data show, in a step of a trained network that sees it?

`python -m benchmarks.rows`. Plants 50 bad rows. In digits: a wrong label, or an image with each number
20 standard deviations off. In a table with a number to predict: a target ten times too large, or one
number 20 standard deviations off. A network is trained without them; forks go on with data that has
them, at a learning rate so small that none spoils the network for the next. At a step with one bad row
in its batch, the rows are ranked by loss and by gradient (`step.rows`). Exits with 1 if fewer
than 48 are first by one of the two. What the network gets right for certain, such as noise that it takes
for the digit of its label, has loss 0 and no gradient: such rows have no effect, and are counted apart.
"""

from __future__ import annotations

import random
import sys
import tempfile
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import everystep
from everystep.run import Run

__all__ = ["Found", "main", "planted", "trained"]

KINDS = ("wrong label", "outlier")
#: Bad rows of one fork, and of each data.
TOGETHER, EACH = 5, 25
BATCH, EPOCHS = 32, 20


class Found(NamedTuple):
    """Where a bad row ranks among those of its batch, from 1, by loss and by gradient."""

    data: str
    kind: str
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


def trained(data: str, directory: Path, epochs: int = EPOCHS) -> Run:
    """Return a run of a network that is trained with sound data."""
    torch.manual_seed(0)
    if data == "digits":
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10)
        )
    else:
        model = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 1))
    return everystep.train(
        model,
        digits() if data == "digits" else table(),
        loss=nn.CrossEntropyLoss() if data == "digits" else nn.MSELoss(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        epochs=epochs,
        batch_size=BATCH,
        run=directory,
        progress=False,
    )


def planted(run: Run, data: str, seed: int, directory: Path) -> list[Found]:
    """Go on for an epoch with bad rows, and return where each ranks."""
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
            found[here[0]] = Found(data, bad[here[0]], ranks[0], ranks[1], float(rows.loss[place]) > 0)
    return [*found.values()]


def main() -> None:
    """Plant 50 rows, and print where they rank."""
    found: list[Found] = []
    for data in ("digits", "table"):
        with tempfile.TemporaryDirectory() as place:
            run = trained(data, Path(place) / "run")
            seed = 0
            while sum(each.data == data and each.has_effect for each in found) < EACH:
                for each in planted(run, data, seed, Path(place) / f"fork-{seed}"):
                    if sum(e.data == data and e.has_effect for e in found) < EACH:
                        found.append(each)
                seed += 1
    print("| data | bad row | planted | without effect | first by loss | by gradient | by one of them |")
    print("| --- | --- | --: | --: | --: | --: | --: |")
    for data in ("digits", "table"):
        for kind in KINDS:
            of = [each for each in found if (each.data, each.kind) == (data, kind)]
            counts = (sum(e.by_loss == 1 for e in of), sum(e.by_gradient == 1 for e in of))
            firsts = sum(each.is_first for each in of)
            none = sum(not each.has_effect for each in of)
            print(f"| {data} | {kind} | {len(of)} | {none} | {counts[0]} | {counts[1]} | {firsts} |")
    with_effect = [each for each in found if each.has_effect]
    for each in with_effect:
        if not each.is_first:
            print(f"not first: {each}")
    firsts = sum(each.is_first for each in with_effect)
    print(f"{firsts} of {len(with_effect)} with an effect are first")
    sys.exit(0 if firsts >= 48 else 1)


if __name__ == "__main__":
    main()
