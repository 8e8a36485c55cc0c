"""What is wrong with a run: numbers, states or files that are missing or differ from the recording.

This is the one place that finds it; terminal, page and `doctor` show it. Checking the structure costs
little for a run of any length; checking numbers and files reads all of them.
"""

from __future__ import annotations

import csv
import io
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from everystep.errors import RunError
from everystep.recording.blocks import BLOCK, LOSS, TABLES, block_of, digests_of, fits, series_of
from everystep.recording.connection import connect_reading
from everystep.recording.database import FILE_NAME, Database, reading
from everystep.recording.facts import Facts
from everystep.recording.files import SNAPSHOTS
from everystep.recording.lock import is_locked

if TYPE_CHECKING:
    from everystep.recording.blocks import Series

__all__ = [
    "Finding",
    "damage_text",
    "missing_steps",
    "number_findings",
    "readable_numbers",
    "structure_findings",
]

#: Queries for losses, measurements and digests, and the type of their last column.
#: Each is read from both ends, so the order has a place in it: see `_rows`.
_LOSSES = "SELECT 'loss', step, loss FROM steps ORDER BY step {0}", float | None
_MEASUREMENTS = (
    "SELECT 'measurement/' || name, step, value FROM measurements ORDER BY name {0}, step {0}",
    float | None,
)
_DIGESTS = "SELECT name, first, digest FROM blocks ORDER BY name {0}, first {0}", int
#: A run that was closed has digests of all its losses.
_CLOSED = ("finished", "stopped", "failed")
#: Blocks and files of a kind that are named one by one.
_MOST_NAMED = 5
_RESTORE = (
    f"restore {FILE_NAME} from a copy of the run; everystep doctor RUN --export FILE.csv writes the "
    "numbers that can be read, each with whether its digest matches"
)


class Finding(NamedTuple):
    """A problem: its place in the run, a description, and what to do."""

    place: str
    problem: str
    cure: str = _RESTORE

    def __str__(self) -> str:
        return f"{self.place}: {self.problem}"


def _in_table(table: str, problem: str) -> Finding:
    return Finding(f"{FILE_NAME}, {table}", problem)


