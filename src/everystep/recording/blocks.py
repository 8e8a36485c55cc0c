"""Series: the numbers of a run by step, and digests over them, so that an altered number is found.

The facts and the list of files have a digest each, made in the same way of those of their rows, so that
a row that was removed is found, too.

A series is the losses, or one measurement. A block is up to 4,096 consecutive steps of one. Its digest
is the exclusive or of the hashes of its numbers: a transaction that writes or deletes numbers updates it
without reading the others, so every number has a digest, in a killed run, too. A number under a name
that has no digest for its block is not one that was recorded.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, reduce
from itertools import chain
from operator import xor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, get_args, get_type_hints

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
    "LOSS",
    "TABLES",
    "Block",
    "Blocks",
    "block_of",
    "digest_of_row",
    "digests_of",
    "fits",
    "same_number",
    "series_of",
]

#: Steps of a block; it begins at a multiple of this.
BLOCK = 4096
#: Names in the table `blocks`, other than those of measurements: of the losses, and of whole tables.
LOSS, TABLES = "loss", ("facts", "files")
#: The smallest and the largest whole number of SQLite.
_LEAST, _MOST = -(2**63), 2**63 - 1

# e.g. the losses of 9,000 steps are in three blocks, each of the step where it begins: ("loss", 0) has
# steps 1 to 4,095, and ("loss", 4096) and ("loss", 8192) have the others.
Row = TypeVar("Row", bound=tuple[Any, ...])


class Block(NamedTuple):
    """The digest of a block: the name of its series, its first step, and 64 bits."""

    name: str
    first: int
    digest: int


def series_of(measurement: str) -> str:
    """Return the name of the series of a measurement."""
    return f"measurement/{measurement}"


def block_of(step: int) -> int:
    """Return the first step of the block that a step belongs to."""
    return step - step % BLOCK


def same_number(one: float, two: float) -> bool:
    """Return whether two numbers of a run are equal; NaN equals NaN."""
    return one == two or (one != one and two != two)


def digests_of(steps: NDArray[np.int64], values: NDArray[np.float64]) -> dict[int, int]:
    """Return the digests of the numbers of a series, by the first step of each block.

    The hash of a number is `mix(mix(step) + bits)`, modulo 2^64, where `bits` are those of its value as
    float64 (NaN is NumPy's nan, and -0.0 is 0.0, as SQLite returns it), and `mix` is the finalizer of
    SplitMix64 (Steele et al., "Fast Splittable Pseudorandom Number Generators", 2014).

    steps: in their order.
    """
    import numpy as np

    if not len(steps):
        return {}
    # NaN has many forms, and SQLite keeps none of them; to add 0.0 makes 0.0 of -0.0.
    bits = np.where(np.isnan(values), np.nan, values + 0.0).view(np.uint64)
    hashes = _mixed(_mixed(steps.astype(np.int64).view(np.uint64)) + bits).view(np.int64)
    firsts, begins = np.unique(steps - steps % BLOCK, return_index=True)
    digests = np.bitwise_xor.reduceat(hashes, begins)
    return dict(zip(firsts.tolist(), digests.tolist(), strict=True))


def _mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    import numpy as np

    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        words = (words ^ (words >> np.uint64(shift))) * np.uint64(factor)
    return words ^ (words >> np.uint64(31))


def digest_of_row(row: tuple[Any, ...]) -> int:
    """Return XXH3, 64 bits, of a row of the database as JSON, with bytes in hexadecimal."""
    digest = xxhash.xxh3_64_digest(json.dumps(row, default=bytes.hex).encode())
    return int.from_bytes(digest, "big", signed=True)


def _joint_digest(rows: Iterable[tuple[Any, ...]]) -> int:
    return reduce(xor, map(digest_of_row, rows), 0)


def fits(values: Iterable[Any], kind: Any) -> bool:
    """Return whether all values have exactly a type, or one of a union."""
    return {*map(type, values)} <= {*(get_args(kind) or (kind,))}


@cache
def _fields(row: Callable[..., Any]) -> dict[str, Any]:
    """Return the types of the fields of a named tuple, by name."""
    return get_type_hints(row)


class Blocks:
    """An open database: reads its rows, and reads and writes the numbers by step and their digests.

    Every call raises RunError if the database cannot be read, or a value has another type than everystep
    writes.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self.connection = connection
        self.path = path

    @property
    def directory(self) -> Path:
        """The run's directory; it may be moved while it is written."""
        return self.path.parent

    def rows(self, row: Callable[..., Row], query: str, *arguments: Any) -> list[Row]:
        """Return the rows of a query as named tuples; the fields of `row` have the types of columns."""
        found = self._fetched(query, arguments)
        # Not strict: without rows, there is nothing in columns.
        for (name, kind), column in zip(_fields(row).items(), zip(*found, strict=True), strict=False):
            self._check(column, kind, f"a value of another type than that of {name!r}")
        return [row(*values) for values in found]

    def numbers(
        self,
        query: str,
        *arguments: Any,
        kind: Any = int | None,
        wrong: str = "fractions for steps",
    ) -> list[Any]:
        """Return the only column of a query; fast for millions of rows.

        kind: the type of the values; wrong: what others are, as text.
        """
        found = self._fetched(query, arguments, chain.from_iterable)
        self._check(found, kind, wrong)
        return found

    def _fetched(
        self, query: str, arguments: Sequence[Any], shaped: Callable[[Any], Iterable[Any]] = iter
    ) -> list[Any]:
        try:
            return [*shaped(self.connection.execute(query, arguments))]
        except (sqlite3.Error, UnicodeError) as error:
            # An extended error code has the primary one in its lowest byte.
            is_damaged = getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_CORRUPT
            cure = f"; everystep doctor {self.directory.name} reports what can be read"
            raise RunError(f"{self.path} cannot be read: {error}{cure if is_damaged else ''}") from None

    def _check(self, values: Iterable[Any], kind: Any, wrong: str) -> None:
        if not fits(values, kind):
            raise RunError(f"{self.path} has {wrong}: the database was changed")

    def series(self, name: str, first: int | None = None, last: int | None = None) -> Series:
        """Return the numbers of a series from step `first` to `last`; fast for millions."""
        import numpy as np

        ends = (_LEAST if first is None else first), (_MOST if last is None else last)
        # A larger number is an OverflowError in Python's module, not an empty answer.
        given: list[Any] = [max(_LEAST, min(end, _MOST)) for end in ends]
        column, table, among = "loss", "steps", ""
        if name != LOSS:
            column, table, among = "value", "measurements", "name = ? AND"
            given.insert(0, name.partition("/")[2])
        which = f"FROM {table} WHERE {among} step BETWEEN ? AND ? ORDER BY step"
        wrong = f"{'losses' if name == LOSS else table} that are not numbers"
        values = np.array(
            self.numbers(f"SELECT {column} {which}", *given, kind=float | None, wrong=wrong), np.float64
        )
        # Two steps show that none is missing, in place of a column of as many steps as losses.
        if name == LOSS and len(values):
            query = f"SELECT (SELECT step {which} LIMIT 1), (SELECT step {which} DESC LIMIT 1)"
            ((low, high),) = self._fetched(query, (*given, *given))
            if high - low + 1 == len(values):  # so there is no gap
                return np.arange(low, high + 1), values
        return np.array(self.numbers(f"SELECT step {which}", *given, kind=int), np.int64), values

    def losses(self, first: int, last: int | None = None) -> NDArray[np.float64]:
        """Return the losses from step `first` (1 or later) to `last`, as far as recorded.

        Raises:
            RunError: as `series`, or a loss is missing, but a later one exists.
        """
        steps, losses = self.series(LOSS, first, last)
        self.check_gap(steps, first)
        return losses

    def check_gap(self, steps: NDArray[np.int64], first: int) -> None:
        """Check that steps are `first`, `first + 1`, ...

        Raises:
            RunError: they are not.
        """
        import numpy as np

        for place in np.flatnonzero(steps != np.arange(first, first + len(steps)))[:1]:
            name = self.directory.name
            raise RunError(
                f"{name} has no loss for step {first + place}, but one for step {steps[place]}: the "
                f"database was changed; everystep doctor {name} shows what can still be read"
            )

    def gaps(self, most: int) -> list[tuple[int, int]]:
        """Return the first gaps between the steps that have losses: the ends of each, up to `most`."""
        numbers = "count(*)", "coalesce(min(step), 1)", "coalesce(max(step), 0)"
        # Each query alone is fast; combined, they would read all rows.
        count, first, newest = (self.numbers(f"SELECT {each} FROM steps")[0] for each in numbers)
        if first >= 1 and count == newest:
            return []
        before = "SELECT step, lag(step, 1, 0) OVER (ORDER BY step) AS before FROM steps WHERE step > 0"
        query = f"SELECT before + 1, step - 1 FROM ({before}) WHERE step > before + 1 LIMIT ?"
        return [(first, last) for first, last in self._fetched(query, (most,))]

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
        names = [name for (name,) in self._fetched(query, (MOST_NAMES, LONGEST_NAME))]
        if len(names) > MOST_NAMES or None in names:
            raise RunError(
                f"{self.path} has more than {MOST_NAMES:,} measurements, or one with a name of more "
                f"than {LONGEST_NAME:,} characters, which everystep does not read"
            )
        self._check(names, str, "names that are not texts")
        return names

    def measurements(self, first: int | None = None, last: int | None = None) -> dict[str, Series]:
        """Return the numbers of all measurements from step `first` to `last`, by name."""
        found = {name: self.series(series_of(name), first, last) for name in self.measurement_names()}
        return {name: series for name, series in found.items() if len(series[0])}

    def measured_blocks(self) -> set[str]:
        """Return the series of measurements that have digests, 0 being that of no numbers."""
        query = "SELECT DISTINCT name FROM blocks WHERE digest <> 0 AND name GLOB ?"
        return {*self.numbers(query, series_of("*"), kind=str)}

    def write_losses(self, first_step: int, losses: Iterable[float | None]) -> None:
        """Write the losses of consecutive new steps."""
        rows = dict(enumerate(losses, start=first_step))
        self.change_digests(LOSS, rows)
        self.connection.executemany("INSERT INTO steps VALUES (?, ?)", rows.items())

    def write_measurements(self, rows: Iterable[tuple[str, int, float | None]]) -> None:
        """Write measurements (name, step, value), in place of those that the steps have."""
        series: dict[str, dict[int, float | None]] = {}
        for name, step, value in rows:
            series.setdefault(name, {})[step] = value
        for name, numbers in series.items():
            before = self.series(series_of(name), min(numbers), max(numbers))
            old = {step: value for step, value in _pairs(before) if step in numbers}
            # The exclusive or takes a number out of its digest in the same way as it was added.
            self.change_digests(series_of(name), old)
            self.change_digests(series_of(name), numbers)
            new = ((name, *number) for number in numbers.items())
            self.connection.executemany("INSERT OR REPLACE INTO measurements VALUES (?, ?, ?)", new)

    def take_numbers(self, other: Blocks, last: int) -> None:
        """Take over the numbers of another run up to a step, with its digests: altered ones stay so."""
        end = block_of(last) + BLOCK - 1
        self.connection.executemany(
            "INSERT INTO steps VALUES (?, ?)", _pairs(other.series(LOSS, last=end))
        )
        for name, series in other.measurements(last=end).items():
            rows = ((name, *number) for number in _pairs(series))
            self.connection.executemany("INSERT INTO measurements VALUES (?, ?, ?)", rows)
        blocks = [each for each in other.blocks() if each.name not in TABLES and each.first <= last]
        self.connection.executemany("INSERT INTO blocks VALUES (?, ?, ?)", blocks)
        for table in other.altered_tables():
            self.change_table(table, [(table,)])
        self.forget_numbers_after(last)

    def forget_numbers_after(self, step: int) -> None:
        """Delete losses and measurements of later steps."""
        # What is deleted is taken out of the digest of its block: to compute that again would pass off
        # altered numbers as recorded ones.
        for name in {block.name for block in self.blocks() if block.name not in TABLES}:
            later = self.series(name, step + 1, block_of(step) + BLOCK - 1)
            self.change_digests(name, dict(_pairs(later)))
        self.connection.execute(
            "DELETE FROM blocks WHERE name NOT IN (?, ?) AND first > ?", (*TABLES, step)
        )
        for table in ("steps", "measurements"):
            self.connection.execute(f"DELETE FROM {table} WHERE step > ?", (step,))

    def change_digests(self, name: str, numbers: Mapping[int, float | None]) -> None:
        """Note that numbers by step are added to a series, or removed from it, which is the same.

        To be called in the transaction that does it.
        """
        import numpy as np

        steps = np.array(sorted(numbers), np.int64)
        values = np.array([numbers[step] for step in steps.tolist()], np.float64)
        self._change_blocks((name, *digest) for digest in digests_of(steps, values).items())

    def _change_blocks(self, changes: Iterable[tuple[str, int, int]]) -> None:
        # SQLite has no exclusive or.
        query = (
            "INSERT INTO blocks VALUES (?, ?, ?) ON CONFLICT DO UPDATE "
            "SET digest = (digest | excluded.digest) - (digest & excluded.digest)"
        )
        self.connection.executemany(query, changes)

    def change_table(self, table: str, rows: Iterable[tuple[Any, ...]]) -> None:
        """Note that rows are added to one of `TABLES`, or removed from it, as `change_digests` does."""
        self._change_blocks([(table, 0, _joint_digest(rows))])

    def altered_tables(self) -> list[str]:
        """Return which of `TABLES` do not have the rows that were written."""
        query = "SELECT coalesce(max(digest), 0) FROM blocks WHERE name = ?"
        rows = {table: self._fetched(f"SELECT * FROM {table}", ()) for table in TABLES}
        return [t for t in TABLES if self.numbers(query, t)[0] != _joint_digest(rows[t])]

    def blocks(self, series: str | None = None) -> list[Block]:
        """Return the blocks, or those of one series."""
        among, given = ("", ()) if series is None else ("WHERE name = ?", (series,))
        return self.rows(Block, f"SELECT * FROM blocks {among} ORDER BY name, first", *given)


def _pairs(series: Series) -> Iterable[tuple[int, float]]:
    return zip(series[0].tolist(), series[1].tolist(), strict=True)
