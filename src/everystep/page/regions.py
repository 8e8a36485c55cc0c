"""The numbers of a tensor: a region to draw as a heat map, and a histogram."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from everystep.errors import UsageError
from everystep.views.formatting import dtype_text

__all__ = ["MOST", "Region", "histogram", "matrix", "npy", "region"]

#: Rows and columns that a region has at most.
MOST = 2048
#: Slices sent in one answer.
MOST_SLICES = 512
#: Buckets of a histogram.
BUCKETS = 64
#: Whole numbers up to this are exact in float32.
_EXACT = 2**24


class Region(NamedTuple):
    """Numbers of a tensor, little endian, row after row; `about` describes them."""

    about: dict[str, Any]
    numbers: bytes


def npy(tensor: Tensor) -> bytes:
    """Return a tensor as a file of NumPy's; types that NumPy does not have (bfloat16), as float32."""
    # NumPy has no lazy conjugates and signs: .numpy() refuses them.
    numbers = tensor.detach().cpu().resolve_conj().resolve_neg()
    fits = not numbers.is_floating_point() or numbers.dtype in (torch.half, torch.float, torch.double)
    content = io.BytesIO()
    np.save(content, (numbers if fits else numbers.float()).numpy())
    return content.getvalue()


def matrix(tensor: Tensor, index: int = 0) -> tuple[Tensor, int]:
    """Return one of the 2-d slices that a tensor's leading dimensions make, and how many there are.

    A vector is one row, a number 1 by 1; complex numbers become absolute values.

    Raises:
        UsageError: there is no such slice.
    """
    numbers = (tensor.abs() if tensor.is_complex() else tensor).detach().cpu()
    if not numbers.numel():
        return numbers.new_empty(0, 0), 0
    leading = numbers.shape[:-2]
    slices = math.prod(leading)
    if not 0 <= index < slices:
        raise UsageError(f"there is no slice {index} of {slices}; they are numbered from 0")
    if numbers.dim() < 2:
        return numbers.reshape(1, -1), 1
    return numbers[tuple(map(int, np.unravel_index(index, leading)))], slices


def region(
    tensor: Tensor,
    index: int = 0,
    rows: tuple[int, int] | None = None,
    columns: tuple[int, int] | None = None,
    most: int = 512,
    count: int = 1,
) -> Region:
    """Return the numbers of a region of one or more slices, at most `most` by `most` of each.

    In a larger region, each number represents a block: the one with the largest absolute value, with its
    sign; NaN has precedence, so that no non-finite number is lost.

    index: of the first 2-d slice; rows, columns: the first, and one past the last; absent: all; most:
    numbers along a side; count: of slices, which come one after the other; `about` describes the first.

    Raises:
        UsageError: there is no such slice or region.
    """
    if not 1 <= most <= MOST:
        raise UsageError(f"most is {most}; it must be from 1 to {MOST}")
    if not 1 <= count <= MOST_SLICES:
        raise UsageError(f"count is {count}; it must be from 1 to {MOST_SLICES}")
    first, *others = (_slice(tensor, each, rows, columns, most) for each in range(index, index + count))
    return Region(first.about | {"count": count}, b"".join(each.numbers for each in (first, *others)))


def _slice(
    tensor: Tensor, index: int, rows: tuple[int, int] | None, columns: tuple[int, int] | None, most: int
) -> Region:
    whole, slices = matrix(tensor, index)
    (top, bottom), (left, right) = (
        _range(label, asked, size)
        for label, asked, size in (("rows", rows, len(whole)), ("columns", columns, whole.shape[1]))
    )
    block = [max(1, math.ceil(size / most)) for size in (bottom - top, right - left)]
    floats = whole.to(_float_type(whole))
    drawn = _extremes(floats[top:bottom, left:right], *block)
    # Of the whole slice, not of the region: colours stay the same while one moves through it.
    lowest, highest = _finite_range(floats)
    about = {
        "shape": list(tensor.shape),
        "dtype": dtype_text(tensor),
        "rows": [top, bottom],
        "columns": [left, right],
        "height": drawn.shape[0],
        "width": drawn.shape[1],
        "slices": slices,
        "index": index,
        "block": block,
        "format": dtype_text(drawn),
        "lowest": lowest,
        "highest": highest,
    }
    # Little endian: JavaScript's typed arrays have the order of the machine, which nearly always is
    # that.
    form = "<f8" if drawn.dtype == torch.float64 else "<f4"
    return Region(about, drawn.numpy().astype(form, order="C", copy=False).tobytes())


