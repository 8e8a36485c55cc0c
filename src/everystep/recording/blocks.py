"""Blocks: digests over the numbers of a run, so that a changed or missing number is found.

A block is up to 4,096 consecutive steps of one series: the losses, or one measurement. Each transaction
seals (writes the digest of) the blocks that it changes, so every number has a digest, in a killed run,
too. A number under a name that has no digest for its block is not one that was recorded.
"""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from everystep.recording.connection import BYTES, LOSSES, STEP, TEXT, VALUES, Rows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    #: Steps in their order, and their numbers.
    Series = tuple[NDArray[np.int64], NDArray[np.float64]]
    #: Measurements (name, step, value) in order of names, then steps; None is NaN.
    Measured = Sequence[tuple[str, int, float | None]]

__all__ = [
    "BLOCK",
    "FACTS",
    "LOSS",
    "Blocks",
    "block_of",
    "digest_of_numbers",
    "digests_of_measurements",
    "series_of",
]

#: Steps of a block; it begins at a multiple of this.
BLOCK = 4096
#: Names in the table `blocks`, besides those of measurements.
LOSS, FACTS = "loss", "facts"


def series_of(measurement: str) -> str:
    """Return the name of the blocks of a measurement."""
    return f"measurement/{measurement}"


def block_of(step: int) -> int:
    """Return the first step of the block that a step belongs to."""
    return step - step % BLOCK


def digest_of_numbers(steps: NDArray[np.int64], values: NDArray[np.float64]) -> bytes:
    """Return the digest of numbers by step: XXH3, 128 bits, of the steps as int64 and then the values as
    float64, both little-endian; NaN is the bytes of NumPy's nan, and -0.0 is 0.0, as SQLite returns it.
    """
    machine = xxhash.xxh3_128(steps.astype("<i8", copy=False).tobytes())
    machine.update((values + 0.0).astype("<f8", copy=False).tobytes())
    return machine.digest()


def digests_of_measurements(
    rows: Measured,
) -> dict[tuple[str, int], bytes]:
    """Return the digests of measurements (name, step, value), by the name and first step of each block.

    rows: in order of names, then steps; out of this order, the digests are not the recorded ones.
    """
    import numpy as np

    found = {}
    for name, group in groupby(rows, key=itemgetter(0)):
        _, listed, numbers = zip(*group, strict=True)
        steps, values = np.array(listed, np.int64), np.array(numbers, np.float64)
        firsts = steps - steps % BLOCK
        ends = [*(np.flatnonzero(np.diff(firsts)) + 1).tolist(), len(steps)]
        for begin, end in pairwise([0, *ends]):
            digest = digest_of_numbers(steps[begin:end], values[begin:end])
            found[series_of(name), int(firsts[begin])] = digest
    return found


def _digest_of_facts(rows: Iterable[tuple[str, str]]) -> bytes:
    """Return the digest of facts: XXH3, 128 bits, of each key and its value, in order of the keys."""
    machine = xxhash.xxh3_128()
    for key, value in sorted(rows):
        for text in (key, value):
            content = text.encode("utf-8", "surrogatepass")
            machine.update(struct.pack("<q", len(content)))
            machine.update(content)
    return machine.digest()


