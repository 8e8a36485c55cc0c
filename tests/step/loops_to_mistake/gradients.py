"""Loops that do something odd with gradients."""

import torch
from tests.step.loops_to_mistake.loop import Loops, batches, descend, network, trained, update
from torch import nn
from torch.nn import functional

__all__ = ["GRADIENT_LOOPS"]

GRADIENT_LOOPS = loop = Loops()


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
