"""The two trainings of a planted difference, and what is true of where and why they part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import everystep

__all__ = [
    "STEPS",
    "Kind",
    "Place",
    "Side",
    "Training",
    "images",
    "mlp",
    "of_classes",
    "of_words",
    "values",
    "with_module",
]

#: Of each training, if its kind needs no other number.
STEPS = 8
#: Returns the run.
Side = Callable[[], everystep.Run]
Model = Callable[[], nn.Module]
Data = Callable[[], tuple[Tensor, Tensor]]


class Place(NamedTuple):
    """An operation by what is known of it besides its numbers."""

    phase: str
    module: str | None
    operator: str


@dataclass(frozen=True)
class Kind:
    """A kind of difference between two trainings.

    step, place: of the first operation with another result, None where no operation has one; causes: in
    words, exactly; listed: lines of the list of what was asked for differently, if it has others than
    `data.digest`.
    """

    name: str
    one: Side
    other: Side
    step: int | None = None
    place: Place | None = None
    causes: tuple[str, ...] = ()
    listed: tuple[str, ...] | None = None


def mlp() -> nn.Module:
    """Return the model of trainings that need no other."""
    return with_module(nn.Tanh)()


def with_module(*made: Callable[[], nn.Module]) -> Model:
    """Return what makes a network of two linear layers with modules between them."""
    return lambda: nn.Sequential(nn.Linear(4, 8), *(make() for make in made), nn.Linear(8, 3))


def values() -> tuple[Tensor, Tensor]:
    """Return data to fit: x (20, 4), y (20, 3)."""
    return torch.randn(20, 4), torch.randn(20, 3)


def of_classes() -> tuple[Tensor, Tensor]:
    """Return data of three classes: x (20, 4), y (20)."""
    return torch.randn(20, 4), torch.arange(20) % 3


def of_words() -> tuple[Tensor, Tensor]:
    """Return rows of two words of six: x (20, 2), y (20, 3)."""
    return torch.randint(6, (20, 2), generator=torch.Generator().manual_seed(1)), torch.randn(20, 3)


def images() -> tuple[Tensor, Tensor]:
    """Return images of two channels: x (8, 2, 6, 6), y (8, 3)."""
    return torch.randn(8, 2, 6, 6), torch.randn(8, 3)


def descent(parameters: Any) -> torch.optim.Optimizer:
    """Return the optimizer of trainings that need no other."""
    return everystep.GradientDescent(parameters, lr=0.05)


@dataclass(frozen=True)
class Training:
    """A training from Python objects.

    before: changes model, x and y before the first step, or draws a random number; options: of
    `everystep.train`; state: from which model the initial values are, if not its own.
    """

    model: Model = mlp
    data: Data = values
    loss: Callable[[], Any] = nn.MSELoss
    optimizer: Callable[[Any], torch.optim.Optimizer] = descent
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None
    before: Callable[[nn.Module, Tensor, Tensor], Any] = lambda model, x, y: None
    after: Callable[[everystep.Run], everystep.Run] = lambda run: run
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> everystep.Run:
        """Train, and return the run."""
        torch.manual_seed(0)
        x, y = self.data()
        torch.manual_seed(1)
        model = self.model()
        # What a module draws for its own values must not change what is drawn after it.
        torch.manual_seed(2)
        with torch.no_grad():
            self.before(model, x, y)
        optimizer = self.optimizer(model.parameters())
        options: dict[str, Any] = {"steps": STEPS, "progress": False} | self.options
        if self.scheduler is not None:
            options["scheduler"] = self.scheduler(optimizer)
        return self.after(
            everystep.train(model, (x, y), loss=self.loss(), optimizer=optimizer, **options)
        )
