"""PyTorch Lightning: a LightningModule and the Trainer in its barebones mode."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from benchmarks.peers import Training
from benchmarks.workloads import Start, Workload

__all__ = ["prepare"]

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # it announces every Trainer


class _Batches:
    """One epoch of all steps; straight from memory, which is faster than a DataLoader."""

    def __init__(self, workload: Workload, start: Start) -> None:
        self.workload, self.start = workload, start

    def __len__(self) -> int:
        return self.workload.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.workload.batches(self.start.x, self.start.y)


class _Module(LightningModule):  # type: ignore[misc]
    def __init__(self, workload: Workload, start: Start) -> None:
        super().__init__()
        self.workload, self.model, self.loss = workload, start.model, start.loss
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        x, y = batch
        loss: Tensor = self.loss(self.model(x), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.workload.optimizer(self.parameters())


def prepare(workload: Workload, folder: Path) -> Training:
    """Return the training from making the Trainer to the losses."""
    start = workload.make()

    def train() -> list[float]:
        module = _Module(workload, start)
        trainer = Trainer(
            max_epochs=1, accelerator="cpu", devices=1, barebones=True, default_root_dir=folder
        )
        trainer.fit(module, _Batches(workload, start))
        return module.losses

    return train
