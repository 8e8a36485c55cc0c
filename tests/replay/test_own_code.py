"""Runs in which the user's own code ran between steps, or at every step, replay as they were trained."""

import copy
import pickle
import random
from functools import partial

import numpy as np
import pytest
import torch
from tests.training.by_hand import bits, by_hand, by_train, contents, new_training
from tests.training.published_optimizers import new_published_training
from torch import nn, optim
from torch.optim import lr_scheduler

import everystep
from everystep import numerics

STEPS = 40


def with_dropout():
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.BatchNorm1d(8), nn.Linear(8, 2))


new = partial(new_training, with_dropout)


def verified(run):
    """Open a run again, without the objects that trained it; assert that all of it replays."""
    opened = everystep.open(run.directory)
    found = opened.verify(processes=1, progress=False)
    assert found.is_exact, found
    for number in (STEPS // 2 + 1, 3, STEPS):
        assert opened[number].is_exact
        assert opened[number].loss == run.losses["loss"][number - 1]
    return opened


# Metrics.


def clamps(made):
    with torch.no_grad():
        made.model[0].weight.clamp_(-0.2, 0.2)


def resets_a_buffer(made):
    made.model[2].running_mean.zero_()


def draws(made):
    torch.rand(3)
    random.random()
    np.random.rand()


def clears_momentum(made):
    for entries in made.optimizer.state.values():
        entries["momentum_buffer"].zero_()


def decays_more(made):
    made.optimizer.param_groups[0]["weight_decay"] += 0.01


def freezes(made):
    made.model[0].requires_grad_(False)


def unfreezes(made):
    made.model[0].requires_grad_(True)


def drops_less(made):
    made.model[1].p *= 0.9


def exchanges(made):
    made.model[3].weight.data = made.model[3].weight.data * 0.5


def replaces(made):
    layer, group = made.model[3], made.optimizer.param_groups[0]
    other = nn.Parameter(layer.bias.detach() * 2)
    group["params"] = [other if each is layer.bias else each for each in group["params"]]
    layer.bias = other


METRICS = [
    *(clamps, resets_a_buffer, draws, clears_momentum, decays_more, exchanges, drops_less, replaces)
]


@pytest.mark.parametrize("change", METRICS, ids=lambda each: each.__name__)
@pytest.mark.parametrize("times", [1, 3])
def test_what_a_metric_changes_is_part_of_the_run(change, times, capfd):
    def make():
        made, left = new(), [times]

        def metric(prediction, target):
            if left[0]:
                left[0] -= 1
                change(made)
            return 0.0

        made.metrics = {"mine": metric}
        return made

    expected = make()
    losses = by_hand(expected, steps=STEPS, evaluate_every=10)
    made = make()
    run = by_train(made, steps=STEPS, evaluate_every=10)
    assert run.losses["loss"].to_list() == losses
    assert contents(made) == contents(expected)
    assert run.facts.training.engine.reason is None
    verified(run)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("batch_size", [None, 8])
def test_data_that_a_metric_writes_into_is_kept_from_there_on(batch_size, capfd):
    def make():
        made = new()

        def metric(prediction, target):
            made.x.mul_(1.01)
            return 0.0

        made.metrics = {"mine": metric}
        return made

    settings = {"steps": STEPS, "evaluate_every": 10, "batch_size": batch_size}
    losses = by_hand(make(), **settings)
    run = by_train(make(), **settings)
    assert run.losses["loss"].to_list() == losses
    verified(run)
    err = capfd.readouterr().err
    assert (
        "from step 11 on: your code changes the data" in err and "begin with the data as it was" in err
    )


def test_a_layer_that_a_metric_freezes_and_unfreezes_replays():
    made = new(optimizer=partial(optim.AdamW, lr=0.01))
    calls = iter([freezes, unfreezes])
    metrics = {"mine": lambda p, t: next(calls, lambda made: None)(made) or 0.0}
    run = by_train(made, steps=STEPS, metrics=metrics, evaluate_every=10)
    assert run.facts.training.engine.reason is None
    opened = verified(run)
    assert bits(opened[15].updates["0.weight"].after) == bits(opened[15].updates["0.weight"].before)
    assert bits(opened[25].updates["0.weight"].after) != bits(opened[25].updates["0.weight"].before)


def sets_lr(made):
    lr = made.optimizer.param_groups[0]["lr"]
    if isinstance(lr, torch.Tensor):
        lr.mul_(0.5)
    else:
        made.optimizer.param_groups[0]["lr"] = lr * 0.5


def sets_all(made):
    for group in made.optimizer.param_groups:
        group["maximize"] = not group["maximize"]
        group["weight_decay"] += 0.1
        if "betas" in group:
            group["betas"] = (0.5, 0.9)


@pytest.mark.parametrize("change", [sets_lr, sets_all], ids=lambda each: each.__name__)
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "fused", "tensor lr", "SGD tensor lr"])
def test_what_a_metric_sets_of_the_optimizer_is_recorded(change, optimizer):
    def make():
        made, calls = new(optimizer=OPTIMIZERS[optimizer]), [0]

        def metric(prediction, target):
            calls[0] += 1
            if calls[0] in (2, 4):
                change(made)
            return 0.0

        made.metrics = {"mine": metric}
        return made

    expected, made = make(), make()
    torch.manual_seed(1)
    losses = by_hand(expected, steps=STEPS, evaluate_every=7)
    torch.manual_seed(1)
    run = by_train(made, steps=STEPS, evaluate_every=7)
    assert run.losses["loss"].to_list() == losses
    verified(run)


