"""Methods of Tensor that somebody exchanges: a recorded loop has the bits that it has without."""

import pytest
import torch
from tests.descent import descend
from torch import nn
from torch.nn import functional

import everystep


def trained(record):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    with record(model, optimizer) as recording:
        for _ in range(12):
            x = torch.randn(8, 4)
            with recording.step((x,)):
                loss = descend(optimizer, functional.softplus(model(x)).mean())
                recording.log(loss=loss)
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["mean", "__rsub__"])
def test_a_method_that_is_exchanged_is_called_once(name, monkeypatch):
    from tests.training.loops import unrecorded

    usual = getattr(torch.Tensor, name)
    monkeypatch.setattr(torch.Tensor, name, lambda *args: usual(*args) * 0.5)
    plain = trained(lambda model, optimizer: unrecorded(model=model, optimizer=optimizer))
    recorded = trained(lambda model, optimizer: everystep.record(model=model, optimizer=optimizer))
    assert recorded == plain
