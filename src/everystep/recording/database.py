"""A run's SQLite database: all SQL but that of `connection`, `blocks` and `health`."""

from __future__ import annotations

import math
import sqlite3
import threading
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from everystep.bounded import MOST_STEPS
from everystep.errors import RecordingError, RunError
from everystep.recording.blocks import Blocks, digest_of_row, series_of
from everystep.recording.connection import (
    FILE_NAME,
    LONGEST_VALUE,
    begin_database,
    connect_at_rest,
    connect_reading,
    edition_at_rest,
)
from everystep.recording.facts import Facts, MeasuredFacts, read_facts, rows_of
from everystep.recording.files import BATCHES, CHANGES, SNAPSHOTS, FileRow, own_path, remove
from everystep.recording.snapshots import SnapshotRow, snapshots_in

__all__ = [
    "FILE_NAME",
    "Database",
    "MeasurementEnds",
    "PieceIndex",
    "Pieces",
    "Repeat",
    "cut",
    "read_from",
    "reading",
]

_Found = TypeVar("_Found")


#: How many databases at rest a thread keeps open, those that it has read last.
_MOST_OPEN = 4
#: Seconds that a writer waits for another program that has locked the database; writes wait in memory.
PATIENCE = 60.0


# The rows that repeat a step refer to other tables, e.g. of a loop that shuffles its rows:
#   repeats   step 17, count 1, program 2, numbers [0.01], inputs {"batch/x": pieces 5, 9, 10, ...}
#   contents  number 1, file 1, place 0, size 784, 1,024 digests: piece 5 begins at byte 4 * 784
#   files     programs/2.json, snapshots/000016/parameters.safetensors, ...; not batches/1.bin
# Batches by a rule need one row for many steps: `count` of them.
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

    @property
    def digest(self) -> int:
        """XXH3, 64 bits, of the row: a step is repeated by what was recorded of it, or not at all."""
        return digest_of_row(self)


class Pieces(NamedTuple):
    """Pieces of inputs, such as rows of one, that lie one after the other in a file of batches.

    number: of the first; the others have those that follow; place: of its first byte; size: bytes of
    each; digests: of each, 16 bytes; source: the number of data that they were cut out of: then these
    bytes are places in that.
    """

    number: int
    file: int
    place: int
    size: int
    digests: bytes
    source: int | None = None

    @property
    def end(self) -> int:
        """The number after those of the pieces."""
        return self.number + len(self.digests) // 16

    def digests_from(self, number: int, end: int) -> list[bytes]:
        """Return the digests of the pieces from one on, up to the one before `end`."""
        first = self.number
        return [self.digests[16 * (n - first) : 16 * (n - first + 1)] for n in range(number, end)]


class _Numbered(Protocol):
    @property
    def end(self) -> int: ...


_Row = TypeVar("_Row", bound=_Numbered)


class PieceIndex(Generic[_Row]):
    """Pieces by their numbers. rows: in order of their first numbers, with which each begins."""

    def __init__(self, rows: Iterable[_Row]) -> None:
        self.rows = [*rows]

    def of(self, number: int) -> _Row | None:
        """Return those that a piece is among, None if it was given up."""
        # Rows are tuples: one of a number alone sorts before that which begins with it.
        index = bisect_right(self.rows, (number + 1,)) - 1  # type: ignore[type-var]
        return self.rows[index] if index >= 0 and number < self.rows[index].end else None


#: Rows that are entered by one call; SQLite takes 999 values.
_AT_ONCE = 128
#: The tables of rows.
_TABLES: dict[type[Any], str] = {FileRow: "files", Repeat: "repeats", Pieces: "contents"}
#: The columns of what repeats steps, without its digest.
_REPEAT = ", ".join(Repeat._fields)


