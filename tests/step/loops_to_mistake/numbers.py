"""Loops with numbers that Python has, or reads."""

import random

import torch
from tests.step.loops_to_mistake.loop import Loops, batches, descend, network, sgd, trained, update
from torch import nn
from torch.nn import functional

__all__ = ["NUMBER_LOOPS"]

NUMBER_LOOPS = loop = Loops()


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
def generators_that_are_forked(record):
    def body(model, optimizer, x, y, number):
        with torch.random.fork_rng():
            torch.manual_seed(number)
            x = x + torch.randn_like(x)
        torch.randn(3, generator=torch.default_generator)
        return update(model, optimizer, x + torch.randn_like(x), y)

    return trained(record, body)


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
def rows_that_a_tensor_picks(record):
    def body(model, optimizer, x, y, number):
        place = (x[0, 0] * 0).long() + (number % 7 if number > 5 else 1)
        h = x + x[place] + x.narrow(0, place, 1)
        return update(model, optimizer, h, y)

    return trained(record, body)
