import math

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from everystep.views.reduction import reduce


def _frame(values, first_step=1):
    steps = range(first_step, first_step + len(values))
    return pl.DataFrame({"step": steps, "loss": values}, schema={"step": pl.Int64, "loss": pl.Float64})


@given(
    st.lists(st.floats(width=32), min_size=1, max_size=300),
    st.integers(1, 40),
    st.integers(1, 10**6),
)
def test_every_bucket_keeps_its_extremes_and_the_ends_stay(values, buckets, first_step):
    frame = _frame(values, first_step)
    reduced = reduce(frame, buckets)
    kept = dict(reduced.iter_rows())

    assert reduced["step"].is_sorted()
    assert set(kept) <= set(frame["step"])
    assert first_step in kept
    assert first_step + len(values) - 1 in kept
    assert len(reduced) <= max(2 * buckets, 3 * buckets + 2)
    for bucket in range(buckets):
        of_bucket = [index for index in range(len(values)) if index * buckets // len(values) == bucket]
        finite = [values[index] for index in of_bucket if math.isfinite(values[index])]
        kept_here = [kept[first_step + i] for i in of_bucket if first_step + i in kept]
        kept_finite = [value for value in kept_here if math.isfinite(value)]
        if finite:
            assert min(kept_finite) == min(finite)
            assert max(kept_finite) == max(finite)
        if len(finite) < len(of_bucket):
            assert len(kept_finite) < len(kept_here)


def test_a_short_frame_comes_back_as_it_is():
    frame = _frame([3.0, 1.0, 2.0, math.nan])
    assert reduce(frame, 2) is frame


def test_the_first_of_equal_rows_and_the_first_nonfinite_row_are_kept():
    values = [5.0] + [2.0] * 10 + [math.inf, math.nan] + [7.0] * 10 + [5.0]
    assert reduce(_frame(values), 1)["step"].to_list() == [1, 2, 12, 14, 24]


def test_rows_keep_their_other_columns_and_gaps_in_the_steps_do_no_harm():
    frame = pl.DataFrame({"step": [0, 1, 2, 1000, 1001], "x": [1, 9, 4, 3, 2], "name": list("abcde")})
    reduced = reduce(frame, 2, value="x")
    assert reduced.rows() == [(0, 1, "a"), (1, 9, "b"), (1000, 3, "d"), (1001, 2, "e")]


def test_missing_values_count_as_nan():
    frame = pl.DataFrame({"step": range(1, 8), "loss": [1.0, None, 3.0, None, 2.0, 1.0, 1.0]})
    assert reduce(frame, 1)["step"].to_list() == [1, 2, 3, 7]


@pytest.mark.parametrize("dtype", [pl.Float32, pl.Float64])
def test_a_million_steps_are_reduced(dtype):
    losses = np.random.default_rng(0).exponential(size=1_000_000)
    losses[123_456] = 1e6
    frame = _frame(losses).cast({"loss": dtype})
    reduced = reduce(frame, 2000)
    assert len(reduced) <= 4002
    assert 123_457 in reduced["step"]
    assert reduced.schema == frame.schema
