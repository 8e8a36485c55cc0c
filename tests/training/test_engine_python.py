"""Where no program can stand in for Python, training goes on eagerly, and is the loop's all the same."""

import random
from collections import deque
from functools import partial
from itertools import count

import numpy as np
import pytest
import torch
from tests.training.by_hand import (
    Changed,
    assert_eager,
    assert_same,
    by_hand,
    by_train,
    mlp,
    new_training,
)
from torch import nn
from torch.nn.modules import module as torch_modules
from torch.optim import optimizer as torch_optimizer

DATA_DEPENDENT = {
    "if": (lambda _, h: h if h.sum() > 0 else 2 * h, "_local_scalar_dense"),
    "item": (lambda _, h: h / h.detach().abs().max().item(), "_local_scalar_dense"),
    "numpy": (lambda _, h: h * float(h.detach().numpy().max()), "Tensor.numpy"),
    "asarray": (lambda _, h: h * float(np.asarray(h.detach()).max()), "Tensor.__array__"),
    "tolist": (lambda _, h: h * max(h[0].tolist()), "Tensor.tolist"),
    "mask": (lambda _, h: h + h[h > 0].mean(), "selects by a mask"),
    "nonzero": (lambda _, h: h + h.detach().gt(0).nonzero().sum(), "nonzero"),
    "unique": (lambda _, h: h * len(h.detach().round().unique()), "unique"),
}


@pytest.mark.parametrize("kind", DATA_DEPENDENT)
def test_what_numbers_decide_runs_in_python(kind, capfd):
    change, reason = DATA_DEPENDENT[kind]
    run = assert_same(lambda: new_training(lambda: Changed(change)), 50)
    assert_eager(run, capfd, 1, reason)


DRAWING = {
    "random": (lambda _, h: h * random.random(), "Python's random generator"),
    "numpy": (lambda _, h: h * np.random.rand(), "NumPy's random generator"),
    "seed": (lambda _, h: h * torch.rand(2, generator=torch.manual_seed(1)), "Generator"),
    "reseeded": (lambda _, h: (torch.manual_seed(1), nn.functional.dropout(h))[1], "other bits"),
}


@pytest.mark.parametrize("kind", DRAWING)
def test_other_generators_than_torchs_draw_in_python(kind, capfd):
    change, reason = DRAWING[kind]
    run = assert_same(lambda: new_training(lambda: Changed(change)), 50)
    assert_eager(run, capfd, 1, reason)


def test_a_generator_of_the_models_own_is_drawn_from_in_python(capfd):
    def make():
        def change(model, h):
            return h + torch.randn(2, generator=model.generator)

        model = Changed(change)
        model.generator = torch.Generator().manual_seed(1)
        return model

    assert_eager(assert_same(lambda: new_training(make), 50), capfd, 1, "generator of the model")


# What is carried from step to step and is no tensor: a count of calls. At the hundredth, all changes.

CALLS = []


class Slots:
    __slots__ = ("calls",)

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return self.calls


class Attribute:
    calls = 0

    def __call__(self):
        self.calls += 1
        return self.calls


class OfTheClass:
    calls = 0

    def __call__(self):
        type(self).calls += 1
        return type(self).calls


class Nested:
    def __init__(self):
        self.inner = {"a": [{"b": Slots()}]}

    def __call__(self):
        return self.inner["a"][0]["b"]()


class OfALongQueue:
    def __init__(self):
        self.calls = deque(maxlen=1000)

    def __call__(self):
        self.calls.append(1)
        return len(self.calls)


class Unregistered:
    """A module that is in no other module's care."""

    def __init__(self):
        self.helpers = [nn.Identity()]
        self.helpers[0].calls = 0

    def __call__(self):
        self.helpers[0].calls += 1
        return self.helpers[0].calls


def of_a_global():
    CALLS.clear()

    def counted():
        CALLS.append(1)
        return len(CALLS)

    return counted


def of_a_default():
    def counted(calls=[0]):  # noqa: B006
        calls[0] += 1
        return calls[0]

    counted.__defaults__ = ([0],)
    return counted


def of_a_closure():
    calls = 0

    def counted():
        nonlocal calls
        calls += 1
        return calls

    return counted


def of_an_iterator():
    return partial(next, count(1))


def of_a_generator():
    def counting():
        calls = 0
        while True:
            calls += 1
            yield calls

    return partial(next, counting())


def of_a_class():
    OfTheClass.calls = 0
    return OfTheClass()


COUNTERS = {
    "attribute": Attribute,
    "slots": Slots,
    "class": of_a_class,
    "nested": Nested,
    "queue": OfALongQueue,
    "unregistered module": Unregistered,
    "global": of_a_global,
    "default": of_a_default,
    "closure": of_a_closure,
    "iterator": of_an_iterator,
    "generator": of_a_generator,
}


def doubled_from(hundredth, counted, h):
    return 2 * h if counted() >= hundredth else h


