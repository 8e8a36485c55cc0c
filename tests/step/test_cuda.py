"""On a GPU, a program has the bits of Python's steps."""

import pytest
import torch
from torch import nn

import everystep
from everystep.experiment.batches import Batches
from everystep.training.model_step import Training

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]


def training(dropout):
    torch.manual_seed(0)
    x, y = torch.randn(64, 20).cuda(), torch.randn(64, 1).cuda()
    layers = nn.Linear(20, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 1)
    model = nn.Sequential(*layers).cuda()
    optimizer = everystep.GradientDescent(model.parameters(), lr=1e-3)
    batches = Batches(64).of(x, y)
    return Training(model, nn.MSELoss(), optimizer, batches, torch.device("cuda", 0))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_programs_have_the_bits_of_python(dropout, stepper_of):
    with everystep.numerics.in_force():
        ours, by_hand = training(dropout), training(dropout)
        torch.manual_seed(1)
        stepper = stepper_of(ours, 100)
        stepper.advance(100)
        torch.manual_seed(1)
        losses = [by_hand.step(*by_hand.batch(number)) for number in range(1, 101)]
    assert torch.equal(stepper.collect(), torch.stack(losses))
    assert dropout or stepper.by_program > 0
