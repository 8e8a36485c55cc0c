"""Steps as people write them, as functions: those that programs run where the user vouches, and others.

A case makes its parts, its step and its batches, and has a part of the reason why no program can run it.
"""

import math
import random
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from tests.descent import descend
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["CASES", "Case"]

CASES: dict[str, Callable[[], "Case"]] = {}
BY_PROGRAM = None


class Case(NamedTuple):
    """A training.

    reason: why no program can run its steps, None where programs run some; least: how many of forty.
    """

    step: Callable[..., Any]
    batches: Any
    parts: dict[str, Any]
    reason: str | None = BY_PROGRAM
    least: int = 20


def case(make):
    """Add a case under its name."""
    CASES[make.__name__] = make
    return make


def rows(count=64, width=4, batch=16, shuffle=True):
    """Return a loader of (x, y)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, width, generator=generator)
    y = torch.randn(count, 1, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch, shuffle=shuffle)


def network(*layers):
    """Return a small network."""
    return nn.Sequential(*(layers or (nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))))


def sgd(parameters, lr=0.1):
    return torch.optim.SGD(parameters, lr=lr)


def adam(parameters, lr=0.01):
    return torch.optim.Adam(parameters, lr=lr)


def mean_square(model, x, y):
    return functional.mse_loss(model(x), y)


def usual(make, model=None, loss=mean_square, before=lambda: None, after=lambda: None, **others):
    """Return the case of a usual step; others: its batches, its reason, and further parts."""
    model = network() if model is None else model
    optimizer = make(model.parameters())

    def step(batch):
        before()
        found = descend(optimizer, loss(model, *batch))
        after()
        return found

    named = {name: others.pop(name) for name in ("reason", "least") if name in others}
    batches = others.pop("batches", None) or rows()
    return Case(step, batches, {"model": model, "optimizer": optimizer, **others}, **named)


for _name, _make in {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adam": adam,
    "lr_tensor": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01)),
}.items():
    CASES[_name] = lambda make=_make: usual(make)


@case
def momentum_by_hand():
    """Velocities in a list, which is a part."""
    model = network()
    velocities = [torch.zeros_like(p) for p in model.parameters()]

    def step(batch):
        x, y = batch
        loss = functional.mse_loss(model(x), y)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for p, v, g in zip(model.parameters(), velocities, gradients, strict=True):
                v.mul_(0.9).add_(g)
                p.sub_(0.01 * v)
        return loss

    return Case(step, rows(), {"model": model, "velocities": velocities})


@case
def dropout_and_noise():
    """Random numbers, also of the step's own."""
    model = network(nn.Linear(4, 8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 1))
    return usual(adam, model, lambda m, x, y: mean_square(m, x + 0.1 * torch.randn_like(x), y))


@case
def weights_decayed_through_their_data():
    """The statement sets the data of each to what it has changed in place."""
    model = network()
    optimizer = adam(model.parameters())

    def step(batch):
        optimizer.zero_grad()
        loss = mean_square(model, *batch)
        loss.backward()
        for parameter in model.parameters():
            parameter.data -= 0.01 * parameter.data
        optimizer.step()
        return loss

    return Case(step, rows(), {"model": model, "optimizer": optimizer})


@case
def gan():
    """Two models, two optimizers, two schedules."""
    generator, critic = network(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4)), network()
    of_g, of_c = adam(generator.parameters()), adam(critic.parameters(), lr=0.02)
    slower = torch.optim.lr_scheduler.StepLR(of_g, 7, 0.5)
    cyclic = torch.optim.lr_scheduler.OneCycleLR(of_c, max_lr=0.05, total_steps=5000)

    def step(batch):
        real = batch[0]
        fake = generator(torch.randn(len(real), 2))
        of_critic = functional.softplus(-critic(real)).mean()
        of_critic = descend(of_c, of_critic + functional.softplus(critic(fake.detach())).mean())
        cyclic.step()
        loss = descend(of_g, functional.softplus(-critic(fake)).mean())
        slower.step()
        return {"loss": loss, "critic": of_critic, "weight": 2.5}

    parts = {"generator": generator, "critic": critic, "of_g": of_g, "of_c": of_c}
    return Case(step, rows(), parts | {"slower": slower, "cyclic": cyclic})


