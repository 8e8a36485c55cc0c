"""Tables: read with polars, checked, and converted to numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any, Protocol

import numpy as np
import polars as pl
from numpy.typing import NDArray

from everystep.bounded import open_regular
from everystep.errors import DataError, Fault, did_you_mean
from everystep.experiment.preparation import (
    CategoricalColumn,
    NumericColumn,
    Scaling,
    TablePreparation,
    mean_of,
)
from everystep.experiment.specification import TableData

__all__ = [
    "ColumnsByName",
    "Table",
    "check_same_columns",
    "check_some_left",
    "choose_columns",
    "is_missing",
    "is_row_of",
    "is_text",
    "read_errors",
    "read_table",
    "scanned",
    "table_files",
]

#: The numbers of rows in the file.
Numbers = NDArray[np.int64]

#: Number of columns that a message names.
_COLUMNS_NAMED = 20
#: 2024-03-17, 2024/3/17, 17.3.2024, 3/17/24; with or without a time.
_DAY = r"(\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.](\d{4}|\d{2}))"
_DATE = r"^\s*" + _DAY + r"([T ]\d{1,2}:\d{2}.*)?\s*$"
#: 1,5; 1.234,5; 1,234.5; 1 000: numbers to people, text to programs.
_OWN_MARKS = r"^\s*[-+]?(\d+,\d+|\d{1,3}([.,'\u00a0\u202f ]\d{3})+([.,]\d+)?)\s*$"
#: Formats of text, with the usual separator of each, and the others.
_TEXT = {".csv": ",", ".tsv": "\t", ".txt": "\t"}
#: A path is one file, whatever is in its name.
_ONE_FILE: dict[str, Any] = {"glob": False, "hive_partitioning": False}
_SCANNED: dict[str, Callable[[Path], pl.LazyFrame]] = {
    ".parquet": partial(pl.scan_parquet, **_ONE_FILE),
    ".arrow": partial(pl.scan_ipc, **_ONE_FILE),
    ".feather": partial(pl.scan_ipc, **_ONE_FILE),
    ".ipc": partial(pl.scan_ipc, **_ONE_FILE),
}
_MISSING_WORDS = ["", "NA", "N/A", "NaN", "nan", "null", "NULL", "?"]
_AS_TEXT: dict[str, Any] = {"null_values": _MISSING_WORDS, "infer_schema_length": None}
_HEADING: dict[str, Any] = {"has_header": False, "n_rows": 1, "infer_schema": False}
#: Bytes of a text that are checked at once.
_PIECE = 64_000_000


class ColumnsByName(Protocol):
    """A table that is looked at one column at a time."""

    @property
    def columns(self) -> list[str]:
        """The names."""

    @property
    def height(self) -> int:
        """The number of rows."""

    def __getitem__(self, name: str) -> pl.Series: ...


@dataclass(frozen=True)
class Table:
    """A table that has been read and checked, not yet numbers.

    dropped: the numbers of the rows of the file that are not in it: from 0 below the heading.
    """

    frame: ColumnsByName
    features: list[str]
    target: list[str]
    classes: bool
    specification: TableData
    dropped: tuple[int, ...] = ()

    def fit(self, training: np.ndarray) -> TablePreparation:
        """Fit the preparation to the training rows (int64 positions)."""
        columns = [self._fit_column(self.frame[name][training]) for name in self.features]
        target = self.frame[self.target[0]][training]
        is_of_classes = self.classes or not _is_numeric(target)
        return TablePreparation(
            columns=columns,
            target=self.target,
            classes=sorted(target.unique().to_list()) if is_of_classes else None,
            class_indices=self.classes,
        )

    def rows(self, places: np.ndarray) -> pl.DataFrame:
        """Return rows by their places, of a table in memory."""
        assert isinstance(self.frame, pl.DataFrame)
        return self.frame[places]

    def _fit_column(self, column: pl.Series) -> NumericColumn | CategoricalColumn:
        if not _is_numeric(column):
            categories = sorted(column.cast(pl.String).drop_nulls().unique().to_list())
            return CategoricalColumn(
                name=column.name, categories=categories, unseen=self.specification.unseen
            )
        values = column.cast(pl.Float64)
        fill = None
        if self.specification.missing == "mean":
            known = values.fill_nan(None).drop_nulls().to_numpy()
            if not len(known):
                raise DataError(f"column {column.name!r} has no values in the training rows")
            fill = float(mean_of(known))
            values = values.fill_nan(None).fill_null(fill)
        numbers = values.to_numpy()[:, np.newaxis]
        is_scaled = self.specification.scale is not None
        scaling = Scaling.fit(lambda: iter([numbers])) if is_scaled else None
        return NumericColumn(name=column.name, fill=fill, scaling=scaling)


def read_table(data: TableData, *, classes: bool) -> Table:
    """Read the file, or those of a directory, choose columns, and check that a model can train on them.

    Args:
        data: the `[data]` section; its path is absolute.
        classes: whether the loss needs class indices.

    Raises:
        DataError: lists every error.
    """
    files = table_files(Path(data.path))
    parts = [_read(file, data.separator) for file in files]
    check_same_columns({file: frame.columns for file, frame in zip(files, parts, strict=True)})
    with read_errors(data.path):
        frame = pl.concat(parts, how="vertical_relaxed") if len(parts) > 1 else parts[0]
    is_row = is_row_of(files, frame.lazy(), frame.height)
    frame, numbers = frame.filter(is_row), np.flatnonzero(is_row)
    features, target = choose_columns(frame, numbers, data, classes=classes)
    frame = frame.select([*features, *target])
    rows = numbers[-1] + 1
    if data.missing == "drop":
        lacks = frame.select(pl.any_horizontal([is_missing(column) for column in frame])).to_series()
        check_some_left(data, lacks.to_numpy())
        frame, numbers = frame.filter(~lacks), numbers[~lacks.to_numpy()]
    dropped = np.setdiff1d(np.arange(rows), numbers)
    return Table(frame, features, target, classes, data, tuple(dropped.tolist()))


def check_some_left(data: TableData, lacks: np.ndarray) -> None:
    """Check that not all rows have a missing value, if these are dropped."""
    if lacks.all():
        raise DataError(f'{data.path}: every row has a missing value; set data.missing = "mean"')


def choose_columns(
    frame: ColumnsByName, numbers: Numbers, data: TableData, *, classes: bool
) -> tuple[list[str], list[str]]:
    """Return the names of features and targets, checked. numbers: of the rows.

    Raises:
        DataError: lists every error.
    """
    target = [data.target] if isinstance(data.target, str) else list(data.target)
    features = data.features or [name for name in frame.columns if name not in target]
    faults = [
        Fault(f"data.{key}", f"no column {name!r} in {Path(data.path).name}; {_known(name, frame)}")
        for key, names in (("target", target), ("features", features))
        for name in names
        if name not in frame.columns
    ]
    faults += [
        Fault("data.features", f"{name!r} is the target; remove it from the features")
        for name in features
        if name in target
    ]
    faults += [
        Fault(f"data.{key}", f"{name!r} is there {count} times; write it once")
        for key, names in (("target", target), ("features", features))
        for name, count in Counter(names).items()
        if count > 1
    ]
    heading = frame.columns[0] if len(frame.columns) == 1 else ""
    if faults and (separator := next((sign for sign in ";\t|," if sign in heading), "")):
        problem = f"the file seems to use the separator {separator!r}; set separator = {separator!r}"
        faults.append(Fault("data.separator", problem))
    if faults:
        raise DataError(faults)
    if not features:
        raise DataError(
            f"{data.path} has no column other than the target; at least one feature is needed"
        )
    if frame.height == 0:
        raise DataError(f"{data.path} has no rows")
    if classes and len(target) > 1:
        problem = "a classification loss needs a single target column of classes"
        faults.append(Fault("data.target", problem))
    for name in target:
        if problem := _target_problem(frame[name], numbers, target, classes, data.missing):
            faults.append(Fault("data.target", f"{name!r} {problem}"))
        elif not classes and (problem := _slip(frame[name], numbers)):
            faults.append(Fault(f"column {name!r}", problem))
    for name in features:
        if problem := _feature_problem(frame[name], numbers, data.missing):
            faults.append(Fault(f"column {name!r}", problem))
    if faults:
        raise DataError(faults)
    return features, target


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


def check_same_columns(columns: dict[Path, list[str]]) -> None:
    """Check that the files of a table have the same columns.

    Raises:
        DataError: names the first that has others.
    """
    (first, names), *others = columns.items()
    for file, its in others:
        if its != names:
            lacks = [f"lacks {name!r}" for name in names if name not in its]
            has = [f"has {name!r}" for name in its if name not in names]
            how = ", ".join([*lacks, *has][:_COLUMNS_NAMED]) or "has them in another order"
            raise DataError(f"{file.name} does not have the columns of {first.name}: it {how}")


def is_text(file: Path) -> bool:
    """Return whether a table is in a text."""
    return file.suffix.lower() in _TEXT


def is_row_of(files: list[Path], frame: pl.LazyFrame, height: int) -> np.ndarray:
    """Return which lines are rows: empty lines of a text are not, but are counted."""
    if not is_text(files[0]):
        return np.ones(height, dtype=bool)
    is_empty = frame.select(pl.all_horizontal(pl.all().is_null())).collect(engine="streaming")
    return ~is_empty.to_series().to_numpy()


@contextmanager
def read_errors(path: Path | str) -> Iterator[None]:
    """Report what polars cannot read."""
    try:
        yield
    except DataError:  # which says more
        raise
    except pl.exceptions.NoDataError:
        raise DataError(f"{path} has no rows") from None
    except (pl.exceptions.PolarsError, OSError, ValueError) as error:
        reason = shorten(str(error).strip().partition("\n")[0], 300)
        kind = Path(path).suffix[1:] or "a table"
        raise DataError(f"{path} cannot be read as {kind}: {reason}") from None


def _read(path: Path, separator: str | None) -> pl.DataFrame:
    with read_errors(path):
        if is_text(path):
            return _read_text(path, separator or _TEXT[path.suffix.lower()])
        return _SCANNED[path.suffix.lower()](path).collect()


def _read_text(path: Path, separator: str) -> pl.DataFrame:
    check_text(path, separator)
    # Types are inferred from the whole file: a word in the last row must not be a surprise.
    frame = pl.read_csv(path.read_bytes(), separator=separator, **_AS_TEXT)
    return frame.rename({name: name.strip() for name in frame.columns})


def scanned(path: Path, separator: str | None) -> pl.LazyFrame:
    """Return a file as a table that is read when it is asked for.

    Raises:
        DataError: it is not sound text, or two columns have the same name.
    """
    kind = path.suffix.lower()
    with read_errors(path):
        if kind not in _TEXT:
            return _SCANNED[kind](path)
        check_text(path, separator or _TEXT[kind])
        frame = pl.scan_csv(path, separator=separator or _TEXT[kind], glob=False, **_AS_TEXT)
        return frame.rename({name: name.strip() for name in frame.collect_schema().names()})


def check_text(path: Path, separator: str) -> None:
    """Check that a file is complete text, with one name for each column.

    Unchecked, polars would misread words, cut the last number, or give a second column another name.
    """
    quotes, wrong, lines, begin = 0, "", 1, 0
    with open_regular(path) as file:
        while piece := file.read(_PIECE) + file.readline():
            quotes += piece.count(b'"')
            place = None if wrong else _first_wrong_byte(piece)
            if place is not None:
                wrong = f"line {lines + piece.count(10, 0, place)}, byte {begin + place}"
            lines, begin = lines + piece.count(10), begin + len(piece)
    if quotes % 2:
        raise DataError(f'{path}: a quotation mark (") is not closed; the file may be cut off')
    if wrong:
        raise DataError(f"{path} is not UTF-8 text ({wrong}); save it as UTF-8")
    heading = pl.read_csv(path, separator=separator, glob=False, **_AS_TEXT | _HEADING)
    _check_names(path, [(name or "").strip() for name in heading.row(0)])


def _first_wrong_byte(content: bytes) -> int | None:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    place = content.find(0)
    return place if place >= 0 else None


def _check_names(path: Path, names: list[str]) -> None:
    """Check that no two columns have the same name: polars would give the second another one."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    faults = [
        Fault("", f"{path.name} has {names.count(name)} columns named {name!r}; give each its own name")
        for name in twice
    ]
    if faults:
        raise DataError(faults)


