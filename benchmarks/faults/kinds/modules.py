"""Differences in the model: arguments of modules, their tensors, their structure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.faults.kinds.sides import Kind, Place, Training, images, of_words, with_module

__all__ = ["kinds"]


class Scale(nn.Module):
    """Multiplies by a buffer."""

    scale: Tensor

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Factor(nn.Module):
    """Multiplies by a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Hidden(nn.Module):
    """Has a slope that no public attribute shows."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self._slope = slope

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.leaky_relu(x, self._slope)


class Labelled(Hidden):
    """Has a number that it does not use, and another one that no public attribute shows."""

    def __init__(self, label: float, slope: float) -> None:
        super().__init__(slope)
        self.label = label


class Cast(nn.Module):
    """A linear layer in a precision of its own."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        given: Tensor = self.inner(x.to(self.inner.weight.dtype))
        return given.float()


class Running(nn.Module):
    """Keeps a running mean that it does not use."""

    mean: Tensor

    def __init__(self, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.lerp_(x.mean(0), self.momentum)
        return x


def _one_module(
    name: str, operator: str, made: tuple[Callable[[], nn.Module], Callable[[], nn.Module]], *causes: str
) -> Kind:
    """Return a kind in which the module between the layers is another, as its forward shows."""
    one, other = (Training(with_module(each)) for each in made)
    return Kind(name, one, other, 1, Place("forward", "1", operator), causes)


def _arguments() -> Iterator[Kind]:
    rows: Any = (
        ("GELU approximate", "aten.gelu.default", nn.GELU, "approximate", ("none", "tanh")),
        ("LeakyReLU slope", "aten.leaky_relu.default", nn.LeakyReLU, "negative_slope", (0.01, 0.02)),
        ("ELU alpha", "aten.elu.default", nn.ELU, "alpha", (1.0, 1.1)),
        ("Softplus beta", "aten.softplus.default", nn.Softplus, "beta", (1.0, 2.0)),
        ("Hardtanh maximum", "aten.hardtanh.default", nn.Hardtanh, "max_val", (1.0, 0.5)),
        ("Softmax dim", "aten._softmax.default", nn.Softmax, "dim", (1, 0)),
        ("LayerNorm eps", "aten.native_layer_norm.default", nn.LayerNorm, "eps", (1e-5, 1e-3)),
        ("BatchNorm eps", "aten.native_batch_norm.default", nn.BatchNorm1d, "eps", (1e-5, 1e-3)),
        ("BatchNorm momentum", "aten.native_batch_norm.default", nn.BatchNorm1d, "momentum", (0.1, 0.2)),
        ("groups of GroupNorm", "aten.native_group_norm.default", nn.GroupNorm, "num_groups", (2, 4)),
        ("Dropout p", "aten.bernoulli_.float", nn.Dropout, "p", (0.2, 0.21)),
        ("a module's own number", "aten.mul.Tensor", Factor, "factor", (0.5, 0.6)),
        ("momentum of an own running mean", "aten.lerp_.Scalar", Running, "momentum", (0.1, 0.2)),
    )
    for name, operator, module, setting, pair in rows:
        sizes = {nn.LayerNorm: (8,), nn.BatchNorm1d: (8,)}.get(module, ())
        more = {nn.GroupNorm: {"num_channels": 8}}.get(module, {})
        one, other = (partial(module, *sizes, **{setting: value}, **more) for value in pair)
        yield _one_module(
            name,
            operator,
            (one, other),
            f"module 1 {module.__name__}: {setting} {pair[0]!r} | {pair[1]!r}",
        )


def _convolutions() -> Iterator[Kind]:
    def network(*modules: nn.Module) -> nn.Module:
        return nn.Sequential(*modules, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))

    def convolution(**options: Any) -> nn.Module:
        return network(nn.Conv2d(2, 4, 3, **{"padding": 1} | options))

    def pooled(make: Callable[..., nn.Module], **options: Any) -> nn.Module:
        return network(nn.Conv2d(2, 4, 3, padding=1), make(**options))

    rows: Any = (
        ("padding", (1, 0), ((1, 1), (0, 0))),
        ("stride", (1, 2), ((1, 1), (2, 2))),
        ("dilation", (1, 2), ((1, 1), (2, 2))),
        ("groups", (1, 2), (1, 2)),
        ("padding_mode", ("zeros", "circular"), ("zeros", "circular")),
    )
    for setting, pair, shown in rows:
        one, other = (Training(partial(convolution, **{setting: value}), images) for value in pair)
        place = Place("forward", "0", "aten.convolution.default")
        cause = f"module 0 Conv2d: {setting} {shown[0]!r} | {shown[1]!r}"
        # By how many inputs an output has, torch chooses the initial bias.
        more = ("0.bias of state 0: 4 of 4 numbers, ...",) * (setting == "groups")
        yield Kind(f"Conv2d {setting}", one, other, 1, place, (cause, *more))
    rows = (
        ("MaxPool2d kernel size", "aten.max_pool2d_with_indices.default", nn.MaxPool2d,
         ({"kernel_size": 2, "stride": 2}, {"kernel_size": 3, "stride": 2}), "kernel_size 2 | 3"),
        ("AvgPool2d count_include_pad", "aten.avg_pool2d.default", nn.AvgPool2d,
         tuple({"kernel_size": 3, "padding": 1, "count_include_pad": on} for on in (True, False)),
         "count_include_pad True | False"),
    )  # fmt: skip
    for name, operator, make, options, causes in rows:
        one, other = (Training(partial(pooled, make, **each), images) for each in options)
        cause = f"module 1 {make.__name__}: {causes}"
        yield Kind(name, one, other, 1, Place("forward", "1", operator), (cause,))


