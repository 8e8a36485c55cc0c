"""Loops that do what torch's functions do not show."""

import torch
from tests.step.loops_to_mistake.loop import Loops, descend, trained, update
from torch.nn import functional

__all__ = ["HIDDEN_LOOPS"]

HIDDEN_LOOPS = loop = Loops()


@loop(2)
def temporaries_that_are_written_out_of_sight(record):
    def body(model, optimizer, x, y, number):
        h = x * 2
        if number > 5:
            with torch._C.DisableTorchFunction():
                h.add_(1)
        return update(model, optimizer, h, y)

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


def accumulator(parameter):
    return parameter.view_as(parameter).grad_fn.next_functions[0][0]


#: Nodes are kept, since nothing else of Python's holds them.
NODES = []


def hook_a_node(model):
    NODES[:] = [accumulator(model[0].weight)]
    NODES[0].register_prehook(lambda g: (g[0] * 2,))


def double_gradient(parameter):
    parameter.grad.mul_(2)


HOOKS = {
    "a parameter": lambda model: model[0].weight.register_hook(lambda g: g * 2),
    "a gradient": lambda model: model[0].weight.register_post_accumulate_grad_hook(double_gradient),
    "a node": hook_a_node,
}


def hooked_on_the_way(register):
    def between(model, optimizer, number):
        if number == 10:
            register(model)

    return lambda record: trained(record, lambda m, o, x, y, n: update(m, o, x, y), between=between)


HIDDEN_LOOPS |= {f"a hook on {name}": (hooked_on_the_way(hook), 5) for name, hook in HOOKS.items()}


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
