"""A table as an array: each number, and for each word its place among all words of its column.

That is done once, and for a large table in the cache directory. Nothing is filled or scaled there: that
depends on the rows to train on, and is done to each batch. It is fitted to one column at a time, which
must fit in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from everystep.errors import DataError, named
from everystep.experiment.preparation import CategoricalColumn, NumericColumn, Scaling, TablePreparation
from everystep.experiment.prepared_rows import Prepare, Reading, SourceArray
from everystep.experiment.source_files import Conversion, SourceFile, check_room, converted
from everystep.experiment.specification import TableData
from everystep.experiment.table import (
    TableColumns,
    choose_columns,
    is_missing,
    is_numeric,
    read_errors,
    scan_parquet,
    table_frame,
)

__all__ = ["ConvertedTable", "convert_table"]

#: A text in a format from which single columns can be read.
_TEXT = "table.parquet"
#: To be raised when the conversion of tables changes.
_FORMAT = 2
#: Bytes of rows that are converted together.
_ROWS = 64_000_000
#: Rows that a run can list as dropped.
_MOST_DROPPED = 1_000_000
#: Numbers of these types are exact in float32.
_EXACT = {pl.Float32, pl.Boolean, pl.Int8, pl.Int16, pl.UInt8, pl.UInt16}


@dataclass(frozen=True)
# A table and its conversion, e.g. of the columns `age` and `colour`, and the target `price`:
#   file            31, red, 10.5     17, blue, 8.0     (none), red, 9.0
#   words           colour: blue, red                   all words of the file, in alphabetical order
#   x               31.0, 1.0         17.0, 0.0         NaN, 1.0       places of words, NaN for missing
#   trained on      fills NaN, scales, and makes a column of 0 and 1 of each word: see `TablePreparation`
class ConvertedTable:
    """A table as an array x (rows, columns) and its targets y.

    whole: what the columns are; columns: as they are in the file, to be fitted to; dropped: the numbers
    of the rows of the file that are not in it, from 0 below the heading.
    """

    x: SourceArray
    y: SourceArray
    whole: TablePreparation
    columns: TableColumns
    specification: TableData
    dropped: tuple[int, ...]

    def fit(self, training: np.ndarray | None) -> TablePreparation:
        """Fit the preparation to the training rows (int64 places), or to all.

        Raises:
            DataError: a column has no values there, or other rows have words or classes that these lack.
        """

        def values_of(name: str) -> pl.Series:
            return self.columns[name] if training is None else self.columns[name][training]

        whole = self.whole
        columns = [
            self._fitted_words(column, values_of(column.name))
            if isinstance(column, CategoricalColumn)
            else self._fitted_numbers(column, values_of(column.name))
            for column in whole.columns
        ]
        target = values_of(whole.target[0])
        known = {*target.unique().to_list()}
        if new := [each for each in whole.classes or () if each not in known]:
            raise DataError(
                f"target {target.name!r}: class {_listed(sorted(set(map(str, new))))} not in the "
                "training rows; use another seed or a smaller data.validation, or remove those rows"
            )
        return whole.model_copy(update={"columns": columns})

    def _fitted_words(self, column: CategoricalColumn, values: pl.Series) -> CategoricalColumn:
        found = column.model_copy(
            update={"categories": _words(values), "unseen": self.specification.unseen}
        )
        # What only held-out rows have: no number of the model would stand for it.
        new = sorted({*column.categories} - {*found.categories})
        if new and found.unseen == "error":
            raise DataError(
                f"column {column.name!r}: {_listed(new)} not in the training rows; set data.unseen = "
                '"zeros", use another seed, or leave the column out of data.features'
            )
        return found

    def _fitted_numbers(self, column: NumericColumn, values: pl.Series) -> NumericColumn:
        numbers, fill = values.cast(pl.Float64).fill_null(np.nan).to_numpy(), None
        if self.specification.missing == "mean":
            is_absent = np.isnan(numbers)
            if is_absent.all():
                raise DataError(f"column {column.name!r} has no values in the training rows")
            (fill,) = Scaling.fit(lambda: iter([numbers[~is_absent]])).mean
            numbers = np.where(is_absent, fill, numbers)
        is_scaled = self.specification.scale is not None
        scaling = Scaling.fit(lambda: iter([numbers])) if is_scaled else None
        return NumericColumn(name=column.name, fill=fill, scaling=scaling)

    def prepared_by(self, fitted: Any) -> tuple[Prepare, Prepare]:
        """Return what makes features of rows of x, and targets of rows of y.

        Raises:
            ValueError: the preparation is of another table.
        """
        return fitted.features_from(self.whole), lambda rows: rows


def convert_table(
    data: TableData, sources: tuple[SourceFile, ...], progress: Reading, *, classes: bool
) -> ConvertedTable:
    """Read a table, choose columns, check that a model can train on them, and convert them.

    Args:
        data: the `[data]` section; its path is absolute.
        sources: the files of a table that does not come into memory; none for others.
        progress: called with how many rows are converted, and of all.
        classes: whether the loss needs class indices.

    Raises:
        DataError: lists every error.
    """

    def convert(folder: Path) -> Conversion:
        frame, is_text = table_frame(data, in_memory=False)
        with read_errors(data.path):
            if is_text:  # each look at a column would read all of it
                # The Parquet file is expected to take half the bytes of the text.
                check_room(folder, sum(each.bytes for each in sources) // 2)
                frame.sink_parquet(folder / _TEXT, compression="lz4")
                frame = scan_parquet(folder / _TEXT)
            frame, is_kept, whole = _checked_table(frame, is_text, data, classes=classes)
        dropped = np.flatnonzero(~is_kept).tolist()
        if len(dropped) > _MOST_DROPPED:
            problem = f"{len(dropped):,} rows would be dropped, too many for a run to list"
            raise DataError(f'{problem}; set data.missing = "mean"')
        about = {"whole": whole.model_dump(mode="json"), "lines": len(is_kept), "dropped": dropped}
        return Conversion(int(is_kept.sum()), _parts(frame, is_kept, whole, data), about)

    if not sources:
        found = table_frame(data, in_memory=True)
        frame, is_kept, whole = _checked_table(*found, data, classes=classes)
        x, y = map(np.concatenate, zip(*_parts(frame, is_kept, whole, data), strict=True))
    else:
        # Only batches depend on these: a training with others uses the same cache.
        asked = data.model_dump_json(exclude={"validation", "scale", "unseen"})
        name = f"tables/{Path(data.path).stem[:50]}"
        # Another version of polars may parse a text differently.
        how = {"format": _FORMAT, "polars": pl.__version__, "data": asked, "classes": classes}
        x, y, about, folder = converted(name, sources, convert, progress, **how)
        is_kept = np.ones(about["lines"], dtype=bool)
        is_kept[about["dropped"]] = False
        text = folder / _TEXT
        frame = scan_parquet(text) if text.exists() else table_frame(data, in_memory=False)[0]
        frame = frame.head(len(is_kept))
        whole = TablePreparation.model_validate(about["whole"])
    columns, dropped = TableColumns(frame, is_kept), tuple(np.flatnonzero(~is_kept).tolist())
    return ConvertedTable(SourceArray(x), SourceArray(y), whole, columns, data, dropped)


def _checked_table(
    frame: pl.LazyFrame, is_text: bool, data: TableData, *, classes: bool
) -> tuple[pl.LazyFrame, np.ndarray, TablePreparation]:
    """Return a table, which of its lines are rows to train on, and what its columns are."""
    is_row = np.ones(frame.select(pl.len()).collect().item(), dtype=bool)
    if is_text:
        # An empty line of a text is a row of missing values to polars; in other formats, such a row is
        # meant.
        is_empty = frame.select(pl.all_horizontal(pl.all().is_null())).collect(engine="streaming")
        is_row = ~is_empty.to_series().to_numpy()
    columns = TableColumns(frame, is_row)
    features, target = choose_columns(columns, data, classes=classes)
    is_kept = is_row.copy()
    if data.missing == "drop":
        for name in (*features, *target):
            is_kept[is_row] &= ~is_missing(columns[name]).to_numpy()
        if not is_kept.any():
            raise DataError(f'{data.path}: every row has a missing value; set data.missing = "mean"')
    # Without the empty lines at the end, so that a run need not list them as dropped.
    lines = int(np.flatnonzero(is_row)[-1]) + 1
    frame, is_kept = frame.head(lines), is_kept[:lines]
    kept = TableColumns(frame, is_kept)
    found = [
        NumericColumn(name=name, fill=None, scaling=None)
        if is_numeric(kept[name])
        else CategoricalColumn(name=name, categories=_words(kept[name]), unseen="error")
        for name in features
    ]
    values = kept[target[0]]
    are_classes = classes or not is_numeric(values)
    whole = TablePreparation(
        columns=found,
        target=target,
        classes=sorted(values.unique().to_list()) if are_classes else None,
        class_indices=classes,
    )
    return frame, is_kept, whole


def _words(values: pl.Series) -> list[str]:
    return sorted(values.cast(pl.String).drop_nulls().unique().to_list())


def _parts(
    frame: pl.LazyFrame, is_kept: np.ndarray, whole: TablePreparation, data: TableData
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield x and y of the rows that are kept, some at a time."""
    # 8 bytes a number, whatever they are converted to in the end.
    size, line = max(1, _ROWS // (8 * len(whole.columns))), 0
    wanted = frame.select([*(each.name for each in whole.columns), *whole.target])
    with read_errors(data.path):
        for batch in wanted.collect_batches(chunk_size=size, maintain_order=True):
            for part in batch.iter_slices(size):
                kept = part.filter(is_kept[line : line + part.height])
                line += part.height
                yield _features(kept, whole), _targets(kept, whole)


def _features(frame: pl.DataFrame, whole: TablePreparation) -> np.ndarray:
    """Return x (n, columns) in float64, or in float32 if that is exact."""
    columns, is_exact = [], True
    for each in whole.columns:
        column = frame[each.name]
        if isinstance(each, CategoricalColumn):
            # The place of each word among the categories.
            column = column.cast(pl.String).cast(pl.Enum(each.categories)).to_physical()
        else:
            is_exact = is_exact and column.dtype in _EXACT
        columns.append(column.cast(pl.Float64).fill_null(np.nan))
    numbers = pl.DataFrame(columns).to_numpy()
    return numbers.astype(np.float32 if is_exact else np.float64, order="C")


def _targets(frame: pl.DataFrame, whole: TablePreparation) -> np.ndarray:
    """Return y: (n,) int64 class indices, or (n, targets) float32."""
    if whole.classes is None:
        return frame.select(pl.col(whole.target).cast(pl.Float32)).to_numpy(order="c")
    index = {value: position for position, value in enumerate(whole.classes)}
    indices = np.array([index[value] for value in frame[whole.target[0]].to_list()], dtype=np.int64)
    return indices if whole.class_indices else indices.astype(np.float32)[:, np.newaxis]


def _listed(names: list[str]) -> str:
    return named([*map(repr, names)], 3) + (" is" if len(names) == 1 else " are")
