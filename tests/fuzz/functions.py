"""Step functions of random statements, as source: `everystep.train` has the bits of a plain loop."""

from __future__ import annotations

import importlib.util
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from tests.fuzz.loops import digest

import everystep
from everystep.errors import TrainingError

__all__ = ["FUNCTIONS", "Function", "train_and_compare"]

STEPS = 14

HEAD = """
import random

import numpy as np
import torch
from torch import nn, optim
from torch.nn import functional

import everystep

torch.manual_seed(0)
np.random.seed(0)
random.seed(0)
inner = [nn.BatchNorm1d(8), nn.{activation}(), nn.Dropout({dropout})]
model = nn.Sequential(nn.Linear(6, 8), *inner, nn.Linear(8, 3))
other = nn.Sequential(nn.Linear(6, 3))
average = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
one = optim.{optimizer}
two = optim.SGD(other.parameters(), lr=0.05)
schedule = optim.lr_scheduler.StepLR(one, step_size=3, gamma=0.5)
state = {{"count": 0, "hidden": torch.zeros(3), "best": 1e9}}
parts = {{"model": model, "other": other, "average": average, "one": one, "two": two}}
parts |= {{"schedule": schedule, "state": state}}
RATE = 0.5
seen = []
total = 0.0


def penalty(module):
    return sum(p.pow(2).sum() for p in module.parameters())


def step(batch):
"""

#: Before a loss, on the way to it, after its backward pass, and after the update.
BEFORE = [
    "x = x + 0.1 * torch.randn_like(x)",
    "x = x * random.random()",
    "x = x * float(np.random.rand())",
    "x = x.clone(); x[0] = 0.5",
    "y = y.roll(1, 0)",
    "state['count'] += 1",
    "one.zero_grad()",
    "two.zero_grad(set_to_none=False)",
    "model.train(state['count'] % 2 == 0)",
    "model.eval()",
    "RATE = RATE * 0.9",
    "x = x[:, torch.randperm(6)]",
    "if state['count'] > 3:\n        x = x + state['hidden'].sum()",
]
LOSSES = [
    "loss = functional.mse_loss(model(x), y)",
    "loss = functional.smooth_l1_loss(model(x), other(x).detach())",
    "loss = (model(x) - y).abs().mean() * RATE",
    "loss = functional.cross_entropy(model(x), y.argmax(1))",
    "loss = functional.mse_loss(other(x), y) + 1e-3 * penalty(model)",
]
MORE = [
    "loss = loss + 0.1 * other(x).pow(2).mean()",
    "loss = loss * state['count']",
    "loss = loss + (model(x).mean(0) * state['hidden']).sum()",
    "if loss.item() > 1.0:\n        loss = loss * 0.5",
    "if loss > 0.9:\n        loss = loss + 0.1",
    "loss = loss / max(1, len(seen))",
    "loss = loss + total * 0.01",
    "for p in model.parameters():\n        loss = loss + 1e-4 * p.abs().sum()",
]
GRADIENTS = [
    "nn.utils.clip_grad_norm_(model.parameters(), 0.5)",
    "for p in model.parameters():\n        if p.grad is not None:\n            p.grad.mul_(0.5)",
    "norm = nn.utils.clip_grad_value_(model.parameters(), 0.1)",
    "model[0].bias.grad = None",
    "loss.detach().mul_(1.0)",
]
UPDATES = [
    "one.step()",
    "one.step(); two.step()",
    "if state['count'] % 2 == 0:\n        one.step(); one.zero_grad()",
    "with torch.no_grad():\n        for p in model.parameters():\n            p -= 0.01 * p.grad",
]
AFTER = [
    "one.zero_grad()",
    "two.zero_grad()",
    "schedule.step()",
    "one.param_groups[0]['lr'] *= 0.95",
    "seen.append(loss.item())",
    "total += loss.item()",
    "total = float(loss)",
    "state['hidden'] = model(x).detach().mean(0)",
    "state['hidden'].copy_(y.mean(0))",
    "state['best'] = min(state['best'], loss.item())",
    "with torch.no_grad():\n        for a, p in zip(average[0].parameters(), model[0].parameters()):\n"
    "            a.lerp_(p, 0.1)",
    "if len(seen) == 5:\n        model[0].weight.requires_grad_(False)",
    "if state['count'] == 6:\n        other[0].weight.data.mul_(0.5)",
    "state['last'] = x.mean().item()",
    "model[3].p = 0.1 if loss.item() < 0.5 else 0.3",
    "x.zero_()",
    "if state['count'] == 4:\n        torch.manual_seed(3)",
]
RETURNS = [
    "return loss",
    "return {'loss': loss, 'count': state['count'], 'total': total}",
    "return loss.item()",
    "return {'loss': loss.detach() * 2, 'norm': model[0].weight.norm()}",
]
#: Parts of statements that no program repeats; half of the functions have none, and are vouched for.
IMPURE = (
    "state[",
    "seen",
    "random.random",
    "np.random",
    "total",
    "RATE",
    ".item()",
    "> 0.9",
    "val()",
    "zero_()",
    "param_groups",
)
OPTIMIZERS = [
    "SGD(model.parameters(), lr=0.05, momentum=0.9)",
    "Adam(model.parameters(), lr=0.01)",
    "AdamW(model.parameters(), lr=0.01, fused=True)",
    "RMSprop(model.parameters(), lr=0.01, centered=True)",
    "SGD([{'params': model[0].parameters(), 'lr': 0.01}, {'params': model[4].parameters()}], lr=0.1)",
]


