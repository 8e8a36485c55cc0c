"""Which rows each step sees: a pure function of seed and step, without iterating."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from everystep.errors import ExperimentError, Fault
from everystep.experiment.data import derived_generator

__all__ = ["Batches", "RowsOf"]


@dataclass(frozen=True)
class Batches:
    """The rows of each step: all of them at every step, or shuffled epochs.

    Args:
        rows: the number of rows.
        batch_size: rows per step, or None for all of them, in order.
        seed: decides the order of every epoch.
        drop_last: drop an epoch's last batch if it is incomplete.

    Raises:
        ExperimentError: there are no rows, or a batch is larger than the data.
    """

    rows: int
    batch_size: int | None = None
    seed: int = 0
    drop_last: bool = False
    _order: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ExperimentError("the training set has no rows")
        if self.batch_size is not None and not 1 <= self.batch_size <= self.rows:
            problem = (
                f"{self.batch_size} is out of range: there are {self.rows} training rows; use 1 to "
            )
            raise ExperimentError([Fault("batch_size", f"{problem}{self.rows}")])

    @property
    def steps_per_epoch(self) -> int:
        """How many steps see all rows once (all but a dropped last batch)."""
        if self.batch_size is None:
            return 1
        whole, rest = divmod(self.rows, self.batch_size)
        return whole + bool(rest and not self.drop_last)

    @property
    def smallest(self) -> int:
        """How many rows the smallest batch has."""
        if self.batch_size is None:
            return self.rows
        rest = 0 if self.drop_last else self.rows % self.batch_size
        return rest or self.batch_size

    def epoch(self, step: int) -> int:
        """Return the epoch (from 0) of a step (from 1)."""
        return (step - 1) // self.steps_per_epoch

    def rows_of(self, step: int) -> int:
        """Return how many rows a step (from 1) sees."""
        if self.batch_size is None:
            return self.rows
        start = (step - 1) % self.steps_per_epoch * self.batch_size
        return min(self.batch_size, self.rows - start)

    def indices(self, step: int) -> Tensor | None:
        """Return the rows of a step (from 1) as int64 on the CPU, or None for all in order.

        Raises:
            ValueError: the step is below 1.
        """
        if step < 1:
            raise ValueError(f"steps are numbered from 1, not {step}")
        if self.batch_size is None:
            return None
        start = (step - 1) % self.steps_per_epoch * self.batch_size
        return self._epoch_order(self.epoch(step))[start : start + self.batch_size]

    def of(self, x: Tensor, y: Tensor, *, is_read: bool = False, guards: Any = None) -> RowsOf:
        """Return the batch source for tensors (rows, ...) on any device.

        is_read: whether the rows come from a Dataset; guards: what must then stay the same.
        """
        return RowsOf(self, x, y, is_read, guards)

    def _epoch_order(self, epoch: int) -> Tensor:
        if epoch not in self._order:
            self._order.clear()  # one epoch at a time is in use
            generator = derived_generator(self.seed, "epoch", epoch)
            self._order[epoch] = torch.randperm(self.rows, generator=generator)
        return self._order[epoch]


class RowsOf:
    """The batches of two tensors x and y (rows, ...): their row numbers, and the rows themselves.

    is_fixed: whether every step sees x and y themselves; for a Dataset, each step sees new tensors, as
    in a loop that reads it. guards: what must stay the same for the rows to be those of their Dataset.
    """

    runs_python = False

    def __init__(
        self, batches: Batches, x: Tensor, y: Tensor, is_read: bool = False, guards: Any = None
    ) -> None:
        self._batches = batches
        self._x = x
        self._y = y
        self.guards = guards
        self.is_fixed = batches.batch_size is None and not is_read

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Return x and y of a step (from 1)."""
        indices = self._indices(step)
        if indices is None and not self.is_fixed:
            return self._x.clone(), self._y.clone()
        if indices is None:
            return self._x, self._y
        return self._x.index_select(0, indices), self._y.index_select(0, indices)

    def shape(self, step: int) -> int:
        """Return how many rows a step sees."""
        return self._batches.rows_of(step)

    def into(self, step: int, x: Tensor, y: Tensor) -> None:
        """Write x and y of a step into tensors of their shape."""
        indices = self._indices(step)
        if indices is None:
            x.copy_(self._x)
            y.copy_(self._y)
        else:
            torch.index_select(self._x, 0, indices, out=x)
            torch.index_select(self._y, 0, indices, out=y)

    def _indices(self, step: int) -> Tensor | None:
        indices = self._batches.indices(step)
        return None if indices is None else indices.to(self._x.device)
