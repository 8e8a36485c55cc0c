"""Steps that are recognised by their calls: loops that try to make one step pass for another."""

import contextlib
import random
import threading

import numpy as np
import pytest
import torch
from tests.training.by_hand import bits
from tests.training.loops import unrecorded
from torch import nn
from torch.nn import functional
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import everystep
from everystep.step.recognition.memory import Memory
from everystep.step.recognition.recognizer import Recognizer

#: By name: a loop, and how many of its steps must be recognised at least.
LOOPS = {}
STEPS = 28
pytestmark = pytest.mark.filterwarnings("ignore")


def loop(least):
    def noted(function):
        LOOPS[function.__name__] = function, least
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


def descend(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


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


# Numbers that Python has, or reads.


@loop(20)
def nothing_odd(record):
    return trained(record, lambda m, o, x, y, n: update(m, o, x, y))


@loop(1)
def a_weight_that_is_annealed(record):
    def body(model, optimizer, x, y, number):
        weight = 1.0 if number < 5 else 1.0 / number
        return descend(optimizer, functional.mse_loss(model(x), y) * weight)

    return trained(record, body)


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


@loop(5)
def exponents_that_become_zero_and_one(record):
    def body(model, optimizer, x, y, number):
        exponent = float(number % 3) if number > 4 else 2.0
        return descend(optimizer, (model(x).abs() + 1).pow(exponent).mean())

    return trained(record, body)


@loop(10)
def a_branch_on_a_number_that_is_read(record):
    def body(model, optimizer, x, y, number):
        loss = functional.mse_loss(model(x), y)
        if x[0, 0].item() > 0.8:
            loss = loss + model[0].weight.pow(2).sum()
        if bool(y[0, 0] > 1) and float(x.mean()) < 1:
            loss = loss * y.sum().tolist()
        return descend(optimizer, loss)

    return trained(record, body)


@loop(15)
def operands_that_are_swapped(record):
    def body(model, optimizer, x, y, number):
        a, b = (y, model(x)) if random.random() < 0.5 else (model(x), y)
        return descend(optimizer, (a - b).exp().mean())

    return trained(record, body)


@loop(8)
def modules_of_equal_shapes_at_random(record):
    model = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def body(model, optimizer, x, y, number):
        for _ in range(2):
            x = model[random.randrange(2)](x)
        return descend(optimizer, x[:, :3].sub(y).pow(2).mean())

    return trained(record, body, model)


@loop(8)
def numbers_of_every_type(record):
    def body(model, optimizer, x, y, number):
        factor = [1, 1.0, True, -0.0, 0.0, 0, float("nan")][number % 7 if number > 8 else 0]
        h = model(x)
        h = h + (y.long() * factor).to(h.dtype).nan_to_num() + torch.full_like(h, factor).nan_to_num()
        return descend(optimizer, functional.mse_loss(h, y))

    return trained(record, body)


@loop(10)
def dropout_of_another_rate(record):
    def body(model, optimizer, x, y, number):
        x = functional.dropout(x, 0.1 if number % 9 else 0.5, training=number % 10 != 0)
        return update(model, optimizer, x, y)

    return trained(record, body)


@loop(15)
def generators_that_are_set(record):
    def body(model, optimizer, x, y, number):
        if number % 3 == 0:
            torch.manual_seed(number)
        a = torch.randn_like(x)
        if number % 4 == 0:
            torch.manual_seed(7)
        return update(model, optimizer, x + a * torch.randn_like(x), y)

    def between(model, optimizer, number):
        if number % 5 == 0:
            torch.randn(3)

    return trained(record, body, between=between)


@loop(0)
def sequences_of_other_lengths(record):
    model = nn.LSTM(6, 3, batch_first=True)

    def body(model, optimizer, x, y, number):
        given = torch.tensor([2, 2, 2, 2] if number < 5 else [4, 2, 1, 1])
        packed = nn.utils.rnn.pack_padded_sequence(x.view(4, 4, 6), given, batch_first=True)
        out, _ = nn.utils.rnn.pad_packed_sequence(model(packed)[0], batch_first=True, total_length=4)
        return descend(optimizer, functional.mse_loss(out.reshape(16, 3), y))

    return trained(record, body, model, given=batches(rows=16))


@loop(0)
def lengths_that_come_with_the_batch(record):
    model = nn.GRU(6, 3, batch_first=True)
    optimizer = sgd(model)
    with record(model=model, optimizer=optimizer) as recording:
        for number, (x, y) in enumerate(batches(rows=16), start=1):
            lengths = torch.tensor([2, 2, 2, 2] if number < 5 else [4, 2, 1, 1])
            with recording.step((x, y, lengths)):
                x = x.view(4, 4, 6)
                packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
                out = model(packed)[0].data
                recording.log(loss=descend(optimizer, functional.mse_loss(out, y[:8])))
    return model


@loop(0)
def lengths_for_ctc(record):
    model = nn.Linear(6, 5)
    optimizer = sgd(model)
    with record(model=model, optimizer=optimizer) as recording:
        for number, (x, _) in enumerate(batches(rows=16), start=1):
            lengths = torch.tensor([4, 4] if number < 5 else [5, 3 + number % 3])
            with recording.step((x, lengths)):
                loss = functional.ctc_loss(
                    model(x).view(8, 2, 5).log_softmax(2),
                    torch.tensor([[1, 2, 3], [1, 2, 2]]) if number < 0 else x[:2, :3].abs().long() + 1,
                    lengths + 1,
                    lengths // 2,
                )
                recording.log(loss=descend(optimizer, loss))
    return model


@loop(0)
def places_to_split_at(record):
    model = network()
    optimizer = sgd(model)
    with record(model=model, optimizer=optimizer) as recording:
        for number, (x, y) in enumerate(batches(), start=1):
            places = torch.tensor([2, 4] if number < 5 else [1 + number % 3, 5])
            with recording.step((x, y, places)):
                one, two, three = torch.tensor_split(x, places)
                x = torch.cat([three, one.mul(2), two])
                recording.log(loss=update(model, optimizer, x, y))
    return model


@loop(0)
def masks_with_other_counts(record):
    def body(model, optimizer, x, y, number):
        h = model(x)
        kept = h[y > (9.0 if number < 4 else 0.5)]
        rows = torch.nonzero(x[:, 0] > 0.5)
        h = h + 0.1 * kept.sum() + len(rows) * 0 + torch.unique(y.round()).sum()
        return descend(optimizer, functional.mse_loss(h, y))

    return trained(record, body)


@loop(0)
def products_with_zeros(record):
    def body(model, optimizer, x, y, number):
        return descend(optimizer, (model(x).relu() + y).prod(1).mean())

    given = [(x, y.clamp(min=1) if n < 5 else y.relu()) for n, (x, y) in enumerate(batches())]
    return trained(record, body, given=given)


@loop(0)
def a_largest_number(record):
    return trained(record, lambda m, o, x, y, n: descend(o, (m(x) - y).abs().max()))


@loop(0)
def one_tensor_of_numbers_that_python_makes(record):
    def body(model, optimizer, x, y, number):
        return update(model, optimizer, x * torch.tensor([1.0, number]).sum(), y)

    return trained(record, body)


@loop(0)
def rows_that_a_tensor_picks(record):
    def body(model, optimizer, x, y, number):
        place = (x[0, 0] * 0).long() + (number % 7 if number > 5 else 1)
        h = x + x[place] + x.narrow(0, place, 1)
        return update(model, optimizer, h, y)

    return trained(record, body)


# What torch's functions do not show.


@loop(2)
def temporaries_that_are_written_out_of_sight(record):
    def body(model, optimizer, x, y, number):
        h = x * 2
        if number > 5:
            with torch._C.DisableTorchFunction():
                h.add_(1)
        return update(model, optimizer, h, y)

    return trained(record, body)


@loop(10)
def parameters_that_are_written_out_of_sight(record):
    def body(model, optimizer, x, y, number):
        loss = update(model, optimizer, x, y)
        if number == 20:
            with torch._C.DisableTorchFunction(), torch.no_grad():
                model[0].weight.mul_(0.5)
        return loss

    return trained(record, body)


class Straight(torch.autograd.Function):
    factor = 1.0

    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * Straight.factor


@loop(0)
def a_function_with_state_in_its_backward(record):
    def body(model, optimizer, x, y, number):
        Straight.factor = float(number)
        return descend(optimizer, functional.mse_loss(Straight.apply(model(x)), y))

    return trained(record, body)


@loop(10)
def a_function_that_does_the_same_calls(record):
    def body(model, optimizer, x, y, number):
        h = model(x)
        if number < 6 or number > 12:
            with torch.no_grad():
                s = h.sign()
        else:
            s = Straight.apply(h)
        return descend(optimizer, functional.mse_loss(h + s, y))

    return trained(record, body)


@loop(4)
def a_hook_on_a_module(record):
    factor = []

    def hook(module, grads_in, grads_out):
        return tuple(g * (1 + len(factor)) for g in grads_in)

    def body(model, optimizer, x, y, number):
        handle = model[2].register_full_backward_hook(hook) if number > 7 else None
        factor.append(number)
        loss = update(model, optimizer, x, y)
        if handle is not None and number < 12:
            handle.remove()
        return loss

    return trained(record, body)


@loop(4)
def a_hook_on_a_tensor(record):
    def body(model, optimizer, x, y, number):
        h = model(x)
        if number > 7:
            h.register_hook(lambda g: g * number)
        return descend(optimizer, functional.mse_loss(h, y))

    return trained(record, body)


@loop(5)
def a_hook_on_a_parameter_between_the_steps(record):
    def between(model, optimizer, number):
        if number == 10:
            model[0].weight.register_hook(lambda g: g * 2)

    return trained(record, lambda m, o, x, y, n: update(m, o, x, y), between=between)


def doubles_gradient(parameter):
    parameter.grad.mul_(2)


@loop(5)
def a_hook_that_runs_when_a_gradient_is_there(record):
    def between(model, optimizer, number):
        if number == 10:
            model[0].weight.register_post_accumulate_grad_hook(doubles_gradient)

    return trained(record, lambda m, o, x, y, n: update(m, o, x, y), between=between)


def accumulator(parameter):
    return parameter.view_as(parameter).grad_fn.next_functions[0][0]


@loop(5)
def a_hook_on_a_node_between_the_steps(record):
    kept = []

    def between(model, optimizer, number):
        if number == 10:
            kept.append(accumulator(model[0].weight))
            kept[0].register_prehook(lambda g: (g[0] * 2,))

    return trained(record, lambda m, o, x, y, n: update(m, o, x, y), between=between)


@loop(5)
def a_hook_on_a_node_that_is_kept_from_before(record):
    model = network()
    node = accumulator(model[0].weight)

    def between(model, optimizer, number):
        if number == 10:
            node.register_prehook(lambda g: (g[0] * 2,))

    return trained(record, lambda m, o, x, y, n: update(m, o, x, y), model, between=between)


@loop(5)
def a_hook_on_a_node_of_the_last_loss(record):
    kept = []

    def body(model, optimizer, x, y, number):
        loss = update(model, optimizer, x, y)
        kept[:] = [loss]
        return loss

    def between(model, optimizer, number):
        if number == 10:
            node = kept[0].grad_fn
            while type(node).__name__ != "AccumulateGrad":
                node = node.next_functions[0][0]
            node.register_prehook(lambda g: (g[0] * 2,))

    return trained(record, body, between=between)


@loop(5)
def a_hook_on_a_node_within_a_step(record):
    model = network()
    node = accumulator(model[0].weight)

    def body(model, optimizer, x, y, number):
        loss = functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        handle = node.register_prehook(lambda g: (g[0] * 2,)) if number > 9 else None
        loss.backward()
        if handle is not None:
            handle.remove()
        optimizer.step()
        return loss

    return trained(record, body, model)


@loop(5)
def a_hook_on_a_node_of_a_tensor_that_is_no_part(record):
    scale = torch.ones(3, requires_grad=True)
    node = accumulator(scale)

    def body(model, optimizer, x, y, number):
        scale.grad = None
        loss = descend(optimizer, functional.mse_loss(model(x) * scale, y))
        with torch.no_grad():
            model[4].bias.sub_(scale.grad, alpha=0.01)
        return loss

    def between(model, optimizer, number):
        if number == 10:
            node.register_prehook(lambda g: (g[0] * 2,))

    return trained(record, body, between=between)


@loop(15)
def another_backward_pass_out_of_sight(record):
    def body(model, optimizer, x, y, number):
        h = model(x)
        g = torch.ones_like(h)
        loss = functional.mse_loss(h, y)
        optimizer.zero_grad()
        loss.backward(retain_graph=True)
        if number > 7:
            torch.autograd.backward([h], [g])
        optimizer.step()
        return loss

    return trained(record, body)


@loop(15)
def another_backward_pass_before_an_update_by_hand(record):
    def body(model, optimizer, x, y, number):
        h = model(x)
        g = torch.ones_like(h)
        loss = functional.mse_loss(h, y)
        model.zero_grad()
        loss.backward(retain_graph=True)
        if number > 7:
            torch.autograd.backward([h], [g])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.05 * parameter.grad
        return loss

    return trained(record, body)


# Gradients.


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
def gradients_of_a_tensor_that_is_no_part(record):
    scale = torch.ones(3, requires_grad=True)

    def body(model, optimizer, x, y, number):
        loss = descend(optimizer, functional.mse_loss(model(x) * scale, y))
        with torch.no_grad():
            model[4].bias.sub_(scale.grad, alpha=0.01)
        return loss

    def between(model, optimizer, number):
        if number in (3, 5, 9, 10, 14, 15, 16):
            scale.grad = None

    return trained(record, body, between=between)


@loop(10)
def gradients_that_are_retained_and_swapped(record):
    def body(model, optimizer, x, y, number):
        h = model[0](x)
        h.retain_grad()
        k = model[2](h.tanh())
        k.retain_grad()
        loss = functional.mse_loss(model[4](k.tanh()), y)
        optimizer.zero_grad()
        loss.backward()
        one, two = (h, k) if number % 5 else (k, h)
        with torch.no_grad():
            model[0].bias.sub_(one.grad.mean(0)).add_(two.grad.exp().mean(0), alpha=0.01)
        optimizer.step()
        return loss

    return trained(record, body)


@loop(10)
def gradients_of_the_input(record):
    def body(model, optimizer, x, y, number):
        x = x.clone().requires_grad_()
        functional.mse_loss(model(x), y).backward()
        return update(model, optimizer, (x + 0.1 * x.grad.sign()).detach(), y)

    return trained(record, body)


@loop(10)
def a_penalty_on_gradients(record):
    def body(model, optimizer, x, y, number):
        x = x.clone().requires_grad_()
        h = model(x)
        (found,) = torch.autograd.grad(h.sum(), x, create_graph=True)
        return descend(optimizer, functional.mse_loss(h, y) + found.pow(2).mean())

    return trained(record, body)


@loop(8)
def gradients_that_add_up_and_are_dropped(record):
    def body(model, optimizer, x, y, number):
        if number % 4 == 0:
            optimizer.zero_grad(set_to_none=number % 8 == 0)
        loss = functional.mse_loss(model(x), y)
        loss.backward()
        if number % 4 == 3:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            nn.utils.clip_grad_value_(model.parameters(), 0.2)
            optimizer.step()
        if number % 7 == 0:
            model[0].weight.grad = None
        return loss

    return trained(record, body)


@loop(5)
def parameters_that_are_used_at_times(record):
    model = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3), nn.Linear(6, 3)])

    def body(model, optimizer, x, y, number):
        h = model[0](x) + (model[1](x) if number % 2 else 0) + (model[2](x) if number > 9 else 0)
        return descend(optimizer, functional.mse_loss(h, y))

    return trained(record, body, model, torch.optim.Adam(model.parameters(), lr=0.01))


