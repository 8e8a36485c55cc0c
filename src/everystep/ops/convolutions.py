"""Rules of convolutions and pooling, and of their derivatives.

A convolution connects place o of its output along a dimension with place `o * stride - padding + k *
dilation` of its input, by place k of its kernel; a transposed one the other way round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product as combinations
from typing import Any, NamedTuple

import numpy as np

from everystep.ops.call import Call, Formula, Made, NoRuleError, Piece, Sum, Words, grid
from everystep.ops.sums import product, single

__all__ = ["CONVOLUTIONS"]


class _Geometry(NamedTuple):
    """How the places of an input and an output are connected, for each dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def inputs(self, output: Sequence[int], sizes: Sequence[int]) -> list[tuple[list[int], list[int]]]:
        """Return, for each dimension, the kernel's places and the input's at a place of the output."""
        found = []
        for d, (o, size) in enumerate(zip(output, sizes, strict=True)):
            begin = o * self.stride[d] - self.padding[d]
            pairs = [(k, begin + k * self.dilation[d]) for k in range(self.kernel[d])]
            found.append(_apart([(k, i) for k, i in pairs if 0 <= i < size]))
        return found

    def outputs(self, input: Sequence[int], sizes: Sequence[int]) -> list[tuple[list[int], list[int]]]:
        """Return, for each dimension, the kernel's places and the output's of a place of the input."""
        found = []
        for d, (i, size) in enumerate(zip(input, sizes, strict=True)):
            pairs = []
            for k in range(self.kernel[d]):
                o, rest = divmod(i + self.padding[d] - k * self.dilation[d], self.stride[d])
                if not rest and 0 <= o < size:
                    pairs.append((k, o))
            found.append(_apart(pairs))
        return found

    def both(
        self, k: Sequence[int], outputs: Sequence[int], inputs: Sequence[int]
    ) -> list[tuple[list[int], list[int]]]:
        """Return, for each dimension, places of output and input that a place of the kernel connects."""
        found = []
        for d, (count, size) in enumerate(zip(outputs, inputs, strict=True)):
            shift = k[d] * self.dilation[d] - self.padding[d]
            pairs = [(o, o * self.stride[d] + shift) for o in range(count)]
            found.append(_apart([(o, i) for o, i in pairs if 0 <= i < size]))
        return found