class _Growing:
    """The numbers of a block while they are appended, so that sealing it again reads nothing."""

    def __init__(self, steps: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        import numpy as np

        self._steps, self._values = np.empty(BLOCK, np.int64), np.empty(BLOCK)
        self._count = 0
        self.append(steps, values)

    def append(self, steps: NDArray[np.int64], values: NDArray[np.float64]) -> bool:
        """Append numbers in order of their steps; return whether they follow those that are there."""
        last = self._steps[self._count - 1] if self._count else -1
        if len(steps) and (steps[0] <= last or (steps[1:] <= steps[:-1]).any()):
            return False
        end = self._count + len(steps)
        self._steps[self._count : end], self._values[self._count : end] = steps, values
        self._count = end
        return True

    def digest(self) -> bytes:
        """Return the digest of the block as it is."""
        return digest_of_numbers(self._steps[: self._count], self._values[: self._count])


class Blocks(Rows):
    """Reads and writes the digests of an open database."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        super().__init__(connection, path)
        self._open_blocks: set[tuple[str, int]] = set()
        #: The newest block of each series, as far as this connection has written it.
        self._growing: dict[tuple[str, int], _Growing] = {}

    def seal_facts(self) -> None:
        """Write the digest of all facts."""
        digest = _digest_of_facts(self.checked((TEXT, TEXT), "SELECT key, value FROM facts"))
        self.connection.execute("INSERT OR REPLACE INTO blocks VALUES (?, 0, ?)", (FACTS, digest))

    def seal_blocks(self) -> None:
        """Write the digests of all blocks that the transaction has changed."""
        rows = []
        for name, first in self._open_blocks:
            growing = self._growing.get((name, first))
            if growing is not None:
                rows.append((name, first, growing.digest()))
                continue
            steps, values = self.block(name, first)
            if len(steps):
                rows.append((name, first, digest_of_numbers(steps, values)))
        self.connection.executemany("INSERT OR REPLACE INTO blocks VALUES (?, ?, ?)", rows)
        self._open_blocks.clear()

    def about_to_append(self, name: str, steps: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        """Note that numbers of a series are about to be written, in order of their steps."""
        import numpy as np

        values = np.where(np.isnan(values), np.nan, values)  # as SQLite gives it back
        firsts = steps - steps % BLOCK
        for first in dict.fromkeys(firsts.tolist()):
            block = name, first
            self.open_blocks({block})
            if block not in self._growing:
                for other in [key for key in self._growing if key[0] == name]:
                    del self._growing[other]
                self._growing[block] = _Growing(*self.block(name, first))
            here = firsts == first
            if not self._growing[block].append(steps[here], values[here]):
                del self._growing[block]

    def forget_blocks(self) -> None:
        """Forget what was noted of blocks: it may not be what the database has."""
        self._growing.clear()
        self._open_blocks.clear()

    def open_blocks(self, blocks: set[tuple[str, int]]) -> None:
        """Remove the digests of blocks that are about to change."""
        new = blocks - self._open_blocks
        self.connection.executemany("DELETE FROM blocks WHERE name = ? AND first = ?", new)
        self._open_blocks |= new

    def open_blocks_after(self, step: int) -> None:
        """Remove the digests of blocks that have later steps, some of which will be deleted."""
        self._growing.clear()
        query = "SELECT name, first FROM blocks WHERE first + ? > ? AND name <> ?"
        self.open_blocks({*self.rows(query, BLOCK, step + 1, FACTS)})

    def remove_blocks(self, name: str) -> None:
        """Remove the digests of a series that is deleted."""
        self._open_blocks = {block for block in self._open_blocks if block[0] != name}
        self._growing.clear()
        self.connection.execute("DELETE FROM blocks WHERE name = ?", (name,))

    def block(self, name: str, first: int) -> Series:
        """Return the steps of a block that the run has, and their numbers."""
        among = "FROM steps WHERE step BETWEEN ? AND ? ORDER BY step"
        given: tuple[str, ...] = ()
        if name != LOSS:
            among = among.replace("steps WHERE", "measurements WHERE name = ? AND")
            given = (name.partition("/")[2],)
        column, kinds = ("loss", LOSSES) if name == LOSS else ("value", VALUES)
        ends = first, min(first + BLOCK, 2**63) - 1
        steps = self.integers(f"SELECT step {among}", *given, *ends, kinds=STEP)
        return steps, self.floats(f"SELECT {column} {among}", *given, *ends, kinds=kinds)

    def blocks(self, series: str | None = None) -> list[tuple[str, int, bytes]]:
        """Return the sealed blocks, or those of one series: name, first step, digest."""
        among, given = ("", ()) if series is None else ("WHERE name = ?", (series,))
        query = f"SELECT name, first, digest FROM blocks {among} ORDER BY name, first"
        return self.checked((TEXT, STEP, BYTES), query, *given)

    def sealed_losses(self) -> tuple[int, int]:
        """Return how many blocks of losses are sealed, and the first step of the newest, -1 if none."""
        query = "SELECT count(*), coalesce(max(first), -1) FROM blocks WHERE name = ?"
        count, newest = self.rows(query, LOSS)[0]
        return count, newest

    def has_facts_as_written(self) -> bool:
        """Return whether all facts are as they were written; true if they have no digest."""
        known = self.numbers("SELECT digest FROM blocks WHERE name = ?", FACTS)
        if not known:
            return True
        rows = self.rows("SELECT key, value FROM facts")
        are_texts = all(isinstance(text, str) for row in rows for text in row)
        return are_texts and known[0] == _digest_of_facts(rows)
