"""A run's SQLite database: all SQL but that of `connection`, `blocks` and `health`."""

from __future__ import annotations

import sqlite3
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self, TypeVar

from everystep.bounded import MOST_STEPS
from everystep.errors import RecordingError, RunError
from everystep.recording.blocks import LOSS, Blocks, series_of
from everystep.recording.connection import (
    BYTES,
    FILE_NAME,
    LONGEST_VALUE,
    LOSSES,
    MAYBE_BYTES,
    MAYBE_STEP,
    STEP,
    TEXT,
    VALUES,
    begin_database,
    connect_reading,
    stillness,
)
from everystep.recording.facts import LONGEST_NAME, MOST_NAMES, Facts, MeasuredFacts, read_facts, rows_of
from everystep.recording.files import FileRow, changes_in

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from everystep.recording.blocks import Series

__all__ = [
    "FILE_NAME",
    "Database",
    "MeasurementEnds",
    "Repeat",
    "SnapshotRow",
    "cut",
    "read_quickly",
    "reading",
]


#: Seconds that a writer waits for another program that has locked the database; what is to be written
#: waits in memory.
PATIENCE = 60.0
_SNAPSHOT = (STEP, TEXT, TEXT, STEP)
_REPEAT = (STEP, MAYBE_STEP, MAYBE_BYTES, MAYBE_BYTES, STEP)
_PLACE = (STEP, STEP, STEP)
_FILE = (TEXT, STEP, BYTES)

Found = TypeVar("Found")


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
    """The data that repeats watched steps: `count` of them, from `step` on.

    program: its number, None if nothing repeats the steps; numbers, inputs: of each, as written.
    """

    step: int
    program: int | None
    numbers: bytes | None
    inputs: bytes | None
    count: int = 1  # type: ignore[assignment]  # the method of tuples is not needed

    @property
    def last(self) -> int:
        """The last of the steps."""
        return self.step + self.count - 1


class _OfSteps(Protocol):
    """A row of `count` consecutive steps, from `step` on."""

    @property
    def step(self) -> int: ...
    @property
    def count(self) -> int: ...
    def _replace(self, *, step: int, count: int) -> Self: ...


_Row = TypeVar("_Row", bound=_OfSteps)


def cut(rows: Sequence[_Row], first: int, last: int) -> list[_Row]:
    """Return the rows of steps `first` to `last` alone: one that reaches beyond them is shortened.

    rows: in the order of their steps; no two have a step in common.
    """
    begin = bisect_left(rows, first, key=lambda row: row.step + row.count - 1)
    end = bisect_right(rows, last, key=lambda row: row.step)
    spans = ((r, max(r.step, first), min(r.step + r.count - 1, last)) for r in rows[begin:end])
    return [row._replace(step=a, count=b - a + 1) for row, a, b in spans if a <= b]


