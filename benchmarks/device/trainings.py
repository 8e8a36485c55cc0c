"""Small trainings on a device: by everystep in its three ways, and by a loop that is written out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import everystep
from benchmarks.device import LOOKED_AT, STEPS

__all__ = ["TRAININGS", "Trained", "Training"]


class Trained(NamedTuple):
    """What came of a training.

    losses: of each step; gradients: as backward left them at LOOKED_AT, by name, none if they were not
    kept; parameters: at the end, with buffers, by name.
    """

    losses: list[float]
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]


class Training(NamedTuple):
    """A training: model: makes it; inputs: makes those of a batch of 16; how: of everystep's ways."""

    model: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    optimizer: Callable[..., torch.optim.Optimizer]
    how: Callable[[_Ready, Path], Any]

    def by_hand(self, device: str, lr: float) -> Trained:
        """Train without everystep."""
        ready = self._ready(device, lr)
        losses, kept = [], {}
        for number, batch in enumerate(ready.batches, 1):
            loss = ready.backward(batch)
            if number == LOOKED_AT:
                kept = {
                    n: p.grad.clone() for n, p in ready.model.named_parameters() if p.grad is not None
                }
            ready.update()
            losses.append(loss.item())
        return Trained(losses, kept, ready.model.state_dict())

    def by_everystep(self, device: str, lr: float, directory: Path) -> tuple[Any, Trained]:
        """Train by everystep; return the run, too."""
        ready = self._ready(device, lr)
        run = self.how(ready, directory)
        return run, Trained(run.losses["loss"].to_list(), {}, ready.model.state_dict())

    def _ready(self, device: str, lr: float) -> _Ready:
        torch.manual_seed(1)
        batches = [(self.inputs().to(device), torch.randint(3, (16,)).to(device)) for _ in range(STEPS)]
        if self.how is by_train:
            batches = batches[:1] * STEPS
        model = self.model().to(device)
        torch.manual_seed(2)  # of the device, too
        return _Ready(
            model, self.optimizer(model.parameters(), lr=lr), batches, self.how is not by_train
        )


class _Ready(NamedTuple):
    """What is needed to train; clips: whether gradients are clipped."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: list[tuple[Tensor, Tensor]]
    clips: bool

    def backward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Compute the loss and its gradients."""
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def update(self) -> None:
        """Update the parameters."""
        if self.clips:
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def by_train(ready: _Ready, directory: Path) -> Any:
    """Train on one batch by `train(model, (x, y))`."""
    return everystep.train(
        ready.model, ready.batches[0], loss=nn.CrossEntropyLoss(), optimizer=ready.optimizer,
        steps=STEPS, run=directory, progress=False,
    )  # fmt: skip


def by_step_function(ready: _Ready, directory: Path) -> Any:
    """Train by `train(step, batches)`."""
    model, optimizer = ready.model, ready.optimizer

    def step(batch: Any) -> Tensor:
        x, y = batch
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss

    parts = {"model": model, "optimizer": optimizer}
    return everystep.train(step, ready.batches, parts=parts, steps=STEPS, run=directory, progress=False)


def by_record(ready: _Ready, directory: Path) -> Any:
    """Train by an own loop in `record`."""
    with everystep.record(run=directory, model=ready.model, optimizer=ready.optimizer) as recording:
        for batch in recording.steps(ready.batches):
            loss = ready.backward(batch)
            ready.update()
            recording.log(loss=loss)
    return everystep.open(directory)


def _network() -> nn.Module:
    hidden = nn.Linear(20, 32), nn.BatchNorm1d(32), nn.GELU(), nn.Dropout(0.2)
    return nn.Sequential(*hidden, nn.Linear(32, 3))


def _network_without_draws() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 3))


def _network_of_images() -> nn.Module:
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 16, 3))
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


class _NetworkOfWords(nn.Module):
    """A transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 16)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, words: Tensor) -> Tensor:
        """Return a score for each class (N, 3)."""
        places = torch.arange(words.shape[1], device=words.device) / words.shape[1]
        found: Tensor = self.head(self.encoder(self.embedding(words) + places[:, None]).mean(1))
        return found


class _OnTheCpu(nn.Embedding):
    """An embedding that stays in the CPU's memory, as a large one may."""

    def _apply(self, fn: Any, recurse: bool = True) -> _OnTheCpu:
        return self

    def forward(self, words: Tensor) -> Tensor:
        """Return the vectors of words, on their device."""
        return super().forward(words.cpu()).to(words.device)


class _NetworkThatSeeds(_NetworkOfWords):
    """The same, with its embedding on the CPU; it sets the seed between two draws."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = _OnTheCpu(30, 16)

    def forward(self, words: Tensor) -> Tensor:
        """Return a score for each class (N, 3)."""
        found = super().forward(words)
        torch.manual_seed(3)
        return nn.functional.dropout(found, 0.2)


def _numbers() -> Tensor:
    return torch.randn(16, 20)


def _pictures() -> Tensor:
    return torch.randn(16, 3, 8, 8).to(memory_format=torch.channels_last)


def _words() -> Tensor:
    return torch.randint(30, (16, 12))


TRAININGS = {
    "network, `train`, GradientDescent": Training(
        _network_without_draws, _numbers, everystep.GradientDescent, by_train
    ),
    "network with dropout, `train`, AdamW": Training(_network, _numbers, torch.optim.AdamW, by_train),
    "images, step function, Adam": Training(
        _network_of_images, _pictures, torch.optim.Adam, by_step_function
    ),
    "words, step function, SGD": Training(_NetworkOfWords, _words, torch.optim.SGD, by_step_function),
    "network, own loop, RMSprop": Training(
        _network_without_draws, _numbers, torch.optim.RMSprop, by_record
    ),
    "images, own loop, SGD": Training(_network_of_images, _pictures, torch.optim.SGD, by_record),
    "words, own loop, AdamW": Training(_NetworkOfWords, _words, torch.optim.AdamW, by_record),
    "words on the CPU, own loop, SGD": Training(_NetworkThatSeeds, _words, torch.optim.SGD, by_record),
}
