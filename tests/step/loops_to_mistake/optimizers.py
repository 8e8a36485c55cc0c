"""Loops with each optimizer of torch's, one foreach and two fused; hooks, and updates by hand."""

import torch
from tests.step.loops_to_mistake.loop import STEPS, Loops, batches, network, trained, update
from torch import nn
from torch.nn import functional
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import everystep

__all__ = ["OPTIMIZER_LOOPS"]

OPTIMIZER_LOOPS = loop = Loops()

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.05, amsgrad=True, maximize=True),
    "Adam foreach": lambda p: torch.optim.Adam(p, lr=0.05, foreach=True, weight_decay=0.1),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.05, fused=True),
    "Adam tensor": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.05)),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.05, decoupled_weight_decay=True, weight_decay=0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.05),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.05),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, lr_decay=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.05),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
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
    OPTIMIZER_LOOPS[f"optimizer {name}"] = (
        with_optimizer(make),
        0 if name == "ASGD" else 15,
    )


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
