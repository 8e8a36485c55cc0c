"""Memory from outside of the parts that a step overwrites: what it held before is not kept."""

import pytest
import torch
from tests.descent import recorded_as_it_is
from torch import nn

import everystep


def whole(buffer, x, step):
    torch.mul(x, 2, out=buffer)
    return buffer


def in_parts(buffer, x, step):
    torch.mul(x[:2], 2, out=buffer[:2])
    torch.add(x[2:], 1, out=buffer[2:])
    return buffer


def partly(buffer, x, step):
    """The last row is what it was before the step."""
    torch.mul(x[:3], 2, out=buffer[:3])
    return buffer


def overlapping(buffer, x, step):
    """Nine numbers within nine places, of which it writes five."""
    torch.as_strided(buffer, (3, 3), (2, 2)).fill_(step)
    return buffer


def across(buffer, x, step):
    buffer.t().copy_(x.t())
    return buffer


def added_to(buffer, x, step):
    buffer.zero_()
    buffer += x
    return buffer[1:]


def in_turn(buffer, x, step):
    """Read in the step after that which has written it."""
    before = buffer.clone()
    buffer.copy_(x + step)
    return before


LOOPS = [whole, in_parts, partly, overlapping, across, added_to, in_turn]


@pytest.mark.sweep(every=2)
@pytest.mark.parametrize("loop", LOOPS)
def test_steps_that_overwrite_memory_replay_bit_for_bit(loop, tmp_path):
    def make():
        model, buffer = nn.Linear(3, 2), torch.zeros(4, 3)

        def loss_of(model, x, step):
            return model(x).square().mean() + model.bias[0] * loop(buffer, x, step).sum()

        batches = [torch.randn(4, 3) for _ in range(8)]
        return model, torch.optim.SGD(model.parameters(), lr=0.1), batches, loss_of

    assert all(step.is_exact for step in recorded_as_it_is(tmp_path / "run", make))


def test_what_is_overwritten_is_not_stored(tmp_path):
    model, buffer = nn.Linear(1000, 2), torch.zeros(1000, 1000)
    with everystep.record(run=tmp_path / "run", model=model) as recording:
        for x in recording.steps([torch.ones(1000, 1) * step for step in range(5)]):
            torch.mul(x, torch.ones(1, 1000), out=buffer)
            recording.log(loss=model(buffer).sum())
    assert recording.run.verify().is_exact
    assert sum(file.stat().st_size for file in (tmp_path / "run/batches").iterdir()) < 1_000_000
