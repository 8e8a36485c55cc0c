"""Random tables as files: they are read as Python's csv module reads them, or refused in words."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from everystep.errors import DataError
from everystep.experiment.data import make_data
from everystep.experiment.preparation import CategoricalColumn, TablePreparation
from everystep.experiment.specification import load

__all__ = ["TABLES", "Table", "read_and_compare"]

MISSING = ["", "NA", "N/A", "NaN", "nan", "null", "NULL", "?"]

_number = (
    st.integers(-9, 99).map(str)
    | st.floats(-1e3, 1e3).map(repr)
    | st.floats(allow_nan=False, allow_infinity=False).map(repr)
)
_large = st.integers(2**53 - 2, 2**66).map(str) | st.integers(-(2**130), 2**130).map(str)
_odd = st.sampled_from(
    [
        *("1e39", "-1e400", "1e-400", "inf", "-inf", "Infinity", "NAN", "+5", "007", "-0", "-0.0", ".5"),
        *("5.", "1E3", "1d3", "1_000", "0x10", "\u0663", " 3", "3 ", "1\u00a0000", "1 000", "1'000"),
        *("--1", "1e", "5%"),
    ]
)
_commas = st.sampled_from(["1,5", "0,25", "-3,0", "1.234,5", "1,234.5", "12,5"])
_words = st.sampled_from(
    ["red", "blue", "true", "false", "True", "yes", "NA", "?", "None", "é", "2024-03-17"]
)
_texts = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs"], exclude_characters="\r"), max_size=8
)
_any = _number | _large | _odd | _commas | _words | _texts | st.sampled_from(MISSING)
_small = st.integers(-9, 99).map(str) | st.floats(-1e3, 1e3).map(repr)
_kinds = [*[_small] * 8, _number, _large, _odd, _commas, _words, _words, _texts]


@dataclass(frozen=True)
class Table:
    """The bytes of a file, and how it is read."""

    content: bytes
    separator: str
    missing: str
    target: str
    classes: bool


def text_of(rows: list[list[str]], separator: str, quoting: int, end: str) -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=separator, quoting=quoting, lineterminator=end).writerows(rows)  # type: ignore[arg-type]
    return out.getvalue()


@st.composite
def _columns(draw: st.DrawFn, count: int) -> list[str]:
    kind = draw(st.sampled_from(_kinds))
    cells = [draw(kind) for _ in range(count)]
    if count and draw(st.integers(0, 5)) == 0:
        cells[draw(st.integers(0, count - 1))] = draw(_any)
    return cells


@st.composite
def _tables(draw: st.DrawFn) -> Table:
    count = draw(st.sampled_from([0, 1, *[2, 3, 4, 6] * 3]))
    known = st.sampled_from(["a", "b", " b", "c d", "é", "x,y", ""])
    names = draw(st.lists(known, min_size=1, max_size=3, unique=draw(st.integers(0, 9)) > 0))
    names.insert(draw(st.integers(0, len(names))), "y")
    columns = [draw(_columns(count)) for _ in names]
    rows = [names, *map(list, zip(*columns, strict=True))] if count else [names]
    for _ in range(draw(st.sampled_from([0] * 8 + [1]))):
        row = rows[draw(st.integers(0, len(rows) - 1))]
        row.append("7") if draw(st.booleans()) else row.pop()
    separator = draw(st.sampled_from([",", ",", ";", "\t"]))
    quoting = draw(
        st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
    )
    text = text_of(rows, separator, quoting, draw(st.sampled_from(["\n", "\r\n"])))
    text = draw(st.sampled_from([str, str, str, str.rstrip, lambda t: t + "\n\n", lambda t: "\n" + t]))(
        text
    )
    encoding = draw(
        st.sampled_from(["utf-8"] * 16 + ["utf-8-sig"] * 4 + ["utf-8-sig", "utf-16", "latin-1"])
    )
    content = text.encode(encoding, "replace")
    if draw(st.integers(0, 19)) == 0:
        content = content[: draw(st.integers(0, len(content)))]
    missing = draw(st.sampled_from(["error", "error", "drop", "mean"]))
    return Table(content, separator, missing, "y", draw(st.booleans()))


#: Random tables.
TABLES = _tables()


def read_and_compare(table: Table, folder: Path) -> str:
    """Read a table; return "refused", or "read": x and y are the numbers of the file.

    Raises:
        AssertionError: a number is another one, or the error does not name the file or a column.
    """
    path = folder / "t.csv"
    path.write_bytes(table.content)
    section = {"source": "table", "path": str(path), "target": table.target, "missing": table.missing}
    experiment = load(
        {
            **{"steps": 1, "model": {"layers": ["Linear(2, 1)"]}, "loss": {"name": "MSELoss"}},
            **{"optimizer": {"name": "SGD"}, "data": section | {"separator": table.separator}},
        }
    )
    try:
        data = make_data(experiment, "classes" if table.classes else "values")
    except DataError as error:
        for fault in error.faults:
            assert re.search(r"t\.csv|column|'", str(fault)), fault
            assert "Traceback" not in str(fault) and len(str(fault)) < 600, fault
        return "refused"
    assert isinstance(data.preparation, TablePreparation)
    expected = _expected(table, data.preparation)
    assert np.isfinite(data.x.numpy()).all() and np.isfinite(data.y.numpy()).all()
    np.testing.assert_array_equal(data.x.numpy(), expected[0])
    np.testing.assert_array_equal(data.y.numpy(), expected[1])
    return "read"


def _rows(table: Table) -> tuple[list[str], list[list[str | None]]]:
    """Return the names and the cells; None where a value is missing."""
    text = table.content.decode("utf-8-sig")
    parsed = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=table.separator) if row]
    names, *rows = parsed
    assert all(len(row) <= len(names) for row in rows), "a row has more values than columns"
    known = [
        [None if cell in MISSING else cell for cell in row] + [None] * (len(names) - len(row))
        for row in rows
    ]
    return names, [row for row in known if any(cell is not None for cell in row)]


def _expected(table: Table, preparation: TablePreparation) -> tuple[np.ndarray, np.ndarray]:
    names, rows = _rows(table)
    unique = [name.strip() for name in names]
    assert len({*unique}) == len(unique)
    places = [unique.index(column.name) for column in preparation.columns]
    target = unique.index("y")
    if table.missing == "drop":
        rows = [row for row in rows if all(row[n] is not None for n in [*places, target])]
    x = [
        _column([row[n] for row in rows], column)
        for n, column in zip(places, preparation.columns, strict=True)
    ]
    return np.concatenate(x, axis=1), _target([row[target] for row in rows], preparation)


def _column(cells: list[str | None], column: object) -> np.ndarray:
    if isinstance(column, CategoricalColumn):
        return np.array(
            [[cell == each for each in column.categories] for cell in cells], dtype=np.float32
        )
    numbers = [None if cell is None else number_of(cell) for cell in cells]
    known = [number for number in numbers if number is not None]
    mean = float(np.array(known, dtype=np.float64).mean())
    return np.array([[mean if n is None else n] for n in numbers], dtype=np.float64).astype(np.float32)


def _target(cells: list[str | None], preparation: TablePreparation) -> np.ndarray:
    if preparation.classes is None:
        values = [number_of(cell or "") for cell in cells]
        return np.array(values, dtype=np.float64).astype(np.float32)[:, np.newaxis]
    kinds = sorted(map(str, preparation.classes), key=[str(c) for c in preparation.classes].index)
    index = [kinds.index(_class_text(cell or "", kinds)) for cell in cells]
    if preparation.class_indices:
        return np.array(index, dtype=np.int64)
    return np.array(index, dtype=np.float32)[:, np.newaxis]


def _class_text(cell: str, kinds: list[str]) -> str:
    if cell in kinds:
        return cell
    number = number_of(cell)
    return next(kind for kind in kinds if number_of(kind) == number)


def number_of(cell: str) -> float:
    """Return the number of a cell, as Python reads it."""
    if cell.lower() in ("true", "false"):
        return float(cell.lower() == "true")
    return float(cell)
