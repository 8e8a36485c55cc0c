"""Optimizers that others have published train as in the loop written out by hand, or are refused."""

import pytest
from tests.training.by_hand import by_hand, by_train, contents
from tests.training.published_optimizers import NEEDS, TRIED, new_published_training

from everystep.errors import EverystepError

STEPS = 12

pytestmark = [
    # Of torch, about the oldest ones of torch_optimizer.
    pytest.mark.filterwarnings("ignore:This overload of .* is deprecated:UserWarning"),
    # Of pytorch_optimizer, where transformers is not installed.
    pytest.mark.filterwarnings("ignore:you need to install `transformers`:ImportWarning"),
]


def test_at_least_seventy_are_trained():
    assert len(set(TRIED) - set(NEEDS)) >= 70


@pytest.mark.sweep(every=10)
@pytest.mark.parametrize("name", [name for name in TRIED if name not in NEEDS])
def test_training_has_the_bits_of_the_loop(name):
    try:
        expected = new_published_training(name)
        losses = by_hand(expected, steps=STEPS)
    except Exception as error:  # of an optimizer that a later version of its package has added
        pytest.skip(f"to be named in tests/training/published_optimizers.py: {error!r}")
    left = contents(expected)
    trained = new_published_training(name)
    run = by_train(trained, steps=STEPS)
    assert run.losses["loss"].to_list() == losses
    assert contents(trained) == left
    assert run.verify(processes=1, progress=False).is_exact


@pytest.mark.parametrize("name", [name for name in TRIED if name in NEEDS])
def test_what_the_loop_cannot_train_with_is_refused(name):
    made = new_published_training(name)
    with pytest.raises(Exception) as of_the_loop:
        by_hand(made, steps=STEPS)
    assert NEEDS[name] in repr(of_the_loop.value)
    with pytest.raises(EverystepError) as refused:
        by_train(new_published_training(name), steps=STEPS)
    assert NEEDS[name] in str(refused.value)