@loop(5)
def parameters_that_are_frozen(record):
    def between(model, optimizer, number):
        if number % 6 == 0:
            for parameter in model[0].parameters():
                parameter.requires_grad_(not parameter.requires_grad)

    def body(model, optimizer, x, y, number):
        if number % 9 == 0:
            model[2].weight.requires_grad = not model[2].weight.requires_grad
        return update(model, optimizer, x, y)

    model = network()
    return trained(record, body, model, torch.optim.AdamW(model.parameters(), lr=0.01), between=between)


@loop(5)
def two_groups_and_a_third(record):
    model = network()
    extra = nn.Linear(3, 3)
    groups = [
        {"params": model[0].parameters(), "lr": 0.01},
        {"params": [*model[2].parameters(), *model[4].parameters()]},
    ]
    optimizer = torch.optim.Adam(groups, lr=1e-3, betas=(0.8, 0.9))

    def body(model, optimizer, x, y, number):
        if number == 10:
            optimizer.add_param_group({"params": extra.parameters(), "weight_decay": 0.1})
        h = model(x)
        return descend(optimizer, functional.mse_loss(extra(h) if number >= 10 else h, y))

    return trained(record, body, model, optimizer, extra=extra)


# Optimizers.

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "dampening": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.1, maximize=True),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.05, amsgrad=True, maximize=True),
    "Adam foreach": lambda p: torch.optim.Adam(p, lr=0.05, foreach=True, weight_decay=0.1),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.05, fused=True),
    "Adam tensor": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.05)),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.05, decoupled_weight_decay=True, weight_decay=0.1),
    "NAdam foreach": lambda p: torch.optim.NAdam(p, lr=0.05, foreach=True),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.05),
    "RAdam foreach": lambda p: torch.optim.RAdam(p, lr=0.05, foreach=True, weight_decay=0.1),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.05),
    "Adamax foreach": lambda p: torch.optim.Adamax(p, lr=0.05, foreach=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, lr_decay=0.1),
    "Adagrad fused": lambda p: torch.optim.Adagrad(p, lr=0.05, fused=True),
    "Adagrad foreach": lambda p: torch.optim.Adagrad(p, lr=0.05, foreach=True, lr_decay=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.05),
    "Adadelta foreach": lambda p: torch.optim.Adadelta(p, lr=0.05, foreach=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "RMSprop foreach": lambda p: torch.optim.RMSprop(p, lr=0.01, foreach=True),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "Rprop foreach": lambda p: torch.optim.Rprop(p, lr=0.01, foreach=True),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.01),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "descent": lambda p: everystep.GradientDescent(p, lr=0.05),
}


