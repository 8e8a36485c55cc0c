"""Reads what is sound from a damaged database: every row that can be read, and no others."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from everystep.bounded import MOST_STEPS
from everystep.errors import RunError
from everystep.recording.blocks import FACTS, LOSS, block_of, digests_of_measurements, series_of
from everystep.recording.connection import connect_reading
from everystep.recording.database import Database, Repeat, SnapshotRow
from everystep.recording.files import FileRow
from everystep.recording.rows import (
    BYTES,
    LOSSES,
    MAYBE_BYTES,
    MAYBE_STEP,
    STEP,
    TEXT,
    VALUES,
    Kinds,
)

__all__ = ["Salvaged", "salvage"]

#: The tables, their keys, and what their columns hold.
_TABLES: dict[str, tuple[str, Sequence[Kinds]]] = {
    "steps": ("step", (STEP, LOSSES)),
    "measurements": ("name, step", (TEXT, STEP, VALUES)),
    "snapshots": ("step", (STEP, TEXT, TEXT, STEP)),
    "files": ("name", (TEXT, STEP, BYTES)),
    "repeats": ("step", (STEP, MAYBE_STEP, MAYBE_BYTES, MAYBE_BYTES)),
    "contents": ("digest", (BYTES, STEP, STEP, STEP)),
    "facts": ("key", (TEXT, TEXT)),
    "blocks": ("name, first", (TEXT, STEP, BYTES)),
}


@dataclass
class Salvaged:
    """The rows of a database that are sound.

    losses: by step, of blocks with the recorded digest, and of those that have none; doubtful: losses of
    the other blocks; problems: in words.
    """

    facts: list[tuple[str, str]]
    losses: dict[int, float | None]
    doubtful: dict[int, float | None]
    measurements: list[tuple[str, int, float | None]]
    snapshots: list[SnapshotRow]
    files: list[FileRow]
    repeats: list[Repeat]
    contents: list[tuple[bytes, int, int, int]]
    problems: list[str] = field(default_factory=list)


def salvage(path: Path) -> Salvaged:
    """Read what is sound from a run's database, which may be cut off or altered.

    Raises:
        RunError: it cannot be opened at all.
    """
    problems: list[str] = []
    with closing(connect_reading(path, is_whole=False)) as connection:
        database = Database(connection, path)
        tables = {name: _rows(database, name, problems) for name in _TABLES}
        has_facts = _has_facts(database)
    if not has_facts:
        problems.append(
            "the description of the run is not as it was recorded, and is taken over as it is"
        )
    tables["steps"] = [row for row in tables["steps"] if 0 < row[0] <= MOST_STEPS]
    tables["measurements"] = [row for row in tables["measurements"] if 0 <= row[1] <= MOST_STEPS]
    tables["snapshots"] = [row for row in tables["snapshots"] if 0 <= row[0] <= MOST_STEPS]
    altered = _altered(tables)
    losses = dict(tables["steps"])
    doubtful = {step: loss for step, loss in losses.items() if (LOSS, block_of(step)) in altered}
    measured = [
        row for row in tables["measurements"] if (series_of(row[0]), block_of(row[1])) not in altered
    ]
    for name in sorted({name for name, _ in altered if name != LOSS}):
        problems.append(
            f"values of {name.partition('/')[2]} are not as they were recorded, and are left out"
        )
    return Salvaged(
        facts=tables["facts"],
        losses={step: loss for step, loss in losses.items() if step not in doubtful},
        doubtful=doubtful,
        measurements=measured,
        snapshots=[SnapshotRow(*row) for row in tables["snapshots"]],
        files=[FileRow(*row) for row in tables["files"]],
        repeats=[Repeat(*row) for row in tables["repeats"]],
        contents=tables["contents"],
        problems=problems,
    )


def _rows(database: Database, table: str, problems: list[str]) -> list[Any]:
    """Return the rows of a table that can be read: from its beginning, and from its end."""
    key, kinds = _TABLES[table]
    found: dict[Any, Any] = {}
    width = key.count(",") + 1
    for direction in ("ASC", "DESC"):
        order = ", ".join(f"{column.strip()} {direction}" for column in key.split(","))
        try:
            for row in database.connection.execute(f"SELECT * FROM {table} ORDER BY {order}"):
                if all(type(value) in kind.types for value, kind in zip(row, kinds, strict=True)):
                    found[row[:width]] = row
            break
        except (sqlite3.Error, UnicodeError) as error:
            if direction == "ASC":
                problems.append(f"table {table} cannot be read as a whole: {error}")
    return [found[place] for place in sorted(found)]


def _has_facts(database: Database) -> bool:
    try:
        return database.has_facts_as_written()
    except RunError:
        return False


def _altered(tables: dict[str, list[Any]]) -> set[tuple[str, int]]:
    """Return the blocks with another digest than recorded, and those of measurements without one."""
    now = digests_of_measurements([(LOSS, *row) for row in tables["steps"]])
    now = {(LOSS, first): digest for (_, first), digest in now.items()}
    now |= digests_of_measurements(tables["measurements"])
    recorded = {(name, first): digest for name, first, digest in tables["blocks"] if name != FACTS}
    without = {block for block in now.keys() - recorded.keys() if block[0] == LOSS}
    blocks = (now.keys() | recorded.keys()) - without
    return {block for block in blocks if now.get(block) != recorded.get(block)}
