"""Differences between loops of one's own, which no experiment describes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from tests.descent import descend
from torch import nn
from torch.nn import functional
from torch.optim import SGD, AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import everystep
from benchmarks.faults.kinds.sides import STEPS, Kind, Place

__all__ = ["kinds"]


@dataclass(frozen=True)
class Loop:
    """A loop with an averaged copy and a buffer of its own; each field is a setting of it."""

    approximate: str = "none"
    module: Any = nn.Tanh
    smoothing: float = 0.1
    optimizer: Any = field(default_factory=lambda: partial(SGD, lr=0.05, foreach=False))
    decay: float = 0.9
    momentum: float = 0.1
    max_norm: float = 1.0
    noise: float = 0.0
    edit_after: int | None = None
    edit: float = 0.0
    shuffled: int = 0
    lr_from: tuple[int, float] | None = None

    def __call__(self) -> everystep.Run:
        """Train, and return the run."""
        torch.manual_seed(0)
        x, y = torch.randn(STEPS, 6, 4), torch.arange(6).repeat(STEPS, 1) % 3
        order = torch.randperm(STEPS, generator=torch.Generator().manual_seed(self.shuffled))
        torch.manual_seed(1)
        first = nn.Linear(4, 8)
        model = nn.Sequential(first, self.module(), nn.Linear(8, 3))
        optimizer = self.optimizer(model.parameters())
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(self.decay))  # type: ignore[no-untyped-call]
        mean = torch.zeros(4)
        parts = {"model": model, "optimizer": optimizer, "average": average, "mean": mean}
        with everystep.record(**parts) as recording:
            batches = recording.steps([(x[i], y[i]) for i in order])
            for number, (batch, target) in enumerate(batches, start=1):
                if self.lr_from is not None and number == self.lr_from[0]:
                    optimizer.param_groups[0]["lr"] = self.lr_from[1]
                if self.noise:
                    batch = batch + self.noise * torch.randn_like(batch)
                hidden = functional.gelu(model[1](first(batch)), approximate=self.approximate)
                loss = functional.cross_entropy(model[2](hidden), target, label_smoothing=self.smoothing)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(model.parameters(), self.max_norm, foreach=False)
                optimizer.step()
                average.update_parameters(model)
                with torch.no_grad():
                    mean.lerp_(batch.mean(0), self.momentum)
                recording.log(loss=loss)
                if number == self.edit_after:
                    with torch.no_grad():
                        first.weight[1, 2] += self.edit
        return recording.run


@dataclass(frozen=True)
class TwoModels:
    """A loop of a generator and a discriminator, each with an optimizer; both rates are its settings."""

    rates: tuple[float, float]

    def __call__(self) -> everystep.Run:
        """Train, and return the run."""
        torch.manual_seed(0)
        generator, critic = nn.Linear(2, 4), nn.Linear(4, 1)
        first, second = (
            SGD(each.parameters(), lr=lr, foreach=False)
            for each, lr in zip((generator, critic), self.rates, strict=True)
        )
        parts: Any = {"generator": generator, "critic": critic, "first": first, "second": second}
        with everystep.record(**parts) as recording:
            for noise in recording.steps([torch.randn(5, 2) for _ in range(STEPS)]):
                for optimizer, sign in ((second, 1), (first, -1)):
                    loss = sign * critic(generator(noise)).tanh().mean()
                    first.zero_grad()
                    second.zero_grad()
                    loss.backward()
                    optimizer.step()
                recording.log(loss=loss)
        return recording.run


@dataclass(frozen=True)
class StepFunction:
    """A step function with an averaged copy, which a program runs; each field is a setting of it."""

    decay: float = 0.9
    lr: float = 0.05
    more: bool = False

    def __call__(self) -> everystep.Run:
        """Train, and return the run."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        optimizer = SGD(model.parameters(), lr=self.lr, foreach=False)
        average = {name: p.detach().clone() for name, p in model.named_parameters()}
        data = [(torch.randn(6, 4), torch.randn(6, 3)) for _ in range(STEPS)]
        decay, more = self.decay, self.more

        def step(batch: Any) -> torch.Tensor:
            x, y = batch
            loss = descend(optimizer, functional.mse_loss(model(x.relu() if more else x), y))
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    average[name].mul_(decay).add_(parameter, alpha=1 - decay)
            return loss  # type: ignore[no-any-return]

        parts = {"model": model, "optimizer": optimizer, "average": average}
        return everystep.train(step, data, parts=parts, steps=STEPS, progress=False)


