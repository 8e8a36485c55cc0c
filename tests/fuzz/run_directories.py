"""Runs with several things altered at once: none is shown as another run, or ends in a traceback."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.torture_files import outcome
from hypothesis import strategies as st
from tests.sealing import seal_files

from everystep.errors import RecordingError

__all__ = ["ALTERATIONS", "alter_and_look"]

_numbers = st.sampled_from([0, -1, 1, 2, 7, 2**31, 2**62, 2**63, 2**70, -(2**63), 1.5, 1e308, -0.0])
_texts = st.sampled_from(
    ["", "x", "0.weight", "../x", "programs/1.json", "cuda:9", "NaN", "\u202e", "a" * 2000]
)
_values = (
    _numbers | _texts | st.sampled_from([None, True, [], {}, [1, 2], [[[]]], {"a": 1}, {"float": "nan"}])
)

#: A kind of alteration, a number that chooses its place, another one, and a value to put there.
Alteration = tuple[str, int, int, Any]

Kinds = dict[str, Callable[[Path, int, int, Any], None]]
KINDS: Kinds = {}


def kind(function: Callable[[Path, int, int, Any], None]) -> Any:
    KINDS[function.__name__] = function
    return function


def _places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the ways to all values within JSON data."""
    inner = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    return [way, *(place for key, each in inner for place in _places(each, (*way, key)))]


def _altered(data: Any, place: int, way: int, value: Any) -> Any:
    """Return data with a value changed, removed, or exchanged with another of its own."""
    places = _places(data)
    *before, last = chosen = places[place % len(places)] or ("",)
    if chosen == ("",):
        return value
    within = data
    for key in before:
        within = within[key]
    if way % 4 == 0:
        del within[last]
    elif way % 4 == 1:
        other = data
        for key in places[way % len(places)]:
            other = other[key]
        within[last] = json.loads(json.dumps(other))
    else:
        within[last] = value
    return data


@kind
def program(run: Path, place: int, way: int, value: Any) -> None:
    path = run / "programs" / "1.json"
    path.write_text(json.dumps(_altered(json.loads(path.read_text()), place, way, value)))
    if place % 2:
        seal_files(run)


@kind
def fact(run: Path, place: int, way: int, value: Any) -> None:
    with closing(sqlite3.connect(run / "run.sqlite")) as database, database:
        rows = database.execute("SELECT key, value FROM facts ORDER BY key").fetchall()
        key, text = rows[place % len(rows)]
        changed = _altered(json.loads(text), place // len(rows), way, value)
        database.execute("UPDATE facts SET value = ? WHERE key = ?", (json.dumps(changed), key))


@kind
def row(run: Path, place: int, way: int, value: Any) -> None:
    value = json.dumps(value) if isinstance(value, list | dict) else value
    value = float(value) if isinstance(value, int) and abs(value) >= 2**63 else value
    with closing(sqlite3.connect(run / "run.sqlite")) as database, database:
        known = "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name"
        tables = [table for (table,) in database.execute(known)]
        table = tables[place % len(tables)]
        columns = database.execute(f"PRAGMA table_info({table})").fetchall()
        keys = [name for _, name, *_, is_key in columns if is_key]
        rows = database.execute(f"SELECT {', '.join(keys)} FROM {table}").fetchall()
        if not rows:
            return
        chosen = rows[place // len(tables) % len(rows)]
        where = " AND ".join(f"{key} = ?" for key in keys)
        if way % 3 == 0:
            database.execute(f"DELETE FROM {table} WHERE {where}", chosen)
        else:
            name = columns[way % len(columns)][1]
            changed = f"UPDATE OR IGNORE {table} SET {name} = ? WHERE {where}"
            database.execute(changed, (value, *chosen))


@kind
def file(run: Path, place: int, way: int, value: Any) -> None:
    paths = sorted(path for path in run.rglob("*") if path.is_file())
    path, other = paths[place % len(paths)], paths[way % len(paths)]
    match way % 5:
        case 0:
            path.unlink()
        case 1:
            path.write_bytes(path.read_bytes()[: place * 37 % (path.stat().st_size + 1)])
        case 2:
            path.write_bytes(other.read_bytes())
        case 3:
            path.write_bytes(path.read_bytes() + b"\0" * (way % 4097))
        case 4:
            path.unlink()
            path.mkdir()


@kind
def forged(run: Path, place: int, way: int, value: Any) -> None:
    with closing(sqlite3.connect(run / "run.sqlite")) as database, database:
        database.execute("DELETE FROM blocks")


_number = st.integers(0, 10_000)
#: One to four alterations.
ALTERATIONS = st.lists(
    st.tuples(st.sampled_from(sorted(KINDS)), _number, _number, _values), min_size=1, max_size=4
)


def alter_and_look(
    alterations: list[Alteration], run: Path, expected: dict[str, Any], folder: Path
) -> str:
    """Alter a copy of a run; return what came of it, as `benchmarks.torture_files` does.

    Raises:
        AssertionError: altered data is shown without a message, or an error has no text.
    """
    copy = Path(shutil.copytree(run, folder / "altered"))
    try:
        for name, place, way, value in alterations:
            try:
                KINDS[name](copy, place, way, value)
            # What was altered before is in the way, or has left nothing.
            except (OSError, sqlite3.Error, ValueError, ZeroDivisionError, RecordingError):
                continue
        what, why = outcome(copy, expected)
    finally:
        shutil.rmtree(copy)
    # Changing numbers and their digests makes another run.
    is_forged = any(name in ("forged", "row") for name, *_ in alterations)
    assert what != "failed" and (what != "WRONG" or is_forged), f"{what}: {why}"
    return what
