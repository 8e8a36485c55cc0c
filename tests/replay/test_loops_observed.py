"""Recorded loops: what is verified and measured many steps at once is what opening each step shows."""

import pytest
import torch
from tests.descent import descend
from tests.training.loops import LOOPS
from torch import nn
from torch.nn.functional import mse_loss

import everystep

STEPS = 26


RECORDED = [
    *("gan_with_two_optimizers", "language_model_with_accumulation_and_clipping"),
    *("two_schedules_and_layers_unfrozen_on_the_way", "classifier_with_dropout"),
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


def test_the_first_infinity_in_a_loop_is_found_at_its_step(tmp_path):
    torch.manual_seed(0)
    x, model = torch.randn(9, 4), nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with everystep.record(run=tmp_path / "run", model=model, optimizer=optimizer) as recording:
        for number in recording.steps(range(1, STEPS)):
            batch = x * (1e38 if number == 20 else 1.0)
            recording.log(loss=descend(optimizer, (model(batch) ** 2).mean()))
    run = everystep.open(tmp_path / "run")
    found = run.first_nonfinite(processes=1, progress=False)
    assert found is not None and found.step.number == 20
    assert run.when("isnan(loss) or loss > 1e30", progress=False).steps[0] >= 20


def test_a_step_that_cannot_be_replayed_ends_the_verification_there(tmp_path):
    x, y = torch.randn(STEPS * 64, 50), torch.randn(STEPS * 64, 3)
    model = nn.Linear(50, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with everystep.record(
        run=tmp_path / "run", batch_budget=60_000, model=model, optimizer=optimizer
    ) as recording:
        for a, b in recording.steps(zip(x.split(64), y.split(64), strict=True)):
            recording.log(loss=descend(optimizer, mse_loss(model(a), b)))
    run = everystep.open(tmp_path / "run")
    found = run.verify(processes=1, progress=False)
    assert not found.is_exact and found.steps < found.all_steps
    assert not found.different_steps and not found.states
    assert any("was dropped" in problem for problem in found.problems)