def _structure() -> Iterator[Kind]:
    forward = partial(Place, "forward")
    tanh, relu = with_module(nn.Tanh), with_module(nn.ReLU)
    yield from (
        Kind("another activation", Training(tanh), Training(relu), 1,
            forward("1", "aten.tanh.default"), ("module 1: Tanh() | ReLU()",),
            ("model.1  Tanh() | ReLU()",)),
        Kind("a layer more", Training(with_module(nn.Tanh)),
            Training(with_module(nn.Tanh, partial(nn.Linear, 8, 8))), 1,
            forward("2", "aten.addmm.default"), ("module 2 Linear: out_features 3 | 8",)),
    )  # fmt: skip
    wide = lambda: nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3))  # noqa: E731
    yield Kind("a wider layer", Training(tanh), Training(wide), 1, forward("0", "aten.addmm.default"),
        ("module 0 Linear: out_features 8 | 9",),
        ("model.0 Linear.out_features  8 | 9", "model.2 Linear.in_features  8 | 9"))  # fmt: skip
    plain = lambda: nn.Sequential(nn.Linear(4, 8, bias=False), nn.Tanh(), nn.Linear(8, 3))  # noqa: E731
    yield Kind("a layer without bias", Training(tanh), Training(plain), 1,
        forward("0", "aten.addmm.default"), ("module 0 Linear: bias 'float32' | None",))  # fmt: skip
    yield from (
        Kind("dtype of one layer", Training(with_module(partial(Cast, torch.float32))),
            Training(with_module(partial(Cast, torch.float64))), 1,
            forward("1.inner", "aten.addmm.default"),
            ("one or more of: module 1.inner Linear: weight 'float32' | 'float64'; "
             "module 1.inner Linear: bias 'float32' | 'float64'",)),
        Kind("a model in evaluation mode", Training(with_module(nn.Dropout)),
            Training(lambda: with_module(nn.Dropout)().eval()), 1, forward("1", "aten.bernoulli_.float"),
            ("one or more of: module 1 Dropout: training True | False; "
             "module 2 Linear: training True | False",)),
    )  # fmt: skip

    def freeze(model: nn.Module, x: Tensor, y: Tensor) -> None:
        model[0].weight.requires_grad_(False)  # type: ignore[index]

    yield Kind("a frozen weight", Training(), Training(before=freeze), 1,
        Place("backward", "0", "aten.mm.default"),
        ("module 0 Linear: weight 'float32' | 'float32, frozen'",))  # fmt: skip
    yield _one_module(
        "an argument that no attribute shows",
        "aten.leaky_relu.default",
        (partial(Hidden, 0.01), partial(Hidden, 0.02)),
        "module 1 Hidden: negative_slope of aten.leaky_relu 0.01 | 0.02",
    )

    yield _one_module(
        "an attribute that may be the cause",
        "aten.leaky_relu.default",
        (partial(Labelled, 1.0, 0.01), partial(Labelled, 3.0, 0.02)),
        "module 1 Labelled: negative_slope of aten.leaky_relu 0.01 | 0.02; perhaps because of "
        "module 1 Labelled: label 1.0 | 3.0",
    )


