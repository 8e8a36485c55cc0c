"""Connections to a run's database: its schema, and how to create or open one.

A database may come from an untrusted source. everystep reads it only if its tables are exactly those
that it creates: a view in place of a table could compute forever.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import tempfile
import time
from contextlib import closing
from functools import cache, partial
from pathlib import Path

from everystep.errors import ForeignDatabaseError, RunError

__all__ = [
    "FILE_NAME",
    "LOCK_NAME",
    "LOGS",
    "LONGEST_VALUE",
    "SPARE_NAME",
    "begin_database",
    "connect_at_rest",
    "connect_reading",
    "edition_at_rest",
    "fingerprint",
    "last_written",
]

FILE_NAME = "run.sqlite"
LOCK_NAME = "run.lock"
# Takes space while the run is written, so that its last facts fit on a full disk.
SPARE_NAME = "run.spare"
APPLICATION_ID = 0x65767374  # "evst"
SCHEMA_VERSION = 16

SCHEMA = """
-- One row a step that was taken. SQLite turns NaN into NULL, so NULL means NaN; infinities are kept.
-- A float32 loss is exact in REAL.
CREATE TABLE steps (
    step INTEGER PRIMARY KEY,              -- from 1
    loss REAL                              -- of the forward pass, that is of state step-1
);

-- Named numbers besides the loss: what was evaluated, and the learning rate where it changed.
CREATE TABLE measurements (
    name TEXT NOT NULL,
    step INTEGER NOT NULL,                 -- the state (from 0) or step that it belongs to
    value REAL,                            -- NULL means NaN
    PRIMARY KEY (name, step)
) WITHOUT ROWID;

-- What repeats watched steps. A row is of `count` consecutive steps that have all of it in common.
CREATE TABLE repeats (
    step INTEGER PRIMARY KEY,              -- the first of them
    program INTEGER,                       -- programs/N.json; 0: among the inputs, which may have its
                                           -- sizes, too; NULL: nothing repeats the steps
    numbers BLOB,                          -- of its operators and those that Python read: JSON, zlib
    inputs BLOB,                           -- what each step was given, by content: JSON, zlib
    count INTEGER NOT NULL,                -- from 1
    digest INTEGER NOT NULL                -- XXH3, 64 bits, of the other columns
);

-- Tensors that steps were given, or rows of them: pieces with consecutive numbers, one after the other.
CREATE TABLE contents (
    number INTEGER PRIMARY KEY,            -- of the first piece, from 1
    file INTEGER NOT NULL,                 -- batches/N.bin
    place INTEGER NOT NULL,                -- of the first byte
    size INTEGER NOT NULL,                 -- bytes of each piece
    digests BLOB NOT NULL,                 -- of each piece: XXH3, 128 bits
    source INTEGER                         -- number of the data that they were cut out of
);

-- Files of the run besides batches, which have digests of their own. A row is entered when its file is
-- complete; a file without a row is not of the run.
CREATE TABLE files (
    name TEXT PRIMARY KEY,                 -- within the run: 'programs/1.json'
    size INTEGER NOT NULL,                 -- bytes
    digest BLOB NOT NULL                   -- XXH3, 128 bits, of its content
) WITHOUT ROWID;

-- Everything else: status, numerics, versions, times. Values are JSON.
CREATE TABLE facts (
    key TEXT PRIMARY KEY,
    value TEXT NOT NULL
) WITHOUT ROWID;

