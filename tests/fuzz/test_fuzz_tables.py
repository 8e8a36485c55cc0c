"""A random table is read as Python's csv module reads it, or refused in words."""

import pytest
from hypothesis import given, settings
from tests.fuzz.tables import TABLES, read_and_compare

pytestmark = pytest.mark.filterwarnings("ignore")


@settings(derandomize=True, max_examples=200)
@given(table=TABLES)
def test_a_random_table(table, tmp_path_factory):
    read_and_compare(table, tmp_path_factory.getbasetemp())
