"""Training live objects: against loops written out by hand, and what becomes of what is handed in."""

import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import everystep


def train(model, data, **options):
    settings = {"loss": nn.MSELoss(), "steps": 5, "progress": False} | options
    if "optimizer" not in settings:
        settings["optimizer"] = everystep.GradientDescent(model.parameters(), lr=0.05)
    return everystep.train(model, data, **settings)


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2))


def test_a_scheduler_can_follow_the_validation_loss(small):
    model, x, y = small
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    options = {"optimizer": optimizer, "scheduler": scheduler, "validation": 0.2, "evaluate_every": 1}
    train(model, (x, y), steps=4, **options)
    assert scheduler.num_bad_epochs + scheduler.last_epoch > 0
    with pytest.raises(everystep.ExperimentError, match="needs a validation loss"):
        train(model, (x, y), optimizer=optimizer, scheduler=scheduler)


def test_the_same_objects_hold_the_last_state_and_modes_stay(small):
    model, x, y = small
    model[1].eval()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run = train(model, (x, y), optimizer=optimizer, validation=(x, y))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(torch.equal(run.parameters(5)[n], v) for n, v in model.state_dict().items())
    assert len(optimizer.state) == 4
    assert (model.training, model[0].training, model[1].training) == (True, True, False)


def test_a_seed_reseeds_and_no_seed_goes_on(small):
    _, x, y = small
    torch.manual_seed(3)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2))
    before = torch.get_rng_state()
    first = train(model, (x, y), steps=1)
    assert not torch.equal(before, torch.get_rng_state())
    state, _, _ = _snapshot(first, 0)
    assert torch.equal(state["generator/torch"], before)
    again = train(model, (x, y), steps=1, seed=9)
    state, _, _ = _snapshot(again, 0)
    torch.manual_seed(9)
    assert torch.equal(state["generator/torch"], torch.get_rng_state())


def _snapshot(run, step):
    state = run.state_near(step, after=step - 1)
    return state.rest, state.parameters, state.settings


def test_arrays_are_data(small):
    model, x, y = small
    assert len(train(model, (x.numpy(), y.numpy())).losses) == 5
    assert len(train(model, (x.numpy()[::-1], y.numpy())).losses) == 5  # torch has no such strides


def test_nan_is_recorded_said_once_and_training_goes_on(small, capfd):
    model, x, y = small
    optimizer = everystep.GradientDescent(model.parameters(), lr=1e30)
    run = train(model, (x, y), optimizer=optimizer, steps=8)
    losses = run.losses["loss"].to_list()
    assert len(losses) == 8
    assert math.isnan(losses[-1])
    assert capfd.readouterr().err.count("the loss is") == 1
    first = next(step for step, loss in enumerate(losses, 1) if not math.isfinite(loss))
    assert run.facts.nonfinite_step == first
    assert run.status == "finished"


def test_a_model_in_evaluation_mode_is_pointed_out(small, capfd):
    model, x, y = small
    train(model.eval(), (x, y))
    assert "evaluation mode" in capfd.readouterr().err
    assert not model.training
