"""What is trained: the network, its data, the update, and which rows each step sees."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import repeat
from typing import Literal

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import everystep
from everystep.experiment.batches import Batches

__all__ = [
    "SEED",
    "WORKLOADS",
    "Convolutional",
    "Network",
    "Perceptron",
    "Start",
    "Transformer",
    "Workload",
]

#: Of parameters, data and the order of the batches.
SEED = 0
DIGITS = 28 * 64  # of 1797: whole batches only, since one `lax.scan` cannot take a shorter last one


@dataclass(frozen=True)
class Perceptron:
    """Linear layers with ReLU between them, of these sizes from input to output."""

    sizes: tuple[int, ...]

    def make(self) -> nn.Sequential:
        """Return the network as torch initializes it; takes (N, sizes[0])."""
        layers: list[nn.Module] = []
        for inputs, outputs in zip(self.sizes, self.sizes[1:], strict=False):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    def __str__(self) -> str:
        return f"linear {'-'.join(map(str, self.sizes))}, ReLU between"


@dataclass(frozen=True)
class Convolutional:
    """Two convolutions of 3 x 3, then a linear layer: that of everystep's experiment `digits`."""

    channels: tuple[int, int] = (16, 32)
    side: int = 8  # of an image, in pixels
    classes: int = 10

    def make(self) -> nn.Sequential:
        """Return the network as torch initializes it; takes (N, 1, side, side)."""
        first, second = self.channels
        return nn.Sequential(
            nn.Conv2d(1, first, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(first, second, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(second * (self.side // 2) ** 2, self.classes),
        )

    def __str__(self) -> str:
        first, second = self.channels
        return f"3 x 3 convolutions 1-{first}-{second}, ReLU after each, 2 x 2 maximum, linear"


@dataclass(frozen=True)
class Transformer:
    """Encoder layers (normalized after each part, ReLU, no dropout) between two linear layers."""

    layers: int = 2
    sequence: int = 16
    inputs: int = 4  # of each position
    width: int = 32
    heads: int = 4
    feedforward: int = 64
    classes: int = 10

    def make(self) -> nn.Sequential:
        """Return the network as torch initializes it; takes (N, sequence, inputs)."""
        encoder = [
            nn.TransformerEncoderLayer(
                self.width, self.heads, self.feedforward, dropout=0.0, batch_first=True
            )
            for _ in range(self.layers)
        ]
        head = nn.Linear(self.sequence * self.width, self.classes)
        return nn.Sequential(nn.Linear(self.inputs, self.width), *encoder, nn.Flatten(), head)

    def __str__(self) -> str:
        sizes = f"width {self.width}, {self.heads} heads, feedforward {self.feedforward}"
        return f"{self.layers} transformer encoder layers, {sizes}, sequence {self.sequence}, linear"


Network = Perceptron | Convolutional | Transformer


@dataclass(frozen=True)
class Start:
    """What every peer starts from: the same parameters, data and loss."""

    model: nn.Sequential
    x: Tensor  # (rows, ...)
    y: Tensor  # (rows, outputs), or (rows,) of classes
    loss: nn.Module


@dataclass(frozen=True)
class Workload:
    """One training.

    Random data takes the chapter's loss, the sum of squares; digits take cross entropy. The
    update "gradient descent" is the chapter's: parameter - gradient * lr.
    """

    key: str
    name: str
    network: Network
    steps: int
    lr: float
    rows: int
    data: Literal["random", "digits"] = "random"
    update: Literal["gradient descent", "Adam", "AdamW"] = "gradient descent"
    batch_size: int | None = None  # all rows at every step where it is None

    def make(self) -> Start:
        """Return the start, the same at every call; seeds torch's generator."""
        torch.manual_seed(SEED)
        if self.data == "digits":
            x, y = self._digits()
            return Start(self.network.make(), x, y, nn.CrossEntropyLoss())
        assert isinstance(self.network, Perceptron)
        x = torch.randn(self.rows, self.network.sizes[0])
        y = torch.randn(self.rows, self.network.sizes[-1])
        return Start(self.network.make(), x, y, nn.MSELoss(reduction="sum"))

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the update as a torch optimizer, in torch's fastest form."""
        parameters = list(parameters)
        match self.update:
            case "gradient descent":
                return everystep.GradientDescent(parameters, lr=self.lr)
            case "Adam":
                return torch.optim.Adam(parameters, lr=self.lr, fused=True)
            case "AdamW":
                return torch.optim.AdamW(parameters, lr=self.lr, fused=True)

    @property
    def rows_a_step(self) -> int:
        """How many rows each step sees."""
        return self.batch_size or self.rows

    @property
    def epochs(self) -> int:
        """How often all rows are seen."""
        return self.steps * self.rows_a_step // self.rows

    def order(self) -> Tensor | None:
        """Return the rows of each step (steps, batch_size) as int64, or None for all in order."""
        return None if self.batch_size is None else _order(self.rows, self.batch_size, self.steps)

    def batches(self, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the x and y of each step."""
        order = self.order()
        if order is None:
            yield from repeat((x, y), self.steps)
        else:
            for rows in order.unbind():
                yield x.index_select(0, rows), y.index_select(0, rows)

    def _digits(self) -> tuple[Tensor, Tensor]:
        bunch = load_digits()
        images = torch.from_numpy(bunch.images[: self.rows]).float() / 16  # (rows, 8, 8), 0 to 1
        y = torch.from_numpy(bunch.target[: self.rows]).long()
        match self.network:
            case Perceptron():
                return images.flatten(1), y
            case Convolutional():
                return images.unsqueeze(1), y
            case Transformer(sequence=sequence, inputs=inputs):
                return images.reshape(-1, sequence, inputs), y


@cache
def _order(rows: int, batch_size: int, steps: int) -> Tensor:
    """Everystep's own order of this seed, so that it and all who can follow see the same batches."""
    batches = Batches(rows, batch_size, SEED)
    indices = [batches.indices(step) for step in range(1, steps + 1)]
    return torch.stack([rows for rows in indices if rows is not None])


_small = partial(Workload, network=Perceptron((20, 32, 1)), rows=64, steps=10_000)
_chapter = partial(Workload, network=Perceptron((1000, 100, 10)), rows=64)
_digits = partial(Workload, data="digits", rows=DIGITS, batch_size=64, update="Adam")

WORKLOADS = [
    _chapter("chapter-500", "chapter, 500 steps", steps=500, lr=1e-4),
    # At 1e-4 the loss reaches the rounding of float32 after some hundred steps: nothing to compare.
    _chapter("chapter-5000", "chapter, 5,000 steps", steps=5000, lr=1e-6),
    _small("small", "small", lr=1e-5),
    _small("small-adamw", "small, AdamW", update="AdamW", lr=2e-5),
    Workload("medium", "medium", Perceptron((256, 64, 10)), steps=3000, lr=1e-6, rows=256),
    Workload("wide", "wide", Perceptron((784, 1024, 10)), steps=100, lr=1e-6, rows=512),
    Workload("wide-400", "wide, 400 steps", Perceptron((784, 1024, 10)), steps=400, lr=1e-6, rows=512),
    _digits("digits", "digits, Adam", network=Perceptron((64, 128, 64, 10)), steps=60 * 28, lr=1e-4),
    _digits("convolution", "convolution, Adam", network=Convolutional(), steps=6 * 28, lr=1e-3),
    _digits("transformer", "transformer, Adam", network=Transformer(), steps=4 * 28, lr=1e-3),
]
