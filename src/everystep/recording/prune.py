"""Prune: a finished run made smaller, by giving up states and the oldest batches."""

from __future__ import annotations

import shutil
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from everystep.errors import RecordingError
from everystep.recording.contents import inputs_of
from everystep.recording.database import FILE_NAME, Database, reading
from everystep.recording.files import BATCHES, SNAPSHOTS
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

    Args:
        directory: of the run.
        snapshots, batches: maximum bytes; None: whatever there is. States 0 and the newest stay in any
            case, and so do those that a fork or a resumed training began with.

    Raises:
        RunError: the run cannot be read.
    """
    with reading(directory / FILE_NAME) as database:
        files, lost, freed = _files_to_drop(directory, database, batches)
        facts, newest = database.facts(), database.newest_step()
        kept = {row.step: row.size for row in database.snapshots()}
        whole = sum(kept.values())
        # The first state behind what is lost: from there, steps open without it.
        pinned = facts.begins | set(sorted(step for step in kept if lost and step >= lost)[:1])
        plan = SnapshotPlan(whole if snapshots is None else snapshots, 1, dict(kept), pinned)
        states = plan.thin()
    left = sorted(plan.kept)
    lost = max(lost, facts.batches_lost_to or 0)
    behind = [step for step in left if step >= lost and step < newest]
    gaps = [
        min(two, last) - max(one, first - 1)
        for one, two in pairwise([*left, newest])
        for first, last in facts.kept(newest)
    ]
    return Pruning(
        states=tuple(states),
        files=tuple(files),
        bytes=freed + whole - sum(plan.kept.values()),
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
    with adding(directory) as database:
        with database.transaction():
            database.remove_files(f"{SNAPSHOTS}/{step:06d}/*" for step in pruning.states)
            for file in pruning.files:
                database.remove_contents(file)
            if pruning.files:
                database.write_facts({"batches_lost_to": pruning.lost})
        # What the database no longer names may go; what cannot be removed does no harm.
        try:
            for step in pruning.states:
                shutil.rmtree(directory / SNAPSHOTS / f"{step:06d}")
            for file in pruning.files:
                with suppress(FileNotFoundError):
                    (directory / BATCHES / f"{file}.bin").unlink()
        except OSError as error:
            raise RecordingError(f"{error.filename} cannot be removed: {error.strerror}") from None


def _files_to_drop(
    directory: Path, database: Database, budget: int | None
) -> tuple[list[int], int, int]:
    """Return files of batches beyond a budget, the last step that needs one, and their bytes.

    A batch that comes again is stored once, so later steps may need its file, too: the files that no
    step has needed for longest go first.
    """
    places = {place.digest: place for place in database.all_contents()}
    sizes: dict[int, int] = {}
    for place in places.values():
        sizes[place.file] = sizes.get(place.file, 0) + place.size
    if budget is None or sum(sizes.values()) <= budget:
        return [], 0, 0
    last_use = dict.fromkeys(sizes, 0)
    for row in database.repeats(1):
        given = inputs_of(row.inputs, f"step {row.step} of {directory}").opens_with.values()
        used = [places[digest] for each in given for digest in each.digests if digest in places]
        used += [places[each.source] for each in used if each.source in places]
        last_use.update((place.file, row.last) for place in used)
    dropped: list[int] = []
    for file in sorted(sizes, key=lambda file: (last_use[file], file)):
        if sum(sizes.values()) - sum(sizes[each] for each in dropped) > budget:
            dropped.append(file)
    lost = max((last_use[file] for file in dropped), default=0)
    return dropped, lost, sum(sizes[each] for each in dropped)
