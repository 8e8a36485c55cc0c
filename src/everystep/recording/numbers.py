"""A run's losses and measurements as arrays, read incrementally."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from everystep.errors import RunError
from everystep.recording.connection import TICK
from everystep.recording.database import FILE_NAME, MeasurementEnds, reading
from everystep.recording.facts import Facts

__all__ = ["Numbers", "fingerprint", "read_numbers"]


class Numbers(NamedTuple):
    """The numbers of a run by step, at one moment.

    steps: the number of steps; losses: those requested; ends: of each measurement; series: steps and
    values of the requested measurements.
    """

    facts: Facts
    steps: int
    losses: NDArray[np.float64]
    ends: list[MeasurementEnds]
    series: dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]]


def fingerprint(directory: Path) -> tuple[int, ...]:
    """Return what differs after every change of a run's database: its files' times and sizes.

    Raises:
        RunError: the run is gone.
    """
    found: list[int] = []
    for name in (FILE_NAME, f"{FILE_NAME}-wal"):
        try:
            stat = (directory / name).stat()
        except OSError:
            if name == FILE_NAME:
                raise RunError(f"{directory} is not a run any more: {FILE_NAME} is missing") from None
            continue
        found += [stat.st_ino, stat.st_mtime_ns, stat.st_size]
    # Two changes within a tick of the file system's clock have the same time, so fingerprints of a
    # file that just changed all differ.
    now = time.time_ns()
    if abs(now - max(found[1::3])) < TICK:
        found.append(now)
    return tuple(found)


def read_numbers(directory: Path, after: int = 0, series: Mapping[str, int] | None = None) -> Numbers:
    """Read the losses after a step, and the values after a step each of the measurements in `series`.

    Raises:
        RunError: the run is unreadable, or another program changed its database.
    """
    with reading(directory / FILE_NAME) as database, database.one_moment():
        losses, newest = database.losses_after(after), database.newest_step()
        if len(losses) != max(0, newest - after):
            raise RunError(
                f"{directory} has {len(losses):,} losses after step {after:,}, but its newest step is "
                f"{newest:,}: the database was changed"
            )
        return Numbers(
            facts=database.facts(),
            steps=newest,
            losses=losses,
            ends=database.measurement_ends(),
            series={name: database.measured_after(name, step) for name, step in (series or {}).items()},
        )
