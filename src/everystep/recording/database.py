"""A run's SQLite database. The only module that contains SQL."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from everystep.errors import RecordingError, RunError
from everystep.recording.connection import FILE_NAME, LOCK_NAME, begin_database, connect_reading
from everystep.recording.fact_rows import read_facts, rows_of
from everystep.recording.facts import Facts

__all__ = [
    "FILE_NAME",
    "LOCK_NAME",
    "Database",
    "MeasurementEnds",
    "Repeat",
    "SnapshotRow",
    "reading",
]


#: Characters of a measurement's name.
LONGEST_NAME = 10_000


class SnapshotRow(NamedTuple):
    """A snapshot as the database knows it."""

    step: int
    directory: str
    digest: str
    bytes: int


class MeasurementEnds(NamedTuple):
    """How many values a measurement has, and its values at its first and its last step."""

    name: str
    values: int
    first: float | None
    last: float | None


class Repeat(NamedTuple):
    """The data that repeats a step of a user's loop.

    program: its number, None if nothing repeats the step; numbers, inputs: as written.
    """

    step: int
    program: int | None
    numbers: bytes | None
    inputs: bytes | None


class Database:
    """An open connection; made by `create` for the one writer, by `reading` for readers.

    Every call may raise RecordingError (writer) or RunError (reader) with SQLite's message.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path

    @classmethod
    def create(cls, path: Path) -> Database:
        """Create the database; other threads may use it afterwards, one at a time."""
        with _writing(path):
            begin_database(path)
            connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
        return cls(connection, path)

    @classmethod
    def change(cls, path: Path) -> Database:
        """Open an existing database to add to it; threads may use it one at a time."""
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        database = cls(connection, path)
        with _writing(path):
            connection.execute("PRAGMA synchronous = NORMAL")
        return database

    def move(self, path: Path) -> None:
        """Go on with the same database at another path."""
        self._connection.close()
        moved = Database.change(path)
        self._connection, self._path = moved._connection, path

    def close(self) -> None:
        """Close the connection; what was committed stays."""
        self._connection.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All writes within are committed together, or none."""
        with _writing(self._path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    @contextmanager
    def one_moment(self) -> Iterator[None]:
        """Read a consistent view of the database inside, whatever the writer does meanwhile."""
        self._connection.execute("BEGIN")
        try:
            yield
        finally:
            self._connection.execute("ROLLBACK")

    def write_losses(self, first_step: int, losses: Iterable[float | None]) -> None:
        """Write the losses of consecutive steps."""
        self._connection.executemany(
            "INSERT INTO steps VALUES (?, ?)", enumerate(losses, start=first_step)
        )

    def write_measurements(self, rows: Iterable[tuple[str, int, float | None]]) -> None:
        """Write measurements (name, step, value)."""
        self._connection.executemany("INSERT OR REPLACE INTO measurements VALUES (?, ?, ?)", rows)

    def write_facts(self, facts: Mapping[str, Any]) -> None:
        """Write facts: values of fields of `Facts` and `TrainingFacts`, by name."""
        self._connection.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", rows_of(facts))

    def add_snapshot(self, row: SnapshotRow) -> None:
        """Enter a snapshot with a complete directory."""
        self._connection.execute("INSERT OR REPLACE INTO snapshots VALUES (?, ?, ?, ?)", row)

    def remove_snapshots(self, steps: Iterable[int]) -> None:
        """Delete snapshots, before their directories are removed."""
        self._connection.executemany("DELETE FROM snapshots WHERE step = ?", [(s,) for s in steps])

    def write_repeats(self, rows: Iterable[Repeat]) -> None:
        """Write what repeats steps."""
        self._connection.executemany("INSERT INTO repeats VALUES (?, ?, ?, ?)", rows)

    def write_contents(self, rows: Iterable[tuple[bytes, int, int, int]]) -> None:
        """Write the locations of contents (digest, file, place, bytes)."""
        self._connection.executemany("INSERT OR REPLACE INTO contents VALUES (?, ?, ?, ?)", rows)

    def remove_contents(self, file: int) -> None:
        """Delete all contents of a file, before it is removed."""
        self._connection.execute("DELETE FROM contents WHERE file = ?", (file,))

    def forget_after(self, step: int) -> None:
        """Delete losses and measurements of later steps."""
        for table in ("steps", "measurements", "repeats"):
            self._connection.execute(f"DELETE FROM {table} WHERE step > ?", (step,))

    def facts(self) -> Facts:
        """Return all facts."""
        return read_facts(self._rows("SELECT * FROM facts"), self._path)

    def losses(self, last: int | None = None) -> list[tuple[int, float | None]]:
        """Return (step, loss) in order of the steps, or only the last ones."""
        if last is None:
            return self._rows("SELECT step, loss FROM steps ORDER BY step")
        return self._rows("SELECT * FROM steps ORDER BY step DESC LIMIT ?", last)[::-1]

    def losses_between(self, first: int, last: int) -> list[tuple[int, float | None]]:
        """Return (step, loss) of steps `first` to `last`, in their order."""
        query = "SELECT step, loss FROM steps WHERE step BETWEEN ? AND ? ORDER BY step"
        most = 2**63 - 1  # SQLite has no larger number
        ends = (max(-most, min(first, most)), max(-most, min(last, most)))
        return self._rows(query, *ends)

    def losses_after(self, step: int) -> list[float | None]:
        """Return the losses of the steps after `step`, in their order."""
        return self._numbers("SELECT loss FROM steps WHERE step > ? ORDER BY step", step)

    def newest_step(self) -> int:
        """Return the number of the newest step, 0 if there is none."""
        newest: int = self._numbers("SELECT coalesce(max(step), 0) FROM steps")[0]
        return newest

    def ends(self) -> tuple[int, float | None, float | None]:
        """Return how many steps there are, and the first and the last loss."""
        # Steps are numbered from 1 without gaps; counting them would read them all.
        rows = self._rows(
            "SELECT coalesce(max(step), 0), (SELECT loss FROM steps ORDER BY step LIMIT 1), "
            "(SELECT loss FROM steps ORDER BY step DESC LIMIT 1) FROM steps"
        )
        newest, first, last = rows[0]
        return newest, first, last

    def measured(self, name: str) -> dict[int, float | None]:
        """Return the values of one measurement by step."""
        query = "SELECT step, value FROM measurements WHERE name = ? ORDER BY step"
        return dict(self._rows(query, name))

    def measured_after(self, name: str, step: int) -> tuple[list[int], list[float | None]]:
        """Return the steps after `step` at which something was measured, and the values there."""
        among = "FROM measurements WHERE name = ? AND step > ? ORDER BY step"
        return (
            self._numbers(f"SELECT step {among}", name, step),
            self._numbers(f"SELECT value {among}", name, step),
        )

    def measurement_ends(self) -> list[MeasurementEnds]:
        """Return how many values each measurement has, and the first and the last, by name."""
        rows = self._rows(
            "SELECT name, count, "
            "(SELECT value FROM measurements AS m WHERE m.name = found.name AND step = low), "
            "(SELECT value FROM measurements AS m WHERE m.name = found.name AND step = high) "
            "FROM (SELECT name, count(*) AS count, min(step) AS low, max(step) AS high "
            "FROM measurements GROUP BY name ORDER BY name) AS found"
        )
        are_names = all(isinstance(row[0], str) and len(row[0]) <= LONGEST_NAME for row in rows)
        if not are_names or any(isinstance(value, str | bytes) for row in rows for value in row[2:]):
            raise RunError(
                f"{self._path} has measurements that everystep did not write: the database was changed"
            )
        return [MeasurementEnds(*row) for row in rows]

    def last_measured(self, name: str) -> float | None:
        """Return the newest value of one measurement; None where there is none, or it is NaN."""
        query = "SELECT value FROM measurements WHERE name = ? ORDER BY step DESC LIMIT 1"
        return next((value for (value,) in self._rows(query, name)), None)

    def measurement_names(self) -> list[str]:
        """Return what was measured."""
        return [name for (name,) in self._rows("SELECT DISTINCT name FROM measurements ORDER BY name")]

    def remove_measurement(self, name: str) -> None:
        """Delete a measurement."""
        self._connection.execute("DELETE FROM measurements WHERE name = ?", (name,))

    def measurements(self) -> list[tuple[str, int, float | None]]:
        """Return (name, step, value) in order of names, then steps."""
        return self._rows("SELECT name, step, value FROM measurements ORDER BY name, step")

    def snapshots(self) -> list[SnapshotRow]:
        """Return the snapshots in order of their steps."""
        return [SnapshotRow(*row) for row in self._rows("SELECT * FROM snapshots ORDER BY step")]

    def repeats(self, first: int, last: int) -> list[Repeat]:
        """Return what repeats steps `first` to `last`, in their order."""
        query = "SELECT * FROM repeats WHERE step BETWEEN ? AND ? ORDER BY step"
        return [Repeat(*row) for row in self._rows(query, first, last)]

    def all_contents(self) -> list[tuple[bytes, int, int, int]]:
        """Return the locations of all contents (digest, file, place, bytes)."""
        return self._rows("SELECT digest, file, place, bytes FROM contents")

    def contents(self, digests: Iterable[bytes]) -> dict[bytes, tuple[int, int, int]]:
        """Return the locations of contents (file, place, bytes), as far as known."""
        query = "SELECT file, place, bytes FROM contents WHERE digest = ?"
        found = ((digest, self._rows(query, digest)) for digest in digests)
        return {digest: rows[0] for digest, rows in found if rows}

    def _rows(self, query: str, *arguments: Any) -> list[Any]:
        try:
            return self._connection.execute(query, arguments).fetchall()
        except sqlite3.Error as error:
            raise RunError(f"{self._path} cannot be read: {error}") from None

    def _numbers(self, query: str, *arguments: Any) -> list[Any]:
        """Return the only column of a query; fast for millions of rows."""
        try:
            return list(chain.from_iterable(self._connection.execute(query, arguments)))
        except sqlite3.Error as error:
            raise RunError(f"{self._path} cannot be read: {error}") from None


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise RecordingError(f"{path} cannot be written: {error}") from error


@contextmanager
def reading(path: Path) -> Iterator[Database]:
    """Open a run's database to read, even if it is being written or is read-only.

    Raises:
        RunError: it is missing, is not an everystep database, or needs a newer everystep.
    """
    connection = connect_reading(path)
    try:
        yield Database(connection, path)
    finally:
        connection.close()
