"""A training loop written out by hand, the same training by `train`, and what both leave behind."""

from __future__ import annotations

import random
import re
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from tests.descent import bits, seeded
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import Dataset, default_collate

import everystep
from everystep import numerics
from everystep.experiment.batches import Batches

__all__ = [
    "EVALUATE_EVERY",
    "Changed",
    "Made",
    "assert_eager",
    "assert_python",
    "assert_same",
    "bits",
    "by_hand",
    "by_train",
    "contents",
    "descent",
    "mlp",
    "momentum",
    "new_training",
    "parts_of",
    "validation_loss",
]

#: Steps between two looks at the validation loss, where a schedule follows it.
EVALUATE_EVERY = 5

#: Attributes of optimizers that torch sets for itself, and that no step reads: by its schedules, to
#: warn, and hooks, which it numbers through the whole process.
NOT_COMPARED = {
    "_opt_called",
    "_warned_capturable_if_run_uncaptured",
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
    "__weakref__",
}

#: What is compared by its name.
CODE = type | FunctionType | BuiltinFunctionType | MethodType | partial | property


@dataclass
class Made:
    """What is handed to `train`. Where a schedule follows a validation loss, it is that of x and y.

    dataset: read at every step, in the place of x and y; metrics: called every `evaluate_every` steps.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    loss: Any
    optimizer: torch.optim.Optimizer
    scheduler: Any = None
    dataset: Dataset[Any] | None = None
    metrics: dict[str, Callable[[Tensor, Tensor], Any]] = field(default_factory=dict)


def by_hand(
    made: Made,
    *,
    steps: int,
    first: int = 1,
    batch_size: int | None = None,
    seed: int | None = None,
    drop_last: bool = False,
    max_grad_norm: float | None = None,
    scheduler_every: str = "step",
    threads: int = 1,
    evaluate_every: int = EVALUATE_EVERY,
    before_step: Callable[[int], Any] = lambda step: None,
    after_step: Callable[[int], Any] = lambda step: None,
) -> list[float]:
    """Train as the chapter does from step `first` on, and return the losses."""
    batches = Batches(len(made.x), batch_size, torch.initial_seed() if seed is None else seed, drop_last)
    losses = []
    with numerics.in_force(threads):
        for step in range(first, steps + 1):
            before_step(step)
            x, y = batch_of(made, batches.indices(step))
            loss = made.loss(made.model(x), y)
            losses.append(loss.item())
            made.optimizer.zero_grad()
            loss.backward()
            if max_grad_norm is not None:
                clipped = [p for group in made.optimizer.param_groups for p in group["params"]]
                nn.utils.clip_grad_norm_(clipped, max_grad_norm)
            made.optimizer.step()
            is_epoch = step % batches.steps_per_epoch == 0
            if isinstance(made.scheduler, ReduceLROnPlateau):
                if step % EVALUATE_EVERY == 0 or step == steps:
                    made.scheduler.step(validation_loss(made))
            elif made.scheduler is not None and (scheduler_every == "step" or is_epoch):
                made.scheduler.step()
            if made.metrics and (step % evaluate_every == 0 or step == steps):
                evaluate(made)
            after_step(step)
    return losses


def batch_of(made: Made, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return x and y of these rows; None: of all of them, in order."""
    if made.dataset is not None:
        numbers = range(len(made.x)) if rows is None else rows.tolist()
        x, y = default_collate([made.dataset[row] for row in numbers])
        return x, y
    return (made.x, made.y) if rows is None else (made.x[rows], made.y[rows])


def evaluate(made: Made) -> None:
    """Call each metric; modes, buffers and generators are before that as the step left them."""
    modes = [(module, module.training) for module in made.model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in made.model.buffers()]
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()
    made.model.eval()
    with torch.no_grad():
        prediction = made.model(made.x)
        for buffer, before in buffers:
            buffer.copy_(before)
    for module, training in modes:
        module.training = training
    torch.set_rng_state(generators[0])
    random.setstate(generators[1])
    np.random.set_state(generators[2])
    for metric in made.metrics.values():
        metric(prediction, made.y)


def validation_loss(made: Made) -> float:
    """Return the loss of all rows in evaluation mode."""
    made.model.eval()
    with torch.no_grad():
        loss = made.loss(made.model(made.x), made.y).item()
    made.model.train()
    return loss


def by_train(made: Made, **options: Any) -> everystep.Run:
    """Train by `everystep.train`, with one thread by default."""
    if isinstance(made.scheduler, ReduceLROnPlateau):
        options = {"validation": (made.x, made.y), "evaluate_every": EVALUATE_EVERY} | options
    if made.metrics:
        options = {"metrics": made.metrics, "evaluate_every": EVALUATE_EVERY} | options
    if made.dataset is not None:
        options = {"data": made.dataset} | options
    return everystep.train(
        made.model,
        options.pop("data", (made.x, made.y)),
        loss=made.loss,
        optimizer=made.optimizer,
        scheduler=made.scheduler,
        **{"threads": 1, "progress": False} | options,
    )


