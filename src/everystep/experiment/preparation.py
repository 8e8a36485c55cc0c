"""Preparation of the data before training, fitted on the training rows and stored with the run.

It consists of plain numbers and names, so that a run can store it as JSON and apply it to new rows
without unpickling anything. That is why it does not use scikit-learn's transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from everystep.errors import DataError, Fault

__all__ = [
    "ArrayPreparation",
    "CategoricalColumn",
    "NumericColumn",
    "Parts",
    "Preparation",
    "Scaling",
    "TablePreparation",
]

Class = str | int | float
#: Returns all rows (N, ...) in parts, each time that it is called.
Parts = Callable[[], Iterator[np.ndarray]]


class Fitted(BaseModel):
    """Frozen, with exact fields, so that a JSON round trip gives an equal object."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Scaling(Fitted):
    """Standard scaling: subtract the mean, divide by the population standard deviation (0 as 1)."""

    mean: list[float]
    deviation: list[float]

    @classmethod
    def fit(cls, parts: Parts) -> Scaling:
        """Fit to rows (N, ...), each position on its own, in float64."""
        # One pass sums and notes these, since the rows may lie in a large file.
        counts, lows, highs = [], [], []

        def seen() -> Iterator[np.ndarray]:
            for flat in _flat(parts):
                counts.append(len(flat))
                lows.append(flat.min(axis=0))
                highs.append(flat.max(axis=0))
                yield flat

        total = _sum(seen())
        # Clipped, so that the mean of equal numbers is that number, whatever their sum rounds to.
        mean = np.clip(total / sum(counts), np.min(lows, axis=0), np.max(highs, axis=0))
        # Not std(), which subtracts a rounded mean: for equal values, only rounding would remain.
        squares = _sum(np.square(flat - mean) for flat in _flat(parts))
        deviation = np.sqrt(squares / sum(counts))
        deviation[deviation == 0] = 1
        return cls(mean=mean.tolist(), deviation=deviation.tolist())

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Return `values` (N, ...), also without rows, scaled, in float64."""
        mean, deviation = (
            np.array(each).reshape(values.shape[1:]) for each in (self.mean, self.deviation)
        )
        scaled: np.ndarray = (values.astype(np.float64) - mean) / deviation
        return scaled


class ArrayPreparation(Fitted):
    """How arrays become tensors: scaled or not, and classes counted from 0."""

    kind: Literal["arrays"] = "arrays"
    scaling: Scaling | None
    classes: list[Class] | None
    indices: bool = False

    @classmethod
    def fit(
        cls, x: Parts, training: Parts, y: np.ndarray, *, scale: bool, classes: bool, indices: bool
    ) -> ArrayPreparation:
        """Check all rows x (N, ...) and targets y (N, ...); fit the scaling to training rows (n, ...).

        y: numbers, or names of classes (N); classes: the loss needs class indices; indices: the model
        uses x as indices (an embedding).
        """
        _check_finite("x", x())
        _check_finite("y", iter([y]))
        if indices and not all(map(_are_whole, x())):
            raise DataError("data.x: an embedding needs integer inputs; round them")
        are_shares = y.dtype.kind == "f" and y.ndim > 1  # of each class
        if classes and not are_shares and not _are_whole(y):
            raise DataError("data.y: a classification loss needs integer classes")
        if indices and scale:
            raise DataError("data.scale: an embedding needs integer inputs; remove scale")
        targets = np.unique(y).tolist() if classes and not are_shares else None
        targets = targets and [each if isinstance(each, str) else int(each) for each in targets]
        return cls(scaling=Scaling.fit(training) if scale else None, classes=targets, indices=indices)

    def features(self, x: np.ndarray) -> np.ndarray:
        """Return x in float32 (int64 for an embedding)."""
        scaled = self.scaling.apply(x) if self.scaling else x
        return scaled.astype(np.int64 if self.indices else np.float32)

    def targets(self, y: np.ndarray) -> np.ndarray:
        """Return y as classes (int64) or float32 values."""
        if self.classes is not None:
            # In the type of y: NumPy would make float64 of int64 and uint64, and large ones equal.
            return np.searchsorted(np.array(self.classes).astype(y.dtype), y).astype(np.int64)
        values = y.astype(np.float32)
        return values[:, np.newaxis] if values.ndim == 1 else values


class NumericColumn(Fitted):
    """A column of numbers: the replacement for missing values, and the scaling."""

    kind: Literal["numeric"] = "numeric"
    name: str
    fill: float | None
    scaling: Scaling | None

    @property
    def x_names(self) -> list[str]:
        """The name of its column of x."""
        return [self.name]


class CategoricalColumn(Fitted):
    """A column of words: one column of 0 and 1 for each word in the training rows.

    A missing word is 0 in all of them.
    """

    kind: Literal["categorical"] = "categorical"
    name: str
    categories: list[str]
    unseen: Literal["error", "zeros"]

    @property
    def x_names(self) -> list[str]:
        """The names of its columns of x: `colour=red`, `colour=blue`, ..."""
        return [f"{self.name}={category}" for category in self.categories]


Column = Annotated[NumericColumn | CategoricalColumn, Field(discriminator="kind")]


class TablePreparation(Fitted):
    """How the columns of a table become x (N, features) and y."""

    kind: Literal["table"] = "table"
    columns: list[Column]
    target: list[str]
    classes: list[Class] | None
    class_indices: bool

    @property
    def x_names(self) -> list[str]:
        """The name of each column of x: `age`, `colour=red`, `colour=blue`, ..."""
        return [name for column in self.columns for name in column.x_names]

    def features_from(self, whole: TablePreparation) -> Callable[[np.ndarray], np.ndarray]:
        """Return what makes x (n, len(x_names)), in float32, of rows of a converted table.

        whole: what the table was converted by: a row has a float for each of its columns, NaN if it is
        missing; of a word, the place among all words of the column.

        Raises:
            ValueError: it is another table.
        """
        # For each column of x: the place of its column in the table, the place of its word (NaN for a
        # number), the value for a missing one, the mean and the deviation. e.g. (1, 0.0, nan, 0, 1) is
        # `colour=blue`.
        rules: list[tuple[float, ...]] = []  # for each column of x
        for place, (column, known) in enumerate(zip(self.columns, whole.columns, strict=True)):
            if (column.kind, column.name) != (known.kind, known.name):
                raise ValueError(f"the table has no such column {column.name!r}")
            if isinstance(column, CategoricalColumn) and isinstance(known, CategoricalColumn):
                words = {word: float(number) for number, word in enumerate(known.categories)}
                if not {*column.categories} <= {*words}:
                    raise ValueError(f"column {column.name!r} does not have these words")
                rules += [(place, words[word], np.nan, 0, 1) for word in column.categories]
            elif isinstance(column, NumericColumn):
                scaling = column.scaling or Scaling(mean=[0], deviation=[1])
                (mean,), (deviation,) = scaling.mean, scaling.deviation
                fill = np.nan if column.fill is None else column.fill
                rules.append((place, np.nan, fill, mean, deviation))
        places, words_of, fills, means, deviations = np.array(rules).reshape(-1, 5).T
        places, is_word = places.astype(np.int64), ~np.isnan(words_of)

        def features(rows: np.ndarray) -> np.ndarray:
            values = rows[:, places].astype(np.float64)
            scaled = (np.where(np.isnan(values), fills, values) - means) / deviations
            return np.asarray(np.where(is_word, values == words_of, scaled), np.float32)

        return features


Preparation = ArrayPreparation | TablePreparation


def _flat(parts: Parts) -> Iterator[np.ndarray]:
    """Yield rows as (n, columns), in float64."""
    return (part.reshape(len(part), -1).astype(np.float64) for part in parts())


def _sum(parts: Iterator[np.ndarray]) -> np.ndarray:
    """Return the sum of rows (N, K), given in parts, with the bits of NumPy's sum of all at once."""
    first = next(parts)
    # NumPy adds the rows of several columns one after the other, but a single column by halves (pairwise
    # summation), so that this one is joined.
    if first.shape[1] == 1:
        first = np.concatenate([first, *parts])
    total: np.ndarray = np.add.reduce(first, axis=0)
    for part in parts:
        # So the sum begins with what the parts before have added up to, as one sum of all rows would.
        part[0] += total
        total = np.add.reduce(part, axis=0)
    return total


def _check_finite(name: str, parts: Iterator[np.ndarray]) -> None:
    """Check that all numbers of rows (N, ...), given in parts, are finite in float32."""
    rows, wrong, first = 0, 0, 0
    for part in parts:
        if part.dtype.kind == "f":
            with np.errstate(over="ignore"):
                places = np.unique(np.nonzero(~np.isfinite(part.astype(np.float32)))[0])
            first = rows + int(places[0]) if len(places) and not wrong else first
            wrong += len(places)
        rows += len(part)
    if wrong:
        problem = (
            f"{wrong} of {rows} rows have NaN, infinity, or a number too large for float32 "
            f"(first: row {first}); remove them"
        )
        raise DataError([Fault(f"data.{name}", problem)])


def _are_whole(values: np.ndarray) -> bool:
    return values.dtype.kind != "f" or bool(np.equal(values, np.round(values)).all())
