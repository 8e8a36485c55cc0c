"""Who trains it. Every peer returns its losses, so that none can leave work out."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

import everystep
from benchmarks.workloads import Workload

__all__ = ["PEERS", "Peer"]

Peer = Callable[[Workload], Sequence[float]]


def plain_loop(workload: Workload) -> Sequence[float]:
    """Train by the chapter's loop, written out by hand; keeps the losses in a list."""
    model, x, y = workload.make()
    loss_function = nn.MSELoss(reduction="sum")
    losses = []
    for _ in range(workload.steps):
        loss = loss_function(model(x), y)
        losses.append(loss.item())
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.sub_(parameter.grad * workload.lr)
    return losses


def everystep_eager(workload: Workload) -> Sequence[float]:
    """Train with everystep, everything recorded, from an empty directory to the finished run."""
    model, x, y = workload.make()
    with tempfile.TemporaryDirectory() as folder:
        run = everystep.train(
            model,
            (x, y),
            loss=nn.MSELoss(reduction="sum"),
            optimizer=everystep.GradientDescent(model.parameters(), lr=workload.lr),
            steps=workload.steps,
            directory=Path(folder) / "run",
            progress=False,
        )
        return [loss for _, loss in run.losses.iter_rows()]


PEERS: dict[str, Peer] = {"plain loop": plain_loop, "everystep, eager": everystep_eager}
