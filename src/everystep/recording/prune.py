"""Prune: a finished run made smaller, by giving up states and the oldest batches."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from everystep.errors import RecordingError
from everystep.recording.database import FILE_NAME, reading
from everystep.recording.files import batch_file, state_folder
from everystep.recording.input_writer import Repeats
from everystep.recording.lock import adding
from everystep.recording.snapshots import SnapshotPlan

__all__ = ["Pruning", "prune", "pruning_of"]


class Pruning(NamedTuple):
    """What a run gives up, and what is left.

    states: on disk, that go, by their step; files: of batches, that go; bytes: of both; kept: states
    that stay; replayed: the most steps that a step is replayed through afterwards; lost: the last step
    with a batch that goes, 0 for none; opens: the first step from which on all open again, None if none
    does.
    """

    states: tuple[int, ...]
    files: tuple[int, ...]
    bytes: int
    kept: tuple[int, ...]
    replayed: int
    lost: int
    opens: int | None


def pruning_of(directory: Path, snapshots: int | None, batches: int | None) -> Pruning:
    """Return what a run must give up to keep within budgets; nothing is changed.

    snapshots, batches: maximum bytes; None: whatever there is. States 0 and the newest stay in any case,
    and so do those that a fork or a resumed training began with.

    Raises:
        RunError: the run cannot be read.
    """
    with reading(directory / FILE_NAME) as database:
        facts, newest = database.facts(), database.newest_step()
        repeats = Repeats(database, math.inf, newest)
        kept = {row.step: row.size for row in database.snapshots()}
        files = repeats.oldest(math.inf if batches is None else batches)
    lost = max((repeats.files[number].newest_step for number in files), default=0)
    lost, whole = max(lost, repeats.lost_to), sum(kept.values())
    # Interval 1: `thin` doubles it from there until the rest fits.
    plan = SnapshotPlan(whole if snapshots is None else snapshots, 1, kept, facts.begins, lost)
    states = plan.thin()
    left = sorted(kept)
    behind = [step for step in left if step >= lost and step < newest]
    # A step is replayed from the state before it, but never through steps that are not kept.
    gaps = [
        min(two, last) - max(one, first - 1)
        for one, two in pairwise([*left, newest])
        for first, last in facts.kept(newest)
    ]
    return Pruning(
        states=tuple(states),
        files=tuple(files),
        bytes=sum(repeats.files[number].size for number in files) + whole - sum(kept.values()),
        kept=tuple(left),
        replayed=max(gaps, default=0),
        lost=lost,
        opens=behind[0] + 1 if behind else None,
    )


def prune(directory: Path, pruning: Pruning) -> None:
    """Give up what `pruning_of` has returned.

    Raises:
        RunError: another process is writing the run.
        RecordingError: it cannot be written to.
    """
    names = [*map(state_folder, pruning.states), *map(batch_file, pruning.files)]
    with adding(directory) as database, database.removing(names):
        if pruning.files:
            database.write_facts({"batches_lost_to": pruning.lost})
    for name in names:
        if (directory / name).exists():
            raise RecordingError(f"{directory / name} cannot be removed")