@case
def gradient_penalty():
    """A gradient of a gradient."""

    def loss(critic, x, y):
        x = x.clone().requires_grad_()
        score = critic(x)
        (gradient,) = torch.autograd.grad(score.sum(), x, create_graph=True)
        return score.mean() + ((gradient.norm(dim=1) - 1) ** 2).mean()

    return usual(adam, loss=loss)


class Autoencoder(nn.Module):
    """A variational autoencoder of the user's own."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(4, 6)
        self.decode = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x):
        mean, log = self.encode(x).chunk(2, dim=1)
        z = mean + torch.randn_like(mean) * (log / 2).exp()
        return self.decode(z), mean, log


@case
def autoencoder():
    """Batches that are dicts, and several losses."""
    model = Autoencoder()
    optimizer = adam(model.parameters())
    batches = [{"x": x, "ids": torch.arange(len(x)), "scale": 0.5} for x, _ in rows(shuffle=False)]

    def step(batch):
        found, mean, log = model(batch["x"])
        rebuilt = functional.mse_loss(found, batch["x"], reduction="sum") / len(found)
        divergence = -0.5 * (1 + log - mean.pow(2) - log.exp()).sum(1).mean()
        loss = descend(optimizer, rebuilt + batch["scale"] * divergence)
        return {"loss": loss, "rebuilt": rebuilt, "divergence": divergence}

    return Case(step, batches, {"model": model, "optimizer": optimizer})


@case
def tied_and_frozen():
    """Weights that are tied, a layer that is frozen, a buffer and a constant."""
    embedding, frozen = nn.Embedding(11, 6), nn.Linear(6, 6).requires_grad_(False)
    model = nn.ModuleDict({"embedding": embedding, "frozen": frozen})
    weights = torch.linspace(0.5, 1.5, 11)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1)
    batches = [torch.randint(0, 11, (8, 5)) for _ in range(4)]

    def step(tokens):
        hidden = frozen(embedding(tokens[:, :-1])).relu()
        logits = hidden @ embedding.weight.T
        loss = descend(
            optimizer, functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), weights)
        )
        with torch.no_grad():
            accuracy = (logits.argmax(-1) == tokens[:, 1:]).float().mean()
        return {"loss": loss, "accuracy": accuracy}

    return Case(step, batches, {"model": model, "optimizer": optimizer})


@case
def short_last_batch():
    """Two kinds of batches."""
    return usual(adam, batches=rows(count=40))


@case
def views_of_a_batch_with_gaps():
    data = torch.randn(40, 9)
    batches = [(data[i : i + 8, 2:7], data[i, 8].expand(9, 1)) for i in (0, 8, 16, 24)]
    return usual(
        sgd, None, lambda m, x, y: mean_square(m, x[:, 1:] * x[:1, 0], y[: len(x)]), batches=batches
    )


@case
def gradients_kept_at_short_batches():
    """Python takes the short batches, and keeps the gradients of a program."""
    made = usual(sgd, batches=rows(count=72))
    kept = []

    def step(batch):
        if len(batch[0]) < 16:
            kept.append(made.parts["model"][0].weight.grad)
            with torch.no_grad():
                made.parts["model"][0].weight.add_(torch.stack(kept).sum(0), alpha=0.01)
        return made.step(batch)

    return made._replace(step=step)


@case
def changed_batch():
    """A step that writes into its batch, which is met again."""
    batches = [(torch.randn(16, 4), torch.randn(16, 1)) for _ in range(3)]
    loss = lambda m, x, y: mean_square(m, x.mul_(0.9), y)  # noqa: E731
    return usual(sgd, loss=loss, batches=batches, reason="changes its batch")


@case
def number_returned():
    """A step that returns a number of Python's."""
    made = usual(adam)
    return made._replace(step=lambda batch: made.step(batch).item())


