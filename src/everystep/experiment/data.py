"""The data set: random, one that comes with everystep, or the user's own arrays and tables.

An experiment may come from a stranger, who may name any file. A file is read only if this user has named
it: by training on it, or in the environment. Which files were trained on is kept in the user's state
directory, as an empty file named by a digest of the path.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from platformdirs import user_state_path
from pydantic import TypeAdapter
from torch import Tensor

from everystep.bounded import MEMORY, open_regular
from everystep.errors import DataError, did_you_mean
from everystep.experiment.file_rows import (
    FileRows,
    MappedArray,
    Prepare,
    Reading,
    mapped_npy,
    mapped_safetensors,
)
from everystep.experiment.preparation import ArrayPreparation, Parts, Preparation, TablePreparation
from everystep.experiment.source_files import SourceFile, source_file
from everystep.experiment.specification import (
    ArrayData,
    BundledData,
    DataSpecification,
    Experiment,
    RandomData,
    TableData,
)

__all__ = [
    "Data",
    "Numbering",
    "Target",
    "check_may_be_read",
    "derived_generator",
    "files_of",
    "make_data",
    "note_named",
    "reopened",
    "split_rows",
]

#: The kind of target that a loss needs: class indices (int64, shape (N,)), or values (floats, (N, ...)).
Target = Literal["classes", "values"]


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
        if self == _AS_THEY_ARE:
            return None
        is_split = self.split_seed is not None
        kept = torch.ones(rows + is_split * held_out + len(self.dropped), dtype=torch.bool)
        kept[list(self.dropped)] = False
        numbers = kept.nonzero().flatten()
        if self.split_seed is None:
            return numbers, torch.arange(held_out)
        training, validation = _split(len(numbers), held_out, self.split_seed)
        return numbers[training], numbers[validation]


#: Each row has the number of its place.
_AS_THEY_ARE = Numbering()


@dataclass(frozen=True)
class Data:
    """A data set: rows along the first dimension.

    x: (N, ...); y: (N, ...) floats, or (N,) int64 class indices; validation: the same for the held-out
    rows, or None; preparation: how they were derived from the source; numbering: of the rows; sources:
    the files that x stays in, if it is not in memory.
    """

    x: Tensor | FileRows
    y: Tensor
    validation: tuple[Tensor | FileRows, Tensor] | None = None
    preparation: Preparation | None = None
    numbering: Numbering = _AS_THEY_ARE
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
        named: dict[str, Tensor | FileRows] = {"x": self.x, "y": self.y}
        if self.validation is not None:
            named["validation_x"], named["validation_y"] = self.validation
        return {
            name: rows.in_memory() if isinstance(rows, FileRows) else rows
            for name, rows in named.items()
        }

    def to(self, device: torch.device) -> Data:
        """Return the data on that device."""
        validation = self.validation and (
            self.validation[0].to(device),
            self.validation[1].to(device),
        )
        return replace(self, x=self.x.to(device), y=self.y.to(device), validation=validation)


#: Bytes of files up to which data is read into memory. The numbers are the same either way.
IN_MEMORY = 1_000_000_000


def make_data(
    experiment: Experiment,
    target: Target,
    progress: Reading = lambda done, total, unit="": None,
) -> Data:
    """Create the data of an experiment, on the CPU; `random` draws from torch's global generator.

    Args:
        experiment: the experiment; its seed decides which rows are held out for validation.
        target: the kind of target that the loss needs.
        progress: called with how much of a large file has been read, and of all.

    Raises:
        DataError: the data is invalid; reports the problem and a fix.
    """
    data = experiment.data
    if _is_large(experiment) and (in_files := _from_files(experiment, target, progress)):
        return in_files
    if isinstance(data, TableData):
        return _from_table(data, target, experiment.seed)
    if isinstance(data, RandomData):
        x = torch.randn(data.N, data.D_in)
        y = torch.randn(data.N, data.D_out)
        return _from_arrays(x.numpy(), y.numpy(), experiment, target)
    if isinstance(data, BundledData):
        file = Path(__file__).parent / "bundled" / f"{data.name}.npz"
        with np.load(file, allow_pickle=False) as arrays:
            return _from_arrays(arrays["x"].astype(np.float64), arrays["y"], experiment, target)
    return _from_arrays(*_load_arrays(data), experiment, target)


def derived_generator(seed: int, *purpose: Any) -> torch.Generator:
    """Return a separate CPU generator for one purpose: a pure function of seed and purpose."""
    text = " ".join(["everystep", str(seed), *map(str, purpose)])
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def split_rows(count: int, validation: float | None, seed: int) -> tuple[Tensor, Tensor]:
    """Return the rows to train on and those to validate on (int64, each in ascending order).

    Raises:
        DataError: one of the two would be empty.
    """
    if validation is None:
        return torch.arange(count), torch.arange(0)
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


def _from_table(data: TableData, target: Target, seed: int) -> Data:
    from everystep.experiment.table import read_table

    table = read_table(data, classes=target == "classes")
    parts = [rows.numpy() for rows in split_rows(table.frame.height, data.validation, seed) if len(rows)]
    preparation = table.fit(parts[0])
    prepared = [preparation.apply(table.rows(rows)) for rows in parts]
    return _data_of(prepared, preparation, seed, table.dropped)


def _from_arrays(x: np.ndarray, y: np.ndarray, experiment: Experiment, target: Target) -> Data:
    split = split_rows(len(x), experiment.data.validation, experiment.seed)
    parts = [rows.numpy() for rows in split if len(rows)]
    preparation = _fitted(lambda: iter([x[parts[0]]]), lambda: iter([y]), experiment, target)
    prepared = [preparation.apply(x[rows], y[rows]) for rows in parts]
    return _data_of(prepared, preparation, experiment.seed)


def _fitted(x: Parts, y: Parts, experiment: Experiment, target: Target) -> ArrayPreparation:
    return ArrayPreparation.fit(
        x,
        y,
        scale=experiment.data.scale,
        classes=target == "classes",
        indices=experiment.model.layers[0].startswith("Embedding"),
    )


def _paths(data: DataSpecification) -> list[Path]:
    """Return the files that the data is in, those of a directory too."""
    files = [Path(each) for each in files_of(data)]
    if not (isinstance(data, TableData) and files[0].is_dir()):
        return files
    from everystep.experiment.table import table_files

    return table_files(files[0])


def _is_large(experiment: Experiment) -> bool:
    """Return whether the data stays in its files.

    Raises:
        DataError: it is larger than memory, but each step would need all of it.
    """
    size = 0
    for file in _paths(experiment.data):
        with suppress(OSError):
            size += file.stat().st_size
    if size > MEMORY and experiment.batch_size is None:
        raise DataError(
            f"the data has {size / 1e9:.1f} GB, more than this machine has memory, and a step "
            "would need all of it; set batch_size"
        )
    return size > IN_MEMORY and experiment.batch_size is not None


class _Mapped(NamedTuple):
    """Data in mapped files: x and y, and how they are prepared.

    fit: returns the preparation, by the places of the training rows, None for all; prepare: returns what
    a preparation makes of rows of x and of y; dropped: as in `Numbering`.
    """

    x: MappedArray
    y: MappedArray
    fit: Callable[[np.ndarray | None], Preparation]
    prepare: Callable[[Any], tuple[Prepare, Prepare]]
    dropped: tuple[int, ...] = ()


def _mapped(
    experiment: Experiment, target: Target, sources: tuple[SourceFile, ...], progress: Reading
) -> _Mapped | None:
    """Map the files of data; return None if they must be read as a whole.

    Raises:
        DataError: they are not data to train on, or must be read as a whole and are larger than memory.
    """
    data = experiment.data
    if isinstance(data, TableData):
        from everystep.experiment.table_cache import cached_table, features_by, fit_table

        table = cached_table(data, sources, progress, classes=target == "classes")
        return _Mapped(
            table.x,
            table.y,
            lambda rows: fit_table(table, np.arange(len(table.x.array)) if rows is None else rows),
            lambda fitted: (features_by(table.known, fitted), lambda rows: rows),
            table.table.dropped,
        )
    assert isinstance(data, ArrayData)
    x = y = None
    if data.path is None:
        paths = Path(data.x), Path(data.y)
        x, y = (_read_file(path, partial(mapped_npy, path)) for path in map(_npy, paths))
    elif data.path.endswith(".safetensors"):
        path = Path(data.path)
        x, y = _two_of(data, _read_file(path, partial(mapped_safetensors, path)))
    if x is None or y is None:
        if sum(each.bytes for each in sources) > MEMORY:
            raise DataError(
                f"{files_of(data)[0]} is larger than memory, and its rows do not lie one after the "
                "other; save x and y as .npy or .safetensors, in C order (numpy.ascontiguousarray)"
            )
        return None
    _check_arrays(data, x.array, y.array)
    y_parts = partial(y.parts, None, lambda done, total, unit="": None)
    return _Mapped(
        x,
        y,
        lambda rows: _fitted(partial(x.parts, rows, progress), y_parts, experiment, target),
        lambda fitted: (fitted.features, fitted.targets),
    )


def _sources(paths: list[Path], progress: Reading) -> tuple[SourceFile, ...]:
    """Return files with their digests."""
    sizes = [_read_file(path, path.stat).st_size for path in paths]
    found: list[SourceFile] = []
    for path, before in zip(paths, accumulate(sizes, initial=0), strict=False):

        def note(done: int, before: int = before) -> None:
            progress((before + done) // 10**6, sum(sizes) // 10**6, "MB")

        found.append(_read_file(path, partial(source_file, path, note)))
    progress(sum(sizes) // 10**6, sum(sizes) // 10**6, "MB")
    return tuple(found)


def _from_files(
    experiment: Experiment,
    target: Target,
    progress: Reading,
    preparation: Preparation | None = None,
    digests: tuple[str, ...] = (),
) -> Data | None:
    """Return data that stays in its files; None if they must be read as a whole.

    preparation: as it was fitted before, if it was; digests: of the files, if they are known.
    """
    paths, validation = _paths(experiment.data), experiment.data.validation
    sources = _sources(paths, progress)
    if digests and len(digests) != len(sources):
        raise DataError(
            f"{files_of(experiment.data)[0]} has {len(sources)} files, but the run was trained on "
            f"{len(digests)}; restore the original"
        )
    for source, digest in zip(sources, digests, strict=bool(digests)):
        if source.digest != digest:
            raise DataError(
                f"{source.path} has changed since the run was trained on it: its digest is "
                f"{source.digest[:12]}..., but the run recorded {digest[:12]}...; restore the original"
            )
    mapped = _mapped(experiment, target, sources, progress)
    if mapped is None:
        return None
    split = split_rows(len(mapped.x.array), validation, experiment.seed)
    places = [None] if validation is None else [rows.numpy() for rows in split]
    preparation = mapped.fit(places[0]) if preparation is None else preparation
    features, targets = mapped.prepare(preparation)
    pairs = [
        (FileRows(mapped.x, rows, features), FileRows(mapped.y, rows, targets).in_memory())
        for rows in places
    ]
    for source in sources:
        source.check()
    numbering = Numbering(None if validation is None else experiment.seed, mapped.dropped)
    return Data(*pairs[0], pairs[1] if len(pairs) > 1 else None, preparation, numbering, sources)


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
    target: Target = "classes" if getattr(known, "class_indices", False) else "values"
    found = _from_files(experiment, target, lambda done, total, unit="": None, known, digests)
    if found is None:
        raise DataError(f"{files_of(experiment.data)[0]} does not have rows one after the other")
    return found


def _data_of(
    prepared: list[tuple[np.ndarray, np.ndarray]],
    preparation: Preparation,
    seed: int,
    dropped: tuple[int, ...] = (),
) -> Data:
    """Return the data; prepared: x and y of the rows to train on, and of those held out, if any."""
    (x, y), *held_out = [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in prepared]
    validation = held_out[0] if held_out else None
    return Data(x, y, validation, preparation, Numbering(seed if held_out else None, dropped))


def _load_arrays(data: ArrayData) -> tuple[np.ndarray, np.ndarray]:
    if data.path is None:
        paths = Path(data.x), Path(data.y)
        x, y = (_read_file(p, partial(np.load, p, allow_pickle=False)) for p in map(_npy, paths))
    else:
        path = Path(data.path)
        x, y = _two_of(data, _read_file(path, _archive_reader(path)))
    _check_arrays(data, x, y)
    return x, y


def _two_of(data: ArrayData, arrays: Mapping[str, Any]) -> tuple[Any, Any]:
    absent = [name for name in (data.x, data.y) if name not in arrays]
    if absent:
        cures = "; ".join(f"{name!r}: {did_you_mean(name, list(arrays))}" for name in absent)
        raise DataError(f"{data.path} has no array {cures}")
    return arrays[data.x], arrays[data.y]


def _check_arrays(data: ArrayData, x: np.ndarray, y: np.ndarray) -> None:
    for name, array in (("x", x), ("y", y)):
        if array.ndim == 0 or array.dtype.kind not in "fiub":
            raise DataError(
                f"data.{name}: expected numbers with rows along the first dimension, not "
                f"{array.dtype} of shape {array.shape}"
            )
    if len(x) != len(y):
        raise DataError(f"x has {len(x)} rows and y has {len(y)}; they must match")
    if len(x) == 0:
        raise DataError(f"{data.path or data.x} has no rows")


def _npy(path: Path) -> Path:
    if path.suffix != ".npy":
        raise DataError(
            f"{path} is not a .npy file; for .npz or .safetensors, set data.path to the file and "
            "data.x and data.y to the array names in it"
        )
    return path


def _archive_reader(path: Path) -> Callable[[], dict[str, np.ndarray]]:
    match path.suffix:
        case ".npz":
            return lambda: dict(np.load(path, allow_pickle=False))
        case ".safetensors":
            from safetensors.numpy import load_file

            return lambda: load_file(path)
    raise DataError(f"{path}: expected a .npz or .safetensors file")


def _read_file(path: Path, read: Callable[[], Any]) -> Any:
    try:
        open_regular(path).close()  # a pipe or a device might never end
        return read()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; data.path is relative to the experiment file") from None
    except Exception as error:  # each format has its own
        raise DataError(f"{path} cannot be read as {path.suffix[1:]}: {error}") from None


#: Files that runs may read besides those that were trained on; separated as in PATH.
_ALLOWED = "EVERYSTEP_DATA"

#: Files that were named in this process; the state directory may not be writable.
_named: set[str] = set()


def files_of(data: DataSpecification) -> tuple[str, ...]:
    """Return the files that the data is in."""
    if isinstance(data, TableData):
        return (data.path,)
    if isinstance(data, ArrayData):
        return (data.x, data.y) if data.path is None else (data.path,)
    return ()


def note_named(files: Iterable[str]) -> None:
    """Note that the user has named files, so that runs of theirs may read them."""
    for file in files:
        _named.add(file)
        with suppress(OSError):
            mark = _mark(file)
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()


def check_may_be_read(data: DataSpecification) -> None:
    """Check that the user has named the files that data is in.

    Raises:
        DataError: they have not; says how.
    """
    given = os.environ.get(_ALLOWED, "").split(os.pathsep)
    allowed = {str(Path(each).absolute()) for each in given if each}
    files = files_of(data)
    for file in files:
        is_noted = False
        with suppress(OSError):
            is_noted = _mark(file).is_file()
        if not (is_noted or file in _named or file in allowed):
            raise DataError(
                f"the data is outside of the run, in {file!r:.200}, and a run may come from a stranger; "
                "everystep reads only files that you have trained on. If you trust the run, allow it: "
                f"{_ALLOWED}={os.pathsep.join(files):.400}; in Python, everystep.open(run, data=(x, y)) "
                "takes the data"
            )


def _mark(file: str) -> Path:
    folder: Path = user_state_path("everystep") / "data"
    return folder / hashlib.sha256(os.fsencode(file)).hexdigest()
