"""Ordinary models, as users write them, train as in the loop written out by hand."""

import pytest
from tests.training.by_hand import assert_same
from tests.training.ordinary_models import ORDINARY_MODELS

STEPS = 30


@pytest.mark.parametrize("case", ORDINARY_MODELS, ids=lambda case: case.name)
def test_training_has_the_bits_of_the_loop(case):
    run = assert_same(case.make, STEPS, batch_size=case.batch_size)
    engine = run.facts.training.engine
    assert engine.stands_behind == "python"
    assert (engine.eager_from is None) == case.is_repeated, engine.reason
    losses = run.losses["loss"]
    assert losses[-1] < losses[0], (
        "it does not learn: the data or the settings are not what they should be"
    )
