"""What is wrong with a run: numbers, states or files that are missing, or not as they were recorded.

This is the one place that finds it; terminal, page and `doctor` show it. Looking at the structure costs
little at any length of a run; looking at the numbers reads them all, and looking at the files, too.
"""

from __future__ import annotations

import csv
import io
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from everystep.errors import RunError
from everystep.recording.blocks import (
    BLOCK,
    FACTS,
    LOSS,
    block_of,
    digest_of_numbers,
    digests_of_measurements,
    series_of,
)
from everystep.recording.connection import BYTES, LOSSES, STEP, TEXT, VALUES, connect_reading
from everystep.recording.database import FILE_NAME, Database
from everystep.recording.facts import Facts

if TYPE_CHECKING:
    from everystep.recording.blocks import Measured, Series

__all__ = [
    "Finding",
    "damage_text",
    "measurement_findings",
    "missing_steps",
    "number_findings",
    "readable_numbers",
    "structure_findings",
]

#: Queries for losses, measurements and digests, and the types of their columns.
_LOSSES = "SELECT 'loss', step, loss FROM steps ORDER BY step {0}", (TEXT, STEP, LOSSES)
_MEASUREMENTS = (
    "SELECT name, step, value FROM measurements ORDER BY name {0}, step {0}",
    (TEXT, STEP, VALUES),
)
_DIGESTS = "SELECT name, first, digest FROM blocks ORDER BY name {0}, first {0}", (TEXT, STEP, BYTES)
#: A run that was closed has digests of all its losses.
_CLOSED = ("finished", "stopped", "failed")
#: Blocks and files of a kind that are named one by one.
_MOST_NAMED = 5
_RESTORE = (
    f"restore {FILE_NAME} from a copy of the run; everystep doctor RUN --export FILE.csv writes the "
    "numbers that can be read, each with whether its digest matches"
)


class Finding(NamedTuple):
    """Something that is wrong: its place in the run, what is wrong in words, and what to do."""

    place: str
    problem: str
    cure: str = _RESTORE

    def __str__(self) -> str:
        return f"{self.place}: {self.problem}"


