"""Differences in how a network learns: the loss, the optimizer, its schedule, clipping."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    RAdam,
    RMSprop,
    Rprop,
)
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, OneCycleLR, StepLR

from benchmarks.faults.kinds.sides import Kind, Place, Training, of_classes, values
from everystep import GradientDescent

__all__ = ["kinds"]

loss = partial(Place, "loss", None)
update = partial(Place, "update", None)


class Weighted(nn.Module):
    """A loss of one's own, with a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).abs().mean() * self.factor


class Strong(torch.optim.Optimizer):
    """An optimizer of one's own, with a setting of its own."""

    def __init__(self, parameters: Any, strength: float) -> None:
        super().__init__(parameters, {"strength": strength})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad.sign(), alpha=group["strength"])


def _weighted(last: float) -> nn.Module:
    return nn.CrossEntropyLoss(weight=torch.tensor([1.0, 1.0, last]))


def _losses() -> Iterator[Kind]:
    rows: Any = (
        ("reduction", "aten.mse_loss.default", nn.MSELoss, "reduction", ("mean", "sum"), values),
        ("beta of SmoothL1Loss", "aten.smooth_l1_loss.default", nn.SmoothL1Loss, "beta", (1.0, 0.5),
         values),
        ("delta of HuberLoss", "aten.huber_loss.default", nn.HuberLoss, "delta", (1.0, 0.5), values),
        ("ignore_index", "aten.nll_loss_forward.default", nn.CrossEntropyLoss, "ignore_index",
         (-100, 2), of_classes),
        ("a loss's own number", "aten.mul.Tensor", Weighted, "factor", (1.0, 0.5), values),
    )  # fmt: skip
    for name, operator, make, setting, pair, data in rows:
        one, other = (Training(data=data, loss=partial(make, **{setting: value})) for value in pair)
        cause = f"loss {make.__name__}: {setting} {pair[0]!r} | {pair[1]!r}"
        yield Kind(name, one, other, 1, loss(operator), (cause,))
    rows = (
        ((0.1, 0.2), loss("aten.mul.Scalar"), ("other of aten.mul ...",)),
        ((0.0, 0.1), Place("backward", None, "aten.ones_like.default"), ()),
    )
    for pair, place, more in rows:
        one, other = (
            Training(data=of_classes, loss=partial(nn.CrossEntropyLoss, label_smoothing=value))
            for value in pair
        )
        cause = f"loss CrossEntropyLoss: label_smoothing {pair[0]} | {pair[1]}"
        yield Kind(f"label_smoothing from {pair[0]}", one, other, 1, place, (cause, *more))
    yield Kind("another loss", Training(), Training(loss=nn.L1Loss), 1, loss("aten.mse_loss.default"),
        ("loss: MSELoss() | L1Loss()",), ("loss  MSELoss() | L1Loss()",))  # fmt: skip
    one, other = (Training(data=of_classes, loss=partial(_weighted, last)) for last in (1.0, 2.0))
    yield Kind("class weights", one, other, 1, loss("aten.nll_loss_forward.default"),
        ("loss.weight[2] of state 0: 1.0 | 2.0",))  # fmt: skip


