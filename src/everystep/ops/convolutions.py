"""Convolutions, pooling, padding and resizing.

A convolution connects place o of one side along a dimension with place `o * stride - padding + k *
dilation` of the other, by place k of its kernel. Its input is that other side; of a transposed one, it
is the first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from everystep.ops.call import (
    Call,
    Formula,
    Made,
    NoRuleError,
    Piece,
    Sum,
    Terms,
    Words,
    grid,
    product,
    single,
)
from everystep.ops.operator_record import LATER, OperatorRecord, alike
from everystep.ops.row_rules import batched

__all__ = ["CONVOLUTIONS"]

_TIMES = "\N{MULTIPLICATION SIGN}"


class _Geometry(NamedTuple):
    """How the places of both sides are connected, for each dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def connected(
        self, o: Sequence[range], k: Sequence[range], i: Sequence[range], more: Sequence[int] = (0,)
    ) -> tuple[NDArray[np.int64], ...]:
        """Return all combinations of `more` and of connected places that are among those given.

        `more`, then the places o, k and i of each dimension.
        """
        pairs = []
        for d, sides in enumerate(zip(o, k, i, strict=True)):
            # e.g. stride 2, no padding, a kernel of 3: o = 1 is connected with i = 2, 3, 4 by k = 0, 1,
            # 2.
            first, kernel = grid(sides[0], sides[1])
            other = first * self.stride[d] - self.padding[d] + kernel * self.dilation[d]
            # Places of the padding are left out: they hold zeros, or -inf in max pooling.
            is_in = (other >= sides[2].start) & (other < sides[2].stop)
            pairs.append(np.stack([first, kernel, other])[:, is_in])
        # Dimensions are independent: every pair of one goes with every pair of the others.
        leading, *where = grid(more, *(range(pair.shape[1]) for pair in pairs))
        chosen = [pair[:, at] for pair, at in zip(pairs, where, strict=True)]
        return leading, *(pair[side] for side in range(3) for pair in chosen)


def _repeated(value: Any, dims: int) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else list(value)
    return tuple(values * dims if len(values) == 1 else values)


def _ones(places: Sequence[int]) -> list[range]:
    return [range(place, place + 1) for place in places]


def _convolution(call: Call) -> Made:
    """Return the rule of a convolution, or of its derivative by one of its arguments.

    The side of the places i has as many channels for each group as the weight's second dimension, the
    side of the places o those of its first dimension.
    """
    is_backward = call.kind == "convolution_backward"
    # The bias of a channel was added at each of its places.
    if is_backward and call.place == 2:
        n, _, *others = call.shape("grad_output")
        leading, *where = grid(range(n), *map(range, others))
        return Sum((single("grad_output", call.piece("grad_output", leading, call.index[0], *where)),))
    weight, shape = call.shape("weight"), call.shape("input")
    if len(weight) != len(shape) or call.value("padding") is None:
        raise NoRuleError("without a batch")
    dims = len(shape) - 2
    settings = (_repeated(call.value(key), dims) for key in ("stride", "padding", "dilation"))
    geometry, groups = _Geometry(*settings), call.value("groups")
    count, inner = weight[0] // groups, weight[1]
    names = ("input", "grad_output") if is_backward else ("input", "")
    # A transposed convolution is the derivative of one by its input, so that the sides change places.
    i_side, o_side = names[::-1] if call.value("transposed") else names
    first, second, *at = call.index
    kernels = [range(size) for size in weight[2:]]

    def terms_of(places: Sequence[Any], n: Any, a: Any, b: Any, own: str) -> Terms:
        """Return the products of the numbers at connected places that are not of the wanted tensor."""
        o, k, i = places[:dims], places[dims : 2 * dims], places[2 * dims :]
        group = a // count
        sides = {o_side: (n, a, *o), i_side: (n, group * inner + b, *i), "weight": (a, b, *k)}
        order = ("grad_output", "input", "weight")
        one, other = (
            (key, call.piece(key, *sides[key])) for key in order if key in sides and key != own
        )
        return product(one, other)

    if is_backward and call.place == 1:
        o, i = ([range(size) for size in call.shape(key)[2:]] for key in (o_side, i_side))
        rows, *places = geometry.connected(o, _ones(at), i, range(shape[0]))
        return Sum((terms_of(places, rows, first, second, "weight"),))
    own = "input" if is_backward else ""
    other = call.shape("grad_output" if is_backward else "input")[2:]
    sizes = [range(size) for size in other]
    if own == o_side:
        b, *places = geometry.connected(_ones(at), kernels, sizes, range(inner))
        terms = [terms_of(places, first, second, b, own)]
    else:
        group = second // inner
        channels = range(group * count, group * count + count)
        a, *places = geometry.connected(sizes, kernels, _ones(at), channels)
        terms = [terms_of(places, first, a, second % inner, own)]
    if not is_backward and "bias" in call:
        terms.insert(0, single("bias", call.piece("bias", second)))
    return Sum(tuple(terms))