def contents(made: Made) -> dict[str, Any]:
    """Return the bits of all that a training leaves behind, gradients and generators too."""
    numpy_kind, *numpy_state = np.random.get_state()
    found: dict[str, Any] = {
        "generator": bits(torch.get_rng_state()),
        "generator of Python": random.getstate(),
        "generator of NumPy": (numpy_kind, numpy_state[0].tobytes(), *numpy_state[1:]),
    }
    for place, module in (("model", made.model), ("loss", made.loss)):
        if isinstance(module, nn.Module):
            for name, parameter in module.named_parameters():
                gradient = parameter.grad
                found[f"{place} {name}"] = bits(parameter)
                found[f"{place} {name}.grad"] = None if gradient is None else bits(gradient)
            found |= {f"{place} {name}": bits(buffer) for name, buffer in module.named_buffers()}
    found |= parts_of(made.optimizer, "optimizer")
    found["scheduler"] = made.scheduler and text(made.scheduler.state_dict())
    return found


def parts_of(value: Any, name: str) -> dict[str, Any]:
    """Return what an object holds, by its place: `optimizer.state[0].exp_avg`.

    Goes through containers and through the attributes of any object, such as an optimizer within an
    optimizer. What is met twice is described once; its second place says where, so that it also counts
    what is shared.
    """
    found: dict[str, Any] = {}
    places: dict[int, tuple[str, Any]] = {}

    def look(value: Any, name: str) -> None:
        if value is None or isinstance(value, str | bytes | bool | int | float | complex | Enum):
            found[name] = repr(value)
        elif isinstance(value, CODE):
            found[name] = getattr(value, "__qualname__", type(value).__name__)
        elif isinstance(value, tuple):
            # It cannot be changed, so whether it is shared makes no difference.
            look_into(value, name)
        elif id(value) in places:
            found[name] = f"is {places[id(value)][0]}"
        else:
            # Held, so that no other object gets its place in memory meanwhile.
            places[id(value)] = name, value
            look_into(value, name)

    def look_into(value: Any, name: str) -> None:
        if isinstance(value, Tensor):
            found[name] = bits(value)
        elif isinstance(value, torch.Generator):
            found[name] = bits(value.get_state())
        elif isinstance(value, np.ndarray):
            found[name] = value.shape, value.dtype.str, value.tobytes()
        elif isinstance(value, random.Random):
            found[name] = value.getstate()
        elif isinstance(value, Mapping):
            found[name] = f"{type(value).__name__} of {len(value)}"
            for number, (key, part) in enumerate(value.items()):
                # A key that is a parameter, or its place in memory, is called by its number.
                is_name = isinstance(key, str) or (isinstance(key, int) and abs(key) < 1000)
                look(part, f"{name}[{key!r}]" if is_name else f"{name}[key {number}]")
        elif isinstance(value, set | frozenset):
            found[name] = f"{type(value).__name__} of {len(value)}"
        elif isinstance(value, list | tuple | deque):
            found[name] = f"{type(value).__name__} of {len(value)}"
            for number, part in enumerate(value):
                look(part, f"{name}[{number}]")
        else:
            found[name] = type(value).__qualname__
            for attribute, part in vars_of(value).items():
                if attribute not in NOT_COMPARED:
                    look(part, f"{name}.{attribute}")

    look(value, name)
    return found


def vars_of(value: Any) -> dict[str, Any]:
    """Return the attributes of an object, those in slots too."""
    slots = [slot for kind in type(value).__mro__ for slot in getattr(kind, "__slots__", ())]
    found = {slot: getattr(value, slot) for slot in slots if hasattr(value, slot)}
    return found | getattr(value, "__dict__", {})


def text(value: Any) -> str:
    """Return what `repr` gives, without the addresses of objects."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


# Small trainings.


def new_training(model=None, loss=None, optimizer=None, scheduler=None):
    """Return a training of 20 rows; the same numbers at every call."""
    seeded()
    x, y = torch.randn(20, 4), torch.randn(20, 2)
    model = mlp() if model is None else model()
    optimizer = (optimizer or momentum)(model.parameters())
    loss = nn.MSELoss() if loss is None else loss()
    return Made(model, x, y, loss, optimizer, scheduler and scheduler(optimizer))


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
    """Assert from which step on Python ran and no program repeats, and that stderr has why, once."""
    engine = run.facts.training.engine
    assert engine.eager_from == step
    assert reason in engine.reason
    since = f" from step {step} on" if step > 1 else ""
    assert capfd.readouterr().err.count(f"Python runs the steps{since}: {_first(engine.reason)}") == 1


def assert_python(run, capfd):
    """Assert that Python ran every step, that stderr has why, once, and that all of them open again."""
    engine = run.facts.training.engine
    assert engine.eager_from == 1 and not engine.by_program
    assert capfd.readouterr().err.count(f"Python runs the steps: {engine.reason}") == 1
    assert everystep.open(run.directory).verify(progress=False, processes=1).is_exact


def is_of_torch(run):
    """Return whether a training has only torch's own modules, loss and optimizer."""
    facts = run.facts.training
    parts = (*facts.modules.values(), facts.loss, *facts.optimizers.values())
    return all(part.is_torchs for part in parts)


def _first(reason):
    return reason.partition(";")[0]


class Changed(nn.Module):
    """A network, and what a function of it and of what it gives makes of that."""

    def __init__(self, change):
        super().__init__()
        self.inner, self.change = mlp(), change

    def forward(self, x):
        return self.change(self, self.inner(x))