class Database(Blocks):
    """An open connection; made by `create` for the one writer, by `reading` for readers.

    Every call may raise RecordingError (writer) or RunError (reader) with SQLite's message.
    """

    @classmethod
    def create(cls, path: Path) -> Database:
        """Create the database; other threads may use it afterwards, one at a time."""
        with _writing(path):
            begin_database(path)
            connection = _connected(path)
            connection.execute("PRAGMA synchronous = NORMAL")
        return cls(connection, path)

    @classmethod
    def change(cls, path: Path) -> Database:
        """Open an existing database to add to it; threads may use it one at a time."""
        connection = _connected(path)
        database = cls(connection, path)
        with _writing(path):
            connection.execute("PRAGMA synchronous = NORMAL")
        return database

    def move(self, path: Path) -> None:
        """Go on with the same database at another path."""
        self.connection.close()
        self.connection, self.path = _connected(path), path

    def hurry(self) -> None:
        """Wait no longer for other programs that have locked the database."""
        self.connection.execute("PRAGMA busy_timeout = 0")

    def close(self) -> None:
        """Close the connection; what was committed stays."""
        self.connection.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All writes within are committed together, with the digests of their blocks, or none."""
        with _writing(self.path):
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.seal_blocks()
                self.connection.execute("COMMIT")
            except BaseException:
                self.forget_blocks()
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")
                raise

    @contextmanager
    def one_moment(self) -> Iterator[None]:
        """Read a consistent view of the database inside, whatever the writer does meanwhile."""
        self.connection.execute("BEGIN")
        try:
            yield
        finally:
            self.connection.execute("ROLLBACK")

    def write_losses(self, first_step: int, losses: Iterable[float | None]) -> None:
        """Write the losses of consecutive steps."""
        import numpy as np

        rows = [*enumerate(losses, start=first_step)]
        values = np.array([loss for _, loss in rows], np.float64)
        self.about_to_append(LOSS, np.arange(first_step, first_step + len(rows)), values)
        self.connection.executemany("INSERT INTO steps VALUES (?, ?)", rows)

    def write_measurements(self, rows: Iterable[tuple[str, int, float | None]]) -> None:
        """Write measurements (name, step, value)."""
        import numpy as np

        rows = [*rows]
        series: dict[str, list[tuple[int, float | None]]] = {}
        for name, step, value in rows:
            series.setdefault(name, []).append((step, value))
        for name, numbers in series.items():
            steps, found = zip(*numbers, strict=True)
            self.about_to_append(series_of(name), np.array(steps, np.int64), np.array(found, np.float64))
        self.connection.executemany("INSERT OR REPLACE INTO measurements VALUES (?, ?, ?)", rows)

    def add_measurements(
        self,
        rows: Sequence[tuple[str, int, float]],
        meanings: Mapping[str, MeasuredFacts] = MappingProxyType({}),
        replaced: Sequence[str] = (),
    ) -> None:
        """Write measurements that were made in hindsight (name, step, value), all or nothing.

        meanings: of names that are new; replaced: names to delete existing values of first.
        """
        with self.transaction():
            for name in replaced:
                self.remove_measurement(name)
            if meanings:
                self.write_facts({"measured": self.facts().measured | dict(meanings)})
            self.write_measurements(rows)

    def write_facts(self, facts: Mapping[str, Any]) -> None:
        """Write facts: values of fields of `Facts` and `TrainingFacts`, by name."""
        self.connection.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", rows_of(facts))
        self.seal_facts()

    def add_snapshot(self, row: SnapshotRow) -> None:
        """Enter a snapshot with a complete directory."""
        self.connection.execute("INSERT OR REPLACE INTO snapshots VALUES (?, ?, ?, ?)", row)

    def remove_snapshots(self, steps: Iterable[int]) -> None:
        """Delete snapshots, before their directories are removed."""
        self.connection.executemany("DELETE FROM snapshots WHERE step = ?", [(s,) for s in steps])

    def write_files(self, rows: Iterable[FileRow]) -> None:
        """Enter files that are complete."""
        self.connection.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", rows)

    def remove_files(self, names: Iterable[str]) -> None:
        """Delete files, before they are removed."""
        self.connection.executemany("DELETE FROM files WHERE name = ?", [(name,) for name in names])

    def write_repeats(self, rows: Iterable[Repeat]) -> None:
        """Write what repeats steps."""
        self.connection.executemany("INSERT INTO repeats VALUES (?, ?, ?, ?, ?)", rows)

    def write_contents(self, rows: Iterable[tuple[bytes, int, int, int]]) -> None:
        """Write the locations of contents (digest, file, place, bytes)."""
        self.connection.executemany("INSERT OR REPLACE INTO contents VALUES (?, ?, ?, ?)", rows)

    def remove_contents(self, file: int) -> None:
        """Delete all contents of a file, before it is removed."""
        self.connection.execute("DELETE FROM contents WHERE file = ?", (file,))

    def forget_after(self, step: int) -> list[str]:
        """Delete losses, measurements and changes of later steps; return the files to remove."""
        self.open_blocks_after(step)
        for table in ("steps", "measurements", "repeats"):
            self.connection.execute(f"DELETE FROM {table} WHERE step > ?", (step,))
        shorten = "UPDATE repeats SET count = min(count, ? - step + 1)"
        self.connection.execute(f"{shorten} WHERE step = (SELECT max(step) FROM repeats)", (step,))
        changes = changes_in(row.name for row in self.files())
        later = [name for at, name in changes.items() if at > step]
        self.remove_files(later)
        return later

    def facts(self) -> Facts:
        """Return all facts."""
        return read_facts(self.rows("SELECT * FROM facts"), self.path)

    def losses(self, last: int | None = None) -> Series:
        """Return all steps, in their order, and their losses; or only the last ones."""
        import numpy as np

        newest, first = self.newest_step(), self.first_step()
        if last is not None:
            first = newest - last + 1 if first is None else max(first, newest - last + 1)
        query = "SELECT loss FROM steps WHERE step >= ? ORDER BY step"
        losses = self.floats(query, 1 if first is None else first, kinds=LOSSES)
        if first is None or len(losses) == newest - first + 1:  # so there is no gap
            return np.arange(newest + 1 - len(losses), newest + 1), losses
        query = "SELECT step FROM steps WHERE step >= ? ORDER BY step"
        return self.integers(query, first, kinds=STEP), losses

    def losses_between(self, first: int, last: int) -> list[tuple[int, float | None]]:
        """Return (step, loss) of steps `first` to `last`, in their order."""
        query = "SELECT step, loss FROM steps WHERE step BETWEEN ? AND ? ORDER BY step"
        most = 2**63 - 1  # SQLite has no larger number
        ends = (max(-most, min(first, most)), max(-most, min(last, most)))
        return self.checked((STEP, LOSSES), query, *ends)

    def losses_after(self, step: int) -> NDArray[np.float64]:
        """Return the losses of the steps after `step`, in their order."""
        return self.floats("SELECT loss FROM steps WHERE step > ? ORDER BY step", step, kinds=LOSSES)

    def newest_step(self) -> int:
        """Return the number of the newest step, 0 if there is none."""
        newest: int = self.numbers("SELECT coalesce(max(step), 0) FROM steps")[0]
        return self._bounded(newest)

    def ends(self) -> tuple[int, float | None, float | None]:
        """Return how many steps there are, and the first and the last loss."""
        # Steps are numbered from 1 without gaps; counting them would read them all.
        rows = self.checked(
            (STEP, LOSSES, LOSSES),
            "SELECT coalesce(max(step), 0), (SELECT loss FROM steps ORDER BY step LIMIT 1), "
            "(SELECT loss FROM steps ORDER BY step DESC LIMIT 1) FROM steps",
        )
        newest, first, last = rows[0]
        return self._bounded(newest), first, last

    def _bounded(self, newest: int) -> int:
        if newest > MOST_STEPS:
            raise RunError(
                f"{self.path} claims to have step {newest:,}; everystep reads up to {MOST_STEPS:,}: the "
                "database was changed"
            )
        return newest

    def measured(self, name: str) -> dict[int, float | None]:
        """Return the values of one measurement by step."""
        query = "SELECT step, value FROM measurements WHERE name = ? ORDER BY step"
        return dict(self.checked((STEP, VALUES), query, name))

    def measured_after(self, name: str, step: int) -> Series:
        """Return the steps after `step` at which something was measured, and the values there."""
        among = "FROM measurements WHERE name = ? AND step > ? ORDER BY step"
        return (
            self.integers(f"SELECT step {among}", name, step, kinds=STEP),
            self.floats(f"SELECT value {among}", name, step, kinds=VALUES),
        )

    def measurement_ends(self) -> list[MeasurementEnds]:
        """Return how many values each measurement has, and the first and the last, by name."""
        self._check_names()
        rows = self.checked(
            (TEXT, STEP, VALUES, VALUES),
            "SELECT name, count, "
            "(SELECT value FROM measurements AS m WHERE m.name = found.name AND step = low), "
            "(SELECT value FROM measurements AS m WHERE m.name = found.name AND step = high) "
            "FROM (SELECT name, count(*) AS count, min(step) AS low, max(step) AS high "
            "FROM measurements GROUP BY name ORDER BY name) AS found",
        )
        return [MeasurementEnds(*row) for row in rows]

    def last_measured(self, name: str) -> float | None:
        """Return the newest value of one measurement; None where there is none, or it is NaN."""
        query = "SELECT value FROM measurements WHERE name = ? ORDER BY step DESC LIMIT 1"
        return next((value for (value,) in self.checked((VALUES,), query, name)), None)

    def measurement_names(self) -> list[str]:
        """Return what was measured."""
        self._check_names()
        query = "SELECT DISTINCT name FROM measurements ORDER BY name"
        return [name for (name,) in self.checked((TEXT,), query)]

    def remove_measurement(self, name: str) -> None:
        """Delete a measurement."""
        self.remove_blocks(series_of(name))
        self.connection.execute("DELETE FROM measurements WHERE name = ?", (name,))

    def measurements(self, since: int | None = None) -> list[tuple[str, int, float | None]]:
        """Return (name, step, value) in order of names, then steps; of step `since` and later."""
        self._check_names()
        since = -(2**63) if since is None else since
        query = "SELECT name, step, value FROM measurements WHERE step >= ? ORDER BY name, step"
        return self.checked((TEXT, STEP, VALUES), query, since)

    def snapshots(self) -> list[SnapshotRow]:
        """Return the snapshots in order of their steps."""
        rows = self.checked(_SNAPSHOT, "SELECT * FROM snapshots ORDER BY step")
        return [SnapshotRow(*row) for row in rows]

    def file(self, name: str) -> FileRow | None:
        """Return a file of the run, None if it has none of this name."""
        rows = self.checked(_FILE, "SELECT * FROM files WHERE name = ?", name)
        return FileRow(*rows[0]) if rows else None

    def files(self) -> list[FileRow]:
        """Return the files of the run, by name."""
        return [FileRow(*row) for row in self.checked(_FILE, "SELECT * FROM files ORDER BY name")]

    def repeats(self, first: int, last: int) -> list[Repeat]:
        """Return the rows that repeat any of steps `first` to `last`, in their order.

        The first and the last of them may reach beyond: see `cut`.
        """
        return self._repeats(first, last, -1)

    def repeats_after(self, step: int, most: int) -> list[Repeat]:
        """Return the first rows that repeat any step after `step`, in their order, up to `most`."""
        return self._repeats(step + 1, 2**63 - 1, most + 1)[:most]

    def _repeats(self, first: int, last: int, limit: int) -> list[Repeat]:
        """Return rows that repeat any of steps `first` to `last`; -1 is no limit.

        The limit counts the newest row that begins at `first` or before, which may end before it, too.
        """
        begin = "(SELECT coalesce(max(step), 1) FROM repeats WHERE step <= ?)"
        query = f"SELECT * FROM repeats WHERE step BETWEEN {begin} AND ? ORDER BY step LIMIT ?"
        rows = [Repeat(*row) for row in self.checked(_REPEAT, query, first, last, limit)]
        are_apart = all(row.last < later.step for row, later in pairwise(rows))
        if not are_apart or any(not 1 <= row.step <= row.last <= MOST_STEPS for row in rows):
            raise RunError(
                f"{self.path} has rows that repeat no steps, or the same ones: the database was changed"
            )
        return rows[1:] if rows and rows[0].last < first else rows

    def all_contents(self) -> list[tuple[bytes, int, int, int]]:
        """Return the locations of all contents (digest, file, place, bytes)."""
        query = "SELECT digest, file, place, bytes FROM contents"
        return self.checked((BYTES, *_PLACE), query)

    def contents(self, digests: Iterable[bytes]) -> dict[bytes, tuple[int, int, int]]:
        """Return the locations of contents (file, place, bytes), as far as known."""
        query = "SELECT file, place, bytes FROM contents WHERE digest = ?"
        found = ((digest, self.checked(_PLACE, query, digest)) for digest in digests)
        return {digest: rows[0] for digest, rows in found if rows}

    def gaps(self, most: int = 10) -> list[tuple[int, int]]:
        """Return the first and last of the steps that are missing between others, from 1."""
        count, newest = self.numbers("SELECT count(*) FROM steps")[0], self.newest_step()
        # Counting all is much faster than looking at each.
        if count == newest and (self.first_step() or 1) > 0:
            return []
        before = "SELECT step, lag(step, 1, 0) OVER (ORDER BY step) AS before FROM steps WHERE step > 0"
        query = f"SELECT before + 1, step - 1 FROM ({before}) WHERE step > before + 1 LIMIT ?"
        return self.rows(query, most)

    def first_step(self) -> int | None:
        """Return the smallest number of a step."""
        first: int | None = self.numbers("SELECT min(step) FROM steps")[0]
        return first

    def check_quickly(self, most: int = 10) -> list[str]:
        """Return what SQLite finds wrong with the database, in its words."""
        try:
            found = self.connection.execute(f"PRAGMA quick_check({most})").fetchall()
        except (sqlite3.Error, UnicodeError) as error:  # so damaged that the check itself ends
            return [str(error)]
        return [str(text) for (text,) in found if text != "ok"]

    def _check_names(self) -> None:
        """Check how many names of measurements there are, and that none is too long."""
        # Each name is found from the one before it, without reading their values.
        query = (
            "WITH RECURSIVE found(name, place) AS (SELECT (SELECT min(name) FROM measurements), 1 "
            "UNION ALL SELECT (SELECT min(name) FROM measurements WHERE name > found.name), place + 1 "
            "FROM found WHERE name IS NOT NULL AND place <= ?) "
            "SELECT count(name), max(length(name)) FROM found"
        )
        count, longest = self.rows(query, MOST_NAMES)[0]
        if count > MOST_NAMES or (longest or 0) > LONGEST_NAME:
            raise RunError(
                f"{self.path} has more than {MOST_NAMES:,} measurements, or one with a name of more "
                f"than {LONGEST_NAME:,} characters, which everystep does not read"
            )


def _connected(path: Path) -> sqlite3.Connection:
    found = sqlite3.connect(path, PATIENCE, isolation_level=None, check_same_thread=False)
    found.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LONGEST_VALUE)
    return found


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise RecordingError(f"{path} cannot be written: {error}") from error


def read_quickly(path: Path, read: Callable[[Database], Found]) -> Found:
    """Return what `read` returns of a run's database, all of it as it was at one moment.

    One that nobody writes is read without locks. That takes a third of the time, and leaves no file of
    SQLite's beside a database that was closed.

    Raises:
        RunError: as `reading`.
    """
    before = stillness(path)
    if before is not None:
        with suppress(RunError), reading(path, is_still=True) as database:
            found = read(database)
            if stillness(path) == before:
                return found
    with reading(path) as database, database.one_moment():
        return read(database)


@contextmanager
def reading(path: Path, *, is_still: bool = False) -> Iterator[Database]:
    """Open a run's database to read, even if it is being written or is read-only.

    is_still: as of `connect_reading`.

    Raises:
        RunError: it is missing, is not an everystep database, or needs a newer everystep; or it was
            removed meanwhile.
    """
    try:
        connection = connect_reading(path, is_still=is_still)
    except (OSError, sqlite3.Error, UnicodeError) as error:  # removed, or replaced, between two looks
        raise RunError(f"{path} cannot be read: {error}") from None
    try:
        yield Database(connection, path)
    except FileNotFoundError:
        if path.is_file():
            raise
        raise RunError(f"{path.parent} is not a run any more: {path.name} is missing") from None
    finally:
        connection.close()
