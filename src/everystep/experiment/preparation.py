"""Preparation of the data before training, fitted on the training rows and stored with the run.

It consists of plain numbers and names, so that a run can store it as JSON and apply it to new rows
without unpickling anything. That is why it does not use scikit-learn's transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from everystep.errors import DataError, Fault

if TYPE_CHECKING:
    import polars

__all__ = [
    "ArrayPreparation",
    "CategoricalColumn",
    "NumericColumn",
    "Preparation",
    "Scaling",
    "TablePreparation",
    "mean_of",
]

Class = str | int | float


def mean_of(values: np.ndarray) -> np.ndarray:
    """Return the mean of each column of `values` (N, ...), N above 0; of equal values, that value."""
    mean: np.ndarray = np.clip(values.mean(axis=0), values.min(axis=0), values.max(axis=0))
    return mean


class Fitted(BaseModel):
    """Frozen, with exact fields, so that a JSON round trip gives an equal object."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Scaling(Fitted):
    """Standard scaling: subtract the mean, divide by the population standard deviation (0 as 1)."""

    mean: list[float]
    deviation: list[float]

    @classmethod
    def fit(cls, values: np.ndarray) -> Scaling:
        """Fit to `values` (N, ...), each position on its own, in float64."""
        flat = values.reshape(len(values), -1).astype(np.float64)
        mean = mean_of(flat)
        # Not std(), which subtracts a rounded mean: for equal values, only rounding would remain.
        deviation = np.sqrt(np.square(flat - mean).mean(axis=0))
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
        cls, x: np.ndarray, y: np.ndarray, *, scale: str | None, classes: bool, indices: bool
    ) -> ArrayPreparation:
        """Fit to training rows x (n, ...) and all targets y (N, ...).

        `classes`: the loss needs class indices; `indices`: the model uses x as indices (an embedding).
        """
        _refuse_non_finite("x", x)
        _refuse_non_finite("y", y)
        if indices and x.dtype.kind == "f" and not np.equal(x, np.round(x)).all():
            raise DataError("data.x: an embedding needs integer inputs; round them")
        counted = None
        if classes and not (y.ndim > 1 and y.dtype.kind == "f"):
            if y.dtype.kind == "f" and not np.equal(y, np.round(y)).all():
                raise DataError("data.y: a classification loss needs integer classes")
            counted = [int(value) for value in np.unique(y)]
        if indices and scale:
            raise DataError("data.scale: an embedding needs integer inputs; remove scale")
        return cls(scaling=Scaling.fit(x) if scale else None, classes=counted, indices=indices)

    def apply(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return x in float32 (int64 for an embedding), y as classes (int64) or float32 values."""
        scaled = self.scaling.apply(x) if self.scaling else x
        features = scaled.astype(np.int64 if self.indices else np.float32)
        if self.classes is not None:
            return features, np.searchsorted(np.array(self.classes), y).astype(np.int64)
        values = y.astype(np.float32)
        return features, values[:, np.newaxis] if values.ndim == 1 else values


class NumericColumn(Fitted):
    """A column of numbers: the replacement for missing values, and the scaling."""

    kind: Literal["numeric"] = "numeric"
    name: str
    fill: float | None
    scaling: Scaling | None

    def apply(self, column: polars.Series) -> np.ndarray:
        """Return (N, 1) float64."""
        import polars as pl

        filled = column.cast(pl.Float64)
        if self.fill is not None:
            filled = filled.fill_nan(None).fill_null(self.fill)
        values = filled.to_numpy()[:, np.newaxis]
        return self.scaling.apply(values) if self.scaling else values


class CategoricalColumn(Fitted):
    """A column of words: one column of 0 and 1 for each word in the training rows.

    A missing word is 0 in all of them.
    """

    kind: Literal["categorical"] = "categorical"
    name: str
    categories: list[str]
    unseen: Literal["error", "zeros"]

    def apply(self, column: polars.Series) -> np.ndarray:
        """Return (N, categories) float64; raises DataError for a category never seen."""
        import polars as pl

        words = column.cast(pl.String)
        new = sorted(set(words.drop_nulls()) - set(self.categories))
        if new and self.unseen == "error":
            raise DataError(
                f"column {self.name!r}: {_listed(new)} not in the training rows; set data.unseen = "
                '"zeros", use another seed, or leave the column out of data.features'
            )
        flags = [(words == category).fill_null(False).to_numpy() for category in self.categories]
        return np.stack(flags, axis=1).astype(np.float64)


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
        return [
            name
            for column in self.columns
            for name in (
                [column.name]
                if isinstance(column, NumericColumn)
                else [f"{column.name}={category}" for category in column.categories]
            )
        ]

    def features(self, frame: polars.DataFrame) -> np.ndarray:
        """Return x (N, len(x_names)) in float32."""
        parts = [column.apply(frame[column.name]) for column in self.columns]
        return np.concatenate(parts, axis=1).astype(np.float32)

    def targets(self, frame: polars.DataFrame) -> np.ndarray:
        """Return y: (N,) int64 class indices, or (N, targets) float32."""
        import polars as pl

        if self.classes is None:
            return frame.select(pl.col(self.target).cast(pl.Float32)).to_numpy(writable=True)
        index = {value: position for position, value in enumerate(self.classes)}
        values = frame[self.target[0]].to_list()
        new = sorted({str(value) for value in values if value not in index})
        if new:
            raise DataError(
                f"target {self.target[0]!r}: class {_listed(new)} not in the training rows; use "
                "another seed or a smaller data.validation, or remove those rows"
            )
        indices = np.array([index[value] for value in values], dtype=np.int64)
        return indices if self.class_indices else indices.astype(np.float32)[:, np.newaxis]

    def apply(self, frame: polars.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        """Return x and y of these rows."""
        return self.features(frame), self.targets(frame)


Preparation = ArrayPreparation | TablePreparation


def _refuse_non_finite(name: str, values: np.ndarray) -> None:
    if values.dtype.kind != "f":
        return
    with np.errstate(over="ignore"):
        is_finite = np.isfinite(values.astype(np.float32))
    if not is_finite.all():
        rows = np.unique(np.nonzero(~is_finite)[0])
        problem = (
            f"{len(rows)} of {len(values)} rows have NaN, infinity, or a number too large for float32 "
            f"(first: row {rows[0]}); remove them"
        )
        raise DataError([Fault(f"data.{name}", problem)])


def _listed(names: list[Any]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return shown + more + (" is" if len(names) == 1 else " are")
