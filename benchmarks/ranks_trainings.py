"""Trainings of several processes, as `benchmarks.ranks` starts them: each process runs this module.

`python -m benchmarks.ranks_trainings NAME --steps N --run PLACE [--planted WHAT]`, with RANK, WORLD_SIZE
and STORE in the environment. Without `--run`, it trains without everystep. It prints a digest of the
weights of this rank, and its losses, as JSON.

digits: DistributedDataParallel, torch's sampler, and epochs. transformer: a loop of one's own on texts,
with two passes to an update, of which the first exchanges nothing, clipping, and a schedule.

--planted: what is different. row: a row of the batch on rank 1; ulp: the last bit of one of its numbers;
set_epoch: the sampler of rank 1 has the order of the first epoch in all of them; no_sync: on all ranks,
the first pass exchanges gradients, too (on one rank alone, the others would wait).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any

from everystep import numerics

numerics.prepare()  # before torch computes

import torch  # noqa: E402
from tests.descent import descend  # noqa: E402
from torch import Tensor, distributed, nn  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset  # noqa: E402

import everystep  # noqa: E402
from everystep.experiment.data import make_data  # noqa: E402
from everystep.experiment.loss import target_of  # noqa: E402
from everystep.experiment.specification import load  # noqa: E402

__all__ = ["PLANTED_AT"]

#: The step at which a row, or its last bit, is different.
PLANTED_AT = 137


class _Without:
    """Takes the place of a recording."""

    steps = staticmethod(iter)
    epochs = staticmethod(range)

    def log(self, loss: Tensor) -> None:
        """Keep nothing."""


class _Training:
    """What one process trains. losses: of its steps; planted: what is different, None for nothing."""

    def __init__(self, steps: int, run: str | None, planted: str | None) -> None:
        self.rank = distributed.get_rank()
        self.count = steps
        self.losses: list[float] = []
        self._run = run
        self._planted = planted

    def recording(self, **parts: Any) -> Any:
        """Return a recording of these parts, or what takes its place."""
        if self._run is None:
            return contextlib.nullcontext(_Without())
        return everystep.record(run=self._run, **parts)

    def has(self, planted: str) -> bool:
        """Return whether something is different."""
        return self._planted == planted

    def batch(self, x: Tensor) -> Tensor:
        """Return the batch of the next step, with what is different in it."""
        if self.rank == 1 and len(self.losses) == PLANTED_AT - 1 and x.is_floating_point():
            x = x.clone()
            if self.has("row"):
                x[3] += 1
            if self.has("ulp"):
                place = x[3].reshape(-1)
                where = int(place.abs().argmax())
                place[where] = torch.nextafter(place[where], torch.tensor(torch.inf))
        return x

    def log(self, recording: Any, loss: Tensor) -> bool:
        """Keep the loss of a step; return whether it was the last."""
        recording.log(loss=loss)
        self.losses.append(loss.item())
        return len(self.losses) == self.count


def digits(training: _Training) -> nn.Module:
    """Train a convolutional network on the bundled images."""
    experiment = load("digits")
    data = make_data(experiment, target_of(experiment.loss)).tensors()
    rows = TensorDataset(data["x"], data["y"])
    sampler: DistributedSampler[Any] = DistributedSampler(rows, seed=3)
    loader = DataLoader(rows, batch_size=32, sampler=sampler)
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.2), nn.Linear(128, 10)),
    )
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(ddp.parameters(), lr=1e-3)
    with training.recording(model=ddp, optimizer=optimizer) as recording:
        for epoch in recording.epochs(-(-training.count // len(loader))):
            sampler.set_epoch(0 if training.has("set_epoch") and training.rank == 1 else epoch)
            for x, y in recording.steps(_with(training, loader)):
                loss = descend(optimizer, functional.cross_entropy(ddp(x), y))
                if training.log(recording, loss):
                    break
    return model


def _with(training: _Training, loader: DataLoader[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    for x, y in loader:
        yield training.batch(x), y


class _Words(nn.Module):
    """A small transformer: each word from those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(64, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, 64)

    def forward(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        hidden = self.layers(self.words(ids), mask=mask, is_causal=True)
        return self.head(hidden).transpose(1, 2)  # type: ignore[no-any-return]


def transformer(training: _Training) -> nn.Module:
    """Train a transformer by a loop with two passes to an update."""
    generator = torch.Generator().manual_seed(training.rank)
    model = _Words()
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.count)
    texts = (torch.randint(0, 64, (8, 17), generator=generator) for _ in range(training.count))
    with training.recording(model=ddp, optimizer=optimizer, schedule=schedule) as recording:
        for ids in recording.steps(texts):
            optimizer.zero_grad()
            losses = []
            for place, part in enumerate(ids.chunk(2)):
                is_alone = place == 0 and not training.has("no_sync")
                with ddp.no_sync() if is_alone else contextlib.nullcontext():
                    losses.append(functional.cross_entropy(ddp(part[:, :-1]), part[:, 1:]) / 2)
                    losses[-1].backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(ddp.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            training.log(recording, losses[0].detach() + losses[1].detach())
    return model


def main() -> None:
    """Train what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks_trainings")
    parser.add_argument("name", choices=["digits", "transformer"])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--run")
    parser.add_argument("--planted", choices=["row", "ulp", "no_sync", "set_epoch"])
    asked = parser.parse_args()
    store, rank, world = (os.environ[name] for name in ("STORE", "RANK", "WORLD_SIZE"))
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(world)
    )
    torch.manual_seed(0)
    training = _Training(asked.steps, asked.run, asked.planted)
    model = {"digits": digits, "transformer": transformer}[asked.name](training)
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    print(json.dumps([digest.hexdigest(), training.losses]))
    distributed.barrier()  # the store, of rank 0, must outlive what other ranks ask of it
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
