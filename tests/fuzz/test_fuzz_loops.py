"""Random loops and step functions have the bits of a plain loop, and each step opens again."""

import pytest
from hypothesis import given, settings
from tests.fuzz.loops import (
    FORKED,
    FUNCTIONS,
    LOOPS,
    STOPPED,
    fork_and_compare,
    record_and_compare,
    resume_and_compare,
    train_and_compare,
)

pytestmark = pytest.mark.filterwarnings("ignore")


@settings(derandomize=True, max_examples=8)
@given(loop=LOOPS)
def test_a_random_loop(loop, tmp_path_factory):
    record_and_compare(loop, tmp_path_factory.mktemp("loop") / "run")


@settings(derandomize=True, max_examples=5)
@given(stopped=STOPPED)
def test_a_random_loop_that_stops_and_goes_on(stopped, tmp_path_factory):
    resume_and_compare(stopped, tmp_path_factory.mktemp("stopped") / "run")


@settings(derandomize=True, max_examples=4)
@given(forked=FORKED)
def test_a_random_loop_at_another_rate(forked, tmp_path_factory):
    fork_and_compare(forked, tmp_path_factory.mktemp("forked"))


@settings(derandomize=True, max_examples=5)
@given(function=FUNCTIONS)
def test_a_random_step_function(function, tmp_path_factory):
    train_and_compare(function, tmp_path_factory.mktemp("function") / "run")