def _padding_index(index: int | None) -> nn.Module:
    embedding = nn.Embedding(6, 4, padding_idx=index)
    nn.init.ones_(embedding.weight)
    return nn.Sequential(embedding, nn.Flatten(), nn.Linear(8, 3))


def _within() -> Iterator[Kind]:
    """Settings of modules that other modules run."""

    def attending(**options: Any) -> nn.Module:
        layer = nn.TransformerEncoderLayer(
            8, **{"nhead": 2, "dim_feedforward": 8, "dropout": 0.0, "batch_first": True} | options
        )
        return nn.Sequential(nn.Linear(4, 8), layer, nn.Linear(8, 3))

    def sequences() -> tuple[Tensor, Tensor]:
        return torch.randn(5, 4, 4), torch.randn(5, 4, 3)

    rows: Any = (
        ("norm_first of a transformer", {"norm_first": False}, {"norm_first": True},
         Place("forward", "1.self_attn", "aten.clone.default"),
         ("module 1 TransformerEncoderLayer: norm_first False | True",)),
        ("eps of a norm in a transformer", {}, {"layer_norm_eps": 1e-3},
         Place("forward", "1.norm1", "aten.native_layer_norm.default"),
         ("module 1.norm1 LayerNorm: eps 1e-05 | 0.001",)),
    )  # fmt: skip
    for name, first, second, place, causes in rows:
        one, other = (Training(partial(attending, **each), sequences) for each in (first, second))
        yield Kind(name, one, other, 1, place, causes)


def _tensors() -> Iterator[Kind]:
    def ulp(model: nn.Module, x: Tensor, y: Tensor) -> None:
        weight = model[0].weight  # type: ignore[index]
        weight[1, 2] = torch.nextafter(weight[1, 2], torch.tensor(math.inf))

    def sign(model: nn.Module, x: Tensor, y: Tensor) -> None:
        model[2].bias[1] *= -1  # type: ignore[index]

    def running(model: nn.Module, x: Tensor, y: Tensor) -> None:
        model[1].running_mean[3] = 0.5  # type: ignore[index]

    def orthogonal(model: nn.Module, x: Tensor, y: Tensor) -> None:
        with torch.random.fork_rng():
            nn.init.orthogonal_(model[2].weight)  # type: ignore[index]

    forward = partial(Place, "forward")
    yield from (
        Kind("a weight by an ulp", Training(), Training(before=ulp), 1,
            forward("0", "aten.addmm.default"), ("0.weight[1, 2] of state 0: ...",), ()),
        Kind("the sign of a bias", Training(), Training(before=sign), 1,
            forward("2", "aten.addmm.default"), ("2.bias[1] of state 0: ...",), ()),
        Kind("another initialization", Training(), Training(before=orthogonal), 1,
            forward("2", "aten.addmm.default"),
            ("2.weight of state 0: 24 of 24 numbers, by at most ...",), ()),
        Kind("a buffer", Training(with_module(partial(Scale, 1.0))),
            Training(with_module(partial(Scale, 1.5))), 1, forward("1", "aten.mul.Tensor"),
            ("1.scale of state 0: 1.0 | 1.5",), ()),
        Kind("running statistics", Training(with_module(partial(nn.BatchNorm1d, 8))),
            Training(with_module(partial(nn.BatchNorm1d, 8)), before=running), 1,
            forward("1", "aten.native_batch_norm.default"),
            ("1.running_mean[3] of state 0: 0.0 | 0.5",), ()),
        Kind("Embedding padding_idx", Training(partial(_padding_index, None), of_words),
            Training(partial(_padding_index, 0), of_words), 1,
            Place("backward", "0", "aten.embedding_dense_backward.default"),
            ("module 0 Embedding: padding_idx None | 0",)),
    )  # fmt: skip


def kinds() -> Iterator[Kind]:
    """Yield the kinds."""
    yield from _arguments()
    yield from _convolutions()
    yield from _structure()
    yield from _within()
    yield from _tensors()
