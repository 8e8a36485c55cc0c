"""Tidy: removes what a process that was killed left half done, before the run's training goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

from everystep.errors import RunError
from everystep.recording.changes import FOLDER as CHANGES
from everystep.recording.contents import FOLDER as BATCHES
from everystep.recording.database import Database, SnapshotRow
from everystep.recording.files import sweep
from everystep.recording.snapshots import read_snapshot, remove_snapshots

__all__ = ["tidy"]


def tidy(directory: Path, database: Database, recorded: int, at: int) -> None:
    """Remove what no recorded step belongs to, temporary files, and snapshots that cannot be read.

    Args:
        directory: of the run.
        database: of the run.
        recorded: the newest step that stays.
        at: the state that the training goes on from; the training writes later ones again.
    """
    rows = database.snapshots()
    removed = [row for row in rows if row.step > recorded]
    removed += [row for row in rows if at < row.step <= recorded and not _is_sound(directory, row)]
    with database.transaction():
        database.forget_after(recorded)
        database.remove_snapshots([row.step for row in removed])
    folder = directory / "snapshots"
    remove_snapshots(folder, [row.step for row in removed], lambda steps: None)
    kept = {f"{row.step:06d}" for row in database.snapshots()}
    for path in folder.iterdir():
        if path.name not in kept:
            shutil.rmtree(path, ignore_errors=True)
    sweep(directory)
    files = {row.name for row in database.files()}
    for path in (*directory.glob(f"{CHANGES}/*"), *directory.glob("programs/*")):
        if f"{path.parent.name}/{path.name}" not in files:
            path.unlink(missing_ok=True)
    used = {file for _, file, _, _ in database.all_contents()}
    for path in directory.glob(f"{BATCHES}/*.bin"):
        if path.stem.isdecimal() and int(path.stem) not in used:
            path.unlink(missing_ok=True)


def _is_sound(directory: Path, row: SnapshotRow) -> bool:
    try:
        read_snapshot(directory, row)
    except RunError:
        return False
    return True
