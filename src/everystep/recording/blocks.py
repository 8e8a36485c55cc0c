"""Series: the numbers of a run by step, and digests over them, so that an altered number is found.

A series is the losses, or one measurement. A block is up to 4,096 consecutive steps of one. Each
transaction seals (writes the digest of) the blocks that it changes, so every number has a digest, in a
killed run, too. A number under a name that has no digest for its block is not one that was recorded.
"""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Iterable, Sequence
from itertools import chain, pairwise
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, NamedTuple

import xxhash

from everystep.errors import RunError
from everystep.recording.facts import LONGEST_NAME, MOST_NAMES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    #: Steps in their order, and their numbers.
    Series = tuple[NDArray[np.int64], NDArray[np.float64]]

__all__ = [
    "BLOCK",
    "BYTES",
    "FACTS",
    "LOSS",
    "LOSSES",
    "MAYBE_BYTES",
    "MAYBE_STEP",
    "STEP",
    "TEXT",
    "VALUES",
    "Blocks",
    "block_of",
    "digests_of",
    "series_of",
]

#: Steps of a block; it begins at a multiple of this.
BLOCK = 4096
#: Names in the table `blocks`, other than those of measurements.
LOSS, FACTS = "loss", "facts"


def series_of(measurement: str) -> str:
    """Return the name of the series of a measurement."""
    return f"measurement/{measurement}"


def block_of(step: int) -> int:
    """Return the first step of the block that a step belongs to."""
    return step - step % BLOCK


def digests_of(steps: NDArray[np.int64], values: NDArray[np.float64]) -> dict[int, bytes]:
    """Return the digests of the numbers of a series, by the first step of each block.

    A digest is XXH3, 128 bits, of each step as int64 and its value as float64, both little-endian; NaN
    is the bytes of NumPy's nan, and -0.0 is 0.0, as SQLite returns it.
    """
    import numpy as np

    firsts = steps - steps % BLOCK
    ends = [0, *(np.flatnonzero(np.diff(firsts)) + 1).tolist(), len(steps)]
    return {
        int(firsts[a]): _Growing(int(firsts[a]), steps[a:b], values[a:b]).digest()
        for a, b in pairwise(ends)
        if a < b
    }