def _known(name: str, frame: ColumnsByName) -> str:
    """Return the most similar columns, and all, as far as they fit in a message."""
    near = [cure] if (cure := did_you_mean(name, frame.columns)).endswith("?") else []
    shown = ", ".join(frame.columns[:_COLUMNS_NAMED])
    more = f", and {len(frame.columns) - _COLUMNS_NAMED} more" * (len(frame.columns) > _COLUMNS_NAMED)
    return " ".join([*near, f"the columns are {shown}{more}"])


def _is_numeric(column: pl.Series) -> bool:
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
    column: pl.Series, numbers: Numbers, target: list[str], classes: bool, missing: str
) -> str:
    """Return why a column cannot be a target; empty if it can."""
    absent = int(is_missing(column).sum())
    if absent and missing != "drop":
        return f'is missing in {absent} of {len(column)} rows; set data.missing = "drop" to drop them'
    if column.dtype.is_float() and column.is_infinite().any():
        return "has infinite values"
    if classes:
        return ""
    if _is_numeric(column):
        large = _too_large(column, numbers)
        return f"has {large}" if large else ""
    if _is_date(column):
        return f"contains {_dates_text(column)}"
    if len(target) == 1 and column.drop_nulls().n_unique() == 2:  # yes or no
        return ""
    return (
        f"contains text, but the loss needs numbers{_first_word(column, numbers)}; for classes, use a "
        'classification loss: name = "CrossEntropyLoss"'
    )


