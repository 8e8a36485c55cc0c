"""The numbers that SQL still reads of a damaged database, each with what its digest says."""

from __future__ import annotations

import csv
import io
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from everystep.recording.blocks import LOSS, block_of, digests_of_measurements, series_of
from everystep.recording.connection import connect_reading
from everystep.recording.rows import BYTES, LOSSES, STEP, TEXT, VALUES

__all__ = ["readable_numbers"]

#: Queries for losses, measurements and digests, and the types of their columns.
_LOSSES = "SELECT 'loss', step, loss FROM steps ORDER BY step {0}", (TEXT, STEP, LOSSES)
_MEASUREMENTS = (
    "SELECT name, step, value FROM measurements ORDER BY name {0}, step {0}",
    (TEXT, STEP, VALUES),
)
_DIGESTS = "SELECT name, first, digest FROM blocks ORDER BY name {0}, first {0}", (TEXT, STEP, BYTES)


def readable_numbers(path: Path) -> str:
    """Return the losses and measurements that can be read, as CSV: series, step, value, digest.

    series: `loss`, or `measurement/` and its name; value: empty for NaN; digest: `same` if the block of
    the number has the recorded digest, `differs` if it has another one, `none` if none was recorded.

    path: of the database, which may be cut off or malformed.

    Raises:
        RunError: it cannot be opened at all.
    """
    with closing(connect_reading(path, is_whole=False)) as connection:
        losses, measured, digests = (_rows(connection, *a) for a in (_LOSSES, _MEASUREMENTS, _DIGESTS))
    recorded = {(series, first): digest for series, first, digest in digests}
    now = {(LOSS, first): digest for (_, first), digest in digests_of_measurements(losses).items()}
    now |= digests_of_measurements(measured)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["series", "step", "value", "digest"])
    for series, step, value in losses + [(series_of(name), *rest) for name, *rest in measured]:
        block = series, block_of(step)
        is_same = recorded[block] == now[block] if block in recorded else None
        said = {True: "same", False: "differs", None: "none"}[is_same]
        writer.writerow([series, step, value, said])
    return text.getvalue()


def _rows(connection: sqlite3.Connection, query: str, kinds: Any) -> list[Any]:
    """Return the rows of a query that can be read: from its beginning, and from its end."""
    found = {}
    for direction in ("ASC", "DESC"):
        try:
            for row in connection.execute(query.format(direction)):
                if all(type(value) in kind.types for value, kind in zip(row, kinds, strict=True)):
                    found[row[:2]] = row
            break
        except (sqlite3.Error, UnicodeError):  # damaged from here on; `doctor` says so
            continue
    return [found[key] for key in sorted(found)]