def _dims(call: Call) -> int:
    found = re.search(r"([123])d", call.kind)
    assert found is not None
    return int(found[1])


def _max_pool(call: Call) -> Made:
    dims = _dims(call)
    kernel = _repeated(call.value("kernel_size"), dims)
    keys = ("padding", "dilation")
    padding, dilation = (_repeated(call.value(key), dims) for key in keys)
    geometry = _Geometry(_repeated(call.value("stride") or kernel, dims), padding, dilation)
    sizes = [range(size) for size in call.shape("self")[-dims:]]
    found = geometry.connected(_ones(call.index[-dims:]), [range(size) for size in kernel], sizes)
    return _largest(call, {"self": call.piece("self", *call.index[:-dims], *found[-dims:])})


def _largest(call: Call, given: dict[str, Piece], note: str = "") -> Made:
    if call.place == 1:
        return Words("where the largest of self is", given)
    return Formula("max(self)", given, note=note)


def _adaptive_max_pool(call: Call) -> Made:
    windows = [
        # From the quotient rounded down to the next one rounded up: windows may overlap.
        range(o * size // count, -(-(o + 1) * size // count))
        for size, count, o in zip(
            call.shape("self")[-_dims(call) :],
            call.value("output_size"),
            call.index[-_dims(call) :],
            strict=True,
        )
    ]
    return _largest(call, {"self": call.piece("self", *call.index[: -_dims(call)], *grid(*windows))})


def _max_pool_backward(call: Call) -> Made:
    """Return the sum of the gradients at all places where the wanted number was the largest."""
    sizes, dims = call.shape("self"), _dims(call)
    # `indices` are places in a plane, counted row after row.
    flat = int(np.ravel_multi_index(call.index[-dims:], sizes[-dims:]))
    leading = call.index[:-dims]
    places = np.nonzero(call.tensor("indices")[leading].cpu().numpy() == flat)
    return Sum((single("grad_output", call.piece("grad_output", *leading, *places)),))


def _fractional_max_pool(call: Call) -> Made:
    """Return the rule of windows that random numbers place (Graham, 2014, arXiv:1412.6071)."""
    kernel, counts = call.value("kernel_size"), call.value("output_size")
    dims, shape = len(counts), call.shape("self")
    kernel, before = _repeated(kernel, dims), len(shape) - dims
    leading = call.index[:before]
    samples = call.piece("random_samples", *((0,) if before == 1 else ()), *leading, np.arange(dims))
    numbers = call.tensor("random_samples")[(0, *leading) if before == 1 else leading].tolist()
    # In two dimensions the first number is of the width, in three of the depth.
    numbers = numbers[::-1] if dims == 2 else numbers
    axes = zip(call.index[before:], shape[before:], kernel, counts, numbers, strict=True)
    window = call.piece("self", *leading, *grid(*(_fractional(*axis) for axis in axes)))
    given = {"self": window, "random_samples": samples}
    return _largest(call, given, "in a window that random_samples place")


def _fractional(o: int, size: int, kernel: int, count: int, sample: float) -> range:
    """Return the window of place o of `count`; torch computes in single precision."""
    begin = size - kernel
    if o < count - 1:
        step = np.float32(begin) / np.float32(count - 1)
        given = np.float32(sample)
        begin = int((np.float32(o) + given) * step) - int(given * step)
    return range(begin, begin + kernel)


def _plane(call: Call, *, has_means: bool) -> Made:
    """Return the rule of an operator that is linear in each channel of each image.

    Its factors are its derivative, which torch computes. has_means: whether it divides by counts of
    numbers.
    """
    dims, key = _dims(call), "grad_output" if call.kind.endswith("_backward") else "self"
    leading, at = call.index[:-dims], call.index[-dims:]
    others: dict[str, Any] = {}
    if key != "self" and "self" in call:  # only its shape counts
        others["self"] = torch.zeros(1, 1, *call.shape("self")[-dims:], dtype=torch.float64)
    if "input_size" in call:
        others["input_size"] = [1, 1, *call.value("input_size")[2:]]
    with torch.inference_mode(False), torch.enable_grad():  # a replay runs without gradients
        # One channel of one image: all others have the same factors.
        plane = torch.zeros(1, 1, *call.shape(key)[-dims:], dtype=torch.float64, requires_grad=True)
        found = call.again(**{key: plane}, **others)[0]
        weights = torch.autograd.grad(found[(0, 0, *at)], plane)[0][0, 0].numpy()

    def where(chosen: NDArray[np.bool_]) -> Piece:
        return call.piece(key, *leading, *np.nonzero(chosen))

    factors = weights[weights != 0]
    if not has_means and (factors != 1).any():
        return Sum((Terms(f"{key} * weight", {key: where(weights != 0)}, {"weight": factors}),))
    # Windows at the edges may have fewer numbers.
    counts = dict.fromkeys(np.round(1 / factors).tolist() or [1.0])
    if len(counts) == 1:
        return Sum((single(key, where(weights != 0)),), *counts)
    return Sum(tuple(single(key, where(abs(weights * n - 1) < 1e-9), 1 / n) for n in counts))


def _settings_text(call: Call, usual: dict[str, Any]) -> str:
    """Return the settings other than the defaults, each as one number if its sizes are equal."""
    texts = []
    for key, size in usual.items():
        value = call.value(key)
        sizes = [value] if isinstance(value, int) else value
        if sizes and sizes != size and any(each != size for each in sizes):
            texts.append(f", {key} {_TIMES.join(map(str, sizes if len(set(sizes)) > 1 else sizes[:1]))}")
    return "".join(texts)


def _convolution_line(call: Call) -> str:
    usual = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0, "groups": 1}
    name = "conv_transpose" if call.value("transposed") else "conv"
    given = "({input}, {weight}" + _settings_text(call, usual) + ")"
    return name + given + (" + {bias}" if "bias" in call else "")