def structure_findings(database: Database, facts: Facts) -> Iterator[Finding]:
    """Yield findings that need not read all numbers.

    Raises:
        RunError: the database cannot be read.
    """
    newest, first = database.newest_step(), database.numbers("SELECT min(step) FROM steps")[0]
    if first is not None and first != 1:
        yield _in_table("steps", f"steps begin at {first:,}; a recording begins at step 1")
    short, later = missing_steps(facts, newest), _latest_state(database)
    if short is not None:
        yield short
    elif later > newest and not _is_ahead(database, facts, newest):
        ends = f"the database ends at step {newest:,}, but the state after step {later:,} is on disk"
        yield _in_table("steps", f"{_missing(newest + 1, later)}: {ends}")
    begins = [block.first for block in database.blocks(LOSS)]
    # Steps have no gaps, so neither have their blocks, up to that of the newest step.
    is_closed = facts.status in _CLOSED and newest > 0
    if max(begins, default=-1) > newest or (is_closed and len(begins) != newest // BLOCK + 1):
        yield _in_table("blocks", "the digests of the losses do not belong to these steps")
    for table in database.altered_tables():
        what = {"facts": "description of the run", "files": "list of its files"}[table]
        yield _in_table(table, f"the {what} does not match its digest")
    with suppress(RunError):  # a finding of the numbers reports it
        names = {*map(series_of, database.measurement_names())}
        # A step shows no learning rate, or an earlier one, where all values of a name are gone.
        for name in sorted(database.measured_blocks() - names):
            yield _in_table("measurements", f"all values of {name.partition('/')[2]} are missing")


def missing_steps(facts: Facts, newest: int) -> Finding | None:
    """Return a finding if a finished run ends before its last step, else None."""
    if facts.status != "finished" or facts.steps is None or newest >= facts.steps:
        return None
    return _in_table(
        "steps", f"the run finished with {facts.steps:,} steps, but its database ends at step {newest:,}"
    )


def _latest_state(database: Database) -> int:
    """Return the step of the newest state that is on disk or in the database, 0 if there is none."""
    states = {row.step for row in database.snapshots()}
    with suppress(OSError):
        names = [path.name for path in (database.directory / SNAPSHOTS).iterdir()]
        states |= {int(name) for name in names if name.isdecimal() and len(name) < 18}
    return max(states, default=0)


def _is_ahead(database: Database, facts: Facts, newest: int) -> bool:
    """Return whether a process writes the run, or did so until now: its files are ahead of its rows."""
    if facts.status != "running" or is_locked(database.directory):
        return facts.status == "running"
    # What `database` shows is older than the files by now: a new look decides.
    with reading(database.path) as now:
        return now.newest_step() > newest


def number_findings(
    database: Database,
    known: Mapping[str, Series] | None = None,
    since: int = 0,
    only: str | None = None,
) -> list[Finding]:
    """Return which losses and measurements are missing or not as recorded, or were not recorded.

    known: series that were already read; since: check only blocks that end later; only: check only this
    series.

    Raises:
        RunError: the database cannot be read.
    """
    recorded: dict[str, dict[int, int]] = {LOSS if only is None else only: {}}
    for name, first, digest in database.blocks(only):
        if name not in TABLES and first + BLOCK > since:
            recorded.setdefault(name, {})[first] = digest
    found: list[Finding] = []
    if only is None:
        for first, last in database.gaps(_MOST_NAMED):
            found.append(_in_table("steps", f"{_missing(first, last)}, and later ones are there"))
        try:
            for name in database.measurement_names():
                recorded.setdefault(series_of(name), {})
        except RunError as error:
            found.append(_in_table("measurements", str(error)))
    altered = []
    for name in sorted(recorded, key=lambda name: (name != LOSS, name)):
        try:
            series = (known or {}).get(name) or database.series(name, block_of(since) if since else None)
        except RunError as error:
            if name != LOSS:
                found.append(_in_table("measurements", str(error)))
                continue
            now = _digests_by_block(database, recorded[LOSS])
        else:
            now = digests_of(*series)
        was = recorded[name]
        blocks = sorted(now.keys() | was.keys())
        # Without numbers, a block has the digest 0: the exclusive or of nothing.
        altered += [(name, first) for first in blocks if now.get(first, 0) != was.get(first, 0)]
    newest = database.newest_step()
    for name, first in altered[:_MOST_NAMED]:
        # The first block begins at step 1, the last one may end before its last number.
        which = _span(max(1, first), max(first, min(first + BLOCK - 1, newest)))
        table, what = "steps", "losses"
        if name != LOSS:
            table, what = "measurements", f"values of {name.partition('/')[2]}"
        found.append(_in_table(table, f"{what} of {which} do not match their digest"))
    if more := len(altered[_MOST_NAMED:]):
        found.append(Finding(FILE_NAME, f"{more:,} more blocks of numbers do not match their digest"))
    return found


def _digests_by_block(database: Database, blocks: Iterable[int]) -> dict[int, int]:
    """Return the digests of the blocks of losses that can be read."""
    found: dict[int, int] = {}
    for first in blocks:
        with suppress(RunError):
            found |= digests_of(*database.series(LOSS, first, first + BLOCK - 1))
    return found


def damage_text(name: str, findings: Sequence[Finding]) -> str:
    """Return in a line that a run is damaged, and what to do."""
    more = f" (and {len(findings) - 1:,} more)" if len(findings) > 1 else ""
    return f"{name} is damaged: {findings[0]}{more}; run everystep doctor {name} for details"


def _span(first: int, last: int) -> str:
    return f"step {first:,}" if first >= last else f"steps {first:,} to {last:,}"


def _missing(first: int, last: int) -> str:
    return f"{_span(first, last)} {'is' if first >= last else 'are'} missing"


def readable_numbers(path: Path) -> str:
    """Return the losses and measurements that can be read, as CSV: series, step, value, digest.

    series: `loss`, or `measurement/` and its name; value: empty for NaN; digest: `same` if the block of
    the number has the recorded digest, `differs` if it has another one, `none` if there is no digest.

    path: of the database, which may be cut off or malformed.

    Raises:
        RunError: it cannot be opened at all.
    """
    import numpy as np

    with closing(connect_reading(path, is_whole=False)) as connection:
        rows = _rows(connection, *_LOSSES) + _rows(connection, *_MEASUREMENTS)
        recorded = {row[:2]: row[2] for row in _rows(connection, *_DIGESTS)}
    now: dict[tuple[str, int], int] = {}
    for name, group in groupby(rows, key=itemgetter(0)):
        _, steps, values = zip(*group, strict=True)
        digests = digests_of(np.array(steps), np.array(values, np.float64))
        now |= {(name, first): digest for first, digest in digests.items()}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["series", "step", "value", "digest"])
    for series, step, value in rows:
        block = series, block_of(step)
        is_same = recorded[block] == now[block] if block in recorded else None
        writer.writerow([series, step, value, {True: "same", False: "differs", None: "none"}[is_same]])
    return text.getvalue()


def _rows(connection: sqlite3.Connection, query: str, kind: Any) -> list[tuple[str, int, Any]]:
    """Return the rows of a query that can be read: from its beginning, and from its end."""
    found = {}
    for direction in ("ASC", "DESC"):
        try:
            for row in connection.execute(query.format(direction)):
                if type(row[0]) is str and type(row[1]) is int and fits(row[2:], kind):
                    # By series and step, since the two directions meet where nothing is damaged.
                    found[row[:2]] = row
            break
        except (sqlite3.Error, UnicodeError):  # damaged from here; `doctor` reports it
            continue
    return [found[key] for key in sorted(found)]
