"""Loops that fail, break off, evaluate, or run in another thread."""

import contextlib
import threading

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

__all__ = ["CONTROL_LOOPS"]

CONTROL_LOOPS = loop = Loops()


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


@loop(10)
def the_next_batch_by_hand(record):
    model = network()
    optimizer = sgd(model)
    with record(model=model, optimizer=optimizer) as recording:
        given = iter(recording.steps(batches()))
        for _ in range(STEPS):
            recording.log(loss=update(model, optimizer, *next(given)))
    return model


@loop(10)
def a_zip_that_ends_first(record):
    model = network()
    optimizer = sgd(model)
    with record(model=model, optimizer=optimizer) as recording:
        for (x, y), _ in zip(recording.steps(batches()), range(STEPS - 2), strict=False):
            recording.log(loss=update(model, optimizer, x, y))
    return model