@dataclass(frozen=True)
class Function:
    """The source of a module with `parts` and `step`, and the number of rows of each batch.

    is_vouched: whether programs may run its steps.
    """

    source: str
    rows: tuple[int, ...]
    is_vouched: bool


@st.composite
def _functions(draw: st.DrawFn) -> Function:
    head = HEAD.format(
        activation=draw(st.sampled_from(["ReLU", "GELU", "Tanh"])),
        dropout=draw(st.sampled_from([0.0, 0.3])),
        optimizer=draw(st.sampled_from(OPTIMIZERS)),
    )
    is_vouched = draw(st.booleans())
    without = IMPURE if is_vouched else ()

    def some(among: list[str], least: int, most: int) -> list[str]:
        known = [line for line in among if not any(part in line for part in without)]
        return draw(st.lists(st.sampled_from(known), min_size=least, max_size=most, unique=True))

    lines = [*some(BEFORE, 0, 3), *some(LOSSES, 1, 1), *some(MORE, 0, 2), "loss.backward()"]
    lines += [*some(GRADIENTS, 0, 1), *some(UPDATES, 1, 1), *some(AFTER, 0, 4), *some(RETURNS, 1, 1)]
    assigned = [name for name in ("total", "RATE") if any(line.startswith(name) for line in lines)]
    lines = [*(f"global {name}" for name in assigned), "x, y = batch", *lines]
    body = "".join(f"    {line}\n" for line in lines)
    rows = draw(st.sampled_from([(8,), (8,), (8, 8, 4), (8, 1, 8, 4)]))
    return Function(head + body, rows, is_vouched)


#: Random step functions.
FUNCTIONS = _functions()


class _Batches:
    """An epoch of the same batches each time."""

    def __init__(self, rows: tuple[int, ...]) -> None:
        generator = torch.Generator().manual_seed(1)
        sizes = (rows * STEPS)[:6]
        self._pairs = [
            (torch.randn(n, 6, generator=generator), torch.randn(n, 3, generator=generator))
            for n in sizes
        ]

    def __iter__(self) -> Any:
        return ((x.clone(), y.clone()) for x, y in self._pairs)


def _module(function: Function, path: Path) -> Any:
    path.write_text(function.source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _left(module: Any) -> dict[str, Any]:
    models = ("model", "other", "average")
    left: dict[str, Any] = {n: digest(getattr(module, n).state_dict()) for n in models}
    for name in models:
        named = {n: p.grad for n, p in getattr(module, name).named_parameters() if p.grad is not None}
        left[f"gradients of {name}"] = digest(named)
        left[f"modes of {name}"] = [each.training for each in getattr(module, name).modules()]
    for name in ("one", "two", "scheduler"):
        left[name] = repr(_plain(getattr(module, name).state_dict()))
    left["state"], left["seen"] = repr(_plain(module.state)), repr(module.seen)
    left["others"] = repr((module.total, module.RATE, module.model[3].p))
    left["torch"] = digest({"": torch.get_rng_state()})
    left["draws"] = repr((np.random.rand(), random.random()))
    return left


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return digest({"": value})
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _by_hand(module: Any, batches: _Batches) -> tuple[list[float], str | None]:
    losses: list[float] = []
    try:
        while len(losses) < STEPS:
            for batch in batches:
                found = module.step(batch)
                losses.append(float(found["loss"] if isinstance(found, dict) else found))
                if len(losses) == STEPS:
                    break
    except Exception as error:
        return losses, f"{type(error).__name__}: {error}"
    return losses, None


def train_and_compare(function: Function, folder: Path) -> str:
    """Train by hand and by everystep; return who ran the steps, "program" or "python", or "raises".

    A step that is vouched for may be "refused".

    Raises:
        AssertionError: a bit differs, or the run does not verify.
    """
    number = next(_NUMBERS)
    batches = _Batches(function.rows)
    alone = _module(function, folder / f"alone_{number}.py")
    losses, error = _by_hand(alone, batches)
    left = _left(alone)
    module = _module(function, folder / f"recorded_{number}.py")
    try:
        run = everystep.train(
            module.step,
            batches,
            parts=module.parts,
            steps=STEPS,
            run=folder / f"run-{number}",
            engine="program" if function.is_vouched else "auto",
            progress=False,
        )
    except TrainingError as refused:
        assert function.is_vouched and "no program can run these steps" in str(refused), refused
        return "refused"
    except Exception as raised:
        assert error is not None and error.partition(":")[2].strip() in str(raised), raised
        return "raises"
    assert error is None, error
    found = _left(module)
    assert found == left, [name for name in left if left[name] != found[name]]
    recorded = [math.nan if loss is None else loss for loss in run.losses["loss"].to_list()]
    assert repr(recorded) == repr([loss + 0.0 for loss in losses])
    verified = run.verify(processes=1, progress=False)
    assert verified.is_exact, repr(verified)
    loop = run.facts.training.loop
    assert loop is not None
    return "program" if loop.function is not None and loop.function.by_program else "python"


_NUMBERS = iter(range(10**9))