def _feature_problem(column: pl.Series, numbers: Numbers, missing: str) -> str:
    """Return why a column cannot be a feature; empty if it can."""
    absent = int(is_missing(column).sum())
    if absent == len(column):
        return "has no values; leave it out"
    if absent and missing == "error":
        return (
            f'{absent} of {len(column)} values are missing; set data.missing to "drop" (drops those '
            'rows) or "mean", or leave the column out'
        )
    if column.dtype.is_float() and column.drop_nulls().is_infinite().any():
        return "has infinite values; remove those rows"
    if _is_numeric(column):
        large = _too_large(column, numbers)
        return f"has {large}" if large else ""
    if _is_date(column):
        return f"contains {_dates_text(column)}, or leave the column out of data.features"
    if column.dtype not in (pl.String, pl.Categorical, pl.Enum):
        return f"is {column.dtype}, neither numbers nor text; leave it out of data.features"
    return _slip(column, numbers)


def _too_large(column: pl.Series, numbers: Numbers) -> str:
    """Return a message on the first number that would be infinite as float32; empty if there is none."""
    is_large = column.cast(pl.Float64).cast(pl.Float32).is_infinite().fill_null(False)
    place = is_large.arg_max() if is_large.any() else None
    if place is None:
        return ""
    found = f"a number too large for float32 ({column[place]} in {_row(numbers, place)})"
    return f"{found}; scale the numbers in the file"