def cut(rows: Sequence[Repeat], first: int, last: int) -> list[Repeat]:
    """Return the rows of steps `first` to `last` alone: one that reaches beyond them is shortened.

    rows: in the order of their steps; no two have a step in common.
    """
    begin = bisect_left(rows, first, key=lambda row: row.last)
    end = bisect_right(rows, last, key=lambda row: row.step)
    spans = ((row, max(row.step, first), min(row.last, last)) for row in rows[begin:end])
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
            return cls(_connected(path), path)

    @classmethod
    def change(cls, path: Path) -> Database:
        """Open an existing database to add to it; threads may use it one at a time."""
        with _writing(path):
            return cls(_connected(path), path)

    def move(self, path: Path) -> None:
        """Continue with the same database at another path."""
        self.connection.close()
        self.connection, self.path = _connected(path), path

    def hurry(self) -> None:
        """Stop waiting for other programs that have locked the database."""
        self.connection.execute("PRAGMA busy_timeout = 0")

    def close(self) -> None:
        """Close the connection; committed data stays."""
        with suppress(sqlite3.Error):  # another process reads it now
            self.hurry()  # the end of a training must not wait for a reader
            # Without a log, readers make no files next to the database.
            self.connection.execute("PRAGMA journal_mode = DELETE")
        self.connection.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit all writes inside together, or none."""
        with _writing(self.path):
            # The lock is taken now: to take it at the first write may fail at once, without a wait.
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.connection.execute("COMMIT")
            except BaseException:
                # SQLite may have ended the transaction by itself, as on a full disk.
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")
                raise

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
                self.connection.execute("DELETE FROM measurements WHERE name = ?", (name,))
                # Their digests, too: those of the new values are added to what is there.
                self.connection.execute("DELETE FROM blocks WHERE name = ?", (series_of(name),))
            if meanings:
                self.write_facts({"measured": self.facts().measured | dict(meanings)})
            self.write_measurements(rows)

    def write_facts(self, facts: Mapping[str, Any]) -> None:
        """Write facts: values of fields of `Facts` and `TrainingFacts`, by name."""
        rows = rows_of(facts)
        known = [self._fetched("SELECT * FROM facts WHERE key = ?", (key,)) for key, _ in rows]
        self.change_table("facts", [*chain.from_iterable(known), *rows])
        self.connection.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", rows)

    def enter(self, rows: Sequence[FileRow] | Sequence[Repeat] | Sequence[Pieces]) -> None:
        """Enter rows in their table; of a file, once it is complete."""
        if files := [row for row in rows if isinstance(row, FileRow)]:
            known = chain.from_iterable(self.files(row.name) for row in files)
            self.change_table("files", [*known, *files])
        for begin in range(0, len(rows), _AT_ONCE):  # one call for many: another thread waits for each
            some = rows[begin : begin + _AT_ONCE]
            values = [(*row, row.digest) if isinstance(row, Repeat) else row for row in some]
            places = ", ".join([f"({', '.join('?' * len(values[0]))})"] * len(values))
            query = f"INSERT OR REPLACE INTO {_TABLES[type(some[0])]} VALUES {places}"
            self.connection.execute(query, [*chain.from_iterable(values)])

    @contextmanager
    def removing(self, names: Iterable[str]) -> Iterator[None]:
        """Forget files in a transaction, with what is written inside; then remove them.

        names: within the run: `batches/3.bin`, `changes/000007.safetensors`; `snapshots/000137` is a
        state.

        Raises:
            RunError: one is not of the run.
        """
        names = [*names]
        # Before anything is forgotten: names in a stranger's database may lead anywhere.
        paths = [own_path(self.directory, name) for name in names]
        with self.transaction():
            yield
            # A state is a directory, so the pattern is that of its files. A file of batches has no row
            # in `files`: the rows of its contents name it.
            which = "FROM files WHERE name = ? OR name GLOB ?"
            some = [(name, f"{name}/*") for name in names]
            gone = {row for each in some for row in self.rows(FileRow, f"SELECT * {which}", *each)}
            self.change_table("files", gone)
            self.connection.executemany(f"DELETE {which}", some)
            batches = [(int(Path(name).stem),) for name in names if name.startswith(f"{BATCHES}/")]
            self.connection.executemany("DELETE FROM contents WHERE file = ?", batches)
        # After the commit: a process that is killed here leaves files that nothing names, which `tidy`
        # removes, and never a row without its file.
        for path in paths:
            remove(path)

    def forget_repeats(self, first: int, last: int, since: int) -> list[Repeat]:
        """Delete what repeats steps `first` to `last`; return the rows of those that had a program.

        Rows without one stay from step `since` on, and that of step 1.
        """
        of_steps = "FROM repeats WHERE step >= ? AND step + count - 1 <= ? AND "
        found = self.rows(Repeat, f"SELECT {_REPEAT} {of_steps} program IS NOT NULL", first, last)
        self.connection.execute(
            f"DELETE {of_steps} (program IS NOT NULL OR step BETWEEN 2 AND ?)", (first, last, since - 1)
        )
        return found

    def forget_after(self, step: int) -> None:
        """Delete losses, measurements, facts and what repeats later steps."""
        facts = self.facts()
        self.write_facts({n: each for n, each in facts.up_to(step).items() if getattr(facts, n) != each})
        self.forget_numbers_after(step)
        self.connection.execute("DELETE FROM repeats WHERE step > ?", (step,))
        # Only the last of the rows that are left can reach beyond the step.
        self.enter(cut(self.repeats(step), 1, step))

    def changes(self) -> dict[int, str]:
        """Return the files of what code between two steps changed, by the step before."""
        return {row.step or 0: row.name for row in self.files(f"{CHANGES}/*")}

    def facts(self) -> Facts:
        """Return all facts."""
        return read_facts(self._fetched("SELECT * FROM facts", ()), self.path)

    def newest_step(self) -> int:
        """Return the number of the newest step, 0 if there is none."""
        newest: int = self.numbers("SELECT coalesce(max(step), 0) FROM steps")[0]
        if newest > MOST_STEPS:
            raise RunError(
                f"{self.path} claims to have step {newest:,}; everystep reads up to {MOST_STEPS:,}: the "
                "database was changed"
            )
        return newest

    def measurement_ends(self) -> list[MeasurementEnds]:
        """Return how many values each measurement has, and the first and the last, by name."""
        self.measurement_names()  # it checks them
        return self.rows(
            MeasurementEnds,
            "SELECT name, count, "
            "(SELECT value FROM measurements AS m WHERE m.name = found.name AND step = low), "
            "(SELECT value FROM measurements AS m WHERE m.name = found.name AND step = high) "
            "FROM (SELECT name, count(*) AS count, min(step) AS low, max(step) AS high "
            "FROM measurements GROUP BY name ORDER BY name) AS found",
        )

    def last_measured(self, name: str) -> float | None:
        """Return the newest value of a measurement; None if there is none."""
        query = "SELECT value FROM measurements WHERE name = ? ORDER BY step DESC LIMIT 1"
        wrong = "measurements that are not numbers"
        found: list[float | None] = self.numbers(query, name, kind=float | None, wrong=wrong)
        return None if not found else math.nan if found[0] is None else found[0]

    def snapshots(self) -> list[SnapshotRow]:
        """Return the snapshots in order of their steps."""
        return snapshots_in(self.files(f"{SNAPSHOTS}/*"))

    def files(self, names: str = "*") -> list[FileRow]:
        """Return the files of the run, by name. names: a pattern of those to return."""
        return self.rows(FileRow, "SELECT * FROM files WHERE name GLOB ? ORDER BY name", names)

    def repeats(self, first: int, last: int = MOST_STEPS, most: int = -1) -> list[Repeat]:
        """Return the rows that repeat any of steps `first` to `last`, in their order.

        The first and the last of them may reach beyond: see `cut`. most: about how many rows to return.
        """
        # The newest row that begins at `first` or before may end before it, too.
        begin = "(SELECT coalesce(max(step), 1) FROM repeats WHERE step <= ?)"
        which = f"FROM repeats WHERE step BETWEEN {begin} AND ? ORDER BY step LIMIT ?"
        rows = self.rows(Repeat, f"SELECT {_REPEAT} {which}", first, last, most)
        digests = self.numbers(f"SELECT digest {which}", first, last, most)
        are_apart = all(row.last < later.step for row, later in pairwise(rows))
        if not are_apart or any(not 1 <= row.step <= row.last <= MOST_STEPS for row in rows):
            raise RunError(
                f"{self.path} has rows that repeat no steps, or the same ones: the database was changed"
            )
        for row, digest in zip(rows, digests, strict=True):
            if row.digest != digest:
                raise RunError(
                    f"{self.path}: what repeats step {row.step} does not match its digest: the database "
                    "was changed"
                )
        return rows[1:] if rows and rows[0].last < first else rows

    def all_contents(self) -> list[Pieces]:
        """Return all pieces of inputs, in order of their numbers."""
        return self._pieces("ORDER BY number")

    def contents(self, numbers: Iterable[int]) -> PieceIndex[Pieces]:
        """Return the pieces that are among some, and what they were cut out of, as far as known."""
        found = self._among(numbers)
        # Data that was cut out of is whole: it has no source itself.
        found |= self._among({row.source for row in found.values() if row.source is not None})
        return PieceIndex(found[number] for number in sorted(found))

    def _among(self, numbers: Iterable[int]) -> dict[int, Pieces]:
        found: dict[int, Pieces] = {}
        row: Pieces | None = None
        # In order, so that one query finds the row of all pieces that lie together.
        for number in sorted({*numbers}):
            if row is None or number >= row.end:
                rows = self._pieces("WHERE number <= ? ORDER BY number DESC LIMIT 1", number)
                row = next(iter(rows), None)
            if row is not None and number < row.end:
                found[row.number] = row
        return found

    def _pieces(self, which: str, *arguments: int) -> list[Pieces]:
        rows = self.rows(Pieces, f"SELECT * FROM contents {which}", *arguments)
        if any(min(row[:4]) < 0 or len(row.digests) % 16 for row in rows):
            raise RunError(f"{self.path} has inputs at impossible places: the database was changed")
        return rows

    def check_quickly(self) -> list[str]:
        """Return SQLite's own report of damage in the database."""
        try:
            found = self.connection.execute("PRAGMA quick_check(10)").fetchall()
        except (sqlite3.Error, UnicodeError) as error:  # so damaged that the check itself ends
            return [str(error)]
        return [str(text) for (text,) in found if text != "ok"]