@pytest.mark.parametrize("kind", COUNTERS)
def test_a_model_that_counts_its_calls_runs_in_python(kind, capfd):
    def make():
        counted = COUNTERS[kind]()
        return Changed(lambda _, h: doubled_from(100, counted, h))

    assert_eager(assert_same(lambda: new_training(make), 110), capfd, 1, "change of the model changes")


@pytest.mark.parametrize("kind", ["attribute", "global", "closure", "generator"])
def test_a_loss_that_counts_its_calls_runs_in_python(kind, capfd):
    def make():
        counted, loss = COUNTERS[kind](), nn.MSELoss()
        return lambda p, t: doubled_from(100, counted, loss(p, t))

    assert_eager(assert_same(lambda: new_training(loss=make), 110), capfd, 1, "the loss holds changes")


@pytest.mark.parametrize("kind", ["an activation", "a cache"])
def test_what_a_model_keeps_for_itself_is_kept_at_every_step(kind, capfd):
    def change(model, h):
        if kind == "an activation" or model.kept is None:
            model.kept = h.detach()
        return h

    def make():
        model = Changed(change)
        model.kept = None
        return model

    run = assert_same(lambda: new_training(make), 50)
    assert_eager(run, capfd, 1, "kept of the model changes")


def test_what_is_known_to_change_keeps_nobody_from_a_program(capfd):
    """The parameters and the optimizer, held by the loss and by the model, as for a penalty."""

    def make():
        trained, mse = new_training(), nn.MSELoss()
        parameters = [*trained.model.parameters()]
        trained.model[0].held = parameters
        trained.model.optimizer = trained.optimizer
        trained.loss = lambda p, t: mse(p, t) + 0.01 * sum(q.square().sum() for q in parameters)
        return trained

    run = assert_same(make, 50)
    assert run.facts["engine"]["reason"] is None
    assert capfd.readouterr().err == ""


def test_a_model_that_changes_its_dropout_runs_in_python(capfd):
    def make():
        def change(model, h):
            model.dropout.p *= 0.99
            return model.dropout(h)

        model = Changed(change)
        model.dropout = nn.Dropout(0.5)
        return model

    assert_eager(assert_same(lambda: new_training(make), 50), capfd, 1, "p of module dropout changes")


# Hooks.


def hook_forward(trained, called):
    return trained.model[0].register_forward_hook(lambda *_: called())


def hook_forward_before(trained, called):
    return trained.model[0].register_forward_pre_hook(lambda *_: called())


def hook_backward(trained, called):
    return trained.model[2].register_full_backward_hook(lambda *_: called())


def hook_gradient(trained, called):
    return trained.model[0].weight.register_hook(lambda *_: called())


def hook_accumulated(trained, called):
    return trained.model[0].weight.register_post_accumulate_grad_hook(lambda *_: called())


def hook_before_update(trained, called):
    return trained.optimizer.register_step_pre_hook(lambda *_: called())


def hook_after_update(trained, called):
    return trained.optimizer.register_step_post_hook(lambda *_: called())


def hook_loss(trained, called):
    return trained.loss.register_forward_hook(lambda *_: called())


def hook_all_modules(trained, called):
    return torch_modules.register_module_forward_hook(
        lambda module, *_: called() if module is trained.model else None
    )


def hook_all_optimizers(trained, called):
    return torch_optimizer.register_optimizer_step_post_hook(lambda *_: called())


HOOKS = {
    hook_forward: "module 0 has a forward hook",
    hook_forward_before: "module 0 has a forward hook",
    hook_backward: "module 2 has a backward hook",
    hook_gradient: "0.weight has a hook on its gradient",
    hook_accumulated: "0.weight has a hook on its gradient",
    hook_before_update: "the optimizer has a hook",
    hook_after_update: "the optimizer has a hook",
    hook_loss: "the loss has a forward hook",
    hook_all_modules: "a hook on all modules",
    hook_all_optimizers: "the optimizer has a hook",
}


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_are_called_at_every_step(hook, capfd):
    calls = []
    trained = new_training()
    handle = hook(trained, lambda: calls.append(1))
    try:
        run = by_train(trained, steps=20)
    finally:
        handle.remove()
    assert len(calls) == 20
    assert_eager(run, capfd, 1, HOOKS[hook])
    assert run.losses["loss"].to_list() == by_hand(new_training(), steps=20)


def test_a_hook_that_forward_hangs_on_an_activation_is_part_of_the_program():
    def change(_, h):
        h.register_hook(lambda gradient: 2 * gradient)
        return h

    run = assert_same(lambda: new_training(lambda: Changed(change)), 50)
    assert run.facts["engine"]["reason"] is None


def test_a_forward_that_was_exchanged_runs_at_every_step(capfd):
    def make():
        model = mlp()
        inner = model[0].forward
        model[0].calls = 0

        def forward(x):
            model[0].calls += 1
            return inner(x) * (2 if model[0].calls >= 30 else 1)

        model[0].forward = forward
        return model

    assert_eager(
        assert_same(lambda: new_training(make), 50), capfd, 1, "forward of module 0 has been exchanged"
    )