def _slip(column: pl.Series, numbers: Numbers) -> str:
    """Return the problem of a column of numbers that became text; empty for others.

    These are a few words among them, and decimal commas or thousands separators.
    """
    if _is_numeric(column):
        return ""
    words = column.cast(pl.String)
    is_number = words.str.strip_chars().cast(pl.Float64, strict=False).is_not_null()
    count = len(words.drop_nulls())
    if is_number.sum() * 2 > count:
        return (
            f"text in a numeric column{_first_word(column, numbers)}; correct it, leave the value "
            "empty, or leave the column out of data.features"
        )
    is_marked = words.str.contains(_OWN_MARKS).fill_null(False)
    if is_marked.sum() * 2 <= count:
        return ""
    place = is_marked.arg_max() or 0
    return (
        f"numbers with commas or thousands separators ({column[place]!r} in {_row(numbers, place)}); "
        "write 1234.5, or leave the column out of data.features"
    )


def _dates_text(column: pl.Series) -> str:
    first = str(column.drop_nulls()[0])
    return f"dates ({first!r}), not numbers; write them as numbers, such as days since the first date"


def _row(numbers: Numbers, place: int) -> str:
    """Return the name of a row; line 2 of a text file is row 0, if no field spans lines."""
    return f"row {numbers[place]} (counted from 0)"


def _first_word(column: pl.Series, numbers: Numbers) -> str:
    words = column.cast(pl.String)
    is_number = words.str.strip_chars().cast(pl.Float64, strict=False).is_not_null()
    rows = (~is_number & words.is_not_null()).arg_true()
    return f" ({words[int(rows[0])]!r} in {_row(numbers, int(rows[0]))})" if len(rows) else ""
