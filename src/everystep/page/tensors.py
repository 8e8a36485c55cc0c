"""The tensors of an opened step by their ids, and the numbers of one: a region to draw, a histogram."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from everystep.errors import UsageError
from everystep.replay.step import Step
from everystep.views.mathematics import kind_of

__all__ = [
    "MOST",
    "Region",
    "first_of",
    "histogram",
    "images_of",
    "matrix",
    "region",
    "regions",
    "tensor_of",
    "unset_ids",
]

#: Rows and columns that a region has at most.
MOST = 2048
#: Images are drawn as such up to this many pixels along a side.
_LARGEST_IMAGE = 512
#: Slices that come at once.
MOST_SLICES = 512
#: Operations that give memory as they find it.
_UNWRITTEN = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted"}
#: Operations that write to all of what they are given without a look at it.
_OVERWRITING = {
    "bernoulli",
    "cauchy",
    "copy",
    "exponential",
    "fill",
    "geometric",
    "log_normal",
    "normal",
    "random",
    "uniform",
    "zero",
}
#: From which of their results on operations give the workspace of a library, not all of it written.
_WORKSPACES = {"mkldnn_rnn_layer": 3, "cudnn_rnn": 3, "miopen_rnn": 3, "cudnn_batch_norm": 3}
#: Buckets of a histogram.
BUCKETS = 64
#: Whole numbers up to this are exact in float32.
_EXACT = 2**24


class Region(NamedTuple):
    """Numbers of a tensor, little endian, row after row; `about` says which, and how to read them."""

    about: dict[str, Any]
    numbers: bytes


def tensor_of(step: Step, id: str, facts: dict[str, Any]) -> Tensor:
    """Return a tensor of a step by its id, such as `batch.x` or `operations/3/inputs/x`.

    facts: of the run.

    Raises:
        UsageError: the step has no such tensor.
    """
    kind, _, name = id.partition("/")
    found: Any = None
    if id in ("batch.x", "batch.y"):
        found = step.batch.x if id == "batch.x" else step.batch.y
    elif id == "batch.images":
        found = images_of(step.batch.x, facts)
    elif kind in ("parameters", "dropped", "gradients", "activations"):
        found = first_of(getattr(step, kind).get(name))
    elif kind == "updates":
        parameter, _, which = name.rpartition("/")
        if parameter in step.updates and which in ("before", "after", "change"):
            found = getattr(step.updates[parameter], which)
    elif kind == "operations":
        found = _of_operation(step, name)
    if id in unset_ids(step):
        raise UsageError(f"nothing was written to {id} yet, so it has no numbers")
    if not isinstance(found, Tensor):
        raise UsageError(
            f"step {step.number} has no tensor {id!r:.200}; the step's own list says which there are"
        )
    return found


def unset_ids(step: Step) -> frozenset[str]:
    """Return the ids of tensors that nothing was written to yet: their numbers are of no meaning.

    What lies in such memory may be of anything that was computed before, and is shown to nobody.
    """
    found: set[str] = set()
    unset: dict[str, bool] = {}  # by name, as the operations have been run so far
    for number, seen in enumerate(step.operations):
        kind = kind_of(seen.operation)
        for name in seen.inputs:
            base = name.partition("~")[0]
            # A program has no operation that only asks for memory.
            is_first = base not in unset and "/" not in base and name in seen.results
            if unset.get(base) or (is_first and kind in _OVERWRITING):
                found.add(f"operations/{number}/inputs/{name}")
        for place, name in enumerate(seen.results):
            is_unset = kind in _UNWRITTEN or place >= _WORKSPACES.get(kind, len(seen.results))
            unset[name.partition("~")[0]] = is_unset
            if is_unset:
                found.add(f"operations/{number}/results/{name}")
    return frozenset(found)


def images_of(x: Tensor, facts: dict[str, Any]) -> Tensor | None:
    """Return the images that a batch is, as they were before they were scaled; None: it is none.

    Args:
        x: (N, 1 or 3, H, W).
        facts: of the run.
    """
    shape = x.shape
    if len(shape) != 4 or shape[1] not in (1, 3) or max(shape[2:]) > _LARGEST_IMAGE:
        return None
    if not x.is_floating_point():
        return None
    scaling = (facts.get("preparation") or {}).get("scaling") or {}
    try:
        mean, deviation = (x.new_tensor(scaling[key]).view(shape[1:]) for key in ("mean", "deviation"))
    except (KeyError, TypeError, ValueError, RuntimeError):  # they were not, or not as everystep does it
        return x
    return x * deviation + mean


def first_of(given: Any) -> Tensor | None:
    """Return what a module gave; of several tensors the first."""
    found: Tensor | None = given[0] if isinstance(given, tuple | list) and given else given
    return found


def _of_operation(step: Step, name: str) -> Tensor | None:
    number, _, rest = name.partition("/")
    role, _, own = rest.partition("/")
    known = {str(place): seen for place, seen in enumerate(step.operations)}
    if number not in known or role not in ("inputs", "results"):
        return None
    named: dict[str, Tensor] = getattr(known[number], role)
    return named.get(own)


def matrix(tensor: Tensor, index: int = 0) -> tuple[Tensor, int]:
    """Return one of the 2-d slices that a tensor's leading dimensions make, and how many there are.

    A vector is one row, a number 1 by 1; of complex numbers it has the absolute values.

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
) -> Region:
    """Return the numbers of a region, at most `most` by `most` of them.

    Of a larger one, each number stands for a block: it is the one with the largest absolute value
    there, with its sign; NaN goes before all, so that nothing that is not finite is ever lost.

    Args:
        tensor: whose numbers.
        index: of the 2-d slice.
        rows: first and one after the last; absent: all.
        columns: the same.
        most: numbers along a side.

    Raises:
        UsageError: there is no such slice or region.
    """
    if not 1 <= most <= MOST:
        raise UsageError(f"most is {most}; it must be from 1 to {MOST}")
    whole, slices = matrix(tensor, index)
    (top, bottom), (left, right) = (
        _range(label, asked, size)
        for label, asked, size in (("rows", rows, len(whole)), ("columns", columns, whole.shape[1]))
    )
    block = [max(1, math.ceil(size / most)) for size in (bottom - top, right - left)]
    floats = whole.to(_float_type(whole))
    drawn = _extremes(floats[top:bottom, left:right], *block)
    lowest, highest = _finite_range(floats)
    about = {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "rows": [top, bottom],
        "columns": [left, right],
        "height": drawn.shape[0],
        "width": drawn.shape[1],
        "slices": slices,
        "index": index,
        "block": block,
        "format": str(drawn.dtype).removeprefix("torch."),
        "lowest": lowest,
        "highest": highest,
    }
    form = "<f8" if drawn.dtype == torch.float64 else "<f4"
    return Region(about, drawn.numpy().astype(form, order="C", copy=False).tobytes())


