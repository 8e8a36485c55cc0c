"""Checks of x and y, and of a map-style Dataset: read once if it is torch's own, of tensors, else at
every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    default_collate,
)

from everystep.errors import DataError, Fault, kind_text
from everystep.experiment.batches import Batches
from everystep.step.generators import different, generator_states
from everystep.step.guards import Guards, is_plain, of_constant
from everystep.step.state import same_bits
from everystep.step.torchs_own import TENSOR_TYPES

__all__ = [
    "DEFAULT_DATASET_LIMIT",
    "DatasetBatches",
    "called",
    "guards_of",
    "is_of_tensors",
    "length_of",
    "read_rows",
    "unfit",
]

_TEXT = "map each text or class to a number"
#: Bytes that a Dataset may take as tensors, by default.
DEFAULT_DATASET_LIMIT = 2_000_000_000
#: Rows that are stacked at once, and reported as read.
_ROWS_AT_ONCE = 256


def is_of_tensors(dataset: Any) -> bool:
    """Return whether a Dataset is torch's own, of tensors.

    Reading such a Dataset has no effect, so once is enough; any other must be read at every step.
    """
    if type(dataset) is TensorDataset:
        return all(type(tensor) in TENSOR_TYPES for tensor in dataset.tensors)
    if type(dataset) is Subset:
        # Indices of a class of the user's may change whenever they are read.
        return is_of_tensors(dataset.dataset) and is_plain(tuple(dataset.indices))
    return type(dataset) is ConcatDataset and all(map(is_of_tensors, dataset.datasets))


def guards_of(dataset: Any) -> Guards:
    """Return guards of what the rows of such a Dataset depend on."""
    return Guards(_depends_on(dataset))


def read_rows(
    dataset: Dataset[Any], limit: float, progress: Callable[[int, int], None]
) -> tuple[Tensor, Tensor]:
    """Read all rows into two tensors x and y.

    progress: called with the number of rows read, and of all rows.

    Raises:
        DataError: there are none, or the rows exceed `limit` bytes, are not pairs, or differ in shape.
    """
    wanted = range(length_of(dataset))
    parts: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(wanted), _ROWS_AT_ONCE):
        chosen = wanted[start : start + _ROWS_AT_ONCE]
        parts.append(_collated([_pair(dataset, row) for row in chosen]))
        # From the first rows, before memory is full.
        if not start:
            size = sum(part.nbytes for part in parts[0]) // len(chosen) * len(wanted)
            if size > limit:
                raise DataError(
                    f"the Dataset would need {size / 1e9:.3g} GB as tensors, but the limit is "
                    f"{limit / 1e9:.3g} GB; if memory allows, pass dataset_limit={size}"
                )
        progress(start + len(chosen), len(wanted))
    try:
        return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
    except RuntimeError as error:
        raise DataError(f"the rows of the Dataset differ in shape: {error}") from None


def length_of(dataset: Dataset[Any]) -> int:
    """Return how many rows a Dataset has.

    Raises:
        DataError: it has no length, or no rows.
    """
    try:
        count = len(dataset)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):  # a class without a length, or with one that refuses
        count = None
    if isinstance(dataset, IterableDataset) or count is None:
        raise DataError(
            f"{type(dataset).__name__} has no length or no indexed rows; pass a map-style Dataset "
            "(__len__ and __getitem__), so that everystep can find the rows of any step again"
        )
    if count == 0:
        raise DataError(f"{type(dataset).__name__} has no rows")
    return count


def _depends_on(dataset: Any) -> Iterator[tuple[str, Any]]:
    """Yield the content of one of torch's Datasets, for guards."""
    kind = type(dataset)
    yield f"a {kind.__name__}", vars(dataset)
    for tensor in getattr(dataset, "tensors", ()):
        yield from of_constant(tensor, f"a tensor of a {kind.__name__}")
    if kind is Subset:
        if isinstance(dataset.indices, list):
            yield "the indices of a Subset", dataset.indices
        yield from _depends_on(dataset.dataset)
    if kind is ConcatDataset:
        yield "the parts of a ConcatDataset", dataset.datasets
        for part in dataset.datasets:
            yield from _depends_on(part)


def _pair(dataset: Dataset[Any], row: int) -> tuple[Any, Any]:
    item = dataset[row]
    place = f"row {row} of {type(dataset).__name__}"
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise DataError(
            f"{place} is {called(item)}, not a pair (x, y); wrap it in a Dataset that returns such pairs"
        )
    faults = [
        Fault(place, f"{letter} must be a tensor, an array or a number, not {wrong}")
        for letter, part in zip("xy", item, strict=True)
        if (wrong := unfit(part, letter)) is not None
    ]
    if faults:
        raise DataError(faults, "the data" if len(faults) > 1 else "")
    return item[0], item[1]


def _collated(pairs: list[tuple[Any, Any]]) -> tuple[Tensor, Tensor]:
    try:
        x, y = default_collate(pairs)  # of tensors, arrays and numbers: `_pair` has looked
    except (RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"the rows of the Dataset cannot be stacked: {error}") from None
    return x, y


