"""At which steps a program is compared with Python."""

import pytest

from everystep.step.check_plan import CheckPlan


def test_vouched_steps_are_checked_at_powers_of_two_until_they_are_far_enough_apart(checks_in_time):
    plan = CheckPlan(is_vouched=True)
    plan.captured(1, seconds=0.003)
    plan.timed(1, 0.001)
    steps = []
    for _ in range(14):
        steps.append(plan.next)
        plan.passed(plan.next, seconds=0.005)
    interval = 512  # 0.005 s of each 0.512 s
    assert steps[:9] == [2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert steps[9:] == [512 + n * interval for n in range(1, 6)]


@pytest.mark.parametrize("is_vouched", [False, True])
def test_checks_of_heavy_steps_take_a_hundredth_of_the_time_from_the_first(checks_in_time, is_vouched):
    plan = CheckPlan(is_vouched=is_vouched)
    plan.captured(1, seconds=0.03)
    plan.passed(2, seconds=0.05)  # no step was timed by itself: half a check is taken for one
    assert plan.next == 2 + 256
    plan.timed(100, 2.5)
    plan.passed(258, seconds=0.05)
    assert plan.next == 258 + 256


def test_checks_of_torchs_own_steps_take_a_hundredth_of_the_time_from_the_first(checks_in_time):
    plan = CheckPlan()
    plan.passed(2, seconds=0.002)
    plan.timed(1, 0.001)
    assert (plan.next, plan.until(100), plan.until(202)) == (258, 101, 202)


def test_the_last_step_is_checked_where_that_is_cheap(checks_in_time):
    plan = CheckPlan()
    plan.passed(2, seconds=0.05)
    plan.timed(1, 0.02)
    assert (plan.until(100), plan.until(252)) == (101, 252)  # a hundredth of 250 steps
    plan = CheckPlan(is_vouched=True)
    plan.passed(2, seconds=0.005)
    assert (plan.until(3), plan.until(100)) == (3, 4)