def with_optimizer(make):
    def body(model, optimizer, x, y, number):
        if number == 9:
            optimizer.param_groups[0]["lr"] *= 0.5
        if number in (14, 18) and "weight_decay" in optimizer.defaults:
            optimizer.param_groups[0]["weight_decay"] = 0.1 if number == 14 else 0.2
        if number == 20 and "betas" in optimizer.defaults:
            optimizer.param_groups[0]["betas"] = 0.5, 0.6
        return update(model, optimizer, x, y)

    def run(record):
        model = network()
        model.register_parameter("scalar", nn.Parameter(torch.tensor(1.0)))
        return trained(record, body, model, make(model.parameters()))

    return run


for name, make in OPTIMIZERS.items():
    LOOPS[f"optimizer {name}"] = with_optimizer(make), 0 if name in ("ASGD", "Rprop foreach") else 15


@loop(0)
def lbfgs(record):
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)

    def body(model, optimizer, x, y, number):
        def closure():
            optimizer.zero_grad()
            loss = functional.mse_loss(model(x), y)
            loss.backward()
            return loss

        return optimizer.step(closure)

    return trained(record, body, model, optimizer, batches(12))


@loop(15)
def a_closure_for_adam(record):
    model = network()

    def body(model, optimizer, x, y, number):
        def closure():
            optimizer.zero_grad()
            loss = functional.mse_loss(model(x), y)
            loss.backward()
            return loss * 2 if number > 9 else loss

        return optimizer.step(closure)

    return trained(record, body, model, torch.optim.Adam(model.parameters(), lr=0.01))


