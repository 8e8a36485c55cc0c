"""Losses and measurements of recently used runs, in memory; new ones are read on request.

Everything here may wait for the disk: call it in a thread.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from everystep.errors import UsageError, did_you_mean
from everystep.recording.blocks import series_of
from everystep.recording.connection import fingerprint
from everystep.recording.database import FILE_NAME, Database, MeasurementEnds, reading
from everystep.recording.facts import Facts
from everystep.recording.recorded_run import RecordedRun
from everystep.recording.step_columns import StepColumn, numbers_at, step_columns
from everystep.recording.summary import in_own_precision
from everystep.views.facts_text import landmarks
from everystep.views.loss_table import shortest_texts
from everystep.views.reduction import Sparkline, reduce, sparkline

__all__ = ["MOST_COLUMNS", "Columns", "RunColumns", "reduced"]

#: Number of runs with their numbers in memory.
KEPT = 8
#: Measurements that have a column in the table.
MOST_COLUMNS = 100
#: Orders, and choices of rows, that stay in memory for each run.
KEPT_ORDERS = 4
#: How many of the newest numbers are read again, to check whether those in memory are still valid.
OVERLAP = 4096

Series = tuple[NDArray[np.int64], NDArray[np.float64]]


@dataclass(frozen=True, eq=False)
class RunColumns:
    """A run's numbers as they were at one moment.

    losses: of steps 1 to `steps`, in their own precision; ends: of each measurement.
    """

    facts: Facts
    steps: int
    losses: NDArray[Any]
    ends: list[MeasurementEnds]
    directory: Path
    known: dict[str, Series] = field(default_factory=dict)
    kept: OrderedDict[Hashable, Any] = field(default_factory=OrderedDict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    @cached_property
    def of_ranks(self) -> list[Series]:
        """The steps and losses of each other rank of a run of several processes."""
        ranks = RecordedRun(self.directory).shown_ranks[1:]
        return [rank.losses_as_rank(1, self.steps) for rank in ranks]

    @cached_property
    def table(self) -> dict[str, StepColumn]:
        """The columns of the table except the step, by title."""
        names = [ends.name for ends in self.ends[:MOST_COLUMNS]]
        columns = step_columns(self.facts, names, 1 + len(self.of_ranks))
        return {column.title: column for column in columns}

    def numbers(self, title: str, steps: NDArray[np.int64]) -> Any:
        """Return the numbers of a column at some steps, masked where there are none."""
        _, measurement, rank, holds = self.table[title]
        if measurement is None and not rank:
            return self.losses[steps - 1]
        series = self.of_ranks[rank - 1] if rank else self.curve(measurement)
        return numbers_at(series, steps, holds=holds)

    @cached_property
    def landmarks(self) -> dict[str, Any]:
        """The first, the last and the smallest loss, and the first that is not finite."""
        return landmarks(*(each if self.facts.has_loss else each[:0] for each in self.curve(None)))

    def series(self, name: str) -> Series:
        """Return the steps and values of a measurement.

        Raises:
            UsageError: there is no such measurement.
        """
        names = [ends.name for ends in self.ends]
        if name not in names:
            raise UsageError(f"no measurement {name!r} in this run; {did_you_mean(name, names)}")
        with self.lock:
            if name not in self.known:
                with reading(self.directory / FILE_NAME) as database:
                    self.known[name] = database.series(series_of(name))
            return self.known[name]

    def curve(self, name: str | None) -> Series:
        """Return steps and values of a measurement, or of the losses (None)."""
        return (np.arange(1, self.steps + 1), self.losses) if name is None else self.series(name)

    def remembered(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return the result of `make` for this key, cached while in recent use."""
        with self.lock:
            if key not in self.kept:
                self.kept[key] = make()
            self.kept.move_to_end(key)
            while len(self.kept) > KEPT_ORDERS:
                self.kept.popitem(last=False)
            return self.kept[key]


