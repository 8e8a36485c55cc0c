"""Loops that try to make one step pass for another: `LOOPS`, by name, with a number of steps.

That many of its steps, at least, must be followed on a known path.
"""

import contextlib
import gc
import random

import torch
from tests.descent import descend
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["LOOPS", "STEPS", "batches", "network", "trained", "update"]

STEPS = 28


class Loops(dict):
    """Loops by name, each with how many of its steps must be followed at least."""

    def __call__(self, least):
        def noted(function):
            self[function.__name__] = function, least
            return function

        return noted


def network():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def batches(count=STEPS, rows=8):
    generator = torch.Generator().manual_seed(1)
    made = torch.randn(count, rows, 9, generator=generator)
    return [(each[:, :6].clone(), each[:, 6:].clone()) for each in made]


def sgd(model, **settings):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.05} | settings)


def update(model, optimizer, x, y):
    return descend(optimizer, functional.mse_loss(model(x), y))


def trained(record, body, model=None, optimizer=None, given=None, between=None, **parts):
    """Run a loop around a body that is called with model, optimizer, x, y and the step's number."""
    model = model or network()
    optimizer = optimizer or sgd(model)
    with record(model=model, optimizer=optimizer, **parts) as recording:
        for number, (x, y) in enumerate(given or batches(), start=1):
            if between is not None:
                between(model, optimizer, number)
            with recording.step((x, y)):
                recording.log(loss=body(model, optimizer, x, y, number))
    return model


LOOPS = loop = Loops()


# Numbers that Python has, or reads.


@loop(0)
def floats_of_every_kind(record):
    def body(model, optimizer, x, y, number):
        weight = 1.0 if number < 5 else 1.0 / number
        h = model(x)
        h = torch.add(h, y, alpha=weight) - weight + (weight - h) + torch.sub(h, y, alpha=weight)
        h = h / weight + torch.lerp(h, y, weight) + torch.addcmul(h, y, y, value=weight)
        h = h + torch.addcdiv(h, y, y.abs() + 1, value=weight) + (h.abs() + 1).pow(1 + weight)
        h.mul_(weight).add_(y, alpha=weight).div_(1 + weight)
        return descend(optimizer, functional.mse_loss(h, y))

    model = network()
    return trained(record, body, model, sgd(model, lr=1e-4))


@loop(20)
def answers_about_two_tensors(record):
    known = torch.full((8,), float("nan"))  # not equal to itself, but the same memory is

    def body(model, optimizer, x, y, number):
        bias = model[4].bias.detach()
        decays = torch.equal(bias > 0, y[0] > 0) or torch.allclose(bias, bias * 0, atol=0.3)
        penalty = bias.square().mean() if decays else 0.0
        loss = functional.mse_loss(model(x), y) + model[0].bias.square().mean() * penalty
        return descend(optimizer, loss * torch.equal(known, known) * (not torch.equal(known, y)))

    return trained(record, body)


@loop(20)
def memory_that_python_reads(record):
    def body(model, optimizer, x, y, number):
        h = model(x)
        largest, mean = max(h.detach().flatten().tolist()), y.numpy().mean()
        loss = functional.mse_loss(h, y) * (2.0 if largest > 0.5 else 1.0)
        return descend(optimizer, loss if mean > 0 else loss + h.square().mean())

    return trained(record, body)


@loop(5)
def exponents_that_become_zero_and_one(record):
    def body(model, optimizer, x, y, number):
        exponent = float(number % 3) if number > 4 else 2.0
        return descend(optimizer, (model(x).abs() + 1).pow(exponent).mean())

    return trained(record, body)


@loop(8)
def numbers_of_every_type(record):
    def body(model, optimizer, x, y, number):
        factor = [1, 1.0, True, -0.0, 0.0, 0, float("nan")][number % 7 if number > 8 else 0]
        h = model(x)
        h = h + (y.long() * factor).to(h.dtype).nan_to_num() + torch.full_like(h, factor).nan_to_num()
        return descend(optimizer, functional.mse_loss(h, y))

    return trained(record, body)


# Odd gradients.


@loop(8)
def gradients_of_the_batch_that_add_up(record):
    pairs = batches()
    for x, _ in pairs:
        x.requires_grad_()
    given = pairs[:6] + pairs[:3] + pairs[6:12] + pairs[2:5] + pairs[12:18]

    def body(model, optimizer, x, y, number):
        loss = functional.mse_loss(model(x), y)
        loss.backward()
        other = x + 0.1 * x.grad.sign()
        return update(model, optimizer, other.detach(), y)

    return trained(record, body, given=given)


@loop(0)
def nothing_is_a_part(record):
    model, other = network(), network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with record(model=other) as recording:
        for x, y in recording.steps(batches()):
            recording.log(loss=update(model, optimizer, x, y))
    return model


# Modes of torch.