def _max_pool_line(call: Call) -> str:
    kernel = call.value("kernel_size")
    usual = {"stride": kernel, "padding": 0, "dilation": 1, "ceil_mode": False}
    return "max_pool({self}, " + _TIMES.join(map(str, kernel)) + _settings_text(call, usual) + ")"


_weighted, _mean = (partial(_plane, has_means=each) for each in (False, True))
_PADDING = """
reflection_pad1d_backward reflection_pad2d_backward reflection_pad3d_backward
replication_pad1d_backward replication_pad2d_backward replication_pad3d_backward
"""
_MAXIMA = """
max_pool2d_with_indices_backward max_pool3d_with_indices_backward adaptive_max_pool2d_backward
adaptive_max_pool3d_backward fractional_max_pool2d_backward fractional_max_pool3d_backward
"""
CONVOLUTIONS: dict[str, OperatorRecord] = {
    **alike("""
    _upsample_lanczos2d_aa* adaptive_avg_pool1d affine_grid_generator conv_tbc cudnn_grid_sampler*
    max_pool2d_backward max_unpool2d max_unpool3d mps_convolution_backward
    mps_convolution_transpose_backward
    """),
    **alike("convolution _convolution", _convolution, batched, _convolution_line),
    **alike(
        "convolution_backward",
        *(_convolution, partial(batched, own="grad_output", has_sums=True)),
        kept=LATER,
    ),
    **alike("avg_pool1d", _mean),
    **alike("adaptive_avg_pool2d adaptive_avg_pool3d", _mean, batched),
    **alike("avg_pool2d* avg_pool3d*", _mean, batched, kept=LATER),
    **alike("_adaptive_avg_pool2d* _adaptive_avg_pool3d*", _mean, batched, kept=LATER),
    **alike("upsample_nearest1d* upsample_nearest2d* upsample_nearest3d*", _weighted, batched),
    **alike("_upsample_nearest_exact1d* _upsample_nearest_exact2d*", _weighted, batched),
    **alike("_upsample_nearest_exact3d* upsample_linear1d* upsample_trilinear3d*", _weighted, batched),
    **alike("upsample_bilinear2d* _upsample_bilinear2d_aa*", _weighted, batched),
    **alike("upsample_bicubic2d* _upsample_bicubic2d_aa*", _weighted, batched),
    **alike(_PADDING, _weighted, batched, kept=LATER),
    **alike("max_pool2d", _max_pool, line=_max_pool_line),
    **alike("max_pool2d_with_indices", _max_pool, batched, _max_pool_line),
    **alike("max_pool3d_with_indices", _max_pool, batched),
    **alike("adaptive_max_pool2d adaptive_max_pool3d", _adaptive_max_pool, batched),
    **alike("fractional_max_pool2d fractional_max_pool3d", _fractional_max_pool, batched),
    **alike(_MAXIMA, _max_pool_backward, batched, kept=LATER),
    **alike("grid_sampler_2d*", rows=batched, kept=LATER),
    **alike("grid_sampler_3d*", kept=LATER),
}
