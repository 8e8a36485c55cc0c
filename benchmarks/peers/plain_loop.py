"""The plain PyTorch loop, written out by hand: what every other peer is compared to."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.peers import Training
from benchmarks.workloads import Start, Workload

__all__ = ["prepare"]


def prepare(workload: Workload, folder: Path) -> Training:
    """Return the loop with the chapter's own update, or with torch's optimizer."""
    start = workload.make()
    if workload.update == "gradient descent":
        return lambda: _with_the_chapters_update(workload, start)
    return lambda: _with_an_optimizer(workload, start)


def _with_the_chapters_update(workload: Workload, start: Start) -> list[float]:
    model, loss_function, lr = start.model, start.loss, workload.lr
    losses = []
    for x, y in workload.batches(start.x, start.y):
        loss = loss_function(model(x), y)
        losses.append(loss.item())
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.sub_(parameter.grad * lr)
    return losses


def _with_an_optimizer(workload: Workload, start: Start) -> list[float]:
    model, loss_function = start.model, start.loss
    optimizer = workload.optimizer(model.parameters())
    losses = []
    for x, y in workload.batches(start.x, start.y):
        loss = loss_function(model(x), y)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses
