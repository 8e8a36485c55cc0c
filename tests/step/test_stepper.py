"""By program or eagerly: which step is taken how, and what becomes of a program that does not hold."""

import pytest
import torch
from tests.conftest import stepper_of
from torch import nn

from everystep.errors import TrainingError
from everystep.step import advance, verified
from everystep.step.verified import CheckPlan


def take(stepper, steps, stretch=1000):
    """Take all steps; return the losses, those that became void replaced."""
    losses = {}
    while stepper.step < steps:
        stepper.advance(min(stepper.step + stretch, steps))
        first, values = stepper.collect()
        losses |= dict(enumerate(values.tolist(), start=first))
    stepper.finish()
    return list(losses.values())


def test_it_is_checked_at_powers_of_two_and_at_the_last_step(small, make_trainee):
    stepper = stepper_of(make_trainee(*small), 300)
    take(stepper, 300)
    assert stepper.checked == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300]


def test_checks_take_a_hundredth_of_the_time_once_they_are_far_enough_apart(checks_in_time):
    plan = CheckPlan()
    plan.captured(1, seconds=0.003)
    plan.timed(1, 0.001)
    steps = []
    for _ in range(14):
        steps.append(plan.next)
        plan.passed(plan.next, seconds=0.005)
    interval = 512  # 0.005 s of each 0.512 s
    assert steps[:9] == [2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert steps[9:] == [512 + n * interval for n in range(1, 6)]


def test_a_check_of_a_heavy_step_keeps_to_a_hundredth_of_the_time_from_the_first(checks_in_time):
    plan = CheckPlan()
    plan.captured(1, seconds=0.03)
    plan.passed(2, seconds=0.05)  # no step was timed by itself: half a check is taken for one
    assert plan.next == 2 + 256
    plan.timed(100, 2.5)
    plan.passed(258, seconds=0.05)
    assert plan.next == 258 + 256


def test_the_last_step_is_checked_where_that_is_cheap(checks_in_time):
    plan = CheckPlan()
    plan.passed(2, seconds=0.05)
    plan.timed(1, 0.02)
    assert not plan.is_due(100, last=100) and plan.until(100) == 101
    assert plan.is_due(252, last=252) and plan.until(252) == 252  # a hundredth of 250 steps
    plan = CheckPlan()
    plan.passed(2, seconds=0.005)
    assert plan.is_due(3, last=3) and not plan.is_due(3, last=100)


def test_a_program_that_is_captured_at_a_check_counts_as_checked(checks_in_time):
    for seconds, expected in ((0.001, 4), (0.03, 2 + 256)):
        plan = CheckPlan()
        plan.captured(1, seconds)
        plan.captured(2, seconds)
        assert (plan.checked, plan.next) == ([1, 2], expected)


def test_the_program_of_a_heavy_first_step_is_not_compared(
    small, make_trainee, checks_in_time, monkeypatch
):
    monkeypatch.setattr(verified, "LIGHT_SECONDS", 0.0)
    stepper = stepper_of(make_trainee(*small), 20)
    take(stepper, 20)
    assert stepper.checked == [2]
    assert len(stepper.programs.built) == 1 and stepper.reason is None
    stepper = stepper_of(make_trainee(*small), 1)
    take(stepper, 1)
    assert stepper.checked == [1]  # the last


def test_a_short_last_batch_has_a_program_of_its_own(small, make_trainee):
    stepper = stepper_of(make_trainee(*small, batch_size=8), 30)
    take(stepper, 30)
    assert stepper.reason is None
    shapes = [built.program.tensors["x"].shape for built in stepper.programs.built]
    assert shapes == [(8, 4), (4, 4)]
    assert [rule.steps for rule in stepper.programs.rules()] == ["every", "later"]


def test_where_a_program_is_demanded_its_absence_is_an_error(small, make_trainee):
    model, x, y = small
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(TrainingError, match=r"the model has a forward hook.*auto"):
        stepper_of(make_trainee(model, x, y), 10, engine="program")


def test_losses_wait_until_they_are_collected(small, make_trainee, monkeypatch):
    monkeypatch.setattr(advance, "ROOM", 16)
    stepper = stepper_of(make_trainee(*small), 100)
    stepper.advance(100)
    assert stepper.step == 16
    assert stepper.is_full
    first, losses = stepper.collect()
    assert (first, len(losses)) == (1, 16)
    stepper.advance(20)
    first, losses = stepper.collect()
    assert (first, len(losses)) == (17, 4)


def test_the_caller_finds_the_gradients_of_the_last_step(small, make_trainee):
    model, x, y = small
    training = make_trainee(model, x, y)
    stepper = stepper_of(training, 1000)
    stepper.advance(50)  # no step at which gradients would be there from a check
    before = [p.detach().clone() for p in model.parameters()]
    stepper.finish()
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
