"""Conditions that are asked while a loop runs hold at the steps that `when` finds in its recording."""

import re
from contextlib import suppress

import pytest
import torch
from tests.descent import descend, seeded
from tests.snapshots import take_snapshots_every
from tests.training.loops import LOOPS
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import everystep
from everystep import UsageError

STEPS = 10


def recorded(name, directory, **conditions):
    seeded()
    return LOOPS[name](STEPS, lambda **parts: everystep.record(run=directory, **conditions, **parts))


@pytest.mark.sweep(every=8)
@pytest.mark.parametrize("name", LOOPS)
def test_conditions_hold_where_when_finds_them_and_change_no_bit(name):
    losses, _ = recorded(name, "runs/plain")
    plain = everystep.open("plain")
    step, conditions = plain[5], ["step % 4 == 3", "loss > previous.loss"]
    tensors = [f"gradients['{name}']" for name in [*step.gradients][::2]]
    for asked in (*tensors, f"updates['{next(iter(step.parameters))}']"):
        norms = sorted(plain.measure(f"norm({asked})", name=asked).values.values())
        conditions.append(f"norm({asked}) >= {norms[len(norms) // 2]}")  # a frozen layer has 0.0
    try:
        assert recorded(name, "runs/marked", mark_when=conditions)[0] == losses
    except UsageError as error:
        assert "GradScaler" in str(error) or "closure" in str(error)
        return
    marked = everystep.open("marked")
    assert {c: (*marked.measured(c),) for c in conditions} == {
        c: plain.when(c, "all").steps for c in conditions
    }
    assert marked.diff(plain).is_same and marked.verify(progress=False).is_exact
    stopping = next(c for c in reversed(conditions) if plain.when(c).steps)
    with suppress(UsageError):  # loops that mark their steps do not leave by themselves
        recorded(name, "runs/stopped", stop_when=[stopping, "isnan(loss)"])
    (first,) = plain.when(stopping).steps
    stopped = everystep.open("stopped")
    assert (len(stopped), stopped.status, stopped.snapshots[-1]) == (first, "stopped", first)
    assert stopped.facts.reason == f"{stopping} at step {first}"


def epochs(directory, count=3, **options):
    """Train with a validation after each epoch; return a parameter, and how many epochs there were."""
    torch.manual_seed(0)
    model = nn.Linear(5, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, done = torch.randn(16, 5), 0
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4, shuffle=True)
    parts = {"model": model, "optimizer": optimizer}
    with everystep.record(run=directory, resume=True, **parts, **options) as recording:
        for epoch in recording.epochs(count):
            for rows, targets in recording.steps(loader):
                loss = descend(optimizer, nn.functional.mse_loss(model(rows), targets))
                recording.log(loss=loss)
            recording.log(validation=epoch / 2)
            done += 1
    return model.weight.detach().clone(), done


@pytest.mark.parametrize(("condition", "at"), [("step == 6", 6), ("validation > 0.4", 8)])
def test_a_loop_that_was_stopped_ends_its_epochs_and_continues_when_it_is_resumed(
    condition, at, monkeypatch
):
    take_snapshots_every(monkeypatch, 3)
    whole, _ = epochs("runs/whole")
    _, done = epochs("runs/stopped", stop_when=condition)
    run = everystep.open("stopped")
    assert (len(run), done, run.facts.reason) == (at, 2, f"{condition} at step {at}")
    resumed, _ = epochs("runs/stopped", stop_when=condition)  # what was judged is not judged again
    assert torch.equal(resumed, whole) and len(everystep.open("stopped")) == 12


def test_a_loop_that_marks_its_steps_leaves_by_itself_or_is_ended(capsys):
    def loop(directory, leaves):
        model = nn.Linear(5, 1)
        with everystep.record(
            run=directory, model=model, stop_when=["step == 3", "los > 3"]
        ) as recording:
            while not (leaves and recording.is_stopping):
                with recording.step():
                    recording.log(loss=model(torch.randn(2, 5)).sum())

    loop("runs/leaves", leaves=True)
    assert "a condition reads los, but the loop never logged it" in capsys.readouterr().err
    with pytest.raises(UsageError, match=re.escape("at step 3: leave the loop once recording.is_stop")):
        loop("runs/stays", leaves=False)
    for name in ("leaves", "stays"):
        run = everystep.open(name)
        assert (len(run), run.status, run.facts.reason) == (3, "stopped", "step == 3 at step 3")


@pytest.mark.parametrize(
    ("condition", "problem"),
    [
        ("norm(gradients['weigt']) > 1", "did you mean weight"),
        (
            "max(activations['']) > 1",
            r"activations.* cannot be read while the loop runs, but loss, step",
        ),
        ("norm(previous.gradients['weight']) > 1", "cannot be read while the loop runs"),
        ("norm(gradients['weight'] > 1", "was never closed"),
        (1, "must be a text or a list, not 1"),
        ([1], "takes conditions as texts, not an int"),
    ],
)
def test_a_condition_that_cannot_be_asked_is_refused_before_anything_is_recorded(condition, problem):
    with (
        pytest.raises(UsageError, match=problem),
        everystep.record(run="runs/none", model=nn.Linear(5, 1), stop_when=condition),
    ):
        raise AssertionError
    with pytest.raises(everystep.RunError):
        everystep.open("none")
