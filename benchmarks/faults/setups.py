"""Random trainings, and faults of seven kinds."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

import everystep

__all__ = ["KINDS", "Setup", "Setups", "random_setup"]

Fault = Callable[[nn.Sequential, Tensor, Tensor], None]


@dataclass(frozen=True)
class Setup:
    """A training: Linear, activation, perhaps Dropout, Linear; the mean or the sum of squares.

    fault: changes the model, x or y before the first step, or draws a random number; changes: at which
    states a fork begins, and its lr or its seed.
    """

    seed: int
    rows: int
    sizes: tuple[int, int, int]
    activation: str
    dropout: float
    reduction: str
    batch_size: int | None
    optimizer: str
    lr: float
    steps: int
    threads: int = 1
    fault: Fault = lambda model, x, y: None
    changes: dict[int, dict[str, float]] = field(default_factory=dict)

    def make(self) -> tuple[nn.Sequential, Tensor, Tensor]:
        """Return the model and the data; seeds torch's generator."""
        torch.manual_seed(self.seed)
        n_in, hidden, n_out = self.sizes
        x, y = torch.randn(self.rows, n_in), torch.randn(self.rows, n_out)
        layers: list[nn.Module] = [nn.Linear(n_in, hidden), getattr(nn, self.activation)()]
        layers += [nn.Dropout(self.dropout)] * bool(self.dropout)
        model = nn.Sequential(*layers, nn.Linear(hidden, n_out))
        with torch.no_grad():
            self.fault(model, x, y)
        return model, x, y

    def optimizer_of(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer; all its operations are known."""
        if self.optimizer == "GradientDescent":
            return everystep.GradientDescent(model.parameters(), lr=self.lr)
        kind = getattr(torch.optim, self.optimizer)
        optimizer: torch.optim.Optimizer = kind(model.parameters(), lr=self.lr, foreach=False)
        return optimizer


Setups = tuple[Setup, Setup]


def random_setup(number: int, chance: random.Random) -> Setup:
    """Return a random small training."""
    rows = chance.randint(8, 40)
    return Setup(
        seed=number,
        rows=rows,
        sizes=(chance.randint(2, 12), chance.randint(3, 24), chance.randint(1, 4)),
        activation=chance.choice(["Tanh", "ReLU"]),
        dropout=chance.choice([0.0, 0.2]),
        reduction="mean",
        batch_size=chance.choice([None, chance.randint(2, rows)]),
        optimizer=chance.choice(["GradientDescent", "SGD", "Adam"]),
        lr=chance.choice([0.001, 0.01, 0.05]),
        steps=chance.randint(10, 60),
    )


def _place(tensor: Tensor, chance: random.Random) -> tuple[int, ...]:
    return tuple(chance.randrange(size) for size in tensor.shape)


def _parameter_fault(change: Callable[[Tensor], Tensor]) -> Callable[[Setup, random.Random], Setups]:
    def make(setup: Setup, chance: random.Random) -> Setups:
        number = chance.randrange(4)
        parameters = list(setup.make()[0].parameters())
        place = _place(parameters[number], chance)

        def fault(model: nn.Sequential, x: Tensor, y: Tensor) -> None:
            tensor = list(model.parameters())[number]
            tensor[place] = change(tensor[place])

        return setup, replace(setup, fault=fault)

    return make


def _up(value: Tensor) -> Tensor:
    return torch.nextafter(value, torch.tensor(math.inf))


def _swapped_rows(setup: Setup, chance: random.Random) -> Setups:
    one, other = chance.sample(range(setup.rows), 2)

    def fault(model: nn.Sequential, x: Tensor, y: Tensor) -> None:
        for tensor in (x, y):
            tensor[[one, other]] = tensor[[other, one]]

    return setup, replace(setup, fault=fault)


def _shifted_draw(setup: Setup, chance: random.Random) -> Setups:
    """One more number is drawn before the first step, or other ones from some step on."""
    setup = replace(setup, dropout=0.2)
    if chance.random() < 0.5:
        at = chance.randrange(setup.steps)
        setup = replace(setup, batch_size=None)
        return setup, replace(setup, changes={at: {"seed": chance.randrange(10**6)}})

    def fault(model: nn.Sequential, x: Tensor, y: Tensor) -> None:
        torch.rand(1)

    return setup, replace(setup, fault=fault)


def _other_lr(setup: Setup, chance: random.Random) -> Setups:
    at = chance.randrange(setup.steps)
    lr = chance.choice([setup.lr / 2, setup.lr * 1.01, setup.lr * 3])
    return setup, replace(setup, changes={at: {"lr": lr}})


def _data_value(setup: Setup, chance: random.Random) -> Setups:
    _, x, y = setup.make()
    is_input, by = chance.random() < 0.7, chance.choice([0.0, 1.0, -0.25])
    place = _place(x if is_input else y, chance)

    def fault(model: nn.Sequential, x: Tensor, y: Tensor) -> None:
        tensor = x if is_input else y
        tensor[place] = tensor[place] + by if by else _up(tensor[place])

    return setup, replace(setup, fault=fault)


def _threads(setup: Setup, chance: random.Random) -> Setups:
    """Sums of many numbers depend on how many threads share them."""
    wide = replace(
        setup,
        rows=300,
        sizes=(setup.sizes[0], setup.sizes[1], chance.choice([100, 300, 400, 500])),
        reduction=chance.choice(["mean", "sum"]),
        batch_size=chance.choice([None, 280]),
        lr=1e-7,
        steps=8,
    )
    return wide, replace(wide, threads=2)


KINDS: dict[str, Callable[[Setup, random.Random], Setups]] = {
    "an ulp in a weight": _parameter_fault(_up),
    "a sign flip": _parameter_fault(torch.neg),
    "a swapped pair of rows": _swapped_rows,
    "a shifted random draw": _shifted_draw,
    "another lr from step k": _other_lr,
    "a changed data value": _data_value,
    "another thread count": _threads,
}