class _Growing:
    """The digest of a block while numbers are appended, so that sealing it again reads nothing."""

    def __init__(self, first: int, steps: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        self.first = first
        self._last = first - 1
        self._machine = xxhash.xxh3_128()
        self.append(steps, values)

    def append(self, steps: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        import numpy as np

        pairs = np.empty(len(steps), [("step", "<i8"), ("value", "<f8")])
        pairs["step"], pairs["value"] = steps, np.where(np.isnan(values), np.nan, values + 0.0)
        self._machine.update(pairs.tobytes())
        self._last = int(steps[-1]) if len(steps) else self._last

    def is_followed_by(self, steps: NDArray[np.int64]) -> bool:
        """Return whether these steps are later ones of the block, in their order."""
        ends = self._last < steps[0] and steps[-1] < self.first + BLOCK
        return bool(ends and (steps[1:] > steps[:-1]).all())

    def digest(self) -> bytes:
        digest: bytes = self._machine.digest()
        return digest


def _digest_of_facts(rows: Iterable[tuple[str, str]]) -> bytes:
    """Return the digest of facts: XXH3, 128 bits, of each key and its value, in order of the keys."""
    machine = xxhash.xxh3_128()
    for text in chain.from_iterable(sorted(rows)):
        content = text.encode("utf-8", "surrogatepass")
        machine.update(struct.pack("<q", len(content)))
        machine.update(content)
    return machine.digest()


class Kinds(NamedTuple):
    """The types that the values of a column may have (NULL is None), and a text for wrong ones."""

    types: frozenset[type[Any]]
    others: str


STEP = Kinds(frozenset({int}), "steps or places that are not whole numbers")
MAYBE_STEP = Kinds(STEP.types | {NoneType}, STEP.others)
TEXT = Kinds(frozenset({str}), "names that are not texts")
BYTES = Kinds(frozenset({bytes}), "contents that are not bytes")
MAYBE_BYTES = Kinds(BYTES.types | {NoneType}, BYTES.others)
LOSSES = Kinds(frozenset({float, NoneType}), "losses that are not numbers")
VALUES = Kinds(LOSSES.types, "measurements that are not numbers")


class Blocks:
    """An open database: reads its rows, and reads and writes the numbers by step and their digests."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self.connection = connection
        self.path = path
        #: Blocks, by series and first step, that the transaction changes.
        self._changed: set[tuple[str, int]] = set()
        #: The newest block of each series, as far as this connection has written it.
        self._growing: dict[str, _Growing] = {}

    def rows(self, query: str, *arguments: Any, kinds: Sequence[Kinds] | None = None) -> list[Any]:
        """Return the rows of a query. kinds: the only types that the values of each column may have.

        Raises:
            RunError: a value has another type, or the database cannot be read.
        """
        try:
            rows = self.connection.execute(query, arguments).fetchall()
        except (sqlite3.Error, UnicodeError) as error:
            raise self._unreadable(error) from None
        for column, allowed in zip(zip(*rows, strict=True), kinds or (), strict=False):
            self._check(column, allowed)
        return rows

    def numbers(self, query: str, *arguments: Any, kinds: Kinds | None = None) -> list[Any]:
        """Return the only column of a query; fast for millions of rows.

        Raises:
            RunError: a value has none of the types in `kinds`, or the database cannot be read.
        """
        try:
            found = list(chain.from_iterable(self.connection.execute(query, arguments)))
        except (sqlite3.Error, UnicodeError) as error:
            raise self._unreadable(error) from None
        if kinds is not None:
            self._check(found, kinds)
        return found

    def _unreadable(self, error: Exception) -> RunError:
        is_damaged = getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_CORRUPT
        cure = (
            f"; everystep doctor {self.path.parent.name} reports what can be read" if is_damaged else ""
        )
        return RunError(f"{self.path} cannot be read: {error}{cure}")

    def _check(self, values: Iterable[Any], allowed: Kinds) -> None:
        if not set(map(type, values)) <= allowed.types:
            raise RunError(f"{self.path} has {allowed.others}: the database was changed")

    def series(self, name: str, first: int | None = None, last: int | None = None) -> Series:
        """Return the numbers of a series from step `first` to `last`; fast for millions.

        Raises:
            RunError: one is not a number, or the database cannot be read.
        """
        import numpy as np

        column, kinds, among = "loss", LOSSES, "FROM steps WHERE step BETWEEN ? AND ? ORDER BY step"
        least, most = -(2**63), 2**63 - 1  # that SQLite can hold
        ends = [least if first is None else first, most if last is None else last]
        given: list[Any] = [max(least, min(end, most)) for end in ends]
        if name != LOSS:
            column, kinds = "value", VALUES
            among = among.replace("steps WHERE", "measurements WHERE name = ? AND")
            given.insert(0, name.partition("/")[2])
        values = self._floats(f"SELECT {column} {among}", *given, kinds=kinds)
        if name == LOSS and len(values):
            query = f"SELECT (SELECT step {among} LIMIT 1), (SELECT step {among} DESC LIMIT 1)"
            low, high = self.rows(query, *given, *given)[0]
            if high - low + 1 == len(values):  # so there is no gap
                return np.arange(low, high + 1), values
        steps = self.numbers(f"SELECT step {among}", *given, kinds=STEP)
        return np.array(steps, np.int64), values

    def is_gapless(self) -> bool:
        """Return whether the steps that have losses are 1, 2, 3, ..."""
        numbers = "count(*)", "coalesce(min(step), 1)", "coalesce(max(step), 0)"
        # Each query alone is fast; combined, they would read all rows.
        count, first, newest = (self.numbers(f"SELECT {each} FROM steps")[0] for each in numbers)
        return bool(first >= 1 and count == newest)

    def steps(self) -> NDArray[np.int64]:
        """Return the steps that have losses, whether these can be read or not."""
        import numpy as np

        return np.array(self.numbers("SELECT step FROM steps ORDER BY step", kinds=STEP), np.int64)

    def _floats(self, query: str, *arguments: Any, kinds: Kinds) -> NDArray[np.float64]:
        """Return the only column of a query as an array; NULL is NaN."""
        import numpy as np

        try:
            found = chain.from_iterable(self.connection.execute(query, arguments))
            return np.fromiter(found, np.float64)
        except (sqlite3.Error, UnicodeError) as error:
            raise self._unreadable(error) from None
        except (TypeError, ValueError):  # NULL, or what should not be there
            return np.array(self.numbers(query, *arguments, kinds=kinds), np.float64)

    def measurement_names(self) -> list[str]:
        """Return the names of measurements.

        Raises:
            RunError: there are too many names, or one is too long.
        """
        # Each name is found from the one before it, without reading their values.
        query = (
            "WITH RECURSIVE found(name, place) AS (SELECT (SELECT min(name) FROM measurements), 1 "
            "UNION ALL SELECT (SELECT min(name) FROM measurements WHERE name > found.name), place + 1 "
            "FROM found WHERE name IS NOT NULL AND place <= ?) "
            "SELECT iif(length(name) <= ?, name, NULL) FROM found WHERE name IS NOT NULL"
        )
        names = self.numbers(query, MOST_NAMES, LONGEST_NAME)
        if len(names) > MOST_NAMES or None in names:
            raise RunError(
                f"{self.path} has more than {MOST_NAMES:,} measurements, or one with a name of more "
                f"than {LONGEST_NAME:,} characters, which everystep does not read"
            )
        self._check(names, TEXT)
        return names

    def measurements(self, first: int | None = None, last: int | None = None) -> dict[str, Series]:
        """Return the numbers of all measurements from step `first` to `last`, by name.

        Raises:
            RunError: one is not a number, or the database cannot be read.
        """
        found = {name: self.series(series_of(name), first, last) for name in self.measurement_names()}
        return {name: series for name, series in found.items() if len(series[0])}

    def write_losses(self, first_step: int, losses: Iterable[float | None]) -> None:
        """Write the losses of consecutive steps."""
        rows = [*enumerate(losses, start=first_step)]
        self._append(LOSS, rows)
        self.connection.executemany("INSERT INTO steps VALUES (?, ?)", rows)

    def write_measurements(self, rows: Iterable[tuple[str, int, float | None]]) -> None:
        """Write measurements (name, step, value)."""
        rows = [*rows]
        series: dict[str, list[tuple[int, float | None]]] = {}
        for name, step, value in rows:
            series.setdefault(series_of(name), []).append((step, value))
        for name, numbers in series.items():
            self._append(name, numbers)
        self.connection.executemany("INSERT OR REPLACE INTO measurements VALUES (?, ?, ?)", rows)

    def remove_measurement(self, name: str) -> None:
        """Delete a measurement."""
        self._open(series_of(name), -BLOCK)
        self.connection.execute("DELETE FROM measurements WHERE name = ?", (name,))

    def forget_numbers_after(self, step: int) -> None:
        """Delete losses and measurements of later steps."""
        for name in dict.fromkeys(name for name, _, _ in self.blocks() if name != FACTS):
            self._open(name, step - BLOCK)
        for table in ("steps", "measurements"):
            self.connection.execute(f"DELETE FROM {table} WHERE step > ?", (step,))

    def _append(self, name: str, rows: Sequence[tuple[int, float | None]]) -> None:
        """Note that numbers of a series are about to be written."""
        import numpy as np

        if not rows:
            return
        steps, values = np.array([row[0] for row in rows]), np.array([row[1] for row in rows], float)
        self.open_blocks({(name, first) for first in np.unique(steps - steps % BLOCK).tolist()})
        growing = self._growing.get(name)
        if growing is not None and growing.is_followed_by(steps):
            growing.append(steps, values)
        else:
            self._growing.pop(name, None)

    def _open(self, name: str, after: int) -> None:
        """Note that numbers of all sealed blocks of a series that begin after a step may change."""
        self._growing.pop(name, None)
        self.open_blocks({(name, first) for _, first, _ in self.blocks(name) if first > after})

    def open_blocks(self, blocks: Iterable[tuple[str, int]]) -> None:
        """Note that blocks, by series and first step, are about to change."""
        self._changed.update(blocks)

    def seal_blocks(self) -> None:
        """Write the digests of all blocks that the transaction has changed."""
        digests = []
        for name, first in sorted(self._changed):
            growing = self._growing.get(name)
            if growing is None or growing.first != first:
                steps, values = self.series(name, first, first + BLOCK - 1)
                if not len(steps):
                    query = "DELETE FROM blocks WHERE name = ? AND first = ?"
                    self.connection.execute(query, (name, first))
                    continue
                growing = self._growing[name] = _Growing(first, steps, values)
            digests.append((name, first, growing.digest()))
        self._write_digests(digests)
        self._changed.clear()

    def seal_facts(self) -> None:
        """Write the digest of all facts."""
        rows = self.rows("SELECT key, value FROM facts", kinds=(TEXT, TEXT))
        self._write_digests([(FACTS, 0, _digest_of_facts(rows))])

    def _write_digests(self, rows: Sequence[tuple[str, int, bytes]]) -> None:
        self.connection.executemany("INSERT OR REPLACE INTO blocks VALUES (?, ?, ?)", rows)

    def forget_blocks(self) -> None:
        """Forget notes about blocks, which may differ from the database."""
        self._growing.clear()
        self._changed.clear()

    def blocks(self, series: str | None = None) -> list[tuple[str, int, bytes]]:
        """Return the sealed blocks, or those of one series: name, first step, digest."""
        among, given = ("", ()) if series is None else ("WHERE name = ?", (series,))
        query = f"SELECT name, first, digest FROM blocks {among} ORDER BY name, first"
        return self.rows(query, *given, kinds=(TEXT, STEP, BYTES))

    def sealed_losses(self) -> tuple[int, int]:
        """Return how many blocks of losses are sealed, and the first step of the newest, -1 if none."""
        query = "SELECT count(*), coalesce(max(first), -1) FROM blocks WHERE name = ?"
        count, newest = self.rows(query, LOSS)[0]
        return count, newest

    def has_facts_as_written(self) -> bool:
        """Return whether all facts are unchanged; true if they have no digest."""
        known = self.numbers("SELECT digest FROM blocks WHERE name = ?", FACTS)
        if not known:
            return True
        rows = self.rows("SELECT key, value FROM facts")
        are_texts = all(isinstance(text, str) for row in rows for text in row)
        return are_texts and known[0] == _digest_of_facts(rows)
