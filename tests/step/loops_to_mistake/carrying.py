"""Loops with odd state and batches, and with what is carried from step to step."""

import contextlib

import numpy as np
import torch
from tests.step.loops_to_mistake.loop import (
    STEPS,
    Loops,
    batches,
    descend,
    network,
    sgd,
    trained,
    update,
)
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune

__all__ = ["CARRYING_LOOPS"]

CARRYING_LOOPS = loop = Loops()


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


@loop(11)
def a_result_in_the_place_of_what_is_from_elsewhere(record):
    outside = torch.ones(8, 6)

    def body(model, optimizer, x, y, number):
        own = x * 2
        h = own if number % 9 == 0 else outside
        g = h + 1
        own.mul_(2)
        return update(model, optimizer, own + g + h * 3, y)

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


@loop(5)
def updates_between_the_steps(record):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    best = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with record(model=model, optimizer=optimizer) as recording:
        for number, (x, y) in enumerate(batches()):
            with recording.step((x, y)):
                loss = functional.mse_loss(model(x), y)
                loss.backward()
                recording.log(loss=loss)
            optimizer.step()
            optimizer.zero_grad()
            if number == 4:
                model.load_state_dict(best)
    return model


@loop(5)
def layers_that_come_and_go(record):
    def body(model, optimizer, x, y, number):
        if number == 8:
            model.append(nn.Linear(3, 3))
            optimizer.add_param_group({"params": model[-1].parameters()})
        if number == 12:
            prune.l1_unstructured(model[0], "weight", 0.3)
        return update(model, optimizer, x, y)

    return trained(record, body)


@loop(0)
def results_into_given_tensors(record):
    def body(model, optimizer, x, y, number):
        empty, full = torch.empty(0), torch.zeros(8, 6)
        torch.mul(x, 2, out=empty)
        torch.add(x, 1, out=full)
        return update(model, optimizer, x + empty + full, y)

    return trained(record, body)