def regions(
    tensor: Tensor,
    index: int = 0,
    count: int = 1,
    rows: tuple[int, int] | None = None,
    columns: tuple[int, int] | None = None,
    most: int = 512,
) -> Region:
    """Return the same region of `count` slices, one after the other; `about` has `count` besides.

    Raises:
        UsageError: there is no such slice or region.
    """
    if not 1 <= count <= MOST_SLICES:
        raise UsageError(f"count is {count}; it must be from 1 to {MOST_SLICES}")
    found = [region(tensor, each, rows, columns, most) for each in range(index, index + count)]
    return Region(found[0].about | {"count": count}, b"".join(each.numbers for each in found))


def histogram(tensor: Tensor) -> dict[str, Any]:
    """Return how many finite numbers lie in each of 64 equal buckets, and how many are not finite.

    Where all are equal, they are in the bucket in the middle.
    """
    numbers = (tensor.abs() if tensor.is_complex() else tensor).detach().cpu().double().flatten()
    finite = numbers[torch.isfinite(numbers)]
    low, high = _finite_range(finite)
    low, high = low or 0.0, high or 0.0
    if low == high:
        half = abs(low) / 2 or 0.5
        low, high = low - half, high + half
    # What torch computes with the edges must be finite, too; a power of two changes no digit.
    scale = 1.0 if math.isfinite(BUCKETS * (high - low)) else 2.0**-10
    low, high = low * scale, high * scale
    counts = torch.histc(finite * scale, BUCKETS, low, high)
    return {
        "edges": (np.linspace(low, high, BUCKETS + 1) / scale).tolist(),
        "counts": counts.long().tolist(),
        "nonfinite": len(numbers) - len(finite),
    }


def _range(label: str, asked: tuple[int, int] | None, size: int) -> tuple[int, int]:
    if asked is None:
        return 0, size
    first, end = asked
    if not 0 <= first < end <= size:
        raise UsageError(
            f"{label} {first}:{end} are not there; ask for first:end, from 0 to at most {size}"
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
    """Return of each block the number with the largest absolute value; NaN where there is one."""
    if (height, width) == (1, 1):
        return numbers
    high, low = (
        _of_blocks(_of_blocks(numbers, height, reduce).T.contiguous(), width, reduce).T
        for reduce in (torch.amax, torch.amin)
    )
    return torch.where(high >= -low, high, low)


def _of_blocks(numbers: Tensor, size: int, reduce: Callable[..., Tensor]) -> Tensor:
    """Return what `reduce` makes of each `size` rows; of what is left over, too."""
    whole = len(numbers) // size * size
    found = [reduce(numbers[:whole].reshape(-1, size, numbers.shape[1]), dim=1)]
    if whole < len(numbers):
        found.append(reduce(numbers[whole:], dim=0, keepdim=True))
    return torch.cat(found)


def _finite_range(numbers: Tensor) -> tuple[float | None, float | None]:
    """Return the smallest and the largest finite number, None where there is none."""
    if not numbers.numel():
        return None, None
    low, high = map(float, torch.aminmax(numbers))
    if not math.isfinite(high - low):
        finite = numbers[torch.isfinite(numbers)]
        if not len(finite):
            return None, None
        low, high = map(float, torch.aminmax(finite))
    return low, high
