"""Inheritance: what a fork takes from its parent to be a complete run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from everystep.recording.changes import changes_in
from everystep.recording.contents import FOLDER as BATCHES
from everystep.recording.database import FILE_NAME, Database, SnapshotRow, cut, reading
from everystep.recording.facts import EarlierFacts
from everystep.recording.files import has_own, take_file
from everystep.recording.run import EXPERIMENT_FILE, RecordedRun
from everystep.recording.snapshots import PARAMETERS, REST

__all__ = ["Inherited", "inherit"]


class Inherited(NamedTuple):
    """facts: of the fork, by name; snapshots: those that it has; pinned: states that are always kept."""

    facts: dict[str, Any]
    snapshots: list[SnapshotRow]
    pinned: set[int]


def inherit(directory: Path, database: Database, parent: RecordedRun, at: int) -> Inherited:
    """Take over a parent's recording up to state `at`; hard-link files if possible.

    The state itself is taken over from a loop alone: other forks start with their own. Runs in a
    transaction of the database.

    Raises:
        OSError: a file cannot be linked or copied.
        RunError: the parent refers to files that are not its own.
        RecordingError: the database cannot be written.
    """
    with reading(parent.directory / FILE_NAME) as known:
        losses = known.losses_between(1, at)
        measured = [row for row in known.measurements() if row[1] <= at]
        files = known.files()
        repeats, contents = cut(known.repeats(1, at), 1, at), known.all_contents()
    database.write_losses(1, [loss for _, loss in losses])
    database.write_measurements(measured)
    database.write_repeats(repeats)
    if repeats:
        database.write_contents(contents)
        for number in {file for _, file, _, _ in contents}:
            _take(parent.directory, directory, f"{BATCHES}/{number}.bin")
    # A fork of a loop begins with a snapshot of its parent; others bring their own of that state.
    is_loop = parent.facts.training.loop is not None
    snapshots = [row for row in parent.snapshot_rows() if row.step < at + is_loop]
    for row in snapshots:
        for name in (PARAMETERS, REST):
            _take(parent.directory, directory, f"{row.directory}/{name}")
        database.add_snapshot(row)
    changes = changes_in(row.name for row in files)
    # What the parent's loop changed before its next step, the loop of the fork does, or not.
    later = {name for step, name in changes.items() if step > at - is_loop}
    taken = [row for row in files if row.name not in later]
    for file in taken:
        _take(parent.directory, directory, file.name)
    database.write_files(taken)
    earlier: list[EarlierFacts] = []
    for stretch in parent.stretches:
        if stretch.first > at:
            continue
        training = stretch.facts
        source = training.experiment_file or EXPERIMENT_FILE
        if training.experiment_digest is not None or has_own(parent.directory, source):
            name = f"experiment-{stretch.first}.toml"
            _take(parent.directory, directory, source, name)
            training = training.model_copy(update={"experiment_file": name})
        earlier.append(EarlierFacts(last=min(at, stretch.last or at), training=training))
    facts = parent.facts
    kept: dict[str, Any] = {
        "earlier": tuple(earlier),
        "measured": facts.measured,
        "loss_dtype": facts.loss_dtype,
        "data_file": facts.training.data_file,
    }
    if facts.nonfinite_step is not None and facts.nonfinite_step <= at:
        kept["nonfinite_step"] = facts.nonfinite_step
    if facts.batches_lost_to is not None:
        kept["batches_lost_to"] = min(facts.batches_lost_to, at)
    return Inherited(facts=kept, snapshots=snapshots, pinned={0} | {each.last for each in earlier})


def _take(source: Path, target: Path, name: str, own_name: str | None = None) -> None:
    """Take over a file. A fork reports what it misses when it is read, as its parent does."""
    if has_own(source, name):
        take_file(source, name, target, own_name)
