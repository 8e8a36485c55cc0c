"""A map-style Dataset read once into tensors, or found to give other rows each time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate

from everystep.errors import DataError
from everystep.step.state import generators_preserved

__all__ = ["DEFAULT_DATASET_LIMIT", "collate_rows", "gives_same_rows", "read_dataset"]

#: Bytes that a Dataset may take as tensors, unless told otherwise.
DEFAULT_DATASET_LIMIT = 2_000_000_000
_SAMPLED_ROWS = 16
_ROWS_AT_ONCE = 256


def gives_same_rows(dataset: Dataset[Any]) -> bool:
    """Tell, from a sample of rows read twice, whether the Dataset gives the same row each time.

    The random generators are left as they were.

    Raises:
        DataError: it has no length, no rows, or rows that are not pairs.
    """
    count = _length(dataset)
    sample = torch.linspace(0, count - 1, min(count, _SAMPLED_ROWS)).long().tolist()
    with generators_preserved(torch.device("cpu")):
        first = [_pair(dataset, row) for row in sample]
        second = [_pair(dataset, row) for row in sample]
    return all(
        _same_bits(a, b)
        for one, two in zip(first, second, strict=True)
        for a, b in zip(one, two, strict=True)
    )


def read_dataset(
    dataset: Dataset[Any], limit: int, progress: Callable[[int, int], None]
) -> tuple[Tensor, Tensor]:
    """Read all rows into two tensors x and y; `progress` is told how many of how many are read.

    Raises:
        DataError: the rows would take more than `limit` bytes, or have not all the same shape.
    """
    count = _length(dataset)
    x_row, y_row = _collated([_pair(dataset, 0)])
    size = (x_row.nbytes + y_row.nbytes) * count
    if size > limit:
        raise DataError(
            f"the Dataset would take {size / 1e9:.3g} GB as tensors, more than the limit of "
            f"{limit / 1e9:.3g} GB; pass dataset_limit={size} if there is memory for it"
        )
    parts = []
    for start in range(0, count, _ROWS_AT_ONCE):
        rows = range(start, min(start + _ROWS_AT_ONCE, count))
        parts.append(_collated([_pair(dataset, row) for row in rows]))
        progress(rows.stop, count)
    try:
        return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
    except RuntimeError as error:
        raise DataError(f"the rows of the Dataset differ in shape: {error}") from None


def collate_rows(dataset: Dataset[Any], rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Read these rows now, as one batch (x, y)."""
    return _collated([_pair(dataset, row) for row in rows])


def _length(dataset: Dataset[Any]) -> int:
    try:
        count = len(dataset)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        count = None
    if isinstance(dataset, IterableDataset) or count is None:
        raise DataError(
            f"{type(dataset).__name__} has no length and no rows by number; a map-style Dataset "
            "(__len__ and __getitem__) is needed, so that the rows of any step can be found again"
        )
    if count == 0:
        raise DataError(f"{type(dataset).__name__} has no rows")
    return count


def _pair(dataset: Dataset[Any], row: int) -> tuple[Any, Any]:
    item = dataset[row]
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise DataError(
            f"row {row} of {type(dataset).__name__} is a {type(item).__name__}; each row must be a "
            "pair (x, y)"
        )
    return item[0], item[1]


def _collated(pairs: list[tuple[Any, Any]]) -> tuple[Tensor, Tensor]:
    try:
        x, y = default_collate(pairs)
    except (RuntimeError, TypeError) as error:
        raise DataError(f"the rows of the Dataset make no batch: {error}") from None
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        raise DataError(
            "x and y of each row must be tensors, arrays or numbers, not "
            f"{type(pairs[0][0]).__name__} and {type(pairs[0][1]).__name__}"
        )
    return x, y


def _same_bits(one: Any, two: Any) -> bool:
    a, b = torch.as_tensor(one), torch.as_tensor(two)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
