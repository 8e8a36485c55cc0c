"""On a GPU, the calls of a program are one CUDA graph."""

import pytest
import torch
from tests.conftest import stepper_of
from torch import nn

import everystep
from everystep.experiment.batches import Batches
from everystep.step.eager import EagerStep, Training

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")


def training(dropout):
    torch.manual_seed(0)
    x, y = torch.randn(64, 20).cuda(), torch.randn(64, 1).cuda()
    layers = nn.Linear(20, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 1)
    model = nn.Sequential(*layers).cuda()
    optimizer = everystep.GradientDescent(model.parameters(), lr=1e-3)
    batches = Batches(64).of(x, y)
    return Training(model, nn.MSELoss(), optimizer, batches, torch.device("cuda", 0))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_graph_gives_the_eager_bits(dropout):
    with everystep.numerics.in_force():
        ours, by_hand = training(dropout), training(dropout)
        torch.manual_seed(1)
        stepper = stepper_of(ours, 100, engine="program")
        stepper.advance(100)
        torch.manual_seed(1)
        step = EagerStep(by_hand)
        losses = [step.take(*by_hand.batch(number)) for number in range(1, 101)]
    assert stepper.reason is None
    assert torch.equal(stepper.collect()[1], torch.stack(losses))
    assert len(stepper.programs.bound(100).calls) == 1
