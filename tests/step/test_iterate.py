"""By program or eagerly: which step is taken how, and what becomes of a program that does not hold."""

import pytest
import torch
from torch import nn

from everystep.errors import TrainingError
from everystep.step import iterate
from everystep.step.iterate import Iteration
from everystep.step.verified import CheckPlan


def take(iteration, steps, stretch=1000):
    """Take all steps; return the losses, those that became void replaced."""
    losses = {}
    while iteration.step < steps:
        iteration.advance(min(iteration.step + stretch, steps))
        first, values = iteration.collect()
        losses |= dict(enumerate(values.tolist(), start=first))
    iteration.finish()
    return list(losses.values())


def test_it_is_checked_at_powers_of_two_and_at_the_last_step(small, make_trainee):
    iteration = Iteration(make_trainee(*small), 300)
    take(iteration, 300)
    assert iteration.checked == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300]


def test_checks_take_a_hundredth_of_the_time_once_they_are_far_enough_apart():
    plan = CheckPlan()
    plan.captured(1)
    plan.timed(1, 0.001)
    steps = []
    for _ in range(14):
        steps.append(plan.next)
        plan.passed(plan.next, seconds=0.005)
    interval = 512  # 0.005 s of each 0.512 s
    assert steps[:9] == [2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert steps[9:] == [512 + n * interval for n in range(1, 6)]


def test_a_short_last_batch_has_a_program_of_its_own(small, make_trainee):
    iteration = Iteration(make_trainee(*small, batch_size=8), 30)
    take(iteration, 30)
    assert iteration.reason is None
    shapes = [built.program.tensors["x"].shape for built in iteration.programs.built]
    assert shapes == [(8, 4), (4, 4)]
    assert [rule.steps for rule in iteration.programs.rules()] == ["every", "later"]


def test_where_a_program_is_demanded_its_absence_is_an_error(small, make_trainee):
    model, x, y = small
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(TrainingError, match=r"the model has a forward hook.*auto"):
        Iteration(make_trainee(model, x, y), 10, engine="program")


def test_losses_wait_until_they_are_collected(small, make_trainee, monkeypatch):
    monkeypatch.setattr(iterate, "ROOM", 16)
    iteration = Iteration(make_trainee(*small), 100)
    iteration.advance(100)
    assert iteration.step == 16
    assert iteration.is_full
    first, losses = iteration.collect()
    assert (first, len(losses)) == (1, 16)
    iteration.advance(20)
    first, losses = iteration.collect()
    assert (first, len(losses)) == (17, 4)


def test_the_caller_finds_the_gradients_of_the_last_step(small, make_trainee):
    model, x, y = small
    training = make_trainee(model, x, y)
    iteration = Iteration(training, 1000)
    iteration.advance(50)  # no step at which gradients would be there from a check
    before = [p.detach().clone() for p in model.parameters()]
    iteration.finish()
    handed_over = [p.grad.clone() for p in model.parameters()]
    lr = torch.tensor(1e-3)
    undone = [p + g * lr for p, g in zip(before, handed_over, strict=True)]
    loss = nn.MSELoss(reduction="sum")
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), undone, strict=True):
            parameter.copy_(value)
    model.zero_grad()
    loss(model(x), y).backward()
    for parameter, gradient in zip(model.parameters(), handed_over, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-5)