@loop(5)
def modes_at_random(record):
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.BatchNorm1d(8), nn.Linear(8, 3))

    def body(model, optimizer, x, y, number):
        kind = random.randrange(4) if number > 4 else 0
        modes = [contextlib.nullcontext, torch.no_grad, torch.inference_mode, contextlib.nullcontext]
        model.train(kind != 3)
        with modes[kind]():
            extra = model(x)
        with torch.autocast("cpu", enabled=kind == 1):
            loss = functional.mse_loss(model(x) + extra.detach().clone(), y)
        return descend(optimizer, loss)

    return trained(record, body, model)


class Adds(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.is_on = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result + 1 if self.is_on and func is torch.ops.aten.tanh.default else result


@loop(0)
def a_mode_of_operators_in_the_step(record):
    mode = Adds()

    def body(model, optimizer, x, y, number):
        mode.is_on = number > 6
        with mode:
            return update(model, optimizer, x, y)

    return trained(record, body)


@loop(0)
def an_evaluation_in_inference_mode(record):
    layer = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True)
    model, kept = nn.Sequential(nn.TransformerEncoder(layer, 1), nn.Linear(6, 3)), {}

    def body(model, optimizer, x, y, number):
        loss = update(model, optimizer, x[:, None], y[:, None])
        model.eval()
        with torch.inference_mode():
            mask = torch.zeros(8, 4, dtype=torch.bool)
            mask[:, 3] = True
            model[0](x[:, None].expand(-1, 4, -1), src_key_padding_mask=mask)
            kept["best"] = model(x[:, None]).mean(0)
        model.train()
        return loss

    return trained(record, body, model, kept=kept)


@loop(0)
def training_in_inference_mode(record):
    model = network()
    with torch.inference_mode(), record(model=model) as recording:
        for x, _ in recording.steps(batches()):
            recording.log(loss=model(x).sum())
    return model


# Odd state and batches, and what is carried from step to step.


@loop(10)
def tensors_from_elsewhere_that_alias(record):
    other = torch.randn(8, 6)

    def body(model, optimizer, x, y, number):
        h = x * 1.5
        seen = [other, other[:], model[0].weight, h[:]][number % 4 if number > 9 else 0]
        seen.detach().mul_(0.9)
        return update(model, optimizer, h + other, y)

    return trained(record, body)


@loop(20)
def memory_in_a_cycle_that_python_has_collected(record):
    """torch 2.9 clears weak references to a storage there, although tensors still have it."""

    def body(model, optimizer, x, y, number):
        loss = functional.mse_loss(model(x), y)
        cycle = [each.untyped_storage() for each in model.parameters()]
        cycle.append(cycle)
        del cycle
        gc.collect(1)  # of what is new, which takes no time
        return descend(optimizer, loss)

    return trained(record, body)


@loop(5)
def a_batch_that_is_added_late_and_aliases(record):
    model = network()
    optimizer = sgd(model)
    one, two = torch.randn(8, 6), torch.randn(8, 6)
    y = torch.randn(8, 3)
    with record(model=model, optimizer=optimizer) as recording:
        for number in range(STEPS):
            alias = (two if number < 9 or number % 2 else one).view(8, 6)
            with recording.step():
                h = one * 2
                if hasattr(recording, "add_batch"):
                    recording.add_batch(alias)
                alias.mul_(0.9)
                recording.log(loss=update(model, optimizer, h + one, y))
    return model


@loop(0)
def data_and_buffers_of_which_the_step_reads_more(record):
    """Batches and a buffer are views of what the body reads in whole."""
    x, y, whole = torch.randn(8 * STEPS, 6), torch.randn(8 * STEPS, 3), torch.arange(12.0)
    model = network()
    model.register_buffer("first_half", whole[:6])

    def body(model, optimizer, a, b, number):
        return update(model, optimizer, a - x.mean(0) + model.first_half + whole.mean(), b + y[0])

    given = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 8 * STEPS, 8)]
    return trained(record, body, model, given=given)


@loop(10)
def gradients_that_are_exchanged_between_the_steps(record):
    def between(model, optimizer, number):
        weight, biases = model[2].weight, (model[0].bias, model[2].bias)
        if weight.grad is None:
            return
        if number % 7 == 3:
            weight.grad = weight.grad.t().contiguous().t()
        if number % 11 == 4:
            biases[1].grad = None
        if number % 11 == 7:
            with torch.no_grad():
                weight.grad.t_()
        if number % 13 == 6:
            biases[0].grad, biases[1].grad = biases[1].grad, biases[0].grad
        if number % 13 == 9:
            weight.grad.as_strided_((8, 8), (8, 1))

    def body(model, optimizer, x, y, number):
        loss = functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        for parameter in model.parameters():
            parameter.grad *= 0.5
        return loss

    return trained(record, body, between=between)


# Steps that fail or break off, evaluations, another thread.


@loop(10)
def texts_of_tensors(record):
    def body(model, optimizer, x, y, number):
        loss = update(model, optimizer, x, y)
        texts = f"{loss:.3f} {loss} {model[0].bias!r}" if number % 4 else str(loss)
        return loss * (len(texts) > 0)

    return trained(record, body)