def _optimizers() -> Iterator[Kind]:
    plain = {"foreach": False}
    rows: Any = (
        (GradientDescent, {}, "lr", (0.05, 0.06), 1, "aten.mul.Tensor"),
        (SGD, plain, "lr", (0.05, 0.06), 1, "aten.add_.Tensor"),
        (SGD, plain, "momentum", (0.9, 0.8), 2, "aten.mul_.Tensor"),
        (SGD, plain | {"momentum": 0.9}, "dampening", (0.0, 0.1), 2, "aten.add_.Tensor"),
        (SGD, plain, "weight_decay", (0.1, 0.2), 1, "aten.add.Tensor"),
        (SGD, plain, "weight_decay", (0, 0.1), 1, "aten.add_.Tensor"),
        (SGD, plain | {"momentum": 0.9}, "nesterov", (False, True), 1, "aten.add_.Tensor"),
        (SGD, plain, "maximize", (False, True), 1, "aten.add_.Tensor"),
        (SGD, {"momentum": 0.9, "foreach": True}, "momentum", (0.9, 0.8), 2,
         "aten._foreach_mul_.Scalar"),
        (Adam, {}, "lr", (0.05, 0.06), 1, "aten.addcdiv_.default"),
        (Adam, {}, "betas", ((0.9, 0.999), (0.8, 0.999)), 1, "aten.lerp_.Scalar"),
        (Adam, {}, "betas", ((0.9, 0.999), (0.9, 0.99)), 1, "aten.addcmul_.default"),
        (Adam, {}, "eps", (1e-8, 1e-7), 1, "aten.add_.Tensor"),
        (Adam, {}, "weight_decay", (0, 0.1), 1, "aten.lerp_.Scalar"),
        (Adam, {"fused": True}, "eps", (1e-8, 1e-7), 1, "aten._fused_adam_.default"),
        (Adam, {"fused": True}, "lr", (0.01, 0.02), 1, "aten._fused_adam_.default"),
        (AdamW, {}, "eps", (1e-8, 1.1e-8), 1, "aten.add_.Tensor"),
        (AdamW, {}, "weight_decay", (0.01, 0.02), 1, "aten.mul_.Tensor"),
        (AdamW, {"fused": True}, "weight_decay", (0.01, 0.02), 1, "aten._fused_adamw_.default"),
        (RMSprop, {}, "alpha", (0.99, 0.9), 1, "aten.addcmul_.default"),
        (RMSprop, {}, "centered", (False, True), 1, "aten.zeros.default"),
        (SGD, {"momentum": 0.9}, "foreach", (False, True), 1, "aten.add_.Tensor"),
        (Adam, {}, "fused", (None, True), 1, "aten.zeros_like.default"),
        (Adagrad, {}, "lr_decay", (0, 0.1), 2, "aten.addcdiv_.default"),
        (Adamax, {}, "eps", (1e-8, 1e-3), 1, "aten.add_.Tensor"),
        (NAdam, {}, "momentum_decay", (0.004, 0.01), 1, "aten.mul_.Tensor"),
        (RAdam, {}, "eps", (1e-8, 1e-3), 6, "aten.add_.Tensor"),
        (Rprop, {}, "etas", ((0.5, 1.2), (0.5, 1.3)), 2, "aten.index_put_.default"),
        (ASGD, {}, "lambd", (1e-4, 1e-2), 1, "aten.mul_.Tensor"),
        (Adadelta, {}, "rho", (0.9, 0.8), 1, "aten.addcmul_.default"),
        (Strong, {}, "strength", (0.01, 0.02), 1, "aten.sub_.Tensor"),
    )  # fmt: skip
    for make, common, setting, pair, step, operator in rows:
        one, other = (Training(optimizer=_optimizer(make, common | {setting: value})) for value in pair)
        shown = f"{pair[0]!r} | {pair[1]!r}"
        computed = () if common.get("fused") else COMPUTED.get((make, setting), ())
        causes = (f"{make.__name__}: {setting} {shown}", *computed)
        yield Kind(f"{make.__name__} {setting}, {shown}", one, other, step, update(operator), causes)


#: Numbers that an optimizer computes from a setting, which are named as well.
COMPUTED: dict[Any, tuple[str, ...]] = {
    (Adam, "lr"): ("value of aten.addcdiv_ ...",),
    (AdamW, "weight_decay"): ("other of aten.mul_ ...",),
    (Adagrad, "lr_decay"): ("value of aten.addcdiv_ ...",),
    (NAdam, "momentum_decay"): ("other of aten.mul_ ...",),
    (ASGD, "lambd"): ("other of aten.mul_ ...",),
}


def _optimizer(
    make: Callable[..., torch.optim.Optimizer], options: dict[str, Any]
) -> Callable[[Any], Any]:
    rate = {} if make is Strong else {"lr": 0.01}
    return lambda parameters: make(parameters, **rate | options)


def _taken_by_python() -> Iterator[Kind]:
    eager = {"engine": "eager"}
    rows: Any = (
        (AdamW, {"foreach": False}, "eps", (1e-8, 1.1e-8), 1, "aten.add_.Tensor", ()),
        (Adam, {"foreach": False}, "betas", ((0.9, 0.999), (0.9, 0.99)), 1, "aten.addcmul_.default", ()),
        (AdamW, {"foreach": False}, "weight_decay", (0.01, 0.02), 1, "aten.mul_.Tensor",
         ("other of aten.mul_ 0.9999 | 0.9998",)),
    )  # fmt: skip
    for make, common, setting, pair, step, operator, more in rows:
        one, other = (
            Training(optimizer=_optimizer(make, common | {setting: value}), options=eager)
            for value in pair
        )
        cause = f"{make.__name__}: {setting} {pair[0]!r} | {pair[1]!r}"
        yield Kind(
            f"{make.__name__} {setting}, by Python", one, other, step, update(operator), (cause, *more)
        )


