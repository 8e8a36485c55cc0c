"""Where no program can stand in for Python, training goes on eagerly, and is the loop's all the same."""

import random

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

CALLS = []


def tried(_, h):
    try:
        return h * 2
    finally:
        pass


def counted(_, h):
    global CALLS
    CALLS = [*CALLS, 1]
    return h


#: What a forward does to its module and to what it gives, and a part of the reason that is given for it.
REASONS = {
    "if": (lambda _, h: h if h.sum() > 0 else 2 * h, "`h.sum() > 0` branches on a number in a tensor"),
    "item": (lambda _, h: h / h.detach().abs().max().item(), "calls Tensor.item"),
    "numpy": (lambda _, h: h * float(h.detach().numpy().max()), "calls Tensor.numpy"),
    "asarray": (lambda _, h: h * float(np.asarray(h.detach()).max()), "calls asarray"),
    "tolist": (lambda _, h: h * max(h[0].tolist()), "calls Tensor.tolist"),
    "mask": (lambda _, h: h + h[h > 0].mean(), "selects by a mask"),
    "nonzero": (lambda _, h: h + h.detach().gt(0).nonzero().sum(), "calls Tensor.nonzero"),
    "unique": (lambda _, h: h * len(h.detach().round().unique()), "calls Tensor.unique"),
    "random": (lambda _, h: h * random.random(), "`random.random()` calls random"),
    "attribute": (lambda m, h: h * m.__dict__.setdefault("a", 1), "reads __dict__"),
    "try": (tried, "uses try"),
    "global": (counted, "declares a global"),
    "list": (lambda _, h: h * len(CALLS.append(1) or CALLS), "changes a list from before"),
    "generator": (lambda m, h: h + torch.randn(2, generator=m.generator), "passes a Generator"),
}


@pytest.mark.parametrize("kind", REASONS)
def test_python_that_is_not_proven_runs_at_every_step_and_the_reason_is_said_once(kind, capfd):
    change, reason = REASONS[kind]

    def make():
        CALLS.clear()
        model = Changed(change)
        model.generator = torch.Generator().manual_seed(1)
        return model

    run = assert_same(lambda: new_training(make), 20)
    assert_eager(run, capfd, 1, reason)
    assert ".py:" in run.facts.training.engine.reason or kind == "mask"


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
    assert run.facts.training.engine.reason is None
    assert capfd.readouterr().err == ""


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
    hook_all_modules: "a hook on all modules or optimizers",
    hook_all_optimizers: "a hook on all modules or optimizers",
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
        assert_same(lambda: new_training(make), 50), capfd, 1, "a Linear, where forward was replaced"
    )