def _apart(pairs: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    return [a for a, _ in pairs], [b for _, b in pairs]


def _paired(
    first: Sequence[int], pairs: list[tuple[list[int], list[int]]]
) -> tuple[Any, list[Any], list[Any]]:
    """Return all combinations of `first` and of the pairs of each dimension, as indices."""
    leading, *where = grid(first, *(range(len(a)) for a, _ in pairs))
    one = [np.asarray(a, dtype=np.int64)[at] for (a, _), at in zip(pairs, where, strict=True)]
    other = [np.asarray(b, dtype=np.int64)[at] for (_, b), at in zip(pairs, where, strict=True)]
    return leading, one, other


def _spread(value: Any, dims: int) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else list(value)
    return tuple(values * dims if len(values) == 1 else values)


def _geometry(call: Call, kernel: Sequence[int]) -> _Geometry:
    dims = len(kernel)
    settings = (_spread(call.value(key), dims) for key in ("stride", "padding", "dilation"))
    return _Geometry(tuple(kernel), *settings)


def _convolution(call: Call) -> Made:
    weight, shape = call.shape("weight"), call.shape("input")
    if len(weight) != len(shape) or call.value("padding") is None:
        raise NoRuleError("without a batch")
    geometry, groups = _geometry(call, weight[2:]), call.value("groups")
    n, channel, *at = call.index
    if call.value("transposed"):
        own, inner = divmod(channel, weight[1])
        count = weight[0] // groups
        channels = range(own * count, own * count + count)
        leading, k, i = _paired(channels, geometry.outputs(at, shape[2:]))
        numbers = call.piece("weight", leading, inner, *k)
    else:
        own = channel // (weight[0] // groups)
        channels = range(own * weight[1], (own + 1) * weight[1])
        leading, k, i = _paired(channels, geometry.inputs(at, shape[2:]))
        numbers = call.piece("weight", channel, leading - own * weight[1], *k)
    terms = [product(("input", call.piece("input", n, leading, *i)), ("weight", numbers))]
    if "bias" in call:
        terms.insert(0, single("bias", call.piece("bias", channel)))
    return Sum(tuple(terms))


def _convolution_backward(call: Call) -> Made:
    return (_of_input, _of_weight, _of_bias)[call.place](call)


def _of_input(call: Call) -> Made:
    weight, output = call.shape("weight"), call.shape("grad_output")
    geometry, groups = _geometry(call, weight[2:]), call.value("groups")
    n, channel, *at = call.index
    if call.value("transposed"):
        own = channel // (weight[0] // groups)
        channels = range(own * weight[1], (own + 1) * weight[1])
        leading, k, o = _paired(channels, geometry.inputs(at, output[2:]))
        numbers = call.piece("weight", channel, leading - own * weight[1], *k)
    else:
        own, inner = divmod(channel, weight[1])
        count = weight[0] // groups
        leading, k, o = _paired(
            range(own * count, own * count + count), geometry.outputs(at, output[2:])
        )
        numbers = call.piece("weight", leading, inner, *k)
    gradient = call.piece("grad_output", n, leading, *o)
    return Sum((product(("grad_output", gradient), ("weight", numbers)),))


def _of_weight(call: Call) -> Made:
    weight, output, shape = (call.shape(key) for key in ("weight", "grad_output", "input"))
    geometry, groups = _geometry(call, weight[2:]), call.value("groups")
    first, second, *k = call.index
    if call.value("transposed"):
        own = first // (weight[0] // groups)
        leading, i, o = _paired(range(shape[0]), geometry.both(k, shape[2:], output[2:]))
        gradient = call.piece("grad_output", leading, own * weight[1] + second, *o)
        numbers = call.piece("input", leading, first, *i)
    else:
        own = first // (weight[0] // groups)
        leading, o, i = _paired(range(shape[0]), geometry.both(k, output[2:], shape[2:]))
        gradient = call.piece("grad_output", leading, first, *o)
        numbers = call.piece("input", leading, own * weight[1] + second, *i)
    return Sum((product(("grad_output", gradient), ("input", numbers)),))


def _of_bias(call: Call) -> Made:
    n, _, *sizes = call.shape("grad_output")
    leading, *where = grid(range(n), *map(range, sizes))
    return Sum((single("grad_output", call.piece("grad_output", leading, call.index[0], *where)),))


def _pooled(call: Call, key: str = "self") -> tuple[_Geometry, tuple[int, ...], int]:
    """Return the geometry of a pooling, the sizes that it pools, and the dimensions before those."""
    kernel = call.value("kernel_size")
    dims = 3 if "3d" in call.kind else 1 if "1d" in call.kind else 2
    kernel = _spread(kernel, dims)
    stride = call.value("stride") or kernel
    dilation = call.value("dilation") if "dilation" in call else 1
    settings = (_spread(value, dims) for value in (stride, call.value("padding"), dilation))
    shape = call.shape(key)
    return _Geometry(kernel, *settings), shape[-dims:], len(shape) - dims


def _max_pool(call: Call) -> Made:
    geometry, sizes, before = _pooled(call)
    if call.value("ceil_mode") and any(geometry.padding):
        raise NoRuleError("with ceil_mode and padding")
    pairs = geometry.inputs(call.index[before:], sizes)
    window = call.piece("self", *call.index[:before], *grid(*(i for _, i in pairs)))
    return _largest(call, window)


def _largest(call: Call, window: Piece) -> Made:
    if call.place == 1:
        return Words("where the largest of self is", {"self": window})
    return Formula("max(self)", {"self": window})


def _max_pool_backward(call: Call) -> Made:
    geometry, sizes, before = _pooled(call)
    at = call.index[before:]
    outputs = call.shape("grad_output")[before:]
    _, where = zip(*geometry.outputs(at, outputs), strict=True)
    places = grid(*where)
    flat = 0
    for place, size in zip(at, sizes, strict=True):
        flat = flat * size + place
    leading = call.index[:before]
    chosen = call.tensor("indices")[leading].cpu().numpy()[places] == flat
    numbers = call.piece("grad_output", *leading, *(axis[chosen] for axis in places))
    return Sum((single("grad_output", numbers),))


def _average_divisor(call: Call, geometry: _Geometry, at: Sequence[int], sizes: Sequence[int]) -> float:
    """Return what torch divides a window's sum by."""
    if call.value("divisor_override"):
        return float(call.value("divisor_override"))
    count = 1
    for d, (o, size) in enumerate(zip(at, sizes, strict=True)):
        padding = geometry.padding[d]
        begin = o * geometry.stride[d] - padding
        end = min(begin + geometry.kernel[d], size + padding)
        if not call.value("count_include_pad"):
            begin, end = max(begin, 0), min(end, size)
        count *= end - begin
    return float(count)


def _average_pool(call: Call) -> Made:
    geometry, sizes, before = _pooled(call)
    at = call.index[before:]
    pairs = geometry.inputs(at, sizes)
    window = call.piece("self", *call.index[:before], *grid(*(i for _, i in pairs)))
    return Sum((single("self", window),), _average_divisor(call, geometry, at, sizes))


def _average_pool_backward(call: Call) -> Made:
    geometry, sizes, before = _pooled(call)
    outputs = call.shape("grad_output")[before:]
    _, where = zip(*geometry.outputs(call.index[before:], outputs), strict=True)
    return _shares(call, before, where, lambda at: _average_divisor(call, geometry, at, sizes))


def _shares(
    call: Call,
    before: int,
    where: Sequence[Sequence[int]],
    divisor_at: Callable[[tuple[int, ...]], float],
) -> Made:
    """Return the sum of gradients at places of an output, each divided by its number."""
    leading = call.index[:before]
    terms = []
    by_divisor: dict[float, list[tuple[int, ...]]] = {}
    for at in combinations(*where):
        by_divisor.setdefault(divisor_at(at), []).append(at)
    for divisor, places in by_divisor.items():
        axes = np.asarray(places, dtype=np.int64).T
        terms.append((divisor, call.piece("grad_output", *leading, *axes)))
    if len(terms) == 1:
        divisor, piece = terms[0]
        return Sum((single("grad_output", piece),), divisor)
    return Sum(tuple(single("grad_output", piece, 1 / divisor) for divisor, piece in terms))


def _adaptive(size: int, count: int, o: int) -> range:
    """Return the window of place o of `count` windows on `size` places."""
    return range(o * size // count, -(-(o + 1) * size // count))


def _adaptive_window(call: Call) -> Piece:
    """Return the numbers of `self` in the window of the wanted place."""
    shape = call.shape("self")
    counts = call.value("output_size")
    before = len(shape) - len(counts)
    at, sizes = call.index[before:], shape[before:]
    windows = [_adaptive(size, n, o) for size, n, o in zip(sizes, counts, at, strict=True)]
    return call.piece("self", *call.index[:before], *grid(*windows))


def _adaptive_pool(call: Call) -> Made:
    window = _adaptive_window(call)
    return Sum((single("self", window),), float(window.size))


def _adaptive_pool_backward(call: Call) -> Made:
    shape, outputs = call.shape("self"), call.shape("grad_output")
    before = len(shape) - (3 if "3d" in call.kind else 2)
    sizes, counts = shape[before:], outputs[before:]
    where = [
        [o for o in range(count) if place in _adaptive(size, count, o)]
        for place, size, count in zip(call.index[before:], sizes, counts, strict=True)
    ]

    def divisor_at(at: tuple[int, ...]) -> float:
        windows = (_adaptive(s, n, o) for s, n, o in zip(sizes, counts, at, strict=True))
        return float(np.prod([len(window) for window in windows]))

    return _shares(call, before, where, divisor_at)


def _adaptive_max_pool(call: Call) -> Made:
    return _largest(call, _adaptive_window(call))


def _adaptive_max_pool_backward(call: Call) -> Made:
    sizes = call.shape("self")
    before = len(sizes) - (3 if "3d" in call.kind else 2)
    flat = int(np.ravel_multi_index(call.index[before:], sizes[before:]))
    leading = call.index[:before]
    places = np.nonzero(call.tensor("indices")[leading].cpu().numpy() == flat)
    return Sum((single("grad_output", call.piece("grad_output", *leading, *places)),))


def _fractional_max_pool(call: Call) -> Made:
    """Return the rule of windows that begin where random numbers say (Graham, 2014, arXiv:1412.6071)."""
    kernel, counts = call.value("kernel_size"), call.value("output_size")
    dims, shape = len(counts), call.shape("self")
    kernel, before = _spread(kernel, dims), len(shape) - dims
    leading = call.index[:before]
    samples = call.piece("random_samples", *((0,) if before == 1 else ()), *leading, np.arange(dims))
    numbers = call.tensor("random_samples")[(0, *leading) if before == 1 else leading].tolist()
    # In two dimensions the first number is of the width, in three of the depth.
    numbers = numbers[::-1] if dims == 2 else numbers
    axes = zip(call.index[before:], shape[before:], kernel, counts, numbers, strict=True)
    window = call.piece("self", *leading, *grid(*(_fractional(*axis) for axis in axes)))
    given = {"self": window, "random_samples": samples}
    if call.place == 1:
        return Words("where the largest of self is", given)
    return Formula("max(self)", given, note="in a window that random_samples place")


def _fractional(o: int, size: int, kernel: int, count: int, sample: float) -> range:
    """Return the window of place o of `count`; torch computes in single precision."""
    begin = size - kernel
    if o < count - 1:
        step = np.float32(begin) / np.float32(count - 1)
        given = np.float32(sample)
        begin = int((np.float32(o) + given) * step) - int(given * step)
    return range(begin, begin + kernel)


CONVOLUTIONS: dict[str, Callable[[Call], Made]] = {
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "max_pool2d": _max_pool,
    "max_pool2d_with_indices": _max_pool,
    "max_pool3d_with_indices": _max_pool,
    "max_pool2d_with_indices_backward": _max_pool_backward,
    "max_pool3d_with_indices_backward": _max_pool_backward,
    "adaptive_max_pool2d": _adaptive_max_pool,
    "adaptive_max_pool3d": _adaptive_max_pool,
    "adaptive_max_pool2d_backward": _adaptive_max_pool_backward,
    "adaptive_max_pool3d_backward": _adaptive_max_pool_backward,
    "fractional_max_pool2d": _fractional_max_pool,
    "fractional_max_pool3d": _fractional_max_pool,
    "fractional_max_pool2d_backward": _adaptive_max_pool_backward,
    "fractional_max_pool3d_backward": _adaptive_max_pool_backward,
    "avg_pool1d": _average_pool,
    "avg_pool2d": _average_pool,
    "avg_pool3d": _average_pool,
    "avg_pool2d_backward": _average_pool_backward,
    "avg_pool3d_backward": _average_pool_backward,
    "adaptive_avg_pool2d": _adaptive_pool,
    "adaptive_avg_pool3d": _adaptive_pool,
    "adaptive_avg_pool2d_backward": _adaptive_pool_backward,
    "adaptive_avg_pool3d_backward": _adaptive_pool_backward,
}
