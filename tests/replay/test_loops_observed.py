"""Recorded loops: what is verified and measured many steps at once is what opening each step shows."""

import pytest
import torch
from tests.descent import descend
from tests.training.loops import LOOPS
from torch import nn
from torch.nn.functional import mse_loss

import everystep

STEPS = 26


def scheduled_and_clipped(record):
    x, y = torch.randn(40, 6), torch.randn(40, 3)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
    with record(model=model, optimizer=optimizer, scheduler=scheduler) as recording:
        for number in recording.steps(range(STEPS)):
            rows = slice(number % 5 * 8, number % 5 * 8 + 8)
            loss = mse_loss(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
            scheduler.step()
            recording.log(loss=loss, norm=norm.item())


def accumulated(record):
    x, y = torch.randn(40, 6), torch.randn(40, 3)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    with record(model=model, optimizer=optimizer) as recording:
        for number, (a, b) in enumerate(recording.steps([(x[i::5], y[i::5]) for i in range(5)] * 6), 1):
            loss = mse_loss(model(a), b)
            loss.backward()
            if number % 3 == 0:
                optimizer.step()
                optimizer.zero_grad()
            recording.log(loss=loss)


def two_shapes_and_changes(record):
    x, y, weight = torch.randn(40, 6), torch.randn(40, 3), torch.rand(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, fused=True)
    batches = [(x[:8], y[:8]), (x[8:20], y[8:20])] * (STEPS // 2)
    with record(model=model, optimizer=optimizer) as recording:
        for number, (a, b) in enumerate(recording.steps(batches)):
            recording.log(loss=descend(optimizer, ((model(a) - b) ** 2 * weight).mean()))
            if number in (7, 15):
                with torch.no_grad():
                    model[0].weight.mul_(0.5)


def called_twice_without_loss(record):
    x = torch.randn(40, 6)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    optimizer = torch.optim.RMSprop(model.parameters(), 0.01)
    with record(model=model, optimizer=optimizer) as recording:
        for _ in recording.steps(range(STEPS)):
            descend(optimizer, model(model(x)).square().sum())
            recording.log(loss=1.0)


def of_kind(name):
    return lambda record: LOOPS[name](STEPS, record)


RECORDED = {
    "scheduled": (scheduled_and_clipped, "0.weight"),
    "accumulated": (accumulated, "0.weight"),
    "two shapes": (two_shapes_and_changes, "0.weight"),
    "called twice": (called_twice_without_loss, "0.weight"),
    "classifier": (of_kind("classifier_with_dropout"), "0.weight"),
    "gan": (of_kind("gan_with_two_optimizers"), None),
    "language model": (of_kind("language_model_with_accumulation_and_clipping"), None),
}


@pytest.mark.sweep(every=3)
@pytest.mark.parametrize("name", RECORDED)
def test_each_step_has_the_bits_that_opening_it_shows(name, tmp_path):
    loop, parameter = RECORDED[name]
    torch.manual_seed(0)
    loop(lambda **parts: everystep.record(run=tmp_path / "run", **parts))
    run = everystep.open(tmp_path / "run")
    assert run.verify(processes=1, progress=False).is_exact
    parameter = parameter or next(iter(run[1].gradients))
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