def _connected(path: Path) -> sqlite3.Connection:
    # `transaction` begins and commits by itself. The thread of a recorder uses what another opened.
    found = sqlite3.connect(path, PATIENCE, isolation_level=None, check_same_thread=False)
    found.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LONGEST_VALUE)
    found.execute("PRAGMA journal_mode = WAL")  # processes read while this one writes
    # With a log, a killed process loses no commit; a power failure may lose the newest.
    found.execute("PRAGMA synchronous = NORMAL")
    return found


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise RecordingError(f"{path} cannot be written: {error}") from error


@contextmanager
def reading(path: Path) -> Iterator[Database]:
    """Open a run's database to read it as it is at one moment, also while it is written.

    Raises:
        RunError: it is missing, is not an everystep database, or needs a newer everystep; or it was
            removed meanwhile.
    """
    try:
        connection = connect_reading(path)
        # All queries inside see the same moment, though a training writes meanwhile.
        connection.execute("BEGIN")
    except (OSError, sqlite3.Error, UnicodeError) as error:  # removed, or replaced, between two looks
        raise RunError(f"{path} cannot be read: {error}") from None
    try:
        yield Database(connection, path)
    except FileNotFoundError:
        # Another file of the run was missing: either it alone, or the whole run was removed.
        if path.is_file():
            raise
        raise RunError(f"{path.parent} is no longer a run: {path.name} is missing") from None
    finally:
        connection.close()