def halves_gradients(optimizer, *_):
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad.mul_(0.5)


def halves_parameters(optimizer, *_):
    with torch.no_grad():
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.mul_(0.5)


@loop(15)
def hooks_of_an_optimizer(record):
    def between(model, optimizer, number):
        if number == 9:
            optimizer.register_step_pre_hook(halves_gradients)
        if number == 15:
            optimizer.register_step_post_hook(halves_parameters)

    return trained(record, lambda m, o, x, y, n: update(m, o, x, y), between=between)


@loop(15)
def hooks_of_all_optimizers(record):
    handles = []

    def between(model, optimizer, number):
        if number == 9:
            handles.append(register_optimizer_step_pre_hook(halves_gradients))
        if number == 15:
            handles.append(register_optimizer_step_post_hook(halves_parameters))

    try:
        return trained(record, lambda m, o, x, y, n: update(m, o, x, y), between=between)
    finally:
        for handle in handles:
            handle.remove()


@loop(15)
def a_hook_of_all_optimizers_from_before(record):
    at = [0]

    def hook(optimizer, *_):
        at[0] += 1
        if at[0] > 7:
            halves_parameters(optimizer)

    handle = register_optimizer_step_post_hook(hook)
    try:
        return trained(record, lambda m, o, x, y, n: update(m, o, x, y))
    finally:
        handle.remove()


