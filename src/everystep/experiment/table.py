"""Tables: read with polars, checked, and converted to numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import shorten

import numpy as np
import polars as pl
from numpy.typing import NDArray

from everystep.errors import DataError, Fault, did_you_mean
from everystep.experiment.preparation import (
    CategoricalColumn,
    NumericColumn,
    Scaling,
    TablePreparation,
    mean_of,
)
from everystep.experiment.specification import TableData

__all__ = ["Table", "read_table"]

#: The numbers of rows in the file.
Numbers = NDArray[np.int64]

#: Number of columns that a message names.
_COLUMNS_NAMED = 20
#: 2024-03-17, 2024/3/17, 17.3.2024, 3/17/24; with or without a time.
_DAY = r"(\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.](\d{4}|\d{2}))"
_DATE = r"^\s*" + _DAY + r"([T ]\d{1,2}:\d{2}.*)?\s*$"
#: 1,5; 1.234,5; 1,234.5; 1 000: numbers to people, text to programs.
_OWN_MARKS = r"^\s*[-+]?(\d+,\d+|\d{1,3}([.,'\u00a0\u202f ]\d{3})+([.,]\d+)?)\s*$"
_MISSING_WORDS = ["", "NA", "N/A", "NaN", "nan", "null", "NULL", "?"]


@dataclass(frozen=True)
class Table:
    """A table that has been read and checked, not yet numbers.

    dropped: the numbers of the rows of the file that are not in it: from 0 below the heading.
    """

    frame: pl.DataFrame
    features: list[str]
    target: list[str]
    classes: bool
    specification: TableData
    dropped: tuple[int, ...] = ()

    def fit(self, training: np.ndarray) -> TablePreparation:
        """Fit the preparation to the training rows (int64 positions)."""
        frame = self.frame[training]
        target = frame[self.target[0]]
        is_of_classes = self.classes or not _is_numeric(target)
        return TablePreparation(
            columns=[self._fit_column(frame[name]) for name in self.features],
            target=self.target,
            classes=sorted(target.unique().to_list()) if is_of_classes else None,
            class_indices=self.classes,
        )

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
    """Read the file, choose its columns, and check that a model can train on them.

    Args:
        data: the `[data]` section; its path is absolute.
        classes: whether the loss needs class indices.

    Raises:
        DataError: lists every error.
    """
    frame, numbers = _read(Path(data.path), data.separator)
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
    frame = frame.select([*features, *target])
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
    rows = numbers[-1] + 1
    if data.missing == "drop":
        lacks = frame.select(pl.any_horizontal([_missing(column) for column in frame])).to_series()
        if lacks.all():
            raise DataError(f'{data.path}: every row has a missing value; set data.missing = "mean"')
        frame, numbers = frame.filter(~lacks), numbers[~lacks.to_numpy()]
    dropped = np.setdiff1d(np.arange(rows), numbers)
    return Table(frame, features, target, classes, data, tuple(dropped.tolist()))


def _read(path: Path, separator: str | None) -> tuple[pl.DataFrame, Numbers]:
    """Return the table, and the number of each row in the file: from 0 below the heading."""
    readers: dict[str, Callable[[], pl.DataFrame]] = {
        ".csv": lambda: _read_text(path, separator or ","),
        ".tsv": lambda: _read_text(path, separator or "\t"),
        ".txt": lambda: _read_text(path, separator or "\t"),
        ".parquet": lambda: pl.read_parquet(path),
        ".arrow": lambda: pl.read_ipc(path),
        ".feather": lambda: pl.read_ipc(path),
        ".ipc": lambda: pl.read_ipc(path),
    }
    if not path.is_file():
        raise DataError(
            f"data.path: {path} does not exist; a relative path is relative to the experiment file"
        )
    if path.suffix.lower() not in readers:
        raise DataError(f"data.path: {path.name} has an unknown format; supported: {', '.join(readers)}")
    try:
        frame = readers[path.suffix.lower()]()
        is_row = np.ones(frame.height, dtype=bool)
        if path.suffix.lower() in (".csv", ".tsv", ".txt"):  # empty lines are not rows, but are counted
            is_row = ~frame.select(pl.all_horizontal(pl.all().is_null())).to_series().to_numpy()
        return frame.filter(is_row), np.flatnonzero(is_row)
    except pl.exceptions.NoDataError:
        raise DataError(f"{path} has no rows") from None
    except (pl.exceptions.PolarsError, OSError, ValueError) as error:
        reason = shorten(str(error).strip().partition("\n")[0], 300)
        raise DataError(f"{path} cannot be read as {path.suffix[1:]}: {reason}") from None


def _read_text(path: Path, separator: str) -> pl.DataFrame:
    content = path.read_bytes()
    _check_text(path, content)
    read = partial(pl.read_csv, content, separator=separator, null_values=_MISSING_WORDS)
    heading = read(has_header=False, n_rows=1, infer_schema=False)
    _check_names(path, [(name or "").strip() for name in heading.row(0)])
    # Types are inferred from the whole file: a word in the last row must not be a surprise.
    frame = read(infer_schema_length=None)
    return frame.rename({name: name.strip() for name in frame.columns})


def _check_text(path: Path, content: bytes) -> None:
    """Check that a file is complete text: polars would misread words, or cut the last number."""
    if content.count(b'"') % 2:
        raise DataError(f'{path}: a quotation mark (") is not closed; the file may be cut off')
    try:
        content.decode("utf-8")
        wrong = content.index(b"\0")
    except UnicodeDecodeError as error:
        wrong = error.start
    except ValueError:
        return
    line = content.count(b"\n", 0, wrong) + 1
    raise DataError(f"{path} is not UTF-8 text (line {line}, byte {wrong}); save it as UTF-8")


def _check_names(path: Path, names: list[str]) -> None:
    """Check that no two columns have the same name: polars would give the second another one."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    faults = [
        Fault("", f"{path.name} has {names.count(name)} columns named {name!r}; give each its own name")
        for name in twice
    ]
    if faults:
        raise DataError(faults)


def _known(name: str, frame: pl.DataFrame) -> str:
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


def _missing(column: pl.Series) -> pl.Series:
    return column.is_null() | column.is_nan() if column.dtype.is_float() else column.is_null()


def _target_problem(
    column: pl.Series, numbers: Numbers, target: list[str], classes: bool, missing: str
) -> str:
    """Return why a column cannot be a target; empty if it can."""
    absent = int(_missing(column).sum())
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
    absent = int(_missing(column).sum())
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
