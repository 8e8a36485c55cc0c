"""By program or eagerly: which step is taken how, and what becomes of a program that does not hold."""

import copy

import pytest
import torch
from torch import nn

import everystep
from everystep.errors import TrainingError
from everystep.step.acceleration import CheckPlan


def take(stepper, steps):
    """Take all steps."""
    while stepper.step < steps:
        stepper.advance(steps)
        stepper.collect()
    stepper.finish()


def test_it_is_checked_at_powers_of_two_and_at_the_last_step(small, make_trainee, stepper_of):
    stepper = stepper_of(make_trainee(*small), 300)
    take(stepper, 300)
    assert stepper.checked == [2, 4, 8, 16, 32, 64, 128, 256, 300]


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


def test_the_last_step_is_checked_where_few_steps_are_run(small, make_trainee, stepper_of):
    stepper = stepper_of(make_trainee(*small), 3)
    take(stepper, 3)
    assert stepper.checked == [2, 3]


def test_a_short_last_batch_has_a_program_of_its_own(small):
    model, x, y = small
    run = everystep.train(
        model,
        (x, y),
        loss=nn.MSELoss(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        batch_size=8,
        steps=30,
        progress=False,
    )
    engine = run.facts.training.engine
    assert engine.reason is None and engine.by_program > 0
    shapes = {tuple(run[step].batch.tensors["x"].shape) for step in range(1, 4)}
    assert shapes == {(8, 4), (4, 4)}
    assert run.verify(processes=1, progress=False).is_exact


def test_where_a_program_is_demanded_its_absence_is_an_error(small, make_trainee, stepper_of):
    model, x, y = small
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(TrainingError, match=r"the model has a forward hook.*auto"):
        stepper_of(make_trainee(model, x, y), 10, engine="program")


def test_losses_wait_until_they_are_collected(small, make_trainee, stepper_of):
    stepper = stepper_of(make_trainee(*small), 100)
    stepper.advance(16)
    first, losses = stepper.collect()
    assert (first, len(losses)) == (1, 16)
    stepper.advance(20)
    first, losses = stepper.collect()
    assert (first, len(losses)) == (17, 4)


def test_the_caller_finds_the_gradients_of_the_last_step(small, make_trainee, stepper_of):
    model, x, y = small
    stepper = stepper_of(make_trainee(model, x, y), 1000)
    stepper.advance(50)  # a step that a program runs
    by_hand = copy.deepcopy(model)
    stepper.advance(51)
    stepper.finish()
    nn.MSELoss(reduction="sum")(by_hand(x), y).backward()
    for parameter, other in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)