@loop(5)
def an_optimizer_that_is_no_part(record):
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with record(model=model) as recording:
        for x, y in recording.steps(batches()):
            recording.log(loss=update(model, optimizer, x, y))
    return model


@loop(0)
def nothing_is_a_part(record):
    model, other = network(), network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with record(model=other) as recording:
        for x, y in recording.steps(batches()):
            recording.log(loss=update(model, optimizer, x, y))
    return model


@loop(10)
def a_schedule(record):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=STEPS + 1)

    def body(model, optimizer, x, y, number):
        loss = update(model, optimizer, x, y)
        schedule.step()
        return loss

    return trained(record, body, model, optimizer, schedule=schedule)


@loop(10)
def gradients_that_are_scaled(record):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)

    def body(model, optimizer, x, y, number):
        with torch.autocast("cpu", enabled=number % 9 != 0):
            loss = functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        scaler.scale(loss if number != 12 else loss * float("inf")).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        return loss

    return trained(record, body, scaler=scaler)


@loop(10)
def updates_by_hand(record):
    model = network()
    average = [parameter.detach().clone() for parameter in model.parameters()]

    def body(model, optimizer, x, y, number):
        loss = functional.mse_loss(model(x), y)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter, mean in zip(model.parameters(), average, strict=True):
                parameter.add_(parameter.grad, alpha=-0.1 / number)
                mean.lerp_(parameter, 0.1)
                parameter.data.mul_(1 - 0.1 / number)
        return loss

    return trained(record, body, model, average=average)


@loop(10)
def parameters_that_get_other_memory(record):
    def body(model, optimizer, x, y, number):
        loss = update(model, optimizer, x, y)
        weight = model[2].weight
        if number % 4:
            weight.data = weight.data * 0.9
        else:
            weight.data.copy_(weight.data.t() * 0.9)
        if number % 10 == 0:
            weight.data = weight.data.t()
        return loss

    return trained(record, body)


