"""Recorded loops: what is verified and measured many steps at once is what opening each step shows."""

from pathlib import Path

import pytest
import torch
from tests.descent import looped
from tests.training.loops import LOOPS
from torch import nn

import everystep

STEPS = 26


RECORDED = [
    *("two_schedulers_and_layers_unfrozen_on_the_way", "classifier_with_dropout"),
    *("gan_with_two_optimizers", "language_model_with_accumulation_and_clipping"),
]


@pytest.mark.sweep(every=4)
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


class _OddShapes(nn.Module):
    """A layer whose step has transposed, complex, boolean and empty tensors."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))

    def forward(self, x):
        seen = torch.fft.rfft(x @ self.weight.T)
        mask = x.new_zeros(0, 3).sum() + (x.T > 0).T.sum()
        return (seen * seen).abs().sum() + mask * self.weight[::2, 1:].bfloat16().float().mean()


@pytest.mark.parametrize("is_disk_full", [False, True])
def test_a_large_step_lies_in_files_that_have_no_name(is_disk_full, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, batches = _OddShapes(), torch.randn(3, 5, 4)
    looped(model, batches, nn.Module.__call__, run=tmp_path / "run", optimizer=torch.optim.AdamW)
    expected = everystep.open(tmp_path / "run")[3]
    monkeypatch.setattr("everystep.step.observe.LEAST_HELD", 0)
    monkeypatch.setattr("everystep.step.observe.HELD_SHARE", 0.0)
    monkeypatch.setattr("everystep.step.observe.SMALLEST_IN_FILE", 1)
    place = tmp_path / ("none" if is_disk_full else "files")
    if not is_disk_full:
        place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    step = everystep.open(tmp_path / "run")[3]
    assert is_disk_full or not [*place.iterdir()]
    if (maps := Path("/proc/self/maps")).exists():
        assert (f"{place}/everystep-" in maps.read_text()) is not is_disk_full
    assert step.loss == expected.loss
    for one, two in zip(_tensors(step), _tensors(expected), strict=True):
        assert one.dtype == two.dtype and torch.equal(one, two)
    for value in _tensors(step):
        value.copy_(torch.zeros_like(value))  # they are the caller's
    assert everystep.open(tmp_path / "run")[3].loss == expected.loss


def _tensors(step):
    """Return the tensors of a step in order."""
    seen = [
        [*each.inputs.values(), *each.results.values(), *each.written.values()]
        for each in step.operations
    ]
    named = (step.state, step.end, step.gradients)
    return [tensor for each in (*seen, *(held.values() for held in named)) for tensor in each]
