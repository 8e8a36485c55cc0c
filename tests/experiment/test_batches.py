import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everystep.errors import ExperimentError
from everystep.experiment.batches import Batches

sizes = st.integers(1, 60).flatmap(lambda rows: st.tuples(st.just(rows), st.integers(1, rows)))


@given(sizes, st.integers(0, 2**64 - 1), st.booleans(), st.permutations(range(1, 30)))
def test_the_rows_of_a_step_depend_on_seed_and_step_alone(size, seed, drop_last, order):
    rows, batch_size = size
    in_order = Batches(rows, batch_size, seed, drop_last)
    expected = {step: in_order.indices(step).tolist() for step in sorted(order)}
    jumping = Batches(rows, batch_size, seed, drop_last)
    assert {step: jumping.indices(step).tolist() for step in order} == expected


@given(sizes, st.integers(0, 1000), st.integers(0, 5))
def test_an_epoch_sees_every_row_once(size, seed, epoch):
    rows, batch_size = size
    batches = Batches(rows, batch_size, seed)
    first = epoch * batches.steps_per_epoch + 1
    steps = range(first, first + batches.steps_per_epoch)
    seen = torch.cat([batches.indices(step) for step in steps]).tolist()
    assert sorted(seen) == list(range(rows))
    assert {batches.epoch(step) for step in steps} == {epoch}
    assert batches.smallest == min(len(batches.indices(step)) for step in steps)


@given(sizes, st.integers(0, 1000))
def test_drop_last_makes_all_batches_equal(size, seed):
    rows, batch_size = size
    batches = Batches(rows, batch_size, seed, drop_last=True)
    steps = range(1, 2 * batches.steps_per_epoch + 1)
    assert {len(batches.indices(step)) for step in steps} == {batch_size}


def test_epochs_and_seeds_differ_and_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    batches = Batches(50, 50, seed=0)
    assert batches.indices(1).tolist() != batches.indices(2).tolist()
    assert batches.indices(1).tolist() != Batches(50, 50, seed=1).indices(1).tolist()
    assert torch.equal(before, torch.get_rng_state())


def test_without_a_batch_size_every_step_sees_the_very_tensors():
    x, y = torch.randn(5, 2), torch.randn(5, 1)
    batch = Batches(5).of(x, y)
    assert batch(1)[0] is x
    assert batch(7)[1] is y


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(
        ExperimentError, match="batch_size: 11 is out of range: there are 10 training rows"
    ):
        Batches(10, 11)
    with pytest.raises(ValueError, match="steps are numbered from 1"):
        Batches(10, 5).indices(0)