# Modes.


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


@loop(5)
def dtypes_by_default(record):
    def body(model, optimizer, x, y, number):
        torch.set_default_dtype(torch.float64 if number % 6 == 0 else torch.float32)
        try:
            noise = torch.rand(6)
        finally:
            torch.set_default_dtype(torch.float32)
        return update(model, optimizer, x + noise.float(), y)

    return trained(record, body)


@loop(5)
def kinds_of_attention(record):
    kinds = torch.nn.attention.SDPBackend

    def body(model, optimizer, x, y, number):
        kind = kinds.MATH if number % 5 == 0 else kinds.FLASH_ATTENTION
        with torch.nn.attention.sdpa_kernel(kind):
            h = model[0](x)[None, None]
            h = functional.scaled_dot_product_attention(h, h, h)[0, 0]
        return descend(optimizer, functional.mse_loss(model[1:](h), y))

    return trained(record, body)


@loop(5)
def checkpoints_at_times(record):
    def body(model, optimizer, x, y, number):
        x = x.clone().requires_grad_()
        if number % 6 == 0:
            h = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=number % 4 == 0)
        else:
            h = model(x)
        return descend(optimizer, functional.mse_loss(h, y))

    return trained(record, body)


@loop(5)
def transforms_at_times(record):
    def body(model, optimizer, x, y, number):
        loss = update(model, optimizer, x, y)
        if number % 6 == 0:
            parameters = dict(model.named_parameters())
            found = torch.func.grad(
                lambda p: functional.mse_loss(torch.func.functional_call(model, p, (x,)), y)
            )(parameters)
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter -= 0.01 * found[name]
        return loss

    return trained(record, body)


class Doubles(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.is_on = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result * 2 if self.is_on and func is functional.mse_loss else result


class Adds(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.is_on = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result + 1 if self.is_on and func is torch.ops.aten.tanh.default else result


@loop(0)
def a_mode_of_functions_around_the_loop(record):
    with Doubles() as mode:

        def body(model, optimizer, x, y, number):
            mode.is_on = number > 6
            return update(model, optimizer, x, y)

        return trained(record, body)


@loop(15)
def a_mode_of_functions_in_the_step(record):
    mode = Doubles()

    def body(model, optimizer, x, y, number):
        mode.is_on = number > 6
        with mode:
            return update(model, optimizer, x, y)

    return trained(record, body)


@loop(0)
def a_mode_of_operators_in_the_step(record):
    mode = Adds()

    def body(model, optimizer, x, y, number):
        mode.is_on = number > 6
        with mode:
            return update(model, optimizer, x, y)

    return trained(record, body)


@loop(5)
def a_device_by_default(record):
    def body(model, optimizer, x, y, number):
        torch.set_default_device("cpu" if number > 6 else None)
        try:
            return update(model, optimizer, x + torch.rand(6), y)
        finally:
            torch.set_default_device(None)

    return trained(record, body)


# State, batches, and what is carried.


@loop(10)
def buffers_that_are_bound_again(record):
    model = network()
    model.register_buffer("mean", torch.zeros(6))

    def body(model, optimizer, x, y, number):
        loss = update(model, optimizer, x - model.mean, y)
        if number % 5 == 0:
            model.mean.mul_(0.9).add_(x.mean(0))
        else:
            model.mean = 0.9 * model.mean + x.mean(0)
        return loss

    return trained(record, body, model)


@loop(10)
def state_that_is_carried(record):
    model, head = nn.LSTM(6, 8), nn.Linear(8, 3)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()])
    hidden = None
    with record(model=model, head=head, optimizer=optimizer) as recording:
        for number, (x, y) in enumerate(recording.steps(batches()), start=1):
            out, hidden = model(x, hidden if number % 9 else None)
            recording.log(loss=descend(optimizer, functional.mse_loss(head(out), y)))
            hidden = tuple(each.detach() for each in hidden)
    return model


@loop(0)
def a_graph_that_is_carried(record):
    kept = []

    def body(model, optimizer, x, y, number):
        h = model(x)
        loss = functional.mse_loss(h + (0.1 * kept[-1] if kept else 0), y)
        optimizer.zero_grad()
        loss.backward(retain_graph=True)
        kept.append(h if number % 3 else h.detach())
        del kept[:-1]
        return loss

    return trained(record, body)


@loop(5)
def numpy_that_changes_its_memory(record):
    memory = np.zeros((8, 6), np.float32)
    tensor = torch.from_numpy(memory)

    def body(model, optimizer, x, y, number):
        memory[number % 8] += number
        return update(model, optimizer, x + tensor, y)

    return trained(record, body)