class _AtRest(threading.local):
    """The databases at rest that this thread has read last, with their editions, by path."""

    def __init__(self) -> None:
        self.known: OrderedDict[Path, tuple[tuple[int, ...], Database]] = OrderedDict()

    def database(self, path: Path, edition: tuple[int, ...]) -> Database:
        """Return an open database of an edition."""
        if path in self.known and self.known[path][0] != edition:
            self.known.pop(path)[1].connection.close()
        if path not in self.known:
            self.known[path] = edition, Database(connect_at_rest(path), path)
            if len(self.known) > _MOST_OPEN:
                self.known.popitem(last=False)[1][1].connection.close()
        self.known.move_to_end(path)
        return self.known[path][1]


_AT_REST = _AtRest()


def read_from(path: Path, read: Callable[[Database], _Found]) -> _Found:
    """Return what a function reads from a run's database, as it is at one moment.

    To open a database takes longer than most reads, so one that nothing writes is kept open.

    Raises:
        RunError: as `reading`.
    """
    if (edition := edition_at_rest(path)) is not None:
        # Where it fails, or has changed meanwhile, it is read again as one that is written.
        with suppress(RunError, OSError, sqlite3.Error, UnicodeError):
            found = read(_AT_REST.database(path, edition))
            if edition_at_rest(path) == edition:
                return found
    with reading(path) as database:
        return read(database)
