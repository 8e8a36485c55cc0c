"""The data set: random, one that comes with everystep, or the user's own arrays and tables.

Each is an array x and an array y, in memory or in files; a preparation is fitted to rows of them, and
applied where rows are taken: at once, or for each batch if they stay in files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

from everystep.bounded import MEMORY
from everystep.errors import DataError, did_you_mean
from everystep.experiment.preparation import ArrayPreparation, Parts, Preparation, TablePreparation
from everystep.experiment.prepared_rows import (
    Prepare,
    PreparedRows,
    Reading,
    SourceArray,
    mapped_safetensors,
)
from everystep.experiment.source_files import SourceFile, read_file, source_files
from everystep.experiment.specification import (
    ArrayData,
    BundledData,
    DataSpecification,
    Experiment,
    ImagesData,
    RandomData,
    TableData,
)

if TYPE_CHECKING:
    from everystep.experiment.converted_table import ConvertedTable

__all__ = ["Data", "Numbering", "Target", "derived_generator", "make_data", "reopened", "split_rows"]

#: The kind of target that a loss needs: class indices (int64, shape (N,)), or values (floats, (N, ...)).
Target = Literal["classes", "values"]


# Rows have one number from the source of the data to every answer, e.g. of a file with 6 rows, row 2
# dropped for a missing value, two of the others held out:
#   source       0  1  2  3  4  5
#   held out        1        4           split by the seed, in ascending order
#   trained on   0        3     5        `numbers` maps their places 0, 1, 2 in x to these
class Numbering(NamedTuple):
    """How rows are numbered: by their places in the source of the data, from 0.

    split_seed: of the rows held out for validation, None if there are none; dropped: rows of the source,
    in order, that are in no tensor.
    """

    split_seed: int | None = None
    dropped: tuple[int, ...] = ()

    def numbers(self, rows: int, held_out: int) -> tuple[Tensor, Tensor] | None:
        """Return the numbers of the rows to train on and of those held out (int64, ascending).

        None if the numbers of the rows to train on are 0, 1, 2, ...; those held out are from another
        source.
        """
        if self == Numbering():
            return None
        is_split = self.split_seed is not None
        # Held-out rows of another source are not among those of this one.
        kept = torch.ones(rows + is_split * held_out + len(self.dropped), dtype=torch.bool)
        kept[list(self.dropped)] = False
        numbers = kept.nonzero().flatten()
        if self.split_seed is None:
            return numbers, torch.arange(held_out)
        training, validation = _split(len(numbers), held_out, self.split_seed)
        return numbers[training], numbers[validation]


@dataclass(frozen=True)
class Data:
    """A data set: rows along the first dimension.

    x: (N, ...); y: (N, ...) floats, or (N,) int64 class indices; validation: the same for the held-out
    rows, or None; preparation: how they were derived from the source; numbering: of the rows; sources:
    the files that x stays in, if it is not in memory.
    """

    x: Tensor | PreparedRows
    y: Tensor
    validation: tuple[Tensor | PreparedRows, Tensor] | None = None
    preparation: Preparation | None = None
    numbering: Numbering = field(default_factory=Numbering)
    sources: tuple[SourceFile, ...] = ()

    @property
    def numbers(self) -> Tensor | None:
        """The number of each row (N), None if they are 0, 1, 2, ..."""
        found = self.numbering.numbers(
            len(self.x), 0 if self.validation is None else len(self.validation[0])
        )
        return None if found is None else found[0]

    def tensors(self) -> dict[str, Tensor]:
        """Return all rows in memory, by the names that a run has for them."""
        named: dict[str, Tensor | PreparedRows] = {"x": self.x, "y": self.y}
        if self.validation is not None:
            named["validation_x"], named["validation_y"] = self.validation
        return {
            name: rows.in_memory() if isinstance(rows, PreparedRows) else rows
            for name, rows in named.items()
        }

    def to(self, device: torch.device) -> Data:
        """Return the data on that device."""
        validation = self.validation
        if validation is not None:
            validation = validation[0].to(device), validation[1].to(device)
        return replace(self, x=self.x.to(device), y=self.y.to(device), validation=validation)


#: Bytes of files up to which data is read into memory. The numbers are the same either way.
IN_MEMORY = 1_000_000_000


def _unwatched(done: int, total: int, unit: str = "") -> None:
    """Reading that nobody waits for."""


def make_data(
    experiment: Experiment,
    target: Target,
    progress: Reading = _unwatched,
    known: Preparation | None = None,
    digests: tuple[str, ...] = (),
) -> Data:
    """Create the data of an experiment, on the CPU; `random` draws from torch's global generator.

    Args:
        experiment: the experiment; its seed decides which rows are held out for validation.
        target: the kind of target that the loss needs.
        progress: called with how much of a large file has been read, and of all.
        known: the preparation of data that stays in its files, if it was fitted before.
        digests: of these files as they were.

    Raises:
        DataError: the data is invalid; reports the problem and a fix.
        ValueError: the known preparation does not fit.
    """
    sources: tuple[SourceFile, ...] = ()
    is_large = known is not None or _is_large(experiment)
    if is_large or isinstance(experiment.data, ImagesData):
        sources = source_files(_paths(experiment.data), progress)
        _check_digests(experiment.data, sources, digests)
    source = _source(experiment, target, sources, progress if sources else _unwatched)
    if isinstance(experiment.data, ImagesData) and experiment.batch_size is not None:
        # In memory, each byte of the cache would be a float32.
        is_large = is_large or 4 * source.x.array.size > IN_MEMORY
    places: list[np.ndarray | None] = [None]  # all rows, without a list of many numbers
    if experiment.data.validation is not None:
        split = split_rows(len(source.x), experiment.data.validation, experiment.seed)
        places = [rows.numpy() for rows in split]
    preparation = known or source.fit(places[0])
    features, targets = source.prepared_by(preparation)
    stays = is_large and source.x.stays_in_file and source.y.stays_in_file
    pairs: list[tuple[Tensor | PreparedRows, Tensor]] = []
    for rows in places:
        x, y = PreparedRows(source.x, rows, features), PreparedRows(source.y, rows, targets).in_memory()
        pairs.append((x if stays else x.in_memory(), y))
    for each in sources:
        each.check()
    validation = pairs[1] if len(pairs) > 1 else None
    numbering = Numbering(experiment.seed if validation else None, source.dropped)
    return Data(*pairs[0], validation, preparation, numbering, sources if stays else ())


def reopened(experiment: Experiment, preparation: dict[str, Any], digests: tuple[str, ...]) -> Data:
    """Return data of a run that stays in files, prepared as it was.

    preparation: the recorded one; digests: of the files as they were.

    Raises:
        DataError: a file is gone, or was changed.
        ValueError: the preparation does not fit.
    """
    known: Preparation = TypeAdapter(Preparation).validate_python(preparation)
    if isinstance(known, TablePreparation) != isinstance(experiment.data, TableData):
        raise ValueError("the preparation is of other data")
    # A preparation of arrays is not fitted again, and needs none.
    target: Target = "classes" if getattr(known, "class_indices", True) else "values"
    found = make_data(experiment, target, known=known, digests=digests)
    if not found.sources:
        raise DataError(f"{experiment.data.files[0]} does not have rows one after the other")
    return found


def _is_large(experiment: Experiment) -> bool:
    """Return whether the data stays in its files."""
    size = 0
    for file in chain(*_paths(experiment.data).values()):
        # A missing file is reported where it is read, with what to do.
        with suppress(OSError):
            size += file.stat().st_size
    if size > MEMORY and experiment.batch_size is None:
        raise DataError(
            f"the data has {size / 1e9:.1f} GB, more than this machine has memory, and a step "
            "would need all of it; set batch_size"
        )
    return size > IN_MEMORY and experiment.batch_size is not None


def _paths(data: DataSpecification) -> dict[Path, list[Path]]:
    """Return the files that the data is in; the images of a directory count as one file."""
    files = [Path(each) for each in data.files]
    if isinstance(data, ImagesData):
        from everystep.experiment.images import image_files

        return {files[0]: image_files(files[0])}
    # A directory is one table, and each of its files has a digest.
    if isinstance(data, TableData) and files[0].is_dir():
        from everystep.experiment.table import table_files

        files = table_files(files[0])
    return {file: [file] for file in files}


def _check_digests(
    data: DataSpecification, sources: tuple[SourceFile, ...], digests: tuple[str, ...]
) -> None:
    """Check that files are those that a run was trained on, if it is known which they were."""
    if len(digests) not in (0, len(sources)):
        raise DataError(
            f"{', '.join(data.files)} has {len(sources)} files, but the run was trained on "
            f"{len(digests)}; restore the original"
        )
    for source, digest in zip(sources, digests, strict=False):
        if source.digest != digest:
            raise DataError(
                f"{source.path} has changed since the run was trained on it: its digest is "
                f"{source.digest[:12]}..., but the run recorded {digest[:12]}...; restore the original"
            )


def _source(
    experiment: Experiment, target: Target, sources: tuple[SourceFile, ...], progress: Reading
) -> ArraySource | ConvertedTable:
    """Return the data before its preparation. sources: its files, if they are large."""
    data = experiment.data
    if isinstance(data, TableData):
        from everystep.experiment.converted_table import convert_table  # imports polars

        return convert_table(data, sources, progress, classes=target == "classes")
    if isinstance(data, RandomData):  # first x, then y: the chapter's losses depend on this order
        x, y = (SourceArray(torch.randn(data.N, n).numpy()) for n in (data.D_in, data.D_out))
    elif isinstance(data, BundledData):
        file = Path(__file__).parent / "bundled" / f"{data.name}.npz"
        with np.load(file, allow_pickle=False) as arrays:
            x, y = SourceArray(arrays["x"].astype(np.float64)), SourceArray(arrays["y"])
    elif isinstance(data, ImagesData):
        from everystep.experiment.images import convert_images

        if target != "classes":
            raise DataError('images have classes; use a classification loss: name = "CrossEntropyLoss"')
        x, y = convert_images(data, sources, progress)
    else:
        x, y = _open_arrays(data, sources)
    fitted = partial(
        ArrayPreparation.fit,
        scale=data.scale is not None,
        classes=target == "classes",
        indices=experiment.model.layers[0].startswith("Embedding"),
    )
    return ArraySource(x, y, fitted, progress)


@dataclass(frozen=True)
class ArraySource:
    """Arrays x (N, ...) and y (N, ...).

    fitted: returns the preparation, of all rows of x, those to train on, and all of y; progress: called
    with how many rows were looked at, and of all; dropped: no row is.
    """

    x: SourceArray
    y: SourceArray
    fitted: Callable[[Parts, Parts, np.ndarray], ArrayPreparation]
    progress: Reading
    dropped: tuple[int, ...] = ()

    def fit(self, training: np.ndarray | None) -> ArrayPreparation:
        """Fit the preparation to the training rows (int64 places), or to all."""
        whole, part = (partial(self.x.parts, rows, self.progress) for rows in (None, training))
        return self.fitted(whole, part, self.y.array)

    def prepared_by(self, fitted: Any) -> tuple[Prepare, Prepare]:
        """Return what makes features of rows of x, and targets of rows of y."""
        return fitted.features, fitted.targets


def _open_arrays(data: ArrayData, sources: tuple[SourceFile, ...]) -> tuple[SourceArray, SourceArray]:
    """Return x and y, mapped from their files if they can be. sources: the files, if they are large."""
    is_larger = sum(each.bytes for each in sources) > MEMORY
    if not (is_larger and data.files[0].endswith(".npz")):
        x, y = _read(data)
        if not is_larger or (x.stays_in_file and y.stays_in_file):
            return x, y
    raise DataError(
        f"{data.files[0]} is larger than memory, and its rows do not lie one after the other; "
        "save x and y as .npy or .safetensors, in C order (numpy.ascontiguousarray)"
    )


def _read(data: ArrayData) -> tuple[SourceArray, SourceArray]:
    paths = [Path(file) for file in data.files]
    for path in paths:
        if data.path is None and path.suffix != ".npy":
            raise DataError(
                f"{path} is not a .npy file; for .npz or .safetensors, set data.path to the file and "
                "data.x and data.y to the array names in it"
            )
        if data.path is not None and path.suffix not in (".npz", ".safetensors"):
            raise DataError(f"{path}: expected a .npz or .safetensors file")
    found = [read_file(path, partial(_content, path, (data.x, data.y))) for path in paths]
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


def _content(path: Path, wanted: Collection[str]) -> Any:
    """Return the array of a .npy file, or all names in another file, with the arrays that are wanted."""
    match path.suffix:
        case ".npy":
            return np.lib.format.open_memmap(path, mode="r")
        case ".npz":
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] if name in wanted else None for name in file}
        case _:
            return mapped_safetensors(path, wanted)


def derived_generator(seed: int, *purpose: Any) -> torch.Generator:
    """Return a separate CPU generator for one purpose: a pure function of seed and purpose."""
    # Never to be changed: a run stores batches as a rule, and a replay draws their order again.
    text = " ".join(["everystep", str(seed), *map(str, purpose)])
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def split_rows(count: int, validation: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the rows to train on and those to validate on (int64, each in ascending order).

    Raises:
        DataError: one of the two would be empty.
    """
    kept_out = round(count * validation)
    if not 0 < kept_out < count:
        raise DataError(
            f"validation = {validation} splits {count} rows into {count - kept_out} for training and "
            f"{kept_out} for validation; both need at least one row"
        )
    return _split(count, kept_out, seed)


def _split(count: int, kept_out: int, seed: int) -> tuple[Tensor, Tensor]:
    order = torch.randperm(count, generator=derived_generator(seed, "validation"))
    return order[kept_out:].sort().values, order[:kept_out].sort().values
