"""Tables larger than memory: converted once to a mapped array of numbers, in the cache directory.

The array has the numbers of the table, and a column of 0 and 1 for each word, neither filled nor scaled:
that depends on the rows to train on, and is done to each batch. It is fitted to one column at a time,
which must fit in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import polars as pl
from filelock import FileLock

from everystep.errors import DataError
from everystep.experiment.file_rows import MappedArray, Prepare, Reading, mapped_npy
from everystep.experiment.preparation import (
    CategoricalColumn,
    NumericColumn,
    Scaling,
    TablePreparation,
)
from everystep.experiment.source_files import SourceFile, cache_directory
from everystep.experiment.specification import TableData
from everystep.experiment.table import (
    Table,
    check_same_columns,
    check_some_left,
    choose_columns,
    is_missing,
    is_row_of,
    is_text,
    read_errors,
    scanned,
    table_files,
)

__all__ = ["CachedTable", "cached_table", "features_by", "fit_table"]

#: A text in a format from which single columns can be read.
_TEXT = "table.parquet"
#: To be raised where a table is converted in another way.
_FORMAT = 1
#: Bytes of columns that are read together, and of rows that are converted together.
_COLUMNS, _ROWS = 200_000_000, 64_000_000
#: Rows that a run can list as dropped.
_MOST_DROPPED = 1_000_000
#: Numbers of these types are exact in float32.
_EXACT = {pl.Float32, pl.Boolean, pl.Int8, pl.Int16, pl.UInt8, pl.UInt16}


class CachedTable(NamedTuple):
    """A converted table: x (rows, numbers and words) and y, and what they are; and the table itself."""

    x: MappedArray
    y: MappedArray
    known: TablePreparation
    table: Table


def cached_table(
    data: TableData, sources: tuple[SourceFile, ...], progress: Reading, *, classes: bool
) -> CachedTable:
    """Return a table from the cache; convert it if that is not there, or was of other files.

    Raises:
        DataError: the table is invalid, or the disk has not enough room for the cache.
    """
    asked = data.model_dump_json(exclude={"validation", "scale", "unseen"})
    key = hashlib.sha256(f"{_FORMAT} {pl.__version__} {asked} {classes}".encode()).hexdigest()[:12]
    folder = cache_directory() / "tables" / f"{Path(data.path).stem[:50]}-{key}"
    digests = [each.digest for each in sources]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if _about(folder).get("sources") != digests or _about(folder)["files"] != _files(folder):
                shutil.rmtree(folder, ignore_errors=True)
                unfinished = folder.with_name(f".{folder.name}.tmp")
                shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
                unfinished.mkdir()
                try:
                    about = _convert(data, unfinished, progress, classes=classes)
                    for source in sources:
                        source.check()
                    about |= {"sources": digests, "files": _files(unfinished)}
                    (unfinished / "about.json").write_text(json.dumps(about))
                    unfinished.rename(folder)
                finally:
                    shutil.rmtree(unfinished, ignore_errors=True)
            about = _about(folder)
            x, y = mapped_npy(folder / "x.npy"), mapped_npy(folder / "y.npy")
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{folder}: {reason}; EVERYSTEP_CACHE sets another place") from None
    assert x is not None
    assert y is not None
    known = TablePreparation.model_validate(about["known"])
    is_kept = np.ones(about["lines"], dtype=bool)
    is_kept[about["dropped"]] = False
    columns = _ColumnsOnDisk(_frame(data, folder), is_kept)
    features, dropped = [each.name for each in known.columns], tuple(about["dropped"])
    return CachedTable(x, y, known, Table(columns, features, known.target, classes, data, dropped))


def _about(folder: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        found = json.loads((folder / "about.json").read_text())
        return found if isinstance(found, dict) else {}
    return {}


def _files(folder: Path) -> list[list[Any]]:
    """Return what tells whether the files of the cache are as they were written."""
    found = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.suffix != ".json"]
    return [[name, status.st_size, status.st_mtime_ns] for name, status in found]


def _frame(data: TableData, folder: Path) -> pl.LazyFrame:
    if (folder / _TEXT).exists():
        return pl.scan_parquet(folder / _TEXT, glob=False, hive_partitioning=False)
    files = table_files(Path(data.path))
    return pl.concat([scanned(file, data.separator) for file in files], how="vertical_relaxed")


class _ColumnsOnDisk:
    """The columns of a table, some read at a time. is_row: which lines are rows."""

    def __init__(self, frame: pl.LazyFrame, is_row: np.ndarray) -> None:
        self.columns = frame.collect_schema().names()
        self.height = int(is_row.sum())
        self._frame = frame
        self._is_row = is_row
        self._together = max(1, _COLUMNS // (8 * len(is_row) or 1))
        self._read = pl.DataFrame()

    def __getitem__(self, name: str) -> pl.Series:
        if name not in self._read.columns:
            begin = self.columns.index(name)
            wanted = self.columns[begin : begin + self._together]
            self._read = pl.DataFrame()  # not both in memory
            self._read = self._frame.select(wanted).collect(engine="streaming")
        return self._read[name] if self._is_row.all() else self._read[name].filter(self._is_row)


def _convert(data: TableData, folder: Path, progress: Reading, *, classes: bool) -> dict[str, Any]:
    """Write x.npy and y.npy; return what they are."""
    files = table_files(Path(data.path))
    frames = {file: scanned(file, data.separator) for file in files}
    with read_errors(data.path):
        check_same_columns({file: each.collect_schema().names() for file, each in frames.items()})
        if is_text(files[0]):  # each look at a column would read all of it
            _check_room(folder, sum(file.stat().st_size for file in files) // 2)
            _frame(data, folder).sink_parquet(folder / _TEXT, compression="lz4")
        frame = _frame(data, folder)
        lines = frame.select(pl.len()).collect().item()
        is_row = is_row_of(files, frame, lines)
        columns = _ColumnsOnDisk(frame, is_row)
        features, target = choose_columns(columns, np.flatnonzero(is_row), data, classes=classes)
        is_kept = is_row.copy()
        if data.missing == "drop":
            for name in (*features, *target):
                is_kept[is_row] &= ~is_missing(columns[name]).to_numpy()
            check_some_left(data, ~is_kept[is_row])
        dropped = np.flatnonzero(~is_kept).tolist()
        if len(dropped) > _MOST_DROPPED:
            problem = f"{len(dropped):,} rows would be dropped, too many for a run to list"
            raise DataError(f'{problem}; set data.missing = "mean"')
        as_it_is = data.model_copy(update={"scale": None, "missing": "error"})
        table = Table(_ColumnsOnDisk(frame, is_kept), features, target, classes, as_it_is)
        known = table.fit(np.arange(table.frame.height))
        schema = frame.collect_schema()
        numeric = [each.name for each in known.columns if isinstance(each, NumericColumn)]
        dtype = np.float32 if all(schema[name] in _EXACT for name in numeric) else np.float64
        _write(frame.select([*features, *target]), known, is_kept, folder, progress, np.dtype(dtype))
    return {"known": known.model_dump(mode="json"), "lines": lines, "dropped": dropped}


def _write(
    frame: pl.LazyFrame,
    known: TablePreparation,
    is_kept: np.ndarray,
    folder: Path,
    progress: Reading,
    dtype: np.dtype[Any],
) -> None:
    rows, width = int(is_kept.sum()), len(known.x_names)
    shape_of_y = (rows,) if known.class_indices else (rows, len(known.target))
    _check_room(folder, rows * (width * dtype.itemsize + 8 * len(known.target)))
    size, end, line = max(1, _ROWS // (8 * width)), 0, 0
    with (folder / "x.npy").open("wb") as x, (folder / "y.npy").open("wb") as y:
        _begin_npy(x, (rows, width), dtype)
        _begin_npy(y, shape_of_y, np.dtype(np.int64 if known.class_indices else np.float32))
        for batch in frame.collect_batches(chunk_size=size, maintain_order=True):
            for part in batch.iter_slices(size):
                kept = part.filter(is_kept[line : line + part.height])
                line, end = line + part.height, end + kept.height
                known.numbers(kept).astype(dtype).tofile(x)
                known.targets(kept).tofile(y)
                progress(end, rows)
        for file in (x, y):  # what is in the cache is whole after a loss of power, too
            file.flush()
            os.fsync(file.fileno())


def _begin_npy(file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    about = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, about)


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"the table is converted to a cache of {needed / 1e9:.1f} GB in {folder.parent}, which has "
            f"{free / 1e9:.1f} GB free; EVERYSTEP_CACHE sets another place"
        )


def fit_table(cached: CachedTable, training: np.ndarray) -> TablePreparation:
    """Fit the preparation to the training rows of a table (int64 positions).

    Raises:
        DataError: a column has no values there, or other rows have words or classes that these lack.
    """
    fitted, known = cached.table.fit(training), cached.known
    fitted.check_classes([each for each in known.classes or () if each not in (fitted.classes or ())])
    for column, whole in zip(fitted.columns, known.columns, strict=True):
        if isinstance(column, CategoricalColumn) and isinstance(whole, CategoricalColumn):
            column.check_words(sorted({*whole.categories} - {*column.categories}))
    return fitted


def features_by(known: TablePreparation, fitted: TablePreparation) -> Prepare:
    """Return what makes features of rows of a cached table, as a preparation that was fitted does.

    Raises:
        ValueError: it is of another table.
    """
    begins, width = dict[str, int](), 0
    for column in known.columns:
        begins[column.name] = width
        width += 1 if isinstance(column, NumericColumn) else len(column.categories)
    words = {each.name: each.categories for each in known.columns if isinstance(each, CategoricalColumn)}
    kept: list[int] = []
    for each in fitted.columns:
        if (each.name in words) == isinstance(each, NumericColumn) or each.name not in begins:
            raise ValueError(f"the table has no such column {each.name!r}")
        known_words = words.get(each.name, [])
        wanted = each.categories if isinstance(each, CategoricalColumn) else []
        kept += [begins[each.name] + known_words.index(word) for word in wanted]
        kept += [begins[each.name]] * isinstance(each, NumericColumn)
    numeric = [each for each in fitted.columns if isinstance(each, NumericColumn)]
    places = [begins[each.name] for each in numeric]
    fills = [np.nan if each.fill is None else each.fill for each in numeric]
    scalings = [each.scaling for each in numeric if each.scaling]
    scaling = Scaling(
        mean=[each.mean[0] for each in scalings], deviation=[each.deviation[0] for each in scalings]
    )

    def features(part: np.ndarray) -> np.ndarray:
        if not np.isnan(fills).all() or scalings:
            part = part.astype(np.float64)
            values = np.where(np.isnan(part[:, places]), fills, part[:, places])
            part[:, places] = scaling.apply(values) if scalings else values
        return part[:, kept].astype(np.float32)

    return features
