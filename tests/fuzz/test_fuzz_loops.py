"""Loops of random actions have the bits of the same loop alone, and each step opens again."""

import pytest
from hypothesis import given, settings
from tests.fuzz.loops import LOOPS, Verifier, record_and_compare

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def verifier():
    made = Verifier()
    yield made
    made.close()


@settings(derandomize=True, max_examples=12)
@given(loop=LOOPS)
def test_a_random_loop(loop, verifier, tmp_path_factory):
    record_and_compare(loop, tmp_path_factory.mktemp("loop") / "run", verifier)
