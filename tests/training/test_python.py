"""Whatever a user's Python does, training leaves the bits of the loop by hand, or is refused.

Each kind of Python changes what it does at a step between two checks of a program.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.training.by_hand import bits, by_hand, by_train, contents, new_training
from tests.training.python_cases import (
    CASES,
    CHANGERS,
    COUNTS,
    MODELS,
    NEVER,
    SETTINGS,
    WHEN,
    factor_of,
    set_between_steps,
)
from tests.training.python_cases.process import process_put_back

from everystep import EverystepError

#: The last change of a case is made at step 14, and has its effect from the next on.
STEPS = 20


def outcome(train, make, **options):
    """Return all that a training leaves behind, by name, or the error that it raises."""
    with process_put_back():
        made = make()
        try:
            losses = train(made, **options)
        except Exception as error:
            return error
        left = {f"loss of step {step}": repr(loss) for step, loss in enumerate(losses, 1)}
        return left | contents(made) | {"x": bits(made.x), "y": bits(made.y)}


def differences(one, other):
    """Return the names of what differs."""
    names = dict.fromkeys([*one, *other])
    return [name for name in names if name not in one or one[name] != other.get(name)]


def assert_same_or_refused(make, **options):
    """Train by hand and by `train`; assert that both leave the same, or that the latter is refused.

    Return what the loop by hand leaves.
    """

    def recorded(made, **options):
        return by_train(made, **options).losses["loss"].to_list()

    expected = outcome(by_hand, make, **options)
    trained = outcome(recorded, make, **options)
    if isinstance(trained, Exception):
        is_refused = isinstance(trained, EverystepError)
        assert is_refused or type(trained) is type(expected), repr(trained)
        return expected
    assert not isinstance(expected, Exception), repr(expected)
    assert differences(trained, expected)[:3] == []
    return expected


@pytest.mark.sweep(every=4)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_python_does_what_it_does_in_the_loop(case):
    options = {"steps": STEPS} | case.options
    expected = assert_same_or_refused(lambda: case.make(case.at), **options)
    assert isinstance(expected, Exception) == case.raises, repr(expected)
    if case.at is not None and not case.raises:
        # If it did nothing at that step, the case would show nothing.
        unchanged = outcome(by_hand, lambda: case.make(NEVER), **options)
        losses = [f"loss of step {step}" for step in range(1, STEPS + 1)]
        assert any(unchanged[name] != expected[name] for name in losses)


def test_no_two_kinds_have_the_same_name():
    assert len({case.name for case in CASES}) == len(CASES)


# Combinations.

MOMENTS = {"when": st.sampled_from([*WHEN]), "at": st.integers(1, 20)}
combined = settings(max_examples=15, derandomize=True, deadline=None, database=None)


@combined
@given(place=st.sampled_from([*COUNTS]), way=st.sampled_from([*MODELS]), **MOMENTS)
def test_a_count_anywhere_read_in_any_way(place, way, when, at):
    def make():
        def model():
            return MODELS[way](factor_of(COUNTS[place], WHEN[when], at))

        return new_training(model)

    assert_same_or_refused(make, steps=STEPS)


@combined
@given(setting=st.sampled_from([*SETTINGS]), who=st.sampled_from([*CHANGERS]), **MOMENTS)
def test_a_setting_anywhere_set_by_anyone(setting, who, when, at):
    def make():
        return set_between_steps(SETTINGS[setting], CHANGERS[who], WHEN[when], at)

    assert_same_or_refused(make, steps=STEPS, evaluate_every=1)