@loop(10)
def tensors_from_elsewhere_that_alias(record):
    other = torch.randn(8, 6)

    def body(model, optimizer, x, y, number):
        h = x * 1.5
        seen = [other, other[:], model[0].weight, h[:]][number % 4 if number > 9 else 0]
        seen.detach().mul_(0.9)
        return update(model, optimizer, h + other, y)

    return trained(record, body)


@loop(5)
def names_for_parameters_from_elsewhere(record):
    model = network()
    alias, other = model[2].weight.detach(), torch.zeros(8, 8)

    def body(model, optimizer, x, y, number):
        (other if number % 6 else alias).mul_(0.9)
        return update(model, optimizer, x, y)

    return trained(record, body, model)


@loop(4)
def views_from_elsewhere_that_are_gone_at_once(record):
    one, two = torch.randn(2, 6), torch.randn(2, 6)
    views = [view for n in range(STEPS) for view in (one[:1], (one if n < 9 or n % 2 else two)[:1])]

    def body(model, optimizer, x, y, number):
        h = x + views.pop(0)
        return update(model, optimizer, h * views.pop(0), y)

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


@loop(5)
def derivatives_of_another_mode(record):
    forward = torch.autograd.forward_ad

    def body(model, optimizer, x, y, number):
        if number % 5:
            return update(model, optimizer, x, y)
        with forward.dual_level():
            dual = forward.make_dual(x, torch.ones_like(x))
            tangent = forward.unpack_dual(model(dual) * (1.0 / number)).tangent
        return update(model, optimizer, x + tangent.detach().sum(), y)

    return trained(record, body)


@loop(5)
def anomalies_that_are_looked_for(record):
    def body(model, optimizer, x, y, number):
        with torch.autograd.set_detect_anomaly(number % 6 == 0):
            return update(model, optimizer, x, y)

    return trained(record, body)


@loop(2)
def an_optimizer_that_fails(record):
    def body(model, optimizer, x, y, number):
        loss = update(model, optimizer, x, y)
        if number % 5 == 0:
            optimizer.param_groups[0]["lr"] = None
            with contextlib.suppress(TypeError):
                optimizer.step()
            optimizer.param_groups[0]["lr"] = 0.05
            loss = update(model, optimizer, x, y)
        return loss

    return trained(record, body)


class Scripted(nn.Module):
    def forward(self, x):
        x.add_(1.0)
        return x * 2


@loop(5)
def a_script_at_times(record):
    scripted = torch.jit.script(Scripted())

    def body(model, optimizer, x, y, number):
        h = x * 1.0
        k = scripted(h) if number % 5 == 0 else h * 2
        return update(model, optimizer, h + k, y)

    return trained(record, body)


@loop(5)
def weights_that_are_swapped_between_modules(record):
    def body(model, optimizer, x, y, number):
        if number % 7 == 0:
            model[0].bias, model[2].bias = model[2].bias, model[0].bias
        return update(model, optimizer, x, y)

    return trained(record, body)


@loop(2)
def batches_that_alias(record):
    whole, y = torch.randn(40, 6), torch.randn(8, 3)
    model = network()

    def batch(number):
        one = whole[number : number + 8]
        return (one, y), (one, whole[number + 1 : number + 9]), (one, one), (one, one[:])

    optimizer = sgd(model)
    with record(model=model, optimizer=optimizer) as recording:
        for number in range(STEPS):
            one, two = batch(number)[number % 4 if number > 11 else 0]
            with recording.step((one, two)):
                x = one + 0
                two.mul_(0.5)
                recording.log(loss=update(model, optimizer, one + x, y))
    return model


@loop(5)
def batches_that_are_parameters(record):
    model = network()
    optimizer = sgd(model)
    with record(model=model, optimizer=optimizer) as recording:
        for number, (x, y) in enumerate(batches()):
            x = x if number < 7 else model[0].weight if number % 2 else model[0].weight.detach()
            with recording.step({"x": x, "y": y, "more": [y]}):
                recording.log(loss=update(model, optimizer, x, y))
    return model


@loop(10)
def the_batch_is_added_late(record):
    model = network()
    optimizer = sgd(model)
    with record(model=model, optimizer=optimizer) as recording:
        for number, (x, y) in enumerate(batches()):
            with recording.step():
                loss = model[0].weight.pow(2).mean()
                if hasattr(recording, "add_batch") and number % 10 != 9:
                    recording.add_batch((x, y))
                recording.log(loss=descend(optimizer, loss + functional.mse_loss(model(x), y)))
    return model


