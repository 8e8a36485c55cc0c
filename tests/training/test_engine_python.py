"""Python of the user's runs at every step, and is the loop's; programs repeat it where they can."""

from functools import partial, wraps

import pytest
import torch
from tests.training.by_hand import (
    Changed,
    assert_eager,
    assert_python,
    assert_same,
    by_hand,
    by_train,
    new_training,
)
from torch import nn
from torch.nn import functional
from torch.nn.modules import module as torch_modules
from torch.optim import optimizer as torch_optimizer

import everystep
from everystep.errors import EverystepError


def clamped(m, h):
    with torch.no_grad():
        m.inner[0].weight.clamp_(-0.4, 0.4)
        m.inner[2].weight.data = functional.normalize(m.inner[2].weight.data, dim=1)
    return h


def sloped(m, h):
    """Takes gradients of its own."""
    h.square().mean().backward(retain_graph=True)
    x = h.detach().requires_grad_()
    (slope,) = torch.autograd.grad(x.pow(3).sum(), x, create_graph=True)
    return h + 0.1 * slope + 0.1 * m.inner[0].weight.grad.sum()


def growing(m, h):
    """Has another layer from its eleventh call on, and unfreezes one."""
    m.calls += 1
    m.inner[0].requires_grad_(m.calls > 10)
    return m.more(h) if m.calls > 10 else h


FORWARDS = {
    "plain": lambda _, h: torch.tanh(h),
    "generator": lambda m, h: h + torch.randn(2, generator=m.generator),
    "clamped": clamped,
    "sloped": sloped,
    "growing": growing,
}


@pytest.mark.parametrize("kind", FORWARDS)
def test_python_of_the_users_runs_at_every_step_and_that_is_said_once(kind, capfd):
    def make():
        model = Changed(FORWARDS[kind])
        model.generator, model.calls = torch.Generator().manual_seed(1), 0
        model.more = nn.Linear(2, 2)
        return model

    run = assert_same(lambda: new_training(make), 20)
    assert_python(run, capfd)
    assert run.facts.training.engine.reason.startswith("the model is a Changed, which is not a torch")


class Raising(torch.optim.SGD):
    def step(self, closure=None):
        super().step(closure)
        raise ZeroDivisionError("on the way")


def test_an_optimizer_that_raises_is_named():
    made = new_training(optimizer=lambda parameters: Raising(parameters, lr=0.02))
    with pytest.raises(EverystepError, match=r"Raising\.step\(\) raises ZeroDivisionError: on the way"):
        by_train(made, steps=20)
    assert len(everystep.runs()[0]) == 0


def test_programs_run_the_steps_where_the_user_vouches():
    def made():
        return new_training(lambda: Changed(FORWARDS["plain"]))

    run = by_train(made(), steps=20, engine="program")
    assert run.losses["loss"].to_list() == by_hand(made(), steps=20)
    engine = run.facts.training.engine
    assert (engine.stands_behind, engine.reason) == ("vouched", None)
    assert "which you vouched for" in run._repr_html_()


def test_a_run_of_the_users_python_goes_on_with_the_objects_alone():
    made = new_training(lambda: Changed(FORWARDS["plain"]))
    run = everystep.open(by_train(made, steps=20).directory)
    assert run[13].operations
    with pytest.raises(everystep.UsageError, match=r"trained from Python objects.*; pass the objects"):
        run.fork(10)
    made = new_training(lambda: Changed(FORWARDS["plain"]))
    fork = run.fork(10, model=made.model, loss=made.loss, optimizer=made.optimizer, progress=False)
    assert fork.losses["loss"].to_list() == run.losses["loss"].to_list()


# Hooks.


#: How a hook is registered, and what is said of it.
HOOKS = {
    "forward": (lambda t, c: t.model[0].register_forward_hook(c), "module 0 has a forward hook"),
    "backward": (lambda t, c: t.model[2].register_full_backward_hook(c), "module 2 has a backward hook"),
    "gradient": (lambda t, c: t.model[0].weight.register_hook(c), "0.weight has a hook on its gradient"),
    "accumulated": (
        lambda t, c: t.model[0].weight.register_post_accumulate_grad_hook(c),
        "0.weight has a hook on its gradient",
    ),
    "step": (lambda t, c: t.optimizer.register_step_pre_hook(c), "the optimizer has a hook"),
    "loss": (lambda t, c: t.loss.register_forward_hook(c), "the loss has a forward hook"),
    "all modules": (
        lambda t, c: torch_modules.register_module_forward_hook(
            lambda module, *_: c() if module is t.model else None
        ),
        "a hook on all modules or optimizers",
    ),
    "all optimizers": (
        lambda t, c: torch_optimizer.register_optimizer_step_post_hook(c),
        "a hook on all modules or optimizers",
    ),
}


@pytest.mark.sweep(every=3)
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_are_called_at_every_step(hook, capfd):
    calls = []
    trained = new_training()
    register, reason = HOOKS[hook]
    handle = register(trained, lambda *_: calls.append(1))
    try:
        run = by_train(trained, steps=20)
    finally:
        handle.remove()
    assert len(calls) == 20
    assert_eager(run, capfd, 1, reason)
    assert run.losses["loss"].to_list() == by_hand(new_training(), steps=20)


class EveryTenth:
    """Calls a function; changes every tenth result."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *given, **named):
        self.calls += 1
        return self.function(*given, **named) * (1.5 if self.calls % 10 == 0 else 1.0)


def wrapped(function):
    counted = EveryTenth(function)
    return wraps(function)(lambda *given, **named: counted(*given, **named))


@pytest.mark.sweep(every=3)
@pytest.mark.parametrize("wrap", [EveryTenth, wrapped, lambda f: partial(EveryTenth(f))])
@pytest.mark.parametrize(
    ("place", "name"), [(functional, "relu"), (functional, "linear"), (torch, "tanh")]
)
def test_a_function_of_torch_that_was_replaced_runs_at_every_step(place, name, wrap, monkeypatch):
    original = getattr(place, name)

    def make():
        monkeypatch.setattr(place, name, wrap(original))
        return new_training(
            lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2), nn.Tanh())
        )

    run = assert_same(make, 30)
    assert run.facts.training.engine.reason.endswith(f"{name} was replaced")