class DatasetBatches:
    """Provides the batch of each step, and keeps its rows: rows that stay the same can go into the run.

    Args:
        dataset: the rows.
        batches: which of them each step sees.
        device: of the batches.
        limit: maximum bytes of rows to keep.

    draws: whether reading drew from a global random generator; differs: whether a row changed between
    two reads.
    """

    def __init__(
        self, dataset: Dataset[Any], batches: Batches, device: torch.device, limit: float = 0
    ) -> None:
        self.draws = False
        self.differs = False
        self._dataset = dataset
        self.batches = batches
        self._device = device
        self._limit = limit
        self._step = 0
        self._pair: tuple[Tensor, Tensor] | None = None
        self._kept: tuple[Tensor, Tensor] | None = None
        self._is_kept = torch.zeros(batches.rows, dtype=torch.bool)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Return x and y of a step; the same objects if asked for the same step again."""
        if self._pair is None or step != self._step:
            indices = self.batches.indices(step)
            rows = range(self.batches.rows) if indices is None else indices.tolist()
            before = generator_states(self._device)
            x, y = _collated([_pair(self._dataset, row) for row in rows])
            # Rows that were drawn at random cannot be kept as data, even where they came out alike.
            self.draws |= bool(different(before, generator_states(self._device)))
            self._keep(torch.as_tensor(rows), x, y)
            self._step, self._pair = step, (x.to(self._device), y.to(self._device))
        return self._pair

    def rows(self) -> tuple[Tensor, Tensor] | None:
        """Return x and y of all rows if each was read and stayed the same, and no number was drawn."""
        return None if self.draws or self.differs or not self._is_kept.all() else self._kept

    def _keep(self, rows: Tensor, *batch: Tensor) -> None:
        if self.differs or not self._limit:
            return
        # Memory for all rows, which come in any order.
        if self._kept is None:
            size = sum(part.nbytes for part in batch) // len(rows) * len(self._is_kept)
            if size > self._limit:
                self._limit = 0
                return
            x, y = (part.new_empty((len(self._is_kept), *part.shape[1:])) for part in batch)
            self._kept = x, y
        # In a later epoch, rows come again: those that differ, as augmented images do, are not data.
        known = self._is_kept[rows]
        for kept, part in zip(self._kept, batch, strict=True):
            fits = kept.shape[1:] == part.shape[1:] and kept.dtype == part.dtype
            if not fits or not same_bits(kept[rows[known]], part.detach()[known]):
                self.differs, self._kept = True, None
                return
            kept[rows] = part.detach()
        self._is_kept[rows] = True


def unfit(value: Any, name: str) -> str | None:
    """Return what x or y (`name`) is, of all rows or of one, and a fix; None if it is valid."""
    if isinstance(value, Tensor):
        return _unfit_tensor(value, name)
    if isinstance(value, np.ndarray | np.generic) and not isinstance(value, str | bytes):
        return _unfit_array(value, name)
    if isinstance(value, bool | int | float | complex):
        return None
    return f"{called(value)}; {_cure(value, name)}"


def called(value: Any) -> str:
    """Describe a value: `None`, `a list of 3`, `the class SGD`."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, str):
        return "text"
    text = kind_text(value)
    if isinstance(value, Mapping):
        names = ", ".join(repr(name) for name in list(value)[:4])
        return f"{text} of {names}" + ", ..." * (len(value) > 4)
    if isinstance(value, list | tuple):
        is_of_tensors = len(value) > 1 and all(isinstance(item, Tensor) for item in value)
        return f"{text} of {len(value)}" + " tensors" * is_of_tensors
    return text


def _unfit_tensor(value: Tensor, name: str) -> str | None:
    if value.is_nested:
        cure = f"torch.nested.to_padded_tensor({name}, 0.0)"
        return f"a nested tensor; pad its rows to one length: {cure}"
    if value.layout != torch.strided:
        return f"a sparse tensor; pass {name}.to_dense()"
    if value.is_quantized:
        return f"a quantized tensor; pass {name}.dequantize()"
    if value.requires_grad:
        return f"a tensor that requires a gradient; pass {name}.detach()"
    if value.device.type == "meta":
        return "a tensor on the meta device; it has no values; create it on a real device"
    return None


def _unfit_array(value: np.ndarray[Any, Any] | np.generic, name: str) -> str | None:
    if isinstance(value, np.ma.MaskedArray):
        return f"a masked array; pass {name}.filled(0.0), or leave its masked rows out"
    # Asked of torch, since it takes more dtypes in later versions; ValueError: the other order of bytes.
    try:
        torch.from_numpy(np.empty(0, value.dtype))
    except (TypeError, ValueError):
        if value.dtype.kind in "SU":
            return f"an array of text; {_TEXT}"
        return f"an array of {value.dtype}; torch has no such dtype; pass {name}.astype('float32')"
    return None


def _cure(value: Any, name: str) -> str:
    is_mapping, is_list = isinstance(value, Mapping), isinstance(value, list | tuple)
    parts = [*value.values()] if is_mapping else [*value] if is_list else []
    if isinstance(value, str) or (parts and all(isinstance(part, str) for part in parts)):
        return _TEXT
    if parts and is_list and all(isinstance(part, bool | int | float) for part in parts):
        return f"pass torch.tensor({name})"
    if is_list or is_mapping:
        return (
            f"a step takes one tensor as {name}: join them (torch.cat, torch.stack), and split them "
            "in the model's forward or in the loss"
        )
    if type(value).__module__.partition(".")[0] == "PIL":
        return f"convert it to a tensor: torch.from_numpy(numpy.array({name}))"
    if hasattr(value, "to_numpy"):
        return f"pass {name}.to_numpy()"
    return "a step needs both x and y" if value is None else "convert it to a tensor of numbers"