HOOKS = {
    "weight": lambda made: made.model[0].weight.register_hook(lambda gradient: 3 * gradient),
    "post": lambda made: made.model[0].weight.register_post_accumulate_grad_hook(
        lambda weight: (weight.grad.mul_(3), None)[1]
    ),
    "optimizer": lambda made: made.optimizer.register_step_pre_hook(
        lambda *_: (made.model[0].weight.grad.mul_(3), None)[1]
    ),
}


@pytest.mark.parametrize("name", HOOKS)
def test_steps_with_a_hook_open_and_are_continued_only_with_the_hook(name):
    expected, made = new(), new()
    HOOKS[name](expected)
    HOOKS[name](made)
    torch.manual_seed(1)
    losses = by_hand(expected, steps=STEPS)
    torch.manual_seed(1)
    run = by_train(made, steps=STEPS)
    assert run.losses["loss"].to_list() == losses
    verified(run)
    with pytest.raises(everystep.RunError, match="has a hook, which acts on the original alone"):
        run.fork(3, steps=STEPS, progress=False)


def test_steps_that_become_eager_replay():
    def make():
        made, calls = new(), [0]

        def metric(prediction, target):
            calls[0] += 1
            if calls[0] == 2:
                made.model[0].register_forward_hook(lambda *_: None)
            return 0.0

        made.metrics = {"mine": metric}
        return made

    run = by_train(make(), steps=STEPS, evaluate_every=10)
    assert run.facts.training.engine.eager_from == 21
    verified(run)


# Schedules.


class Everything(lr_scheduler.LRScheduler):
    """Sets whatever a param group has, and now and then a parameter."""

    def get_lr(self):
        for group in self.optimizer.param_groups:
            group["weight_decay"] = 0.001 * self.last_epoch
            if "betas" in group:
                group["betas"] = (0.9, 1 - 0.01 / (1 + self.last_epoch))
            if "momentum" in group:
                group["momentum"] = 0.9 - 0.005 * self.last_epoch
        if self.last_epoch % 7 == 3:
            with torch.no_grad():
                self.optimizer.param_groups[0]["params"][0].mul_(0.99)
        return [0.01 / (1 + self.last_epoch) for _ in self.optimizer.param_groups]


OPTIMIZERS = {
    "SGD": partial(optim.SGD, lr=0.01, momentum=0.9, nesterov=True),
    "AdamW": partial(optim.AdamW, lr=0.01),
    "fused": partial(optim.AdamW, lr=0.01, fused=True),
    "SGD tensor lr": lambda parameters: optim.SGD(parameters, lr=torch.tensor(0.01), momentum=0.9),
    "tensor lr": lambda parameters: optim.Adam(parameters, lr=torch.tensor(0.01), capturable=False),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "schedule", [Everything, partial(lr_scheduler.StepLR, step_size=5, gamma=0.7)], ids=["own", "StepLR"]
)
def test_what_a_schedule_sets_is_recorded_by_step(optimizer, schedule):
    parts = {"optimizer": OPTIMIZERS[optimizer], "schedule": schedule}
    expected = new(**parts)
    losses = by_hand(expected, steps=STEPS)
    made = new(**parts)
    run = by_train(made, steps=STEPS)
    assert run.losses["loss"].to_list() == losses
    assert contents(made) == contents(expected)
    verified(run)
    if schedule is Everything:
        assert run.measured("optimizer.weight_decay")[STEPS] == 0.001 * (STEPS - 1)


# Optimizers with state of their own.


class Averaging(optim.SGD):
    """Keeps averages, a count, a generator, and gradients of the last step in attributes of its own."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr=lr)
        self.averages = [p.detach().clone() for p in self.param_groups[0]["params"]]
        self.calls, self.kept, self.generator = 0, [], torch.Generator().manual_seed(5)

    @torch.no_grad()
    def step(self, closure=None):
        self.calls += 1
        for p, kept in zip(self.param_groups[0]["params"], self.kept, strict=False):
            p.grad.add_(kept, alpha=0.1)
        self.kept = [p.grad for p in self.param_groups[0]["params"]]
        super().step()
        for p, average in zip(self.param_groups[0]["params"], self.averages, strict=True):
            average.lerp_(p, 1 / (1 + self.calls))
            p.add_(torch.randn(p.shape, generator=self.generator), alpha=1e-3)


class Accumulating(optim.SGD):
    """Updates every third step, with the gradients of all three."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr=lr, momentum=0.9)
        self.calls = 0

    def zero_grad(self, set_to_none=True):
        if self.calls % 3 == 0:
            super().zero_grad(set_to_none)

    def step(self, closure=None):
        self.calls += 1
        if self.calls % 3 == 0:
            super().step()