def structure_findings(
    directory: Path, database: Database, facts: Facts, is_written: bool
) -> list[Finding]:
    """Return what shows without reading all numbers.

    is_written: whether a process held the run before the database was opened, so that files may be ahead
    of it. Asked later, one that ends meanwhile would leave files that are ahead of what is read.

    Raises:
        RunError: the database cannot be read.
    """
    found = []
    newest, first = database.newest_step(), database.first_step()
    if first is not None and first != 1:
        found.append(
            Finding(f"{FILE_NAME}, steps", f"steps begin at {first:,}; a recording begins at step 1")
        )
    short = missing_steps(facts, newest)
    if short is not None:
        found.append(short)
    is_ahead = is_written and facts.status == "running"
    later = None if is_ahead or short is not None else _later_states(directory, database, newest)
    if later is not None:
        found.append(
            Finding(
                f"{FILE_NAME}, steps",
                f"steps {newest + 1:,} to {later:,} are missing: the database ends at step {newest:,}, "
                f"but the state after step {later:,} is on disk",
            )
        )
    count, last_block = database.sealed_losses()
    is_closed = facts.status in _CLOSED and newest > 0
    if last_block > newest or (is_closed and count != newest // BLOCK + 1):
        found.append(
            Finding(f"{FILE_NAME}, blocks", "the digests of the losses do not belong to these steps")
        )
    if not database.has_facts_as_written():
        found.append(
            Finding(f"{FILE_NAME}, facts", "the description of the run is not as it was recorded")
        )
    return found


def missing_steps(facts: Facts, newest: int) -> Finding | None:
    """Return the finding that a finished run ends before its last step; None: it does not."""
    if facts.status != "finished" or facts.steps is None or newest >= facts.steps:
        return None
    return Finding(
        f"{FILE_NAME}, steps",
        f"the run finished with {facts.steps:,} steps, but its database ends at step {newest:,}",
    )


def number_findings(
    database: Database,
    losses: Series | None = None,
    measured: Measured | None = None,
    since: int = 0,
) -> list[Finding]:
    """Return which losses and measurements are missing or not as recorded.

    losses, measured: all of them, if they have been read already; since: look only at blocks that end
    later.

    Raises:
        RunError: the database cannot be read.
    """
    newest = database.newest_step()
    is_whole = losses is not None and len(losses[0]) == newest and (not newest or losses[0][0] == 1)
    found = [
        Finding(
            f"{FILE_NAME}, steps", f"steps {_span(first, last)} are missing, and later ones are there"
        )
        for first, last in ([] if is_whole else database.gaps()[:_MOST_NAMED])
    ]
    altered = [
        (name, first)
        for name, first, digest in database.blocks(LOSS)
        if first + BLOCK > since
        if not _is_sound(database, losses, first, digest)
    ]
    found += _altered_findings(altered, newest)
    try:
        rows = (
            database.measurements(block_of(since) if since else None) if measured is None else measured
        )
    except RunError as error:
        return [*found, Finding(f"{FILE_NAME}, measurements", str(error))]
    return [*found, *measurement_findings(database, rows, since)]


def measurement_findings(
    database: Database, rows: Measured, since: int = 0, only: str | None = None
) -> list[Finding]:
    """Return which measurements are missing or not as recorded, or under names that were not recorded.

    rows: all of them, of blocks that end after `since`; only: of the measurement with this name.

    Raises:
        RunError: the database cannot be read.
    """
    recorded = {
        (name, first): digest
        for name, first, digest in database.blocks(None if only is None else series_of(only))
        if name not in (LOSS, FACTS) and first + BLOCK > since
    }
    now = digests_of_measurements(rows)
    altered = [block for block in now.keys() | recorded.keys() if now.get(block) != recorded.get(block)]
    return _altered_findings(sorted(altered), database.newest_step())


def _altered_findings(altered: Sequence[tuple[str, int]], newest: int) -> list[Finding]:
    """Return the findings that these blocks are not as they were recorded."""
    found = []
    for name, first in altered[:_MOST_NAMED]:
        last = max(first, min(first + BLOCK - 1, newest))
        table = "steps" if name == LOSS else "measurements"
        what = "losses" if name == LOSS else f"values of {name.partition('/')[2]}"
        found.append(
            Finding(
                f"{FILE_NAME}, {table}",
                f"{what} of steps {_span(max(1, first), last)} are not as they were recorded: their "
                "digest differs",
            )
        )
    if len(altered) > _MOST_NAMED:
        more = len(altered) - _MOST_NAMED
        found.append(Finding(FILE_NAME, f"{more:,} more blocks of numbers have another digest"))
    return found


def damage_text(name: str, findings: Sequence[Finding]) -> str:
    """Return in a line that a run is damaged, and what to do."""
    more = f" (and {len(findings) - 1:,} more)" if len(findings) > 1 else ""
    return f"{name} is damaged: {findings[0]}{more}; run everystep doctor {name} for details"


def _is_sound(database: Database, losses: Series | None, first: int, digest: bytes) -> bool:
    if losses is not None:
        steps, values = losses
        begin, end = steps.searchsorted([first, first + BLOCK])
        return digest_of_numbers(steps[begin:end], values[begin:end]) == digest
    try:
        return digest_of_numbers(*database.block(LOSS, first)) == digest
    except RunError:
        return False


def _later_states(directory: Path, database: Database, newest: int) -> int | None:
    """Return the newest state that is on disk or in the database, if its step is missing."""
    states = {row.step for row in database.snapshots()}
    try:
        names = [path.name for path in (directory / "snapshots").iterdir()]
    except OSError:
        names = []
    states |= {int(name) for name in names if name.isdecimal() and len(name) < 18}
    last = max(states, default=0)
    return last if last > newest else None


def _span(first: int, last: int) -> str:
    return f"{first:,}" if first >= last else f"{first:,} to {last:,}"


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