class Columns:
    """Keeps the numbers of recently used runs."""

    def __init__(self) -> None:
        self._of = lru_cache(KEPT)(_CachedRun)
        self._sparklines: dict[Path, tuple[tuple[int, ...], Sparkline]] = {}

    def of(self, run: RecordedRun) -> RunColumns:
        """Return a run's numbers as they are now.

        Raises:
            RunError: it no longer exists, or cannot be read.
        """
        return self._of(run.directory).look()

    def sparkline(self, run: RecordedRun) -> Sparkline:
        """Return a small picture of a run's losses.

        Raises:
            RunError: it no longer exists, or cannot be read.
        """
        now = fingerprint(run.directory)
        before, line = self._sparklines.get(run.directory, (None, None))
        if line is None or before != now:
            columns = self.of(run)
            losses = columns.losses if columns.facts.has_loss else columns.losses[:0]
            line = sparkline(pl.DataFrame({"step": np.arange(1, len(losses) + 1), "loss": losses}))
            self._sparklines[run.directory] = now, line
        return line


class _CachedRun:
    """The numbers of one run, read by one thread at a time."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._seen: tuple[int, ...] | None = None
        self._columns: RunColumns | None = None
        self._lock = threading.Lock()

    def look(self) -> RunColumns:
        with self._lock:
            now = fingerprint(self._directory)
            if self._columns is None or now != self._seen:
                self._columns = self._read(self._columns)
                self._seen = now
            return self._columns

    def _read(self, old: RunColumns | None) -> RunColumns:
        with reading(self._directory / FILE_NAME) as database:
            facts, ends = database.facts(), database.measurement_ends()
            # Only what is new is read, with an overlap:  in memory  1 ........... 9,000
            #                                             read                4,905 ... 9,120
            # Where both agree, steps 9,001 to 9,120 are appended; else everything is read again.
            start = 0 if old is None else max(0, old.steps - OVERLAP)
            losses, known = in_own_precision(database.losses(start + 1), facts), dict[str, Series]()
            if old is not None and _goes_on(old, facts, losses, start):
                losses = np.concatenate([old.losses[:start], losses])
                known = _extended(old, database, facts, ends)
            elif start:
                losses = in_own_precision(database.losses(1), facts)
            steps = database.newest_step()
        return RunColumns(facts, steps, losses, ends, self._directory, known)


def reduced(
    steps: NDArray[np.int64], values: NDArray[Any], points: int, *, are_logged: bool = True
) -> dict[str, list[Any]]:
    """Return steps and values for JSON, reduced without losing a spike.

    are_logged: else each value is None: a loss that no step logged is not NaN.
    """
    frame = reduce(pl.DataFrame({"step": steps, "loss": values}), max(1, points // 2))
    texts = shortest_texts(frame["loss"])
    is_finite = frame["loss"].is_finite().to_list()
    return {
        "steps": frame["step"].to_list(),
        "values": [
            float(text) if finite else text if are_logged else None
            for text, finite in zip(texts, is_finite, strict=True)
        ],
    }


def _is_same(one: NDArray[Any], other: NDArray[Any]) -> bool:
    return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=True)


def _goes_on(old: RunColumns, facts: Facts, losses: NDArray[Any], start: int) -> bool:
    """Return whether losses after step `start` continue those in memory.

    A training may discard steps and repeat them (then its newest losses differ), and a run may be
    replaced under the same name. When a training ends, everything is read once more.
    """
    pair = ((each.started, each.status) for each in (old.facts, facts))
    return next(pair) == next(pair) and _is_same(old.losses[start:], losses[: old.steps - start])


def _extended(
    old: RunColumns, database: Database, facts: Facts, ends: list[MeasurementEnds]
) -> dict[str, Series]:
    """Return the measurements in memory with new values; changed ones are left out."""
    counts = {each.name: each.values for each in ends}
    extended = {}
    # New ones may have appeared in the meantime; they are read on request.
    for name, (steps, values) in dict(old.known).items():
        kept = max(0, len(steps) - OVERLAP)
        first = int(steps[kept]) if kept else None
        new_steps, new_values = database.series(series_of(name), first)
        overlapping = len(steps) - kept
        if (
            kept + len(new_steps) == counts.get(name)
            and old.facts.measured.get(name) == facts.measured.get(name)
            and np.array_equal(new_steps[:overlapping], steps[kept:])
            and np.array_equal(new_values[:overlapping], values[kept:], equal_nan=True)
        ):
            extended[name] = (
                np.concatenate([steps[:kept], new_steps]),
                np.concatenate([values[:kept], new_values]),
            )
    return extended
