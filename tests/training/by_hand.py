"""A training loop written out by hand, the same training by `train`, and what both leave behind."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

import everystep
from everystep import numerics
from everystep.experiment.batches import Batches

__all__ = [
    "EVALUATE_EVERY",
    "Changed",
    "Made",
    "assert_eager",
    "assert_same",
    "bits",
    "by_hand",
    "by_train",
    "contents",
    "descent",
    "mlp",
    "momentum",
    "new_training",
    "validation_loss",
]

#: Steps between two looks at the validation loss, where a schedule follows it.
EVALUATE_EVERY = 5


@dataclass
class Made:
    """What is handed to `train`. Where a schedule follows a validation loss, it is that of x and y."""

    model: nn.Module
    x: Tensor
    y: Tensor
    loss: Any
    optimizer: torch.optim.Optimizer
    schedule: Any = None


def by_hand(
    made: Made,
    *,
    steps: int,
    batch_size: int | None = None,
    drop_last: bool = False,
    clip_norm: float | None = None,
    schedule_every: str = "step",
    threads: int = 1,
    before_step: Callable[[int], Any] = lambda step: None,
    after_step: Callable[[int], Any] = lambda step: None,
) -> list[float]:
    """Train as the chapter does, and return the losses."""
    batches = Batches(len(made.x), batch_size, torch.initial_seed(), drop_last)
    clipped = [p for group in made.optimizer.param_groups for p in group["params"]]
    losses = []
    with numerics.in_force(threads):
        for step in range(1, steps + 1):
            before_step(step)
            rows = batches.indices(step)
            x, y = (made.x, made.y) if rows is None else (made.x[rows], made.y[rows])
            loss = made.loss(made.model(x), y)
            losses.append(loss.item())
            made.optimizer.zero_grad()
            loss.backward()
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(clipped, clip_norm)
            made.optimizer.step()
            is_epoch = step % batches.steps_per_epoch == 0
            if isinstance(made.schedule, ReduceLROnPlateau):
                if step % EVALUATE_EVERY == 0 or step == steps:
                    made.schedule.step(validation_loss(made))
            elif made.schedule is not None and (schedule_every == "step" or is_epoch):
                made.schedule.step()
            after_step(step)
    return losses


def validation_loss(made: Made) -> float:
    """Return the loss of all rows in evaluation mode."""
    made.model.eval()
    with torch.no_grad():
        loss = made.loss(made.model(made.x), made.y).item()
    made.model.train()
    return loss


def by_train(made: Made, **options: Any) -> everystep.Run:
    """Train by `everystep.train`, with one thread unless told otherwise."""
    if isinstance(made.schedule, ReduceLROnPlateau):
        options = {"validation": (made.x, made.y), "evaluate_every": EVALUATE_EVERY} | options
    return everystep.train(
        made.model,
        options.pop("data", (made.x, made.y)),
        loss=made.loss,
        optimizer=made.optimizer,
        schedule=made.schedule,
        **{"threads": 1, "progress": False} | options,
    )


def contents(made: Made) -> dict[str, Any]:
    """Return the bits of all that a training leaves behind, gradients and the generator too."""
    found: dict[str, Any] = {"generator": bits(torch.get_rng_state())}
    for place, module in (("model", made.model), ("loss", made.loss)):
        if isinstance(module, nn.Module):
            for name, parameter in module.named_parameters():
                gradient = parameter.grad
                found[f"{place} {name}"] = bits(parameter)
                found[f"{place} {name}.grad"] = None if gradient is None else bits(gradient)
            found |= {f"{place} {name}": bits(buffer) for name, buffer in module.named_buffers()}
    optimizer = made.optimizer.state_dict()
    for number, entries in optimizer["state"].items():
        for key, value in entries.items():
            name = f"optimizer {number} {key}"
            found[name] = bits(value) if isinstance(value, Tensor) else repr(value)
    found["groups"] = repr(optimizer["param_groups"])
    found["schedule"] = made.schedule and repr(made.schedule.state_dict())
    return found


def bits(tensor: Tensor) -> tuple[Any, ...]:
    """Return shape, dtype and bytes of a tensor."""
    whole = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    flat = whole.reshape(-1).contiguous().view(torch.uint8)
    return tuple(tensor.shape), tensor.dtype, flat.numpy().tobytes()


# Small trainings.


def new_training(model=None, loss=None, optimizer=None, schedule=None):
    """Return a training of 20 rows; the same numbers at every call."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    x, y = torch.randn(20, 4), torch.randn(20, 2)
    model = mlp() if model is None else model()
    optimizer = (optimizer or momentum)(model.parameters())
    loss = nn.MSELoss() if loss is None else loss()
    return Made(model, x, y, loss, optimizer, schedule and schedule(optimizer))


def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


momentum = partial(torch.optim.SGD, lr=0.02, momentum=0.9)
descent = partial(everystep.GradientDescent, lr=0.05)


def assert_same(make, steps, **options):
    """Train by hand and by `train`; assert that nothing differs, and return the run."""
    expected = make()
    losses = by_hand(expected, steps=steps, **options)
    left = contents(expected)
    trained = make()
    run = by_train(trained, steps=steps, **options)
    assert run.losses["loss"].to_list() == losses
    assert contents(trained) == left
    return run


def assert_eager(run, capfd, step, reason):
    """Assert from which step on Python ran, and that the user was told why."""
    engine = run.facts["engine"]
    assert engine["eager_from"] == step
    assert reason in engine["reason"]
    since = f" from step {step} on" if step > 1 else ""
    message = f"steps are taken eagerly{since}: {engine['reason']}"
    assert capfd.readouterr().err.count(message) == 1


class Changed(nn.Module):
    """A network, and what a function of it and of what it gives makes of that."""

    def __init__(self, change):
        super().__init__()
        self.inner, self.change = mlp(), change

    def forward(self, x):
        return self.change(self, self.inner(x))