def _groups(lr: float, parameters: Any) -> torch.optim.Optimizer:
    first, *rest = parameters
    return SGD([{"params": [first], "lr": 0.05}, {"params": rest, "lr": lr}], foreach=False)


def _schedulers() -> Iterator[Kind]:
    one, other = (Training(optimizer=partial(_groups, lr)) for lr in (0.05, 0.06))
    yield Kind("lr of the second param group", one, other, 1, update("aten.add_.Tensor"),
        ("SGD: lr[1] 0.05 | 0.06",))  # fmt: skip
    rate = update("aten.mul.Tensor")
    rows: Any = (
        (StepLR, {"step_size": 3}, "gamma", (0.5, 0.1), 4, "0.025 | 0.005000000000000001"),
        (StepLR, {"gamma": 0.5}, "step_size", (3, 4), 4, "0.025 | 0.05"),
        (ExponentialLR, {}, "gamma", (0.9, 0.8), 2, "0.045000000000000005 | 0.04000000000000001"),
        (CosineAnnealingLR, {}, "T_max", (8, 9), 2, "..."),
    )
    for make, common, setting, pair, step, rates in rows:
        one, other = (Training(scheduler=partial(make, **common, **{setting: value})) for value in pair)
        causes = (
            f"GradientDescent: lr {rates}",
            f"scheduler {make.__name__}: {setting} {pair[0]} | {pair[1]}",
        )
        yield Kind(f"{setting} of {make.__name__}", one, other, step, rate, causes)
    one, other = (
        Training(
            optimizer=partial(SGD, lr=0.05, momentum=0.9),
            scheduler=partial(OneCycleLR, max_lr=0.1, total_steps=9, base_momentum=base),
        )
        for base in (0.85, 0.8)
    )
    # The schedule writes it into the optimizer.
    momentum = ("SGD: momentum ...",)
    yield Kind("base_momentum of OneCycleLR", one, other, 2, update("aten.mul_.Tensor"), momentum)
    one, other = (
        Training(optimizer=partial(Adagrad, lr=0.01, initial_accumulator_value=value))
        for value in (0, 0.1)
    )
    cause = "sum of 0.weight of state 0: 32 of 32 numbers, by at most 0.1 (1 of the largest)"
    place = update("aten.addcmul_.default")
    yield Kind("Adagrad initial_accumulator_value", one, other, 1, place, (cause,))
    for fused in (False, True):
        one, other = (
            Training(optimizer=partial(Adam, lr=torch.tensor(lr), fused=fused)) for lr in (0.01, 0.02)
        )
        place = update("aten._fused_adam_.tensor_lr" if fused else "aten.addcdiv_.default")
        also = () if fused else COMPUTED[Adam, "lr"]
        yield Kind(
            *(f"an lr that is a tensor, fused {fused}", one, other, 1, place),
            ("Adam: lr 0.01 | 0.02", *also),
        )
    yield Kind("a scheduler or none", Training(),
        Training(scheduler=partial(StepLR, step_size=3, gamma=0.5)), 4, rate,
        ("GradientDescent: lr 0.05 | 0.025",
         "scheduler: None | StepLR(step_size=3, gamma=0.5), every step"))  # fmt: skip
    one, other = (
        Training(
            scheduler=partial(ExponentialLR, gamma=0.5),
            options={"batch_size": 10, "scheduler_every": every},
        )
        for every in ("step", "epoch")
    )
    causes = "GradientDescent: lr 0.025 | 0.05", "scheduler ExponentialLR: every 'step' | 'epoch'"
    yield Kind("a scheduler every step or epoch", one, other, 2, rate, causes)


def _clipping() -> Iterator[Kind]:
    for pair in ((None, 0.1), (0.1, 0.05)):
        one, other = (Training(options={"max_grad_norm": value}) for value in pair)
        cause = f"max_grad_norm: {pair[0]} | {pair[1]}"
        yield Kind(f"max_grad_norm from {pair[0]}", one, other, 1, update("aten.mul.Tensor"), (cause,))


def kinds() -> Iterator[Kind]:
    """Yield the kinds."""
    yield from _losses()
    yield from _optimizers()
    yield from _taken_by_python()
    yield from _schedulers()
    yield from _clipping()