@loop(5)
def batches_of_other_sizes(record):
    given = [(x[: 8 - n % 3 * (n > 9)], y[: 8 - n % 3 * (n > 9)]) for n, (x, y) in enumerate(batches())]
    return trained(record, lambda m, o, x, y, n: update(m, o, x, y), given=given)


# Loops.


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


@loop(10)
def evaluations_in_the_step(record):
    model = nn.Sequential(network(), nn.Dropout(0.1))

    def body(model, optimizer, x, y, number):
        h = model(x)
        if number % 4 == 0:
            with pause(), torch.no_grad():
                model.eval()
                model(x + torch.randn_like(x))
                model.train()
        return descend(optimizer, functional.mse_loss(h, y))

    pause = contextlib.nullcontext

    def recorded(**parts):
        nonlocal pause
        recording = record(**parts)
        pause = getattr(recording, "paused", pause)
        return recording

    return trained(recorded, body, model)


@loop(10)
def another_thread(record):
    def body(model, optimizer, x, y, number):
        found = []
        if number % 5 == 0:
            thread = threading.Thread(target=lambda: found.append(x.detach().tanh()))
            thread.start()
            thread.join()
        return update(model, optimizer, found[0] if found else x, y)

    return trained(record, body)


@loop(10)
def steps_that_are_broken_off(record):
    model = network()
    optimizer = sgd(model)
    given = batches()
    with record(model=model, optimizer=optimizer) as recording:
        for begin in range(0, STEPS, 7):
            for number, (x, y) in enumerate(recording.steps(given[begin:])):
                recording.log(loss=update(model, optimizer, x, y))
                if number == 6:
                    break
    return model


#: torch itself takes another way backward through these where a mode of its dispatcher is in force.
OTHER_BITS = {"products_with_zeros"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=pytest.mark.xfail(
                name in OTHER_BITS,
                reason="a full watch changes the bits of prod's gradient",
                strict=True,
            ),
        )
        for name in LOOPS
    ],
)
def test_steps_are_what_they_were(name, tmp_path, monkeypatch, capfd):
    function, least = LOOPS[name]
    recognized = []
    monkeypatch.setattr(Memory, "recognized", noting(Memory.recognized, recognized))

    def seeded(record):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        return function(record)

    expected = seeded(unrecorded)
    model = seeded(lambda **parts: everystep.record(run=tmp_path / "run", **parts))
    assert [bits(t) for t in model.state_dict().values()] == [
        bits(t) for t in expected.state_dict().values()
    ]
    run = everystep.open(tmp_path / "run")
    found = run.verify(processes=1, progress=False)
    err = capfd.readouterr().err
    assert found.is_exact, found
    assert "other operations than before" not in err
    assert len(recognized) >= least
    assert run[11].is_exact


def noting(function, calls):
    def noted(*args):
        calls.append(args)
        return function(*args)

    return noted


def departs_in_the_forward_pass(model, optimizer, x, y, departs):
    h = model[:2](x)
    return descend(optimizer, functional.mse_loss(model[2:](h.relu() if departs else h), y))


def departs_before_the_backward_pass(model, optimizer, x, y, departs):
    loss = functional.mse_loss(model(x), y)
    return descend(optimizer, loss + model[0].weight.pow(2).sum() if departs else loss)


def departs_after_the_backward_pass(model, optimizer, x, y, departs):
    loss = functional.mse_loss(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    if departs:
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    return loss


def departs_in_the_optimizer(model, optimizer, x, y, departs):
    optimizer.param_groups[0]["weight_decay"] = 0.1 if departs else 0
    return update(model, optimizer, x, y)


@pytest.mark.parametrize(
    "body",
    [
        *(departs_in_the_forward_pass, departs_before_the_backward_pass),
        *(departs_after_the_backward_pass, departs_in_the_optimizer),
    ],
)
def test_a_step_that_departs_has_the_operations_that_it_would_have_in_full(body, tmp_path, monkeypatch):
    resumed = []
    monkeypatch.setattr(Recognizer, "resume", noting(Recognizer.resume, resumed))

    def recorded(name):
        torch.manual_seed(0)
        trained(
            lambda **parts: everystep.record(run=tmp_path / name, **parts),
            lambda m, o, x, y, n: body(m, o, x, y, n in (7, 11)),
        )
        return everystep.open(tmp_path / name)

    def operations(run, step):
        found = [seen.operation for seen in run[step].operations]
        return [(o.operator, o.phase, o.arguments, o.results) for o in found]

    run = recorded("recognised")
    assert len(resumed) == 2  # what a step does after it departs is not remembered
    assert run.verify(processes=1, progress=False).is_exact
    monkeypatch.setattr(Memory, "plan", lambda memory, step: "watch")
    full = recorded("full")
    for step in (6, 7, 10, 11, 12):
        assert operations(run, step) == operations(full, step)
