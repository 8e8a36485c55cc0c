"""Tables as files: read with polars, their columns chosen, and all checked."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from io import TextIOWrapper
from itertools import dropwhile
from operator import not_
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import polars as pl

from everystep.bounded import open_regular
from everystep.errors import DataError, Fault, did_you_mean
from everystep.experiment.specification import TableData

__all__ = [
    "TableColumns",
    "choose_columns",
    "is_missing",
    "is_numeric",
    "read_errors",
    "scan_parquet",
    "table_files",
    "table_frame",
]

#: Number of columns that a message names.
_COLUMNS_NAMED = 20
#: 2024-03-17, 2024/3/17, 17.3.2024, 3/17/24; with or without a time.
_DAY = r"(\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.](\d{4}|\d{2}))"
_DATE = r"^\s*" + _DAY + r"([T ]\d{1,2}:\d{2}.*)?\s*$"
#: 1,5; 1.234,5; 1,234.5; 1 000: numbers to people, text to programs.
_OWN_MARKS = r"^\s*[-+]?(\d+,\d+|\d{1,3}([.,'\u00a0\u202f ]\d{3})+([.,]\d+)?)\s*$"
#: What is read as a number; not ` 1` and `+1`.
_NUMBER = r"^-?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$"
#: Formats of text, with the usual separator of each, and the others.
_TEXT = {".csv": ",", ".tsv": "\t", ".txt": "\t"}
#: A path is one file, whatever is in its name.
scan_parquet = partial(pl.scan_parquet, glob=False, hive_partitioning=False)
_scan_ipc = partial(pl.scan_ipc, glob=False, hive_partitioning=False)
_SCANNED: dict[str, Callable[[Path], pl.LazyFrame]] = {
    ".parquet": scan_parquet,
    **dict.fromkeys((".arrow", ".feather", ".ipc"), _scan_ipc),
}
_WORDS = (pl.String, pl.Categorical, pl.Enum)
_MISSING_WORDS = ["", "NA", "N/A", "NaN", "nan", "null", "NULL", "?"]
#: Types are inferred from the whole file: a word in the last row must not be a surprise.
_AS_TEXT: dict[str, Any] = {"null_values": _MISSING_WORDS, "infer_schema_length": None}
#: Bytes of a text that are checked at once, and of columns that are read together.
_PIECE, _COLUMNS = 64_000_000, 200_000_000


class TableColumns:
    """The columns of a table, some read at a time.

    is_row: which of its lines are rows: empty lines of a text are not, but are counted.
    """

    def __init__(self, frame: pl.LazyFrame, is_row: np.ndarray) -> None:
        self.names = frame.collect_schema().names()
        self.height = int(is_row.sum())
        self._frame = frame
        self._is_row = is_row
        self._together = max(1, _COLUMNS // (8 * len(is_row) or 1))
        self._read = dict[str, pl.Series]()

    def __getitem__(self, name: str) -> pl.Series:
        if name not in self._read:
            begin = self.names.index(name)
            # One read of a file gives several columns: they are mostly asked for in their order.
            wanted = self._frame.select(self.names[begin : begin + self._together])
            self._read = {}  # not both in memory
            self._read = wanted.collect(engine="streaming").to_dict()
        return self._read[name] if self._is_row.all() else self._read[name].filter(self._is_row)

    def row(self, place: int) -> str:
        """Return the name of a row; line 2 of a text file is row 0, if no field spans lines."""
        return f"row {np.flatnonzero(self._is_row)[place]} (counted from 0)"


def table_frame(data: TableData, *, in_memory: bool) -> tuple[pl.LazyFrame, bool]:
    """Return a file, or all of a directory, as one table, and whether it is in a text.

    in_memory: whether it is read now, not when it is asked for.

    Raises:
        DataError: there are no files, one is not a valid table, or its columns differ from the first's.
    """
    files = table_files(Path(data.path))
    found = [_frame_of(file, data.separator, in_memory=in_memory) for file in files]
    first = found[0][1]
    for file, (_, names) in zip(files, found, strict=True):
        if names != first:
            lacks = [f"lacks {name!r}" for name in first if name not in names]
            has = [f"has {name!r}" for name in names if name not in first]
            how = ", ".join([*lacks, *has][:_COLUMNS_NAMED]) or "has them in another order"
            raise DataError(f"{file.name} does not have the columns of {files[0].name}: it {how}")
    with read_errors(data.path):
        # Relaxed: each file has its own types, and a column may be whole numbers in one of them only.
        frame = pl.concat([frame for frame, _ in found], how="vertical_relaxed")
        # A decimal of Python equals no float, and is not JSON.
        frame = frame.with_columns(pl.selectors.decimal().cast(pl.Float64))
        return frame.collect().lazy() if in_memory else frame, files[0].suffix.lower() in _TEXT


def table_files(path: Path) -> list[Path]:
    """Return the files of a table: the file, or all of a directory, by name.

    Raises:
        DataError: there are none, or of unknown or several formats.
    """
    if not path.exists():
        raise DataError(
            f"data.path: {path} does not exist; a relative path is relative to the experiment file"
        )
    files = [path]
    if path.is_dir():
        files = sorted(each for each in path.iterdir() if each.is_file() and each.name[0] not in "._")
    formats = {each.suffix.lower() for each in files}
    if len(formats) > 1 or not files:
        found = f"files of several formats ({', '.join(sorted(formats))})" if files else "no files"
        raise DataError(f"data.path: {path} has {found}; a table is a file, or files of one format")
    if not formats <= {*_TEXT, *_SCANNED}:
        known = ", ".join([*_TEXT, *_SCANNED])
        raise DataError(f"data.path: {files[0].name} has an unknown format; supported: {known}")
    return files


@contextmanager
def read_errors(path: Path | str, separator: str | None = None) -> Iterator[None]:
    """Report what polars cannot read. separator: of the values of a text."""
    try:
        yield
    except DataError:  # which is more precise
        raise
    except pl.exceptions.NoDataError:
        raise DataError(f"{path} has no rows") from None
    except (pl.exceptions.PolarsError, csv.Error, OSError, ValueError) as error:
        reason = None if separator is None else _long_row(Path(path), separator)
        reason = reason or shorten(str(error).strip().partition("\n")[0], 300)
        kind = Path(path).suffix[1:] or "a table"
        raise DataError(f"{path} cannot be read as {kind}: {reason}") from None


def _frame_of(path: Path, separator: str | None, *, in_memory: bool) -> tuple[pl.LazyFrame, list[str]]:
    """Return the table of a file, and the names of its columns."""
    kind = path.suffix.lower()
    separator = separator or _TEXT.get(kind)
    with read_errors(path, separator):
        if kind in _TEXT and separator is not None:
            _check_text(path, separator)
            frame = pl.scan_csv(path, separator=separator, glob=False, **_AS_TEXT)
            frame = frame.rename({name: name.strip() for name in frame.collect_schema().names()})
        else:
            frame = _SCANNED[kind](path)
        frame = frame.collect().lazy() if in_memory else frame
        return frame, frame.collect_schema().names()


def _check_text(path: Path, separator: str) -> None:
    """Check that a file is complete text, with one name for each column."""
    # Unchecked, polars would misread words, cut the last number, or give a second column another name.
    quotes, wrong, lines, begin = 0, "", 1, 0
    with open_regular(path) as file:
        # Up to the end of a line, so that no character of several bytes is cut.
        while piece := file.read(_PIECE) + file.readline():
            # A quotation mark within a value is written twice, so a complete file has an even number of
            # them.
            quotes += piece.count(b'"')
            place = None if wrong else _first_wrong_byte(piece)
            if place is not None:
                wrong = f"line {lines + piece.count(10, 0, place)}, byte {begin + place}"
            lines, begin = lines + piece.count(10), begin + len(piece)
    if quotes % 2:
        raise DataError(f'{path}: a quotation mark (") is not closed; the file may be cut off')
    if wrong:
        raise DataError(f"{path} is not UTF-8 text ({wrong}); save it as UTF-8")
    names = Counter(name.strip() for name in next(_rows(path, separator), []))
    others = [each for each in ";\t|," if each != separator and any(each in name for name in names)]
    # A wrong separator leaves one column, with the names of all in its heading.
    if len(names) == 1 and others:
        raise DataError(
            f"{path.name} has one column, {next(iter(names))!r:.80}; if {others[0]!r} separates its "
            f"values, set data.separator = {json.dumps(others[0])}"
        )
    faults = [
        Fault("", f"{path.name} has {count} columns named {name!r}; give each its own name")
        for name, count in names.items()
        if count > 1
    ]
    if faults:
        raise DataError(faults)


def _rows(path: Path, separator: str) -> Iterator[list[str]]:
    # "sig": spreadsheets begin a file with a byte order mark, which is not of the first name.
    with open_regular(path) as file, TextIOWrapper(file, "utf-8-sig", newline="") as text:
        # polars takes the first line that is not empty for the heading.
        yield from dropwhile(not_, csv.reader(text, delimiter=separator))


def _long_row(path: Path, separator: str) -> str | None:
    """Return in words which row of a text is the first with more values than the heading, if one is."""
    with suppress(csv.Error):  # such as of a value that is too long
        rows = _rows(path, separator)
        columns = len(next(rows, []))
        longer = (number for number, row in enumerate(rows) if len(row) > columns)
        if (number := next(longer, None)) is not None:
            return (
                f"row {number} (counted from 0) has more values than the heading has columns "
                f"({columns}); quote values that contain {separator!r}, and leave out lines that are "
                "not rows"
            )
    return None


def _first_wrong_byte(content: bytes) -> int | None:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    place = content.find(0)
    return place if place >= 0 else None


def choose_columns(
    columns: TableColumns, data: TableData, *, classes: bool
) -> tuple[list[str], list[str]]:
    """Return the names of features and targets, checked.

    Raises:
        DataError: lists every error.
    """
    target = [data.target] if isinstance(data.target, str) else list(data.target)
    features = data.features or [name for name in columns.names if name not in target]
    named = [*(("target", name) for name in target), *(("features", name) for name in features)]
    faults = []
    for (key, name), count in Counter(named).items():
        if name not in columns.names:
            problem = f"no column {name!r} in {Path(data.path).name}; {_known(name, columns)}"
            faults.append(Fault(f"data.{key}", problem))
        if key == "features" and name in target:
            problem = f"{name!r} is the target; remove it from the features"
            faults.append(Fault("data.features", problem))
        if count > 1:
            faults.append(Fault(f"data.{key}", f"{name!r} is there {count} times; write it once"))
    if faults:
        raise DataError(faults)
    if not features:
        raise DataError(
            f"{data.path} has no column other than the target; at least one feature is needed"
        )
    if columns.height == 0:
        raise DataError(f"{data.path} has no rows")
    if classes and len(target) > 1:
        problem = "a classification loss needs a single target column of classes"
        faults.append(Fault("data.target", problem))
    for name in target:
        if problem := _target_problem(columns, name, data, len(target), classes=classes):
            faults.append(Fault("data.target", f"{name!r} {problem}"))
        elif not classes and (problem := _slip(columns, name)):
            faults.append(Fault(f"column {name!r}", problem))
    for name in features:
        if problem := _feature_problem(columns, name, data):
            faults.append(Fault(f"column {name!r}", problem))
    if faults:
        raise DataError(faults)
    return features, target


def _known(name: str, columns: TableColumns) -> str:
    """Return the most similar columns, and all, as far as they fit in a message."""
    near = [cure] if (cure := did_you_mean(name, columns.names)).endswith("?") else []
    shown = ", ".join(columns.names[:_COLUMNS_NAMED])
    more = f", and {len(columns.names) - _COLUMNS_NAMED} more" * (len(columns.names) > _COLUMNS_NAMED)
    return " ".join([*near, f"the columns are {shown}{more}"])


def is_numeric(column: pl.Series) -> bool:
    """Return whether a column has numbers, or yes and no."""
    return column.dtype.is_numeric() or column.dtype == pl.Boolean


def _is_date(column: pl.Series) -> bool:
    """Return whether all values are dates or times, as such or as text."""
    if column.dtype in (pl.Date, pl.Datetime):
        return True
    words = column.drop_nulls()
    return words.dtype == pl.String and len(words) > 0 and bool(words.str.contains(_DATE).all())


def is_missing(column: pl.Series) -> pl.Series:
    """Return which values are missing."""
    return column.is_null() | column.is_nan() if column.dtype.is_float() else column.is_null()


def _target_problem(
    columns: TableColumns, name: str, data: TableData, count: int, *, classes: bool
) -> str:
    """Return why a column cannot be a target, one of so many; empty if it can."""
    column = columns[name]
    absent = int(is_missing(column).sum())
    if absent and data.missing != "drop":
        return f'is missing in {absent} of {len(column)} rows; set data.missing = "drop" to drop them'
    if (problem := _unfit(columns, name, as_numbers=not classes)) or classes or is_numeric(column):
        return problem
    if count == 1 and column.drop_nulls().n_unique() == 2:  # yes or no
        return ""
    return (
        f"contains text, but the loss needs numbers{_first_word(columns, name)}; for classes, use a "
        'classification loss: name = "CrossEntropyLoss"'
    )


def _feature_problem(columns: TableColumns, name: str, data: TableData) -> str:
    """Return why a column cannot be a feature; empty if it can."""
    column = columns[name]
    absent = int(is_missing(column).sum())
    if absent == len(column):
        return "has no values; leave it out"
    if absent and data.missing == "error":
        return (
            f'{absent} of {len(column)} values are missing; set data.missing to "drop" (drops those '
            'rows) or "mean", or leave the column out'
        )
    if problem := _unfit(columns, name, as_numbers=True):
        return f"{problem}, or leave the column out of data.features"
    return _slip(columns, name)


def _unfit(columns: TableColumns, name: str, *, as_numbers: bool) -> str:
    """Return why values are not finite numbers or words; empty if they are.

    as_numbers: numbers must be finite in float32, and words no dates.
    """
    column = columns[name]
    if column.dtype.is_float() and column.is_infinite().any():
        return "has infinite values; remove those rows"
    if not as_numbers and (is_numeric(column) or column.dtype in _WORDS):
        return ""
    if is_numeric(column):
        places = column.cast(pl.Float64).cast(pl.Float32).is_infinite().arg_true()
        if not len(places):
            return ""
        found = f"{column[places[0]]} in {columns.row(places[0])}"
        return f"has a number too large for float32 ({found}); scale the numbers in the file"
    if _is_date(column):
        first = str(column.drop_nulls()[0])
        cure = "write them as numbers, such as days since the first date"
        return f"contains dates ({first!r}), not numbers; {cure}"
    if column.dtype not in _WORDS:
        return f"is {column.dtype}, neither numbers nor text; convert it"
    return ""


def _slip(columns: TableColumns, name: str) -> str:
    """Return why a column that is mostly numbers was read as text; empty for other columns.

    The reasons are a few words among them, and decimal commas or thousands separators.
    """
    column = columns[name]
    if is_numeric(column):
        return ""
    words = column.cast(pl.String).drop_nulls()
    are_numbers = words.str.strip_chars().cast(pl.Float64, strict=False).is_not_null()
    # More than half are numbers: the others are taken for slips.
    if are_numbers.sum() * 2 > len(words):
        return (
            f"text in a numeric column{_first_word(columns, name)}; correct it, leave the value "
            "empty, or leave the column out of data.features"
        )
    places = column.cast(pl.String).str.contains(_OWN_MARKS).arg_true()
    if len(places) * 2 <= len(words):
        return ""
    found = f"{column[places[0]]!r} in {columns.row(places[0])}"
    return (
        f"numbers with commas or thousands separators ({found}); "
        "write 1234.5, or leave the column out of data.features"
    )


def _first_word(columns: TableColumns, name: str) -> str:
    words = columns[name].cast(pl.String)
    places = (~words.str.contains(_NUMBER)).arg_true()
    return f" ({words[places[0]]!r} in {columns.row(places[0])})" if len(places) else ""