-- Digests of up to 4,096 numbers of one series each, of the facts, and of the list of files; see
-- recording/blocks.py.
CREATE TABLE blocks (
    name TEXT NOT NULL,                    -- 'loss', 'measurement/' and its name, 'facts', 'files'
    first INTEGER NOT NULL,                -- a multiple of 4,096; 0 for facts and files
    digest INTEGER NOT NULL,               -- 64 bits
    PRIMARY KEY (name, first)
) WITHOUT ROWID;
"""

#: What SQLite adds to the name of a database for its logs, and for the index of one.
LOGS = "-wal", "-journal", "-shm"
#: Nanoseconds of the coarsest clock of a file system with times below a second.
_TICK = 50_000_000
#: Seconds that another program may lock the database; everystep's writer never makes readers wait.
_PATIENCE = 1.0
#: Bytes that a text or a blob may have, where it is written and where it is read.
LONGEST_VALUE = 16_000_000


def begin_database(path: Path) -> None:
    """Create the database of a run; it is complete from the moment it exists.

    Raises:
        OSError, sqlite3.Error: it cannot be written.
    """
    new = path.with_name(f"{path.name}-new")
    # A log of another database of this name would be played into the new one.
    for suffix in ("", "-wal", "-shm"):  # of a process that was killed
        new.with_name(f"{new.name}{suffix}").unlink(missing_ok=True)
    # No reader knows the file yet, so one sync when it is complete is enough.
    with closing(sqlite3.connect(new, isolation_level=None)) as connection:
        identity = f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION};"
        modes = "PRAGMA synchronous = OFF; PRAGMA journal_mode = WAL;"
        connection.executescript(f"{modes} BEGIN; {identity} {SCHEMA} COMMIT;")
    with new.open("rb+") as file:
        os.fsync(file.fileno())
    # Only a complete database gets the name by which a directory is a run.
    new.rename(path)


def connect_reading(path: Path, *, is_whole: bool = True) -> sqlite3.Connection:
    """Return a read-only connection to a run's database.

    is_whole: refuse a database that is cut off, and one with pages that SQLite finds damaged when it
    opens it.

    Raises:
        RunError: it is missing, is not an everystep database, or needs a newer everystep.
    """
    log = _statuses(path).get("-wal")
    has_log = log is not None and log.st_size > 0
    if is_whole and not has_log:  # where it has content, a checkpoint may be under way
        _check_size(path)
    return _identified(_connect(path, has_log=has_log, is_whole=is_whole), path)


def connect_at_rest(path: Path) -> sqlite3.Connection:
    """Return a connection to a database that nothing writes: it locks nothing, and makes no files.

    What is read is sound if `edition_at_rest` returns the same before and after.

    Raises:
        OSError, sqlite3.Error, UnicodeError: it cannot be read.
        RunError: as `connect_reading`.
    """
    _check_size(path)
    uri = f"{path.resolve().as_uri()}?mode=ro&immutable=1"
    connection = sqlite3.connect(uri, uri=True, isolation_level=None)
    return _identified(_restricted(connection, is_whole=True), path)


def edition_at_rest(path: Path) -> tuple[int, ...] | None:
    """Return a value that changes with a database; None if it may be written now, or just was.

    Raises:
        RunError: there is no such database.
    """
    found = _statuses(path)
    status = found[""]
    # Who may write it, or read what is written, has a log. Two changes within a tick have the same time.
    if len(found) > 1 or abs(time.time_ns() - status.st_mtime_ns) <= _TICK:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def fingerprint(directory: Path) -> tuple[int, ...]:
    """Return a value that changes with a run's database: its files' times and sizes.

    Raises:
        RunError: the run no longer exists.
    """
    found: list[int] = []
    for suffix, status in _statuses(directory / FILE_NAME).items():
        if suffix != "-shm":  # readers make it, too
            found += [status.st_ino, status.st_mtime_ns, status.st_size]
    # Two changes within a tick of the file system's clock have the same time, so fingerprints of a
    # file that just changed all differ.
    now = time.time_ns()
    return tuple(found if abs(now - max(found[1::3])) > _TICK else [*found, now])


def last_written(path: Path) -> float:
    """Return when a database was last written, in seconds since 1970.

    Raises:
        RunError: there is no such database.
    """
    return max(status.st_mtime for suffix, status in _statuses(path).items() if suffix != "-shm")


def _statuses(path: Path) -> dict[str, os.stat_result]:
    """Return the status of a database and of the files that SQLite keeps next to it, by their suffix.

    All must be regular files: of a pipe, SQLite would wait for the other end.
    """
    found: dict[str, os.stat_result] = {}
    for suffix in ("", *LOGS):
        file = f"{path}{suffix}"
        try:
            status = found[suffix] = os.lstat(file)  # a path of its own takes longer
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise RunError(f"{file!r:.200} cannot be read: {error.strerror}") from None
        if not stat.S_ISREG(status.st_mode):
            raise RunError(f"{file} is a link, or is not a regular file: everystep did not write it")
    if "" not in found:
        raise RunError(f"{path.parent} is not a run: {path.name} is missing")
    return found


def _check_size(path: Path) -> None:
    """Check that a database is not cut off; SQLite reads the rest of its last page as zeros.

    Its header has the number of its pages (SQLite's file format, section 1.3).
    """
    with path.open("rb") as file:
        header = file.read(32)
        size = file.seek(0, os.SEEK_END)
    # A page of 65,536 bytes is written as 1: two bytes hold no larger number.
    page, pages = int.from_bytes(header[16:18], "big"), int.from_bytes(header[28:32], "big")
    expected = (65_536 if page == 1 else page) * pages
    if header.startswith(b"SQLite format 3\0") and size < expected:
        raise RunError(
            f"{path} is cut off: it has {size:,} of {expected:,} bytes; restore it from a copy"
        )


def _connect(path: Path, *, has_log: bool, is_whole: bool) -> sqlite3.Connection:
    # It quotes ?, # and %, which SQLite would take for parts of the URI; and it must be absolute.
    uri = path.resolve().as_uri()
    opened = partial(sqlite3.connect, uri=True, isolation_level=None, timeout=_PATIENCE)
    # On a read-only file system SQLite cannot make the files that reading a database with a log takes,
    # as a killed run has. An immutable database needs none, but is read without its log.
    still = partial(opened, f"{uri}?mode=ro&immutable=1")
    other = partial(_with_log, path) if has_log else still
    last_error: Exception | None = None
    for connect in (partial(opened, f"{uri}?mode=ro"), other):
        try:
            return _restricted(connect(), is_whole=is_whole)
        except (OSError, sqlite3.Error, UnicodeError) as error:  # the last of a message with bad bytes
            if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY:
                raise RunError(
                    f"{path} is locked by another program; close that program first"
                ) from None
            last_error = error
    raise RunError(f"{path} cannot be read: {last_error}")


def _restricted(connection: sqlite3.Connection, *, is_whole: bool) -> sqlite3.Connection:
    try:
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LONGEST_VALUE)
        # The file may be a stranger's: no functions in its schema, no cells outside of their pages.
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.execute("PRAGMA cell_size_check = ON")
        if not is_whole:  # SQLite reads the pages that are there
            connection.execute("PRAGMA writable_schema = ON")
        # Opening reads nothing: only a query shows whether the database can be read.
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def _with_log(path: Path) -> sqlite3.Connection:
    """Return a connection to a copy, in memory, of a database and its log."""
    found = sqlite3.connect(":memory:", isolation_level=None)
    # SQLite plays the log into the copy, next to which it can make files.
    with tempfile.TemporaryDirectory(prefix="everystep-") as folder:
        copy = Path(folder, path.name)
        for suffix in ("", "-wal"):
            shutil.copyfile(f"{path}{suffix}", f"{copy}{suffix}")
        with closing(sqlite3.connect(copy, isolation_level=None)) as copied:
            copied.execute("PRAGMA trusted_schema = OFF")
            copied.backup(found)
    return found


def _identified(connection: sqlite3.Connection, path: Path) -> sqlite3.Connection:
    """Return a connection to a database of everystep's; close it if it is not one."""
    try:
        _check_identity(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _check_identity(connection: sqlite3.Connection, path: Path) -> None:
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if application != APPLICATION_ID:
        raise ForeignDatabaseError(f"{path} is a SQLite database, but not of an everystep run")
    if version != SCHEMA_VERSION:
        earlier = "an earlier", "everystep 0.1 reads format 1"
        newer = "a newer", "pip install --upgrade everystep"
        writer, cure = newer if version > SCHEMA_VERSION else earlier
        raise RunError(
            f"{path} has format {version}, written by {writer} everystep; this one reads format "
            f"{SCHEMA_VERSION} only ({cure})"
        )
    if _tables(connection) != _own_tables():
        raise RunError(f"{path} has tables that everystep does not create: the database was changed")


def _tables(connection: sqlite3.Connection) -> set[tuple[str, str, str | None]]:
    # SQLite keeps the text of each CREATE as it was, with its comments, so texts can be compared.
    return set(connection.execute("SELECT type, name, sql FROM sqlite_master"))


@cache
def _own_tables() -> set[tuple[str, str, str | None]]:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(SCHEMA)
        return _tables(connection)