# What no program can run.


@case
def branched_by_chance():
    """A step that asks Python's generator."""
    return usual(
        sgd,
        loss=lambda m, x, y: mean_square(m, -x if random.random() < 0.5 else x, y),
        reason="draws random numbers from Python or NumPy",
    )


@case
def rarely_branched_by_chance():
    """A step that asks NumPy's generator, and turns only long after the first checks."""
    return usual(
        sgd,
        loss=lambda m, x, y: mean_square(m, -x if np.random.rand() < 1e-9 else x, y),
        reason="draws random numbers from Python or NumPy",
    )


@case
def branched_by_the_memory_of_its_batch():
    """A step that decides by what Python reads of a target, long after the first checks."""
    loss = lambda m, x, y: mean_square(m, -x if y[0].tolist()[0] > 99 else x, y)  # noqa: E731
    return usual(sgd, loss=loss, reason="reads the memory of a tensor")


@case
def branched_by_a_number():
    """A step that decides by its loss."""

    def loss(model, x, y):
        found = mean_square(model, x, y)
        return found * 2 if found > 1.0 else found

    return usual(sgd, loss=loss, reason="and may branch on it")


@case
def branched_by_memory():
    """A step that decides by what NumPy reads of a prediction."""

    def loss(model, x, y):
        largest = model(x).detach().numpy().max()
        return mean_square(model, x, y) * (2 if largest > 1.0 else 1)

    return usual(sgd, loss=loss, reason="reads the memory of a tensor")


@case
def other_number_returned():
    """A step that returns another number than its loss as Python's."""
    made = usual(sgd, reason="norm is returned as a Python number")

    def step(batch):
        loss = made.step(batch)
        return {"loss": loss.item(), "norm": float(made.parts["model"][0].weight.detach().norm())}

    return made._replace(step=step)


@case
def outside_of_parts():
    """A step that keeps a sum in a tensor which is in no part."""
    total = torch.zeros(())

    def loss(model, x, y):
        found = mean_square(model, x, y)
        total.add_(found.detach())
        return found + total * 0

    return usual(sgd, loss=loss, reason="a tensor that is in no part")


@case
def second_model_in_no_part():
    """A step that takes gradients of a model which nobody named."""
    head = nn.Linear(1, 1)
    return usual(
        sgd,
        loss=lambda m, x, y: functional.mse_loss(head(m(x)), y),
        reason="the same calls of torch functions do not recur",
    )


@case
def hooked():
    """A model with a forward hook."""
    model = network()
    model[0].register_forward_hook(lambda module, inputs, output: output * 2)
    return usual(sgd, model, reason="a forward hook")


# What makes two steps alike.


def flagged(batches, name, flags):
    """Return batches as dicts, each with a flag."""
    return [{"x": x, "y": y, name: flag} for (x, y), flag in zip(batches, flags, strict=True)]


def pairs(count, rows=16):
    """Return batches of (x, y)."""
    return [(torch.randn(rows, 4), torch.randn(rows, 1)) for _ in range(count)]


@case
def accumulated_over_batches():
    """Gradients that are pending after some steps, and not after others."""
    model = network()
    optimizer = adam(model.parameters())

    def step(batch):
        loss = mean_square(model, batch["x"], batch["y"]) / 4
        loss.backward()
        if batch["last"]:
            optimizer.step()
            optimizer.zero_grad()
        return loss

    batches = flagged(pairs(8), "last", [False, False, False, True] * 2)
    return Case(step, batches, {"model": model, "optimizer": optimizer}, least=1)


