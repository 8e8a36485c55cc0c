"""Trainings as the step modules see them."""

import pytest
import torch
from torch import nn

import everystep
from everystep.experiment.batches import Batches
from everystep.step.build import build
from everystep.step.capture import capture
from everystep.step.eager import EagerStep, Trainee
from everystep.step.execute import allocate


def descent(parameters):
    return everystep.GradientDescent(parameters, lr=1e-3)


@pytest.fixture
def make_trainee():
    def make(model, x, y, *, loss=None, optimizer=descent, batch_size=None, **options):
        return Trainee(
            model=model,
            loss=loss or nn.MSELoss(reduction="sum"),
            optimizer=optimizer(model.parameters()),
            batch=Batches(len(x), batch_size).of(x, y),
            device=torch.device("cpu"),
            **options,
        )

    return make


@pytest.fixture
def program_of():
    """Take a step of a training, and return its program and the content of its constants."""

    def program_of(trainee, step=1):
        return build(capture(EagerStep(trainee), step), trainee)

    return program_of


@pytest.fixture
def memory_of():
    """Return memory for a program, filled from a training as it is now."""

    def memory_of(built, trainee):
        values = dict(trainee.named_state())
        values["x"], values["y"] = trainee.batch(1)
        for index, rate in enumerate(trainee.rates()):
            for dtype in (torch.float32, torch.float64):
                name = f"hyperparameter/{index}/lr/{str(dtype).removeprefix('torch.')}"
                values[name] = torch.tensor(rate, dtype=dtype)
        return allocate(built.program, values | built.constants, trainee.device)

    return memory_of
