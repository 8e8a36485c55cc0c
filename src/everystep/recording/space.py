"""Space: what the files of a run take on the disk, and how to remove them."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from everystep.errors import RecordingError, RunError
from everystep.recording.connection import LOCK_NAME, SPARE_NAME
from everystep.recording.contents import FOLDER as BATCHES
from everystep.recording.database import FILE_NAME, reading
from everystep.recording.files import CHANGES
from everystep.recording.lock import locked
from everystep.recording.recorded_run import EXPERIMENT_FILE

__all__ = ["Space", "remove_run", "spaces_of"]

_FOLDERS = ("snapshots", BATCHES, CHANGES, "programs")


class Space(NamedTuple):
    """What a run takes on the disk, in bytes; a file that several runs share counts for the first.

    database: losses, measurements, facts and what differs from step to step; batches: by content, and
    what the loop changed between steps; data: the rows to train on; others: files that are not
    everystep's; keep: which steps the recording was asked to keep, None for all.
    """

    name: str
    directory: Path
    total: int = 0
    snapshots: int = 0
    batches: int = 0
    data: int = 0
    programs: int = 0
    database: int = 0
    others: int = 0
    keep: str | None = None


def spaces_of(directories: Iterator[Path]) -> list[Space]:
    """Return what each run takes, the largest first."""
    seen: set[tuple[int, int]] = set()
    return sorted((_space_of(each, seen) for each in directories), key=lambda each: -each.total)


def _space_of(directory: Path, seen: set[tuple[int, int]]) -> Space:
    """Return what a run takes. seen: files that were counted, by device and number."""
    sizes = dict.fromkeys(("snapshots", "batches", "data", "programs", "database", "others"), 0)
    for folder, _, names in os.walk(directory):
        place = Path(folder).relative_to(directory)
        for name in names:
            try:
                about = (Path(folder) / name).lstat()
            except OSError:  # a training has just removed it
                continue
            key = about.st_dev, about.st_ino
            if stat.S_ISREG(about.st_mode) and key not in seen:
                seen.add(key)
                blocks = getattr(about, "st_blocks", None)
                sizes[_kind(place / name)] += about.st_size if blocks is None else 512 * blocks
    keep = None
    with suppress(RunError), reading(directory / FILE_NAME) as database:
        keep = database.facts().keep
    return Space(directory.resolve().name, directory, sum(sizes.values()), **sizes, keep=keep)


def _kind(path: Path) -> str:
    """Return what a file of a run is for. path: in the run."""
    first = path.parts[0]
    if len(path.parts) > 1:
        known = {"snapshots": "snapshots", "programs": "programs", BATCHES: "batches"}
        return known.get(first, "batches" if first == CHANGES else "others")
    if first.startswith(FILE_NAME) or first in (LOCK_NAME, SPARE_NAME):
        return "database"
    return "data" if _is_data(first) or first == EXPERIMENT_FILE else "others"


def _is_data(name: str) -> bool:
    return name.startswith("data") and name.endswith(".safetensors")


def remove_run(directory: Path) -> list[str]:
    """Remove the files of a run that everystep wrote; return the names of those that are left.

    Forks stay whole: they have all files that they need.

    Raises:
        RunError: another process is writing the run.
        RecordingError: a file cannot be removed.
    """
    try:
        lock = locked(directory)
        try:
            # Without its database it is not a run, whatever happens next.
            for path in sorted(directory.glob(f"{FILE_NAME}*")):
                path.unlink()
            for name in _FOLDERS:
                if (directory / name).is_dir():
                    shutil.rmtree(directory / name)
            for path in directory.iterdir():
                if _is_data(path.name) or path.name in (EXPERIMENT_FILE, SPARE_NAME):
                    path.unlink()
        finally:
            lock.release()
        (directory / LOCK_NAME).unlink(missing_ok=True)
        left = sorted(path.name for path in directory.iterdir())
        if not left:
            directory.rmdir()
    except OSError as error:
        raise RecordingError(f"{error.filename} cannot be removed: {error.strerror}") from None
    return left
