"""Loops that change a mode of torch's."""

import contextlib
import random

import torch
from tests.step.loops_to_mistake.loop import Loops, batches, descend, network, trained, update
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["MODE_LOOPS"]

MODE_LOOPS = loop = Loops()


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

    return trained(record, body, nn.Sequential(network(), nn.Dropout(0.2)))


@loop(5)
def transforms_at_times(record):
    def body(model, optimizer, x, y, number):
        loss = update(model, optimizer, x, y)
        if number % 6 == 0:
            parameters = dict(model.named_parameters())
            found = torch.func.grad(
                lambda p: functional.mse_loss(torch.func.functional_call(model, p, (x,)), y)
            )(parameters)
            ones = torch.ones(6)
            value, tangent = torch.func.jvp(lambda w: (x @ w).pow(2).mean(), (ones,), (ones,))
            with torch.no_grad():
                factor = tangent / value + torch.func.vmap(model[0])(x).mean()
                for name, parameter in parameters.items():
                    parameter -= 0.01 * found[name] * factor
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


def in_the_step(record, mode):
    def body(model, optimizer, x, y, number):
        mode.is_on = number > 6
        with mode:
            return update(model, optimizer, x, y)

    return trained(record, body)


@loop(15)
def a_mode_of_functions_in_the_step(record):
    return in_the_step(record, Doubles())


@loop(0)
def a_mode_of_operators_in_the_step(record):
    return in_the_step(record, Adds())


@loop(5)
def a_device_by_default(record):
    def body(model, optimizer, x, y, number):
        torch.set_default_device("cpu" if number > 6 else None)
        try:
            return update(model, optimizer, x + torch.rand(6), y)
        finally:
            torch.set_default_device(None)

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