def _sgd(**options: Any) -> Any:
    return partial(SGD, **{"lr": 0.05, "foreach": False} | options)


def kinds() -> Iterator[Kind]:
    """Yield the kinds."""
    update = partial(Place, "update", None)
    rows: Any = (
        ("approximate of a function", ({}, {"approximate": "tanh"}), 1,
         Place("loss", None, "aten.gelu.default"), ("approximate of aten.gelu 'none' | 'tanh'",)),
        ("smoothing of a function", ({}, {"smoothing": 0.2}), 1,
         Place("loss", None, "aten.mul.Scalar"), ("other of aten.mul ...",)),
        ("a module of a loop",
         ({"module": partial(nn.LeakyReLU, 0.01)}, {"module": partial(nn.LeakyReLU, 0.02)}), 1,
         Place("forward", "1", "aten.leaky_relu.default"),
         ("module 1 LeakyReLU: negative_slope 0.01 | 0.02",)),
        ("lr of a loop", ({}, {"optimizer": _sgd(lr=0.06)}), 1, update("aten.add_.Tensor"),
         ("SGD: lr 0.05 | 0.06",)),
        ("lr from a step of a loop", ({"lr_from": (5, 0.04)}, {"lr_from": (5, 0.03)}), 5,
         update("aten.add_.Tensor"), ("SGD: lr 0.04 | 0.03",)),
        ("momentum of a loop", ({"optimizer": _sgd(momentum=0.9)}, {"optimizer": _sgd(momentum=0.8)}),
         2, update("aten.mul_.Tensor"), ("SGD: momentum 0.9 | 0.8",)),
        ("eps of a loop",
         tuple({"optimizer": partial(AdamW, lr=0.01, eps=eps, foreach=False)} for eps in (1e-8, 1e-7)),
         1, update("aten.add_.Tensor"), ("AdamW: eps 1e-08 | 1e-07",)),
        ("decay of an averaged copy", ({}, {"decay": 0.8}), 2,
         Place("other", None, "aten._foreach_lerp_.Scalar"), ("weight of aten._foreach_lerp_ ...",)),
        ("momentum of a running mean", ({}, {"momentum": 0.2}), 1,
         Place("other", None, "aten.lerp_.Scalar"), ("weight of aten.lerp_ 0.1 | 0.2",)),
        ("norm that gradients are clipped to", ({"max_norm": 0.1}, {"max_norm": 0.05}), 1,
         Place("other", None, "aten.mul.Tensor"), ("other of aten.mul 0.1 | 0.05",)),
        ("order of the batches", ({}, {"shuffled": 1}), 1, Place("forward", "0", "aten.addmm.default"),
         ("batch: 24 of 24 numbers of x, ...",)),
        ("noise", ({"noise": 0.1}, {"noise": 0.2}), 1, Place("loss", None, "aten.mul.Tensor"),
         ("other of aten.mul 0.1 | 0.2",)),
        ("an edit after a step", ({"edit_after": 5, "edit": 0.5}, {"edit_after": 5, "edit": 0.25}), 5,
         Place("other", None, "aten.add_.Tensor"), ("other of aten.add_ 0.5 | 0.25",)),
    )  # fmt: skip
    for name, options, step, place, causes in rows:
        one, other = (Loop(**each) for each in options)
        yield Kind(name, one, other, step, place, causes)
    averaging = Place("other", None, "aten.mul_.Tensor")
    rows = (
        ("lr of the second optimizer", (TwoModels((0.05, 0.05)), TwoModels((0.06, 0.07))), 1,
         Place("update", "second", "aten.add_.Tensor"), ("second SGD: lr 0.05 | 0.07",)),
        ("decay in a step function", (StepFunction(), StepFunction(decay=0.8)), 1, averaging,
         ("other of aten.mul_ 0.9 | 0.8",)),
        ("lr of a step function", (StepFunction(), StepFunction(lr=0.06)), 1,
         update("aten.add_.Tensor"), ("SGD: lr 0.05 | 0.06",)),
        ("another operation, which nothing says", (StepFunction(), StepFunction(more=True)), 1,
         Place("forward", "0", "aten.addmm.default"), ("another operation; only ... has relu (loss)",)),
    )  # fmt: skip
    for name, pair, step, place, causes in rows:
        yield Kind(name, pair[0], pair[1], step, place, causes)
    yield Kind("identical step functions", StepFunction(), StepFunction(), listed=())
    yield Kind("identical loops", Loop(), Loop(), listed=())
