"""Differences in what surrounds a network: data, batches, random numbers, threads, forks, files."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

import everystep
from benchmarks.faults.kinds.sides import Kind, Place, Training, with_module
from everystep import numerics
from everystep.experiment.batches import Batches

__all__ = ["kinds"]

first_layer = Place("forward", "0", "aten.addmm.default")
SEED = 2
IN_BATCHES = {"batch_size": 6}


def _first_with(*rows: int) -> int:
    """Return the first step with one of the rows in its batch of 6."""
    batches = Batches(20, 6, SEED)
    for step in range(1, 5):
        seen = batches.indices(step)
        if seen is not None and set(rows) & set(seen.tolist()):
            return step
    raise AssertionError("every row is in some batch")


def _data() -> Iterator[Kind]:
    def cell(model: nn.Module, x: Tensor, y: Tensor) -> None:
        x[11, 2] = 0.5

    def other_cell(model: nn.Module, x: Tensor, y: Tensor) -> None:
        x[11, 2] = 1.5

    def target(model: nn.Module, x: Tensor, y: Tensor) -> None:
        y[12, 1] = 1.5

    def plain_target(model: nn.Module, x: Tensor, y: Tensor) -> None:
        y[12, 1] = 0.5

    def swap(model: nn.Module, x: Tensor, y: Tensor) -> None:
        for tensor in (x, y):
            tensor[[3, 7]] = tensor[[7, 3]]

    yield from (
        Kind("a data cell", Training(before=cell), Training(before=other_cell), 1, first_layer,
            ("data: x[11, 2] 0.5 | 1.5",), ("data.x[11, 2]  0.5 | 1.5",)),
        Kind("a data cell in batches", Training(before=cell, options=IN_BATCHES),
            Training(before=other_cell, options=IN_BATCHES), _first_with(11), first_layer,
            ("data: x[11, 2] 0.5 | 1.5",), ("data.x[11, 2]  0.5 | 1.5",)),
        Kind("a target", Training(before=plain_target, options=IN_BATCHES),
            Training(before=target, options=IN_BATCHES), _first_with(12),
            Place("loss", None, "aten.mse_loss.default"), ("data: y[12, 1] 0.5 | 1.5",),
            ("data.y[12, 1]  0.5 | 1.5",)),
        Kind("two rows swapped", Training(options=IN_BATCHES),
            Training(before=swap, options=IN_BATCHES), _first_with(3, 7), first_layer,
            ("data: 4 numbers of x in row ...",)),
    )  # fmt: skip


def _batches() -> Iterator[Kind]:
    for setting, pair in (("batch_size", (6, 7)), ("batch_size", (None, 6))):
        one, other = (Training(options={setting: value}) for value in pair)
        cause = f"batches: {setting} {pair[0]} | {pair[1]}"
        yield Kind(f"{setting}, {pair[0]} | {pair[1]}", one, other, 1, first_layer, (cause,))
    one, other = (Training(options=IN_BATCHES | {"drop_last": on}) for on in (False, True))
    yield Kind("drop_last", one, other, 4, first_layer, ("batches: drop_last False | True",))
    one, other = (Training(options=IN_BATCHES | {"seed": seed}) for seed in (3, 4))
    yield Kind("seed of batches", one, other, 1, first_layer, ("seed: 3 | 4",))


def _random() -> Iterator[Kind]:
    def draw(model: nn.Module, x: Tensor, y: Tensor) -> None:
        torch.rand(1)

    dropout = with_module(partial(nn.Dropout, 0.2))
    place = Place("forward", "1", "aten.bernoulli_.float")
    one, other = (Training(dropout, options={"seed": seed}) for seed in (3, 4))
    yield from (
        Kind("seed of dropout", one, other, 1, place, ("another random draw: seed 3 | 4",)),
        Kind("one random number more before", Training(dropout), Training(dropout, before=draw), 1,
            place, ("another random draw: torch's generator differs in state 0",)),
    )  # fmt: skip


def _forks() -> Iterator[Kind]:
    dropout = with_module(partial(nn.Dropout, 0.2))
    yield from (
        Kind("lr of a fork", Training(),
            Training(after=lambda run: run.fork(5, lr=0.04, progress=False)), 6,
            Place("update", None, "aten.mul.Tensor"), ("GradientDescent: lr 0.05 | 0.04",)),
        Kind("batch size of a fork", Training(options=IN_BATCHES),
            Training(options=IN_BATCHES, after=lambda run: run.fork(5, batch_size=5, progress=False)),
            6, first_layer, ("batches: batch_size 6 | 5",)),
        Kind("seed of a fork", Training(dropout),
            Training(dropout, after=lambda run: run.fork(5, seed=9, progress=False)), 6,
            Place("forward", "1", "aten.bernoulli_.float"), ("another random draw: seed None | 9",)),
    )  # fmt: skip


EXPERIMENT: dict[str, Any] = {
    "seed": 1,
    "steps": 8,
    "data": {"source": "random", "N": 20, "D_in": 4, "D_out": 3},
    "model": {"layers": ["Linear(4, 8)", "Tanh()", "Dropout(0.2)", "Linear(8, 3)"]},
    "loss": {"name": "MSELoss"},
    "optimizer": {"name": "AdamW", "lr": 0.01},
}


def _experiment(**changed: Any) -> everystep.Run:
    return everystep.train_experiment(copy.deepcopy(EXPERIMENT) | changed, progress=False)


def _experiments() -> Iterator[Kind]:
    one = partial(_experiment)
    layers = ["Linear(4, 8)", "Tanh()", "Dropout(0.21)", "Linear(8, 3)"]
    yield from (
        Kind("Dropout p of an experiment", one, partial(_experiment, model={"layers": layers}), 1,
            Place("forward", "2", "aten.bernoulli_.float"), ("module 2 Dropout: p 0.2 | 0.21",),
            ("model.2 Dropout.p  0.2 | 0.21",)),
        Kind("optimizer of an experiment", one,
            partial(_experiment, optimizer={"name": "AdamW", "lr": 0.01, "eps": 1e-7}), 1,
            Place("update", None, "aten._fused_adamw_.default"), ("AdamW: eps 1e-08 | 1e-07",),
            ("optimizer AdamW.eps  1e-08 | 1e-07",)),
        Kind("seed of an experiment", one, partial(_experiment, seed=2), 1, first_layer,
            ("seed: 1 | 2",)),
    )  # fmt: skip


def _threads() -> Iterator[Kind]:
    """A sum of many numbers depends on how many threads share it, on most processors."""

    def wide() -> tuple[Tensor, Tensor]:
        return torch.randn(300, 4), torch.randn(300, 400)

    one, other = (
        Training(
            partial(nn.Linear, 4, 400),
            wide,
            partial(nn.MSELoss, reduction="sum"),
            lambda parameters: everystep.GradientDescent(parameters, lr=1e-7),
            options={"threads": threads},
        )
        for threads in (1, 2)
    )
    torch.manual_seed(0)
    x, y = wide()
    torch.manual_seed(1)
    prediction = nn.Linear(4, 400)(x)
    losses = []
    for threads in (1, 2):
        with numerics.in_force(threads):
            losses.append(nn.functional.mse_loss(prediction, y, reduction="sum").item())
    if losses[0] != losses[1]:
        place = Place("loss", None, "aten.mse_loss.default")
        cause = "the same inputs give different results, under different numerics: threads 1 and 2"
        yield Kind("threads", one, other, 1, place, (cause,), ())


def _several() -> Iterator[Kind]:
    """Several things are set differently, and one of them is the cause."""
    dropout = partial(with_module, nn.Tanh)
    one, other = (
        Training(dropout(partial(nn.Dropout, p)), optimizer=partial(AdamW, eps=eps))
        for p, eps in ((0.2, 1e-8), (0.3, 1e-7))
    )
    yield Kind("p and eps: p", one, other, 1, Place("forward", "2", "aten.bernoulli_.float"),
        ("module 2 Dropout: p 0.2 | 0.3",),
        ("model.2 Dropout.p  0.2 | 0.3", "optimizer AdamW.eps  1e-08 | 1e-07"))  # fmt: skip
    one, other = (
        Training(optimizer=partial(SGD, lr=lr, momentum=momentum, foreach=False))
        for lr, momentum in ((0.05, 0.9), (0.06, 0.8))
    )
    update = partial(Place, "update", None)
    yield Kind(
        "lr and momentum: lr", one, other, 1, update("aten.add_.Tensor"), ("SGD: lr 0.05 | 0.06",)
    )
    one, other = (
        Training(with_module(partial(nn.LeakyReLU, a), partial(nn.LeakyReLU, b)))
        for a, b in ((0.01, 0.1), (0.02, 0.2))
    )
    place = Place("forward", "1", "aten.leaky_relu.default")
    yield Kind("two slopes: the first", one, other, 1, place,
        ("module 1 LeakyReLU: negative_slope 0.01 | 0.02",))  # fmt: skip
    one, other = (
        Training(optimizer=partial(SGD, lr=lr, foreach=False), options={"max_grad_norm": clip})
        for lr, clip in ((0.05, 0.1), (0.06, 0.05))
    )
    yield Kind("lr and max_grad_norm: max_grad_norm", one, other, 1, update("aten.mul.Tensor"),
        ("max_grad_norm: 0.1 | 0.05",))  # fmt: skip


def _nothing() -> Iterator[Kind]:
    batches = Training(with_module(partial(nn.Dropout, 0.2)), options=IN_BATCHES)

    def note(run: everystep.Run) -> everystep.Run:
        run.note = "another note"
        return run

    def draw(model: nn.Module, x: Tensor, y: Tensor) -> None:
        torch.rand(1)

    yield Kind("identical runs", batches, batches, listed=())
    yield Kind("another name", Training(), Training(options={"run": "elsewhere"}), listed=())
    yield Kind("another note", Training(), Training(after=note), listed=())
    yield Kind("a draw that nobody sees", Training(), Training(before=draw), listed=())
    yield Kind("Python or program", Training(options={"engine": "eager"}), Training(), listed=())
    one, other = (Training(options={"seed": seed}) for seed in (3, 4))
    yield Kind("a seed that nothing uses", one, other, listed=("seed  3 | 4",))
    one, other = (
        Training(options={"validation": (torch.ones(2, 4), torch.ones(2, 3)), "evaluate_every": every})
        for every in (2, 4)
    )
    yield Kind("how often it is evaluated", one, other, listed=("evaluate_every  2 | 4",))
    yield Kind("longer", Training(), Training(options={"steps": 10}), listed=())


def kinds() -> Iterator[Kind]:
    """Yield the kinds."""
    yield from _data()
    yield from _batches()
    yield from _random()
    yield from _forks()
    yield from _experiments()
    yield from _threads()
    yield from _several()
    yield from _nothing()