@case
def scheduler_at_the_end_of_an_epoch():
    """A schedule that goes on in steps of one kind changes those of another."""
    model = network()
    optimizer = sgd(model.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)

    def step(batch):
        loss = descend(optimizer, mean_square(model, batch["x"], batch["y"]))
        if batch["last"]:
            scheduler.step()
        return loss

    batches = flagged(pairs(4), "last", [False, False, False, True])
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    return Case(step, batches, parts, least=5)


def followed_by(make):
    """Return a case with a schedule for its optimizer, which advances at each step."""
    made = usual(sgd)
    scheduler = make(made.parts["optimizer"])

    def step(batch):
        loss = made.step(batch)
        scheduler.step()
        return loss

    return made._replace(step=step, parts=made.parts | {"scheduler": scheduler})


@case
def scheduler_of_another_package():
    return followed_by(lambda o: transformers.get_cosine_schedule_with_warmup(o, 5, 40))


@case
def scheduler_that_is_given_its_epoch():
    """torch has another formula for that, with other rounding."""
    made = usual(sgd)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(made.parts["optimizer"], 0.9)

    def step(batch):
        loss = made.step(batch)
        with warnings.catch_warnings(action="ignore"):  # torch warns of an epoch
            scheduler.step(scheduler.last_epoch + 1)
        return loss

    parts = made.parts | {"scheduler": scheduler}
    return made._replace(step=step, parts=parts, reason="call step() without an epoch")


@case
def layer_frozen_every_other_time():
    model = network()

    def turn():
        model[0].weight.requires_grad_(not model[0].weight.requires_grad)

    return usual(sgd, model, before=turn, reason="requires_grad or hooks of 0.weight change repeatedly")


@case
def rate_that_is_logged():
    """A number that the step's own schedule changes."""
    made = followed_by(lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5))
    groups = made.parts["optimizer"].param_groups
    return made._replace(
        step=lambda batch: {"loss": made.step(batch), "rate": groups[0]["lr"]},
        reason="rate is computed by Python",
    )


@case
def attribute_of_a_batch():
    """A number of Python's on the batch's tensor."""
    batches = pairs(8)
    for number, (x, _) in enumerate(batches):
        x.scale = 3.0 if number == 6 else 1.0
    made = usual(sgd, batches=batches, least=0)
    return made._replace(step=lambda batch: made.step(batch) * batch[0].scale)


@case
def values_of_other_kinds():
    """Ranges and keys of dicts that are equal, or at the same place in memory."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step(batch):
        (sign,) = batch["sign"]
        factor = torch.copysign(torch.ones(()), torch.full((), float(sign))) * len(batch["count"])
        loss = functional.mse_loss(model(batch["x"]), batch["y"]) * factor
        return descend(optimizer, loss)

    batches = [
        {"x": x, "y": y, "count": range(1 + number % 3), "sign": {-0.0 if number > 4 else 0.0: "a"}}
        for number, (x, y) in enumerate(pairs(6))
    ]
    return Case(step, batches, {"model": model, "optimizer": optimizer}, least=1)


@case
def one_learned_number():
    """A parameter without dimensions."""
    temperature = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.Adam([temperature], lr=0.01)

    def step(batch):
        loss = (temperature * batch - 1).pow(2)
        return descend(optimizer, loss)

    batches = [torch.tensor(1.0), torch.tensor(2.0)]
    return Case(step, batches, {"temperature": temperature, "optimizer": optimizer}, least=0)


@case
def mode_that_is_set_already():
    """A step that begins with `model.train()`."""
    model = network(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))
    return usual(adam, model, before=model.train)


@case
def own_optimizer():
    """An optimizer of the user's own, which counts its steps in an attribute."""

    class OwnOptimizer(torch.optim.SGD):
        count = 0

        def step(self):
            self.count += 1
            for parameter in self.param_groups[0]["params"]:
                parameter.grad.div_(math.sqrt(self.count))
            super().step()

    return usual(
        lambda p: OwnOptimizer(p, lr=0.1), reason="OwnOptimizer is not one of torch's own optimizers"
    )
