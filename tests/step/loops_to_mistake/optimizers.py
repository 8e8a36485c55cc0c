"""Loops with each optimizer of torch's, one foreach and two fused; hooks, and updates by hand."""

import torch
from tests.step.loops_to_mistake.loop import Loops, batches, network, trained, update
from torch.nn import functional
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

__all__ = ["OPTIMIZER_LOOPS"]

OPTIMIZER_LOOPS = loop = Loops()


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
