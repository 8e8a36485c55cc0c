"""everystep, recording everything, from an empty directory to the finished run, read back."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

import everystep
from benchmarks.peers import Training
from benchmarks.workloads import SEED, Workload

__all__ = ["prepare_eager", "prepare_program"]


def _prepare(workload: Workload, folder: Path, engine: Literal["eager", "program"]) -> Training:
    start = workload.make()

    def train() -> list[float]:
        run = everystep.train(
            start.model,
            (start.x, start.y),
            loss=start.loss,
            optimizer=workload.optimizer(start.model.parameters()),
            steps=workload.steps,
            batch_size=workload.batch_size,
            seed=SEED,
            engine=engine,
            run=folder / "run",
            progress=False,
        )
        losses: list[float] = run.losses["loss"].to_list()
        return losses

    return train


prepare_eager, prepare_program = partial(_prepare, engine="eager"), partial(_prepare, engine="program")
