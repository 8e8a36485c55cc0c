"""The chapter's network: its published losses, and the loop written out by hand."""

import csv
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import everystep
from everystep.numerics import Numerics

GOLDEN = Path(__file__).parent / "golden"
LOSSES_FILE = GOLDEN / "two-layer.json"


def published():
    with (GOLDEN / "published_losses.tsv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file, delimiter="\t")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("chapter") / "run"
    return everystep.train_experiment("two-layer", run=directory, progress=False)


@torch.no_grad()
def update(model, lr):
    for parameter in model.parameters():
        parameter.copy_(parameter - parameter.grad * lr)


def by_hand(model, x, y, steps=500, lr=1e-4):
    loss_function = nn.MSELoss(reduction="sum")
    losses = []
    for _ in range(steps):
        loss = loss_function(model(x), y)
        losses.append(loss.item())
        model.zero_grad()
        loss.backward()
        update(model, lr)
    return losses


def test_all_500_losses_are_those_that_the_chapter_prints(run):
    losses = run.losses["loss"].to_list()
    assert len(losses) == len(published()) == 500
    for loss, printed in zip(losses, published(), strict=True):
        half_a_unit = 0.5 * 10 ** (int(f"{printed:e}".split("e")[1]) - 2)
        assert abs(loss - printed) <= half_a_unit + 2e-4 * printed


def test_losses_have_the_bits_they_had(run):
    golden = json.loads(LOSSES_FILE.read_text())
    made_with = golden["made_with"]
    here = Numerics.read(torch.device("cpu")).model_dump()
    losses = run.losses["loss"].to_list()
    expected = [float.fromhex(loss) for loss in golden["losses"]]
    if all(here[key] == value for key, value in made_with.items()):
        assert losses == expected
        assert [f"{loss:.3g}" for loss in losses] == [f"{loss:.3g}" for loss in published()]
    else:
        assert losses == pytest.approx(expected, rel=2e-3)


def test_losses_and_parameters_have_the_bits_of_the_loop_written_by_hand(run, chapter):
    model, x, y = chapter
    assert run.losses["loss"].to_list() == by_hand(model, x, y)
    recorded = run.parameters(500)
    assert recorded.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(recorded[name], value)


def test_python_and_the_experiment_file_give_the_same_bits(run, chapter):
    model, x, y = chapter
    optimizer = everystep.GradientDescent(model.parameters(), lr=1e-4)
    loss = nn.MSELoss(reduction="sum")
    other = everystep.train(model, (x, y), loss=loss, optimizer=optimizer, steps=500, progress=False)
    assert other.losses.equals(run.losses)
    assert all(torch.equal(run.parameters(500)[n], v) for n, v in model.state_dict().items())


def test_the_update_as_operators_and_as_operations_has_the_same_bits():
    generator = torch.Generator().manual_seed(3)
    parameter, gradient = (torch.randn(50, 7, generator=generator) for _ in range(2))
    behind = torch.sub(parameter, torch.mul(gradient, 1e-4))
    trained = nn.Parameter(parameter.clone())
    trained.grad = gradient
    everystep.GradientDescent([trained], lr=1e-4).step()
    assert torch.equal(parameter - gradient * 1e-4, behind)
    assert torch.equal(trained.data, behind)
