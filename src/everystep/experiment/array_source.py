"""Arrays as a source of data: they are in memory, or mapped from their files."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from everystep.bounded import MEMORY
from everystep.errors import DataError, did_you_mean
from everystep.experiment.file_rows import Prepare, Reading, SourceArray, mapped_safetensors
from everystep.experiment.preparation import ArrayPreparation, Preparation
from everystep.experiment.source_files import SourceFile, read_file
from everystep.experiment.specification import ArrayData

__all__ = ["ArraySource", "open_arrays"]


@dataclass(frozen=True)
class ArraySource:
    """Arrays x (N, ...) and y (N, ...), and how they are prepared.

    scale: as in the `[data]` section; classes, indices: as in `ArrayPreparation.fit`; progress: called
    with how many rows were looked at, and of all; dropped: no row is.
    """

    x: SourceArray
    y: SourceArray
    scale: str | None
    classes: bool
    indices: bool
    progress: Reading
    dropped: tuple[int, ...] = ()

    def fit(self, training: np.ndarray | None) -> ArrayPreparation:
        """Fit the preparation to the training rows (int64 places), or to all."""
        return ArrayPreparation.fit(
            partial(self.x.parts, training, self.progress),
            partial(self.y.parts, None, lambda done, total: None),
            scale=self.scale,
            classes=self.classes,
            indices=self.indices,
        )

    def prepared_by(self, fitted: Preparation) -> tuple[Prepare, Prepare]:
        """Return what makes features of rows of x, and targets of rows of y.

        Raises:
            ValueError: the preparation is of other data.
        """
        if not isinstance(fitted, ArrayPreparation):
            raise ValueError("the preparation is of a table")
        return fitted.features, fitted.targets


def open_arrays(data: ArrayData, sources: tuple[SourceFile, ...]) -> tuple[SourceArray, SourceArray]:
    """Return x and y of the files that have them.

    sources: the files of data that does not come into memory, if that can be; none for others.

    Raises:
        DataError: they are not data to train on, or must be read as a whole and are larger than memory.
    """
    if sources and not (data.path or "").endswith(".npz"):
        x, y = _read(data, is_mapped=True)
        if x.stays_in_file and y.stays_in_file:
            return x, y
    if sum(each.bytes for each in sources) > MEMORY:
        raise DataError(
            f"{data.files[0]} is larger than memory, and its rows do not lie one after the "
            "other; save x and y as .npy or .safetensors, in C order (numpy.ascontiguousarray)"
        )
    return _read(data, is_mapped=False)


def _read(data: ArrayData, *, is_mapped: bool) -> tuple[SourceArray, SourceArray]:
    paths = [Path(file) for file in data.files]
    for path in paths:
        if data.path is None and path.suffix != ".npy":
            raise DataError(
                f"{path} is not a .npy file; for .npz or .safetensors, set data.path to the file and "
                "data.x and data.y to the array names in it"
            )
        if data.path is not None and path.suffix not in (".npz", ".safetensors"):
            raise DataError(f"{path}: expected a .npz or .safetensors file")
    found = [read_file(path, partial(_content, path, is_mapped=is_mapped)) for path in paths]
    arrays = found[0] if data.path is not None else dict(zip((data.x, data.y), found, strict=True))
    absent = [name for name in (data.x, data.y) if name not in arrays]
    if absent:
        cures = "; ".join(f"{name!r}: {did_you_mean(name, list(arrays))}" for name in absent)
        raise DataError(f"{data.path} has no array {cures}")
    x, y = arrays[data.x], arrays[data.y]
    for name, array in (("x", x), ("y", y)):
        if array.ndim == 0 or array.dtype.kind not in "fiub":
            raise DataError(
                f"data.{name}: expected numbers with rows along the first dimension, not "
                f"{array.dtype} of shape {array.shape}"
            )
    if len(x) != len(y):
        raise DataError(f"x has {len(x)} rows and y has {len(y)}; they must match")
    if len(x) == 0:
        raise DataError(f"{data.files[0]} has no rows")
    return SourceArray(x), SourceArray(y)


def _content(path: Path, *, is_mapped: bool) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.numpy import load_file

        return mapped_safetensors(path) if is_mapped else load_file(path)
    found = np.load(path, mmap_mode="r" if is_mapped else None, allow_pickle=False)
    return dict(found) if path.suffix == ".npz" else found