OWN = {"averaging": partial(Averaging, lr=0.05), "accumulating": partial(Accumulating, lr=0.05)}


@pytest.mark.parametrize("optimizer", OWN)
def test_an_optimizer_with_state_of_its_own_opens_verifies_and_forks(optimizer):
    expected = new(optimizer=OWN[optimizer])
    losses = by_hand(expected, steps=STEPS)
    made = new(optimizer=OWN[optimizer])
    run = by_train(made, steps=STEPS)
    assert run.losses["loss"].to_list() == losses
    assert contents(made) == contents(expected)
    assert "is not one of torch's optimizers" in run.facts.training.engine.reason
    verified(run)
    fork = run.fork(13, steps=STEPS, progress=False)
    assert fork.losses["loss"].to_list() == losses
    assert made.optimizer.calls == STEPS


@pytest.mark.parametrize(
    "name", ["pytorch_optimizer.SOAP", "pytorch_optimizer.Lookahead", "pytorch_optimizer.Ranger21"]
)
def test_published_optimizers_replay_from_the_middle(name):
    run = by_train(new_published_training(name), steps=STEPS, snapshot_budget=10**9)
    verified(run)


# Models that carry something.


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.calls = nn.Linear(4, 2), 0

    def forward(self, x):
        self.calls += 1
        return self.inner(x) * (1 + 0.01 * self.calls)


def test_an_unchanged_fork_of_a_counting_model_is_exact_or_refused():
    made = new_training(Counting)
    run = by_train(made, steps=20)
    try:
        fork = run.fork(10, steps=20, progress=False)
    except everystep.EverystepError as error:
        assert "cannot be restored" in str(error)
    else:
        assert fork.losses.equals(run.losses)


def test_a_counting_model_is_verified_without_counting():
    made = new_training(Counting)
    run = by_train(made, steps=STEPS)
    verified(run)
    assert made.model.calls == STEPS


def test_weights_that_a_metric_ties_replay():
    made = new_training(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)))
    made.loss = reading

    def metric(prediction, target):
        made.model[1].weight = made.model[0].weight
        return 0.0

    made.metrics = {"mine": metric}
    verified(by_train(made, steps=STEPS, evaluate_every=5))


def reading(prediction, target):
    """A loss that reads a number, so that no program repeats its steps."""
    return nn.functional.mse_loss(prediction, target) * (1 + 0 * prediction.sum().item())


@pytest.mark.parametrize("optimizer", [*OWN.values(), partial(optim.Adam, lr=0.01)])
def test_what_was_trained_can_be_copied_and_trained_again(optimizer):
    expected, made = new(optimizer=optimizer), new(optimizer=optimizer)
    torch.manual_seed(2)
    by_hand(expected, steps=5)
    torch.manual_seed(2)
    by_train(made, steps=5)
    model = copy.deepcopy(made.model)
    assert pickle.loads(pickle.dumps(made.model)).state_dict().keys() == model.state_dict().keys()
    # It goes on as if it had never been here.
    torch.manual_seed(1)
    losses = by_hand(expected, steps=5)
    torch.manual_seed(1)
    run = by_train(made, steps=5)
    assert run.losses["loss"].to_list() == losses
    assert contents(made) == contents(expected)


def test_a_training_within_a_metric_is_a_training_of_its_own():
    inner = []

    def metric(prediction, target):
        with numerics.in_force(1), torch.enable_grad():
            state = torch.get_rng_state()
            inner.append(by_train(new(), steps=7, directory=f"inner-{len(inner)}"))
            torch.set_rng_state(state)
        return 0.0

    expected = by_hand(new(), steps=20)
    run = by_train(new(), steps=20, metrics={"mine": metric}, evaluate_every=10)
    assert run.losses["loss"].to_list() == expected
    assert inner[0].losses["loss"].to_list() == expected[:7]


def test_nothing_of_torchs_may_be_in_force_around_the_call():
    made = new()
    for around, name in [
        (torch.autocast("cpu", torch.bfloat16), "torch.autocast"),
        (torch.device("meta"), "the default device is meta here"),
        (torch.inference_mode(), "torch.inference_mode"),
        (torch.no_grad(), r"torch.no_grad\(\)"),
    ]:
        with around, pytest.raises(everystep.UsageError, match=name):
            by_train(made, steps=3)
