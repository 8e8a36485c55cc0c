"""Which rows each step sees: a pure function of seed and step, without iterating."""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from everystep.errors import ExperimentError, Fault, named
from everystep.experiment.data import derived_generator
from everystep.experiment.prepared_rows import PreparedRows

__all__ = ["Batches", "RowsInFiles", "RowsOf"]

#: Steps with rows that are gathered from files in advance, and the threads that do it. This halves the
#: time of a training from a large file (docs/benchmarks.md).
_STEPS_AHEAD, _GATHERERS = 4, ThreadPoolExecutor(2, "everystep-rows")


@dataclass(frozen=True, eq=False)
class _Order:
    """All rows in the order of an epoch. Held weakly, which a tensor of torch 2.9 may not survive."""

    rows: Tensor


@dataclass(frozen=True)
class Batches:
    """The rows of each step: all of them at every step, or shuffled epochs.

    Args:
        rows: the number of rows.
        batch_size: rows per step, or None for all of them, in order.
        seed: decides the order of every epoch.
        drop_last: drop an epoch's last batch if it is incomplete.
        without: rows, by number, to leave out of their batches, which become smaller.
        numbers: the number of each row in the source of the data; None: its place among the rows.
        source: the name of the numbered data.
        share: (rank, count) of a process among several, which takes a contiguous share of each batch;
            None: it takes all.

    Raises:
        ExperimentError: there are no rows, a batch is larger than the data, or a row that is left out
            does not exist.
    """

    rows: int
    batch_size: int | None = None
    seed: int = 0
    drop_last: bool = False
    without: tuple[int, ...] = ()
    numbers: Tensor | None = field(default=None, repr=False, compare=False)
    source: str = "the data"
    share: tuple[int, int] | None = None
    _order: dict[int, tuple[_Order, frozenset[int]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ExperimentError("the training set has no rows")
        if self.batch_size is not None and not 1 <= self.batch_size <= self.rows:
            rows = f"there are {self.rows} training rows; use 1 to {self.rows}"
            raise ExperimentError([Fault("batch_size", f"{self.batch_size} is out of range: {rows}")])
        for row in self.without:
            if reason := self.why_not(row):
                raise ExperimentError([Fault("without_rows", reason)])

    def why_not(self, row: int) -> str | None:
        """Return why there is no training row with this number, None if there is one."""
        last = self.rows - 1 if self.numbers is None else int(self.numbers[-1])
        if not 0 <= row <= last:
            return f"there is no row {row:,}; the training rows are 0 to {last:,}"
        if self.numbers is None or bool((self.numbers == row).any()):
            return None
        return f"row {row:,} of {self.source} is not trained on: it is held out, or was dropped"

    def shared(self, rank: int, count: int) -> Batches:
        """Return the shares that one of several processes takes of these batches.

        Raises:
            ExperimentError: they cannot be split.
        """
        if self.batch_size is not None and self.batch_size % count:
            problem = f"{self.batch_size} rows cannot be split equally among {count} processes"
            fault = Fault("batch_size", f"{problem}; use a multiple of {count}")
        elif self.smallest < count:
            problem = f"a batch of {self.smallest} rows cannot be split among {count} processes"
            fault = Fault("drop_last", f"{problem}; set drop_last, or use fewer of them")
        else:
            return replace(self, share=(rank, count))
        raise ExperimentError([fault], "a training by several processes")

    def _own(self, rows: int) -> slice:
        """Return the places of this process's share among the rows of a batch."""
        rank, count = self.share or (0, 1)
        # Side by side, without a gap, and as equal as they can be.
        return slice(rows * rank // count, rows * (rank + 1) // count)

    def places(self, rows: Collection[int]) -> Tensor:
        """Return the places of rows among those to train on, by their numbers."""
        given = torch.tensor(sorted(rows), dtype=torch.int64)
        return given if self.numbers is None else torch.isin(self.numbers, given).nonzero().flatten()

    def numbers_of(self, step: int) -> Tensor | None:
        """Return the numbers of the rows of a step (from 1), None if they are 0, 1, 2, ...

        Raises:
            ValueError: the step is below 1.
        """
        indices = self.indices(step)
        if self.numbers is None:
            return indices
        # `indices` are places among the rows to train on, which may be only some of the source.
        return self.numbers if indices is None else self.numbers[indices]

    @property
    def _size(self) -> int:
        """How many rows a batch has that is not cut off."""
        return self.batch_size or self.rows

    @property
    def is_whole(self) -> bool:
        """Whether each step sees all rows, in order."""
        return self.batch_size is None and not self.without and self.share is None

    @property
    def steps_per_epoch(self) -> int:
        """How many steps see all rows once (all but a dropped last batch)."""
        whole, rest = divmod(self.rows, self._size)
        return whole + bool(rest and not self.drop_last)

    @property
    def smallest(self) -> int:
        """How many rows the smallest batch has."""
        rest = 0 if self.drop_last else self.rows % self._size
        return rest or self._size

    def epoch(self, step: int) -> int:
        """Return the epoch (from 0) of a step (from 1)."""
        return (step - 1) // self.steps_per_epoch

    def rows_of(self, step: int) -> int:
        """Return how many rows a step (from 1) sees."""
        if self.without and (indices := self.indices(step)) is not None:
            return len(indices)
        start = (step - 1) % self.steps_per_epoch * self._size
        rows = min(self._size, self.rows - start)
        return len(range(rows)[self._own(rows)])

    def indices(self, step: int) -> Tensor | None:
        """Return the rows of a step (from 1) as int64 on the CPU, or None for all in order.

        Raises:
            ValueError: the step is below 1.
        """
        if step < 1:
            raise ValueError(f"steps are numbered from 1, not {step}")
        if self.is_whole:
            return None
        start = (step - 1) % self.steps_per_epoch * self._size
        order, lacking = self._epoch_order(self.epoch(step) if self.batch_size else 0)
        indices = order.rows[start : start + self._size]
        if start // self._size in lacking:  # few are, and finding the places looks through all rows
            indices = indices[torch.isin(indices, self.places(self.without), invert=True)]
        return indices[self._own(len(indices))].long()

    def without_rows(
        self, rows: Collection[int], first: int, last: int, inherited: Collection[int] = ()
    ) -> Batches:
        """Return these batches without some rows.

        first, last: the range of steps; each must keep a row, and one must have one of `rows`;
        inherited: more rows to leave out, which need not be in these steps.

        Raises:
            ExperimentError: they do not, or a row does not exist.
        """
        before = replace(self, without=tuple(sorted({*self.without, *inherited})))
        left = replace(before, without=tuple(sorted({*before.without, *rows})))
        steps = range(first, last + 1)
        # Fewer rows than that cannot empty a batch, and to look at all steps takes long.
        if len(left.without) >= self.smallest:
            empty = next((step for step in steps if not left.rows_of(step)), None)
            if empty is not None:
                problem = f"leaves no row in the batch of step {empty:,}; leave out fewer at once"
                raise ExperimentError([Fault("without_rows", problem)])
        if rows and all(left.rows_of(step) == before.rows_of(step) for step in steps):
            where = f"no batch of steps {first:,} to {last:,} has {named(sorted(rows))}"
            problem = f"{where}; step.batch.rows shows them"
            raise ExperimentError([Fault("without_rows", problem)])
        return left

    def of(self, x: Tensor | PreparedRows, y: Tensor, *, is_read: bool = False) -> RowsOf:
        """Return the batch source for tensors (rows, ...) on any device, or for rows that stay in files.

        is_read: whether the rows come from a Dataset.
        """
        return (RowsInFiles if isinstance(x, PreparedRows) else RowsOf)(self, x, y, is_read)

    def _epoch_order(self, epoch: int) -> tuple[_Order, frozenset[int]]:
        """Return all rows in the order of an epoch, and which of its batches lack some."""
        if epoch not in self._order:
            self._order.clear()  # one epoch at a time is in use
            order = self._shuffled(epoch) if self.batch_size else _Order(torch.arange(self.rows))
            lacking = frozenset[int]()
            if self.without:
                places = torch.isin(order.rows, self.places(self.without)).nonzero().flatten()
                lacking = frozenset((places // self._size).tolist())
            self._order[epoch] = order, lacking
        return self._order[epoch]

    def _shuffled(self, epoch: int) -> _Order:
        key = self.rows, self.seed, epoch
        # Copies of these batches, such as those of each case of a what-if, use the same order.
        if (order := _ORDERS.get(key)) is None:
            generator = derived_generator(self.seed, "epoch", epoch)
            # The same order in half the memory.
            dtype = torch.int32 if _MANY < self.rows < 2**31 else torch.int64
            order = _Order(torch.randperm(self.rows, generator=generator, dtype=dtype))
            _ORDERS[key] = order
        return order


#: The orders in use, by the number of rows, the seed and the epoch: those of many rows take much memory.
_ORDERS: WeakValueDictionary[tuple[int, int, int], _Order] = WeakValueDictionary()
_MANY = 1_000_000


class RowsOf:
    """The batches of two tensors x and y (rows, ...): their row numbers, and the rows themselves.

    batches: which rows each step sees; y: the targets of all rows; is_fixed: whether every step sees x
    and y themselves; for a Dataset, each step sees new tensors, as in a loop that reads it.
    """

    def __init__(self, batches: Batches, x: Any, y: Tensor, is_read: bool) -> None:
        self.y = y
        self._x = x
        self._is_read = is_read
        self.use(batches)

    def use(self, batches: Batches) -> None:
        """From now on, let steps see these batches of the same rows."""
        self.batches = batches
        self.is_fixed = batches.is_whole and not self._is_read

    def of_rank(self, rank: int, count: int) -> RowsOf:
        """Return the batches of one of several processes, of the same rows."""
        own = replace(self.batches, share=(rank, count))
        return type(self)(own, self._x, self.y, self._is_read)

    def with_targets(self, y: Tensor) -> RowsOf:
        """Return these batches with new targets (rows, ...)."""
        return type(self)(self.batches, self._x, y, self._is_read)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Return x and y of a step (from 1)."""
        indices = self._indices(step)
        if indices is not None:
            return self._taken(indices)
        # As a loop that reads a Dataset has new tensors in each step.
        return (self._x, self.y) if self.is_fixed else (self._x.clone(), self.y.clone())

    def into(self, step: int, x: Tensor, y: Tensor) -> None:
        """Write x and y of a step into tensors of their shape."""
        indices = self._indices(step)
        if indices is None:
            x.copy_(self._x)
            y.copy_(self.y)
        else:
            # Straight into the memory of the caller: no tensor in between.
            torch.index_select(self._x, 0, indices, out=x)
            torch.index_select(self.y, 0, indices, out=y)

    def versions(self) -> list[int | None]:
        """Return how often each of the two tensors was changed, None if torch does not count."""
        return [None if each.is_inference() else each._version for each in (self._x, self.y)]

    def _indices(self, step: int) -> Tensor | None:
        indices = self.batches.indices(step)
        return None if indices is None else indices.to(self._x.device)

    def _taken(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self._x.index_select(0, indices), self.y.index_select(0, indices.to(self.y.device))


class RowsInFiles(RowsOf):
    """The batches of rows that stay in files; those of the next steps are gathered in the background."""

    def use(self, batches: Batches) -> None:
        """From now on, let steps see these batches of the same rows."""
        super().use(batches)
        assert batches.batch_size is not None
        self._gathered: dict[int, Future[tuple[Tensor, Tensor]]] = {}

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Return x and y of a step (from 1)."""
        last = min(step + _STEPS_AHEAD, (self.batches.epoch(step) + 1) * self.batches.steps_per_epoch)
        wanted = range(step, last + 1)  # the order of another epoch takes its time
        known = {number: each for number, each in self._gathered.items() if number in wanted}
        for number in wanted:
            if number not in known:
                indices = self.batches.indices(number)  # on the CPU, as the files are
                assert indices is not None
                known[number] = _GATHERERS.submit(self._taken, indices)
        found = known.pop(step).result()
        self._gathered = known
        return found

    def into(self, step: int, x: Tensor, y: Tensor) -> None:
        """Write x and y of a step into tensors of their shape."""
        for target, rows in zip((x, y), self(step), strict=True):
            target.copy_(rows)

    def versions(self) -> list[int | None]:
        """Return how often the data was changed: never, as steps see copies of its rows."""
        return [0, 0]