def histogram(tensor: Tensor) -> dict[str, Any]:
    """Return how many finite numbers are in each of 64 equal buckets, and how many are not finite.

    If all are equal, they are in the middle bucket.
    """
    numbers = (tensor.abs() if tensor.is_complex() else tensor).detach().cpu().double().flatten()
    finite = numbers[torch.isfinite(numbers)]
    low, high = _finite_range(finite)
    low, high = low or 0.0, high or 0.0
    # What torch computes with the edges must be finite, too; a power of two changes no digit.
    scale = 1.0 if math.isfinite(4 * BUCKETS * max(abs(low), abs(high))) else 2.0**-10
    low, high = low * scale, high * scale
    # histc needs a range.
    if low == high:
        half = abs(low) / 2 or 0.5
        low, high = low - half, high + half
    counts = torch.histc(finite * scale, BUCKETS, low, high)
    largest = np.finfo(np.float64).max * scale
    return {
        "edges": (np.linspace(low, high, BUCKETS + 1).clip(-largest, largest) / scale).tolist(),
        "counts": counts.long().tolist(),
        "nonfinite": len(numbers) - len(finite),
    }


def _range(label: str, asked: tuple[int, int] | None, size: int) -> tuple[int, int]:
    if asked is None:
        return 0, size
    first, end = asked
    if not 0 <= first < end <= size:
        raise UsageError(
            f"{label} {first}:{end} are out of range; ask for first:end, from 0 to at most {size}"
        )
    return first, end


def _float_type(numbers: Tensor) -> torch.dtype:
    """Return what holds these numbers: float32, and float64 where float32 is too coarse."""
    if numbers.is_floating_point():
        return torch.float64 if numbers.dtype == torch.float64 else torch.float32
    if numbers.dtype in (torch.bool, torch.uint8, torch.int8, torch.int16):
        return torch.float32
    is_exact = not numbers.numel() or float(numbers.double().abs().max()) <= _EXACT
    return torch.float32 if is_exact else torch.float64


def _extremes(numbers: Tensor, height: int, width: int) -> Tensor:
    """Return the number with the largest absolute value of each block; NaN if there is one."""
    if (height, width) == (1, 1):
        return numbers
    high, low = (
        # Rows first, then columns as rows of the transpose; amax and amin of a block with NaN are NaN.
        _of_blocks(_of_blocks(numbers, height, reduce).T.contiguous(), width, reduce).T
        for reduce in (torch.amax, torch.amin)
    )
    # With NaN, the comparison is false, and `low` is NaN.
    return torch.where(high >= -low, high, low)


def _of_blocks(numbers: Tensor, size: int, reduce: Callable[..., Tensor]) -> Tensor:
    """Return the result of `reduce` for each `size` rows, and for the rest."""
    whole = len(numbers) // size * size
    found = [reduce(numbers[:whole].reshape(-1, size, numbers.shape[1]), dim=1)]
    if whole < len(numbers):
        found.append(reduce(numbers[whole:], dim=0, keepdim=True))
    return torch.cat(found)


def _finite_range(numbers: Tensor) -> tuple[float | None, float | None]:
    """Return the smallest and the largest finite number, None if there is none."""
    if not numbers.numel():
        return None, None
    low, high = map(float, torch.aminmax(numbers))
    # NaN or infinite, or finite with a difference that is not: only then a second look is needed.
    if not math.isfinite(high - low):
        finite = numbers[torch.isfinite(numbers)]
        if not len(finite):
            return None, None
        low, high = map(float, torch.aminmax(finite))
    return low, high
