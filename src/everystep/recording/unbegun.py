"""Runs whose process was killed before their first state was on disk: they hold nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

from everystep.errors import RecordingError
from everystep.recording.changes import FOLDER as CHANGES
from everystep.recording.connection import SPARE_NAME
from everystep.recording.contents import FOLDER as BATCHES
from everystep.recording.database import FILE_NAME, LOCK_NAME, reading
from everystep.recording.lock import locked

__all__ = ["remove_unbegun"]

_OWN = {"snapshots", "programs", BATCHES, CHANGES, LOCK_NAME, SPARE_NAME}


def remove_unbegun(directory: Path) -> bool:
    """Tell whether a run is still to begin: there is none, or it has neither a step nor a state.

    Such a directory is removed if everystep made all that is in it.

    Raises:
        RunError: another process is writing the run, or its database cannot be read.
        RecordingError: it cannot be removed.
    """
    if not directory.is_dir():
        return not directory.exists()
    if (directory / FILE_NAME).exists():
        with reading(directory / FILE_NAME) as database:
            if database.newest_step() or database.snapshots():
                return False
    names = {path.name for path in directory.iterdir()}
    if any(name not in _OWN and not name.startswith(FILE_NAME) for name in names):
        return True  # creating the run there reports that the directory exists
    try:
        lock = locked(directory)
        try:
            shutil.rmtree(directory)
        finally:
            lock.release()
    except OSError as error:
        raise RecordingError(f"{directory} cannot be written to: {error.strerror}") from None
    return True
