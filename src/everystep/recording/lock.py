"""The lock of a run: one process writes or adds to a run, and others learn which one."""

from __future__ import annotations

import errno
import os
import platform
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

from everystep.errors import RecordingError, RunError, UsageError, say
from everystep.recording.connection import LOCK_NAME, last_written
from everystep.recording.database import FILE_NAME, Database, reading
from everystep.recording.facts import LONGEST_NOTE, Facts, WriterFacts
from everystep.recording.files import check_writable_files

__all__ = ["adding", "is_locked", "locked", "write_note", "writer_here"]

#: Errors of file systems without locks, such as some network file systems.
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}
#: Seconds without a write after which a process on another host counts as ended, without locks.
_RECENT = 600.0


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Lock a run for writing; the system releases the lock when the process ends in any way.

    If the file system has no locks, warn, and check the process that the run names as its writer.

    Raises:
        RunError: another process is writing the run; names it. Or the run has links.
        OSError: the lock cannot be created.
    """
    check_writable_files(directory)
    lock = FileLock(directory / LOCK_NAME)
    try:
        # Not at once: who asks whether a run is locked holds the lock for a moment, as a page does.
        lock.acquire(timeout=0.2, poll_interval=0.01)
    except Timeout:
        raise _being_written(directory) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        # Without locks, only the facts show a writer. They may still name this process, from before.
        if _names_a_writer(directory, other=True):
            raise _being_written(directory) from None
        _say_without_locks(directory.absolute())
    try:
        yield
    finally:
        lock.release()


def _being_written(directory: Path) -> RunError:
    writer, by = _facts_of(directory).writer, ""
    if writer is not None:
        since = writer.since.astimezone().strftime("%Y-%m-%d %H:%M:%S")
        by = f": process {writer.process} on {writer.host}, since {since}"
    return RunError(
        f"{directory} is being written (by its training, or by another process that adds to it{by}); "
        "wait until that ends"
    )


@cache
def _say_without_locks(directory: Path) -> None:
    say(
        f"files in {directory} cannot be locked (a network file system without locks?), so nothing "
        "keeps two processes from writing this run at once; let only one write it"
    )


def is_locked(directory: Path) -> bool:
    """Return whether a process is writing a run."""
    path = directory / LOCK_NAME
    try:
        status = path.lstat()
    except OSError:
        return False
    # everystep locks only files that it created; opening another one would empty it.
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        return False
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:  # there are no locks, or the directory is read-only
        return _names_a_writer(directory)
    lock.release()
    return False


def writer_here() -> WriterFacts:
    """Return the facts of this process as a writer."""
    now = datetime.now(UTC).replace(microsecond=0)
    return WriterFacts(process=os.getpid(), host=platform.node(), since=now)


def _facts_of(directory: Path) -> Facts:
    """Return the facts of a run, none if it cannot be read."""
    try:
        with reading(directory / FILE_NAME) as database:
            return database.facts()
    except RunError:
        return Facts()


def _names_a_writer(directory: Path, *, other: bool = False) -> bool:
    """Return whether the process that a run names as its writer (one that is `other`) seems to write."""
    facts = _facts_of(directory)
    writer = facts.writer
    if facts.status != "running" or writer is None:
        return False
    if writer.host == platform.node():
        return not (other and writer.process == os.getpid()) and _is_alive(writer.process)
    # Another host cannot be asked for its processes; that it writes shows in the time of its files.
    with suppress(RunError):
        return time.time() - last_written(directory / FILE_NAME) < _RECENT
    return False


def _is_alive(process: int) -> bool:
    if os.name == "nt":  # where signal 0 ends a process
        return True
    try:
        # Signal 0 does nothing to a process, but raises if there is none.
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):  # a run from a stranger may name any number
        return False
    except PermissionError:  # it is alive, and belongs to another user
        pass
    return True


def write_note(directory: Path, text: str | None) -> str | None:
    """Write the note of a run, and return it as written: one line. None or a blank text removes it.

    Raises:
        UsageError: it is too long.
        RunError: the run is still being trained, or another process is adding to it.
        RecordingError: it cannot be written to.
    """
    line = " ".join((text or "").split()) or None
    if line is not None and len(line) > LONGEST_NOTE:
        raise UsageError(
            f"the note has {len(line):,} characters; write at most {LONGEST_NOTE:,} characters"
        )
    with adding(directory) as database, database.transaction():
        database.write_facts({"note": line})
    return line


@contextmanager
def adding(directory: Path) -> Iterator[Database]:
    """Open the database of a finished run to add to it.

    Raises:
        RunError: it is still being trained, or another process is adding to it.
        RecordingError: it cannot be written to.
    """
    with ExitStack() as closing:
        try:
            closing.enter_context(locked(directory))
        except OSError as error:
            raise RecordingError(f"{directory} cannot be written to: {error.strerror}") from None
        database = Database.change(directory / FILE_NAME)
        closing.callback(database.close)
        with database.transaction():
            database.write_facts({"writer": writer_here()})
        yield database
