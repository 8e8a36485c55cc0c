"""Ordinary models, as users write them, train as in the loop written out by hand."""

import pytest
from tests.training.by_hand import assert_same
from tests.training.ordinary_models import ORDINARY_MODELS

import everystep

STEPS = 30


@pytest.mark.sweep(every=2)
@pytest.mark.parametrize("case", ORDINARY_MODELS, ids=lambda case: case.name)
def test_training_has_the_bits_of_the_loop(case):
    run = assert_same(case.make, STEPS, batch_size=case.batch_size)
    assert run.facts.training.engine.eager_from == 1
    assert everystep.open(run.directory).verify(processes=1, progress=False).is_exact
    losses = run.losses["loss"]
    assert losses[-1] < losses[0], (
        "it does not learn: the data or the settings are not what they should be"
    )
