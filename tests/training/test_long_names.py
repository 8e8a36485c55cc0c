"""Names that everystep would not read again are refused, and those that it gives itself may be used."""

from pathlib import Path

import pytest
import torch
from tests.descent import descend
from torch import nn

import everystep

LONG = "n" * 10_001


def loop(model, steps=3, log=lambda recording, step: None, key="x", **parts):
    """Record a loop, with other parts and numbers; returns the run."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    parts |= {"model": model, "optimizer": optimizer}
    with everystep.record(run="./run", **parts) as recording:
        for step in range(steps):
            with recording.step({key: torch.randn(4, 3)}):
                recording.log(loss=descend(optimizer, model(torch.randn(4, 3)).square().mean()))
                log(recording, step)
    return recording.run


def train(model, **options):
    options |= {"loss": nn.MSELoss(), "optimizer": torch.optim.Adam(model.parameters()), "steps": 4}
    pair = torch.randn(8, 3), torch.randn(8, 2)
    return everystep.train(model, pair, run="./run", progress=False, **options)


def of_module(name):
    model = nn.Sequential()
    model.add_module(name, nn.Linear(3, 2))
    return model


@pytest.mark.parametrize(
    "record",
    [
        lambda: loop(nn.Linear(3, 2), **{LONG: torch.zeros(2)}),
        lambda: loop(of_module(LONG)),
        lambda: train(of_module(LONG)),
        lambda: train(nn.Linear(3, 2), metrics={LONG: lambda prediction, target: 1.0}),
    ],
    ids=["part", "module", "module of train", "metric"],
)
def test_a_long_name_is_refused_before_the_first_step(record):
    with pytest.raises(
        everystep.UsageError, match=r"has 10,0\d\d characters.* a run holds names of up to"
    ) as error:
        record()
    assert len(str(error.value)) < 500 and not Path("run").exists()


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ({LONG: 1.0}, "has 10,001 characters"),
        ({3: 1.0}, "3 is not the name of a measurement"),
        ({"\ud800": 1.0}, "is not the name of a measurement"),
        ({f"m{n}": 1.0 for n in range(10_000)}, "a run holds 10,000; log fewer names"),
    ],
    ids=["long", "number", "surrogate", "many"],
)
def test_a_name_is_refused_where_it_is_logged(log, message):
    with pytest.raises(everystep.UsageError, match=message):
        loop(nn.Linear(3, 2), log=lambda recording, step: recording.log(log if step == 1 else {}))
    run = everystep.open("run")
    assert (run.status, len(run.losses)) == ("failed", 1) and run[1].is_exact
    assert run.verify(progress=False).is_exact
    with pytest.raises(everystep.UsageError, match="has 10,001 characters"):
        run.measure("loss", name=LONG, progress=False)


def test_a_long_name_in_a_batch_is_refused():
    with pytest.raises(everystep.UsageError, match=r"the batch: nnnn.* has 10,001 characters"):
        loop(nn.Linear(3, 2), key=LONG)


@pytest.mark.parametrize("record", [loop, train])
def test_the_longest_names_are_read_again(record):
    model = of_module("m" * (900 - len(".weight")))
    options = {"key": "k" * 900, "p" * 900: torch.zeros(2)} if record is loop else {}
    run = record(model, **options)
    if record is loop:
        run.measure("loss", name="n" * 10_000, progress=False)
    assert run[2].is_exact and run.verify(progress=False).is_exact and run.damage is None


@pytest.mark.parametrize(
    "keys", [("mul", "mul_2", "mul_3"), ("x", "loss", "y"), ("x~1", "x", "x~2"), ("t", "input", "t~1")]
)
def test_a_batch_may_have_names_that_operations_give(keys):
    batches = [{key: torch.randn(4, 3) for key in keys} for _ in range(3)]
    model, losses = nn.Linear(3, 3), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with everystep.record(run="./run", model=model, optimizer=optimizer) as recording:
        for batch in recording.steps(batches):
            one, two, three = batch.values()
            output = model(one * 2 * two).t() * three.t() * two.t() + one[1:].mean()
            loss = descend(optimizer, output.square().mean())
            recording.log(loss=loss)
            losses.append(loss.item())
    run = everystep.open("run")
    assert run.verify(progress=False).is_exact
    assert [float(run[step].loss) for step in (1, 2, 3)] == losses
    assert all(torch.equal(run[2].batch[key], batches[1][key]) for key in keys)


def test_a_batch_with_the_name_of_a_parameter_is_refused():
    with pytest.raises(everystep.UsageError, match=r"the batch has parameter/weight, .* rename it"):
        loop(nn.Linear(3, 2), key="parameter/weight")
