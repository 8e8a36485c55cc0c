"""Assertions in what the tests of trainings share are told as in the tests themselves."""

import pytest

pytest.register_assert_rewrite("tests.training.by_hand")
