"""`train` with a step of the user's own: the same bits as the loop by hand, recorded."""

import pytest
import torch
from tests.descent import descend
from tests.training.by_hand import bits
from tests.training.step_functions import CASES
from torch import nn

import everystep


def new_gan():
    """Return two models and two optimizers, a step of them, and four batches."""
    torch.manual_seed(0)
    return CASES["gan"]()


def test_without_batches_the_step_takes_nothing():
    x = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.1)

    def step():
        return descend(optimizer, ((x - 1) ** 2).sum())

    run = everystep.train(step, parts={"x": x, "optimizer": optimizer}, steps=20, progress=False)
    assert len(run.losses) == 20
    assert run.verify(progress=False, processes=1).is_exact


def test_a_seed_makes_it_repeatable():
    runs = []
    for _ in range(2):
        gan = new_gan()
        torch.manual_seed(5)
        runs.append(
            everystep.train(gan.step, gan.batches, parts=gan.parts, steps=5, seed=3, progress=False)
        )
    assert list(runs[0].losses["loss"]) == list(runs[1].losses["loss"])


def test_a_generator_that_is_used_up_is_said(capsys):
    gan = new_gan()
    batches = (batch for batch in gan.batches)
    run = everystep.train(gan.step, batches, parts=gan.parts, steps=50, progress=False)
    assert len(run.losses) == 4
    assert "no more batches after step 4" in capsys.readouterr().err


class Endless(list):
    """Batches of which nothing has the number."""

    def __len__(self):
        raise RuntimeError("iterate first")


def test_batches_may_have_no_length():
    gan = new_gan()
    batches = Endless(gan.batches)
    run = everystep.train(gan.step, batches, parts=gan.parts, epochs=2, progress=False)
    assert len(run.losses) == 8
    with everystep.record(**gan.parts) as recording:
        for batch in recording.steps(batches):
            gan.step(batch)
    assert len(recording.run.losses) == 4


def test_a_loader_without_batches_is_said(capsys):
    gan = new_gan()
    run = everystep.train(gan.step, [], parts=gan.parts, steps=50, progress=False)
    assert len(run.losses) == 0
    assert "the loader yields no batch" in capsys.readouterr().err


def test_a_step_by_a_program_is_the_last_that_is_kept():
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    batches = [torch.ones(8, 4)] * 33 + [torch.full((8, 4), torch.nan)]

    def step(x):
        optimizer.zero_grad()  # so that gradients are left, which lie in the memory of the program
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    parts, options = {"model": model, "optimizer": optimizer}, {"stop_on_nan": True, "progress": False}
    run = everystep.train(step, batches, parts=parts, steps=100, engine="program", **options)
    assert run.facts.training.loop.function.by_program > 0
    assert (run.status, run.snapshots[-1]) == ("stopped", 34)


def test_it_stops_at_a_loss_that_is_not_finite():
    gan, count = new_gan(), [0]

    def step(batch):
        count[0] += 1
        return {"loss": gan.step(batch)["loss"] * (float("nan") if count[0] == 5 else 1.0)}

    run = everystep.train(step, gan.batches, parts=gan.parts, steps=50, stop_on_nan=True, progress=False)
    assert len(run.losses) == 5
    assert run.facts.status == "stopped"
    assert run.facts.reason == "the loss is nan (stop_on_nan)"


def test_all_wrong_arguments_are_reported_at_once():
    with pytest.raises(everystep.UsageError) as caught:
        everystep.train(
            nn.Linear(2, 2), 3, parts={}, loss=nn.MSELoss(), batch_size=4, steps=2, progress=False
        )
    paths = [fault.path for fault in caught.value.faults]
    assert paths == ["step", "parts", "batches", "loss", "batch_size"]


def test_a_step_without_parts_is_shown_the_way():
    with pytest.raises(everystep.UsageError, match="pass parts= to train your own step"):
        everystep.train(lambda batch: None, [], steps=2)


@pytest.mark.parametrize("result", ["text", (1, 2), {3: 4}])
def test_what_a_step_must_not_return(result):
    with pytest.raises(everystep.UsageError, match="the step returns"):
        everystep.train(lambda batch: result, [1], parts={"x": torch.zeros(2)}, steps=1, progress=False)


def test_a_number_is_read_from_what_the_steps_of_another_batch_change():
    """Python looks at the count at each short batch; only long ones change it."""

    def made():
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        model.register_buffer("count", torch.zeros(()))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step(x):
            if len(x) == 4:
                loss = model(x).square().mean() * (1 if model.count > 4 else 2)
            else:
                model.count.add_(1)
                loss = model(x).abs().mean()
            return descend(optimizer, loss)

        return step, {"model": model, "optimizer": optimizer}, model

    generator = torch.Generator().manual_seed(1)
    lengths = [5] * 4 + [4] * 4 + [5, 4] * 8
    batches = [torch.randn(length, 3, generator=generator) for length in lengths]
    step, _, expected = made()
    losses = [step(x).item() for x in batches]
    step, parts, model = made()
    run = everystep.train(step, batches, parts=parts, epochs=1, engine="program", progress=False)
    assert run.losses["loss"].to_list() == losses
    assert bits(model.weight) == bits(expected.weight)
    assert run.facts.training.loop.function.by_program > 0
    assert run.verify(processes=1, progress=False).is_exact