@loop(10)
def steps_that_fail_and_are_taken_again(record):
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with record(model=model, optimizer=optimizer) as recording:
        for number, (x, y) in enumerate(batches()):
            for attempt in range(2):
                with contextlib.suppress(RuntimeError), recording.step((x, y)):
                    loss = functional.mse_loss(model(x), y)
                    if number % 5 == 4 and not attempt:
                        raise RuntimeError("in the forward pass")
                    recording.log(loss=descend(optimizer, loss))
                    if number % 7 == 4 and not attempt:
                        raise RuntimeError("after the update")
                    break
    return model


@loop(15)
def memory_that_is_exchanged_for_other_at_the_same_address(record):
    model = network()
    weight, array = model[0].weight, model[0].weight.detach().numpy().copy()
    weight.data = torch.frombuffer(array, dtype=torch.float32).view_as(weight)

    def body(model, optimizer, x, y, number):
        loss = update(model, optimizer, x, y)
        with torch.no_grad():  # through a view, which is known by the memory of the parameter
            weight.t()[0].mul_(0.99)
        return loss

    def between(model, optimizer, number):
        if number % 4 == 0:  # as `model.half()` and `model.float()`, where memory is scarce
            weight.data = weight.detach().half() if number % 8 else weight.detach().double()
            array[:] = weight.detach().float().numpy()
            weight.data = torch.frombuffer(array, dtype=torch.float32).view_as(weight)

    return trained(record, body, model, between=between)


# What a known path must compare besides operations and tensors.


@loop(15)
def groups_casts_and_leaves_that_change(record):
    def body(model, optimizer, x, y, number):
        if number == 9:
            optimizer.param_groups[0]["params"].append(optimizer.param_groups[1]["params"].pop(0))
        loss = functional.mse_loss(model(x), y)
        optimizer.zero_grad(set_to_none=False)
        model[0].requires_grad_(number not in (12, 13, 20))  # after the forward pass
        with torch.autocast("cpu", dtype=torch.bfloat16 if number in (6, 20, 21) else torch.float16):
            loss.backward()
        optimizer.step()
        return loss

    model = network()
    groups = [{"params": [*model[:2].parameters()]}, {"params": [*model[2:].parameters()], "lr": 0.5}]
    return trained(record, body, model, torch.optim.Adam(groups, lr=0.01))


@loop(0)
def losses_and_gradients_on_memory_of_something_else(record):
    kept, total = {"losses": torch.zeros(STEPS), "flat": torch.zeros(8)}, torch.zeros(())

    def body(model, optimizer, x, y, number):
        loss = functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        kept["flat"].copy_(model[2].bias.grad)
        model[2].bias.grad = kept["flat"].view(8)
        optimizer.step()
        kept["losses"][number - 1] = loss.detach()
        found = total.add_(loss.detach()).item()
        total.zero_()  # after the number was read
        return found if number % 3 else kept["losses"][number - 1]

    return trained(record, body, kept=kept)


@loop(10)
def operations_and_passes_that_raise_after_they_have_written(record):
    weight, places = nn.Parameter(torch.ones(3)), torch.tensor([0, 1, 99])

    def body(model, optimizer, x, y, number):
        with contextlib.suppress(IndexError, RuntimeError), torch.no_grad():
            if number % 6 == 0:
                model[2].bias.index_add_(0, places, torch.full((3,), 0.1))
            if number % 7 == 0:
                torch._foreach_mul_([model[0].bias, model[2].bias], [x[0, 0], torch.ones(5)])
        optimizer.zero_grad(set_to_none=False)
        with contextlib.suppress(RuntimeError), torch.autograd.set_detect_anomaly(number > 5):
            scale = torch.tensor(float(number not in (8, 9, 20)))
            loss = (model(x) * scale).abs().sum(0).sqrt().mean() + weight.pow(2).sum()
            loss.backward()  # finds NaN where the weight has its gradient
        optimizer.step()
        return loss

    model = network()
    return trained(record, body, model, torch.optim.SGD([*model.parameters(), weight], lr=0.1))


class Rows(nn.Module):
    """Returns rows of a table that is in no part."""

    def __init__(self, table):
        super().__init__()
        self.__dict__["table"] = [table]

    def forward(self, count):
        return self.table[0][:count]


@loop(0)
def tensors_from_outside_that_have_a_name(record):
    model = nn.ModuleDict({"rows": Rows(torch.randn(9, 6, requires_grad=True)), "rest": network()})
    optimizer, last = sgd(model), torch.zeros(())
    with record(model=model, optimizer=optimizer) as recording:
        for number, (x, y) in enumerate(batches()):
            with recording.step((x, y)):
                if number % 2:
                    x = x + model["rows"](len(x))
                if number > 1:
                    recording.log(last=last.detach())
                last = update(model["rest"], optimizer, x, y)
                recording.log(loss=last)
    return model
