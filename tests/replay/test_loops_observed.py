"""Recorded loops: what is verified and measured many steps at once is what opening each step shows."""

import pytest
import torch
from tests.training.loops import LOOPS

import everystep

STEPS = 26


RECORDED = [
    *("gan_with_two_optimizers", "language_model_with_accumulation_and_clipping"),
    *("two_schedulers_and_layers_unfrozen_on_the_way", "classifier_with_dropout"),
]


@pytest.mark.sweep(every=2)
@pytest.mark.parametrize("name", RECORDED)
def test_each_step_has_the_bits_that_opening_it_shows(name, tmp_path):
    torch.manual_seed(0)
    LOOPS[name](STEPS, lambda **parts: everystep.record(run=tmp_path / "run", **parts))
    run = everystep.open(tmp_path / "run")
    assert run.verify(processes=1, progress=False).is_exact
    parameter = next(iter(run[1].gradients))
    values = {
        text: run.measure(text, progress=False, processes=1).values
        for text in (
            f"norm(gradients['{parameter}'])",
            f"norm(updates['{parameter}'])",
            f"sum(parameters['{parameter}'])",
            f"norm(previous.gradients['{parameter}'])",
        )
    }
    assert run.first_nonfinite(processes=1, progress=False) is None
    before = None
    for number in range(1, len(run) + 1):
        step = run[number]
        assert step.is_exact
        gradient = step.gradients.get(parameter)
        found = [measured.get(number) for measured in values.values()]
        expected = [
            None if gradient is None else gradient.norm().item(),
            step.updates[parameter].change.norm().item(),
            step.parameters[parameter].sum().item(),
            None if before is None else before.norm().item(),
        ]
        assert found == expected, number
        before = gradient
