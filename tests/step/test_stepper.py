"""By program or eagerly: which step is taken how, and what becomes of a program that does not hold."""

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
