"""Skorch: a NeuralNet, which keeps the loss of every batch in its history by itself."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from skorch import NeuralNet
from torch import Tensor

from benchmarks.peers import Training
from benchmarks.workloads import Workload

__all__ = ["prepare"]


def prepare(workload: Workload, folder: Path) -> Training:
    """Return the training from making the NeuralNet to the losses read from its history."""
    start = workload.make()

    def batches(dataset: Any, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        # One epoch of all steps, straight from memory: faster than a DataLoader on `dataset`.
        return workload.batches(start.x, start.y)

    def train() -> list[float]:
        net = NeuralNet(
            start.model,
            criterion=start.loss,
            optimizer=partial(_optimizer, workload),
            iterator_train=batches,
            max_epochs=1,
            train_split=None,
            callbacks="disable",
            verbose=0,
        )
        net.fit(start.x, start.y)
        losses: list[float] = net.history[0, "batches", :, "train_loss"]
        return losses

    return train


def _optimizer(workload: Workload, named_parameters: Any, lr: float) -> Any:
    """Return the workload's optimizer; `lr` is skorch's default, which is not what is wanted."""
    return workload.optimizer(named_parameters)
