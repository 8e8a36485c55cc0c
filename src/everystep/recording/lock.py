"""The lock of a run: one process writes, and others learn which one."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from everystep.errors import RunError
from everystep.recording.connection import FILE_NAME, LOCK_NAME
from everystep.recording.database import reading
from everystep.recording.facts import WriterFacts

__all__ = ["is_locked", "locked", "writer_here"]


def locked(directory: Path) -> FileLock:
    """Lock a run for writing; the system releases the lock when the process ends, however it ends.

    Raises:
        RunError: another process is writing the run; names it.
        OSError: the lock cannot be created.
    """
    lock = FileLock(directory / LOCK_NAME)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(
            f"{directory} is being written (by its training, or by another process that adds to it"
            f"{_by_whom(directory)}); wait until that ends"
        ) from None
    return lock


def is_locked(directory: Path) -> bool:
    """Tell whether a process is writing a run."""
    lock = FileLock(directory / LOCK_NAME)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:  # a place that can only be read is not being written
        return False
    lock.release()
    return False


def writer_here() -> WriterFacts:
    """Return the facts of this process as a writer."""
    now = datetime.now(UTC).replace(microsecond=0)
    return WriterFacts(process=os.getpid(), host=platform.node(), since=now)


def _by_whom(directory: Path) -> str:
    try:
        with reading(directory / FILE_NAME) as database:
            writer = database.facts().writer
    except RunError:
        return ""
    if writer is None:
        return ""
    since = writer.since.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    return f": process {writer.process} on {writer.host}, since {since}"
