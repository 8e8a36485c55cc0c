"""Batches of a Dataset that is read at every step, as in a user's loop."""

from __future__ import annotations

import random
from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from everystep.experiment.batches import Batches
from everystep.step.check import same_bits
from everystep.training.dataset import collate_rows

__all__ = ["DatasetBatches"]


class DatasetBatches:
    """Provides the batch of each step, and keeps its rows: rows that stay the same can go into the run.

    Args:
        dataset: the rows.
        batches: which of them each step sees.
        device: of the batches.
        limit: maximum bytes of rows to keep.

    draws: whether reading drew from a global random generator; differs: whether a row changed between
    two reads.
    """

    is_fixed = False
    runs_python = True
    guards = None

    def __init__(
        self, dataset: Dataset[Any], batches: Batches, device: torch.device, limit: int = 0
    ) -> None:
        self.draws = False
        self.differs = False
        self._dataset = dataset
        self._batches = batches
        self._device = device
        self._limit = limit
        self._step = 0
        self._pair: tuple[Tensor, Tensor] | None = None
        self._kept: tuple[Tensor, Tensor] | None = None
        self._is_kept = torch.zeros(batches.rows, dtype=torch.bool)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Return x and y of a step; the same objects if asked for the same step again."""
        if self._pair is None or step != self._step:
            indices = self._batches.indices(step)
            rows = range(self._batches.rows) if indices is None else indices.tolist()
            before = _generators()
            x, y = collate_rows(self._dataset, rows)
            self.draws |= before != _generators()
            self._keep(torch.as_tensor(rows), x, y)
            self._step, self._pair = step, (x.to(self._device), y.to(self._device))
        return self._pair

    def shape(self, step: int) -> Hashable:
        """Return what decides which operations a step runs: everything in its batch except values."""
        return tuple((t.shape, t.dtype, t.stride(), t.requires_grad) for t in self(step))

    def into(self, step: int, x: Tensor, y: Tensor) -> None:
        """Write x and y of a step into tensors of their shape."""
        for target, source in zip((x, y), self(step), strict=True):
            target.copy_(source)

    def forget(self) -> None:
        """Read the next batch again, even if it is of the same step."""
        self._pair = None

    def rows(self) -> tuple[Tensor, Tensor] | None:
        """Return x and y of all rows if each was read and stayed the same, and no number was drawn."""
        return None if self.draws or self.differs or not self._is_kept.all() else self._kept

    def _keep(self, rows: Tensor, *batch: Tensor) -> None:
        if self.differs or not self._limit:
            return
        if self._kept is None:
            size = sum(part.nbytes for part in batch) // len(rows) * len(self._is_kept)
            if size > self._limit:
                self._limit = 0
                return
            x, y = (part.new_empty((len(self._is_kept), *part.shape[1:])) for part in batch)
            self._kept = x, y
        known = self._is_kept[rows]
        for kept, part in zip(self._kept, batch, strict=True):
            fits = kept.shape[1:] == part.shape[1:] and kept.dtype == part.dtype
            if not fits or not same_bits(kept[rows[known]], part.detach()[known]):
                self.differs, self._kept = True, None
                return
            kept[rows] = part.detach()
        self._is_kept[rows] = True


def _generators() -> tuple[Any, ...]:
    """Return the states of the global random generators on the CPU, to be compared."""
    numpy = [str(part) if isinstance(part, str) else part.tobytes() for part in _numpy_state()]
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), numpy


def _numpy_state() -> list[Any]:
    return [part if isinstance(part, str) else np.asarray(part) for part in np.random.get_state()]
