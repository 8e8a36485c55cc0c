"""Trainings of the same mathematics that are written differently, and mistakes in one of them."""

import json

import pytest
import torch
from torch import nn

import everystep
from everystep.errors import UsageError

STEPS = 6


def made():
    torch.manual_seed(0)
    x, y = torch.randn(32, 10), torch.randn(32, 4)
    return nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 4)), x, y


@pytest.fixture(scope="module")
def by_autograd(tmp_path_factory):
    model, x, y = made()
    return everystep.train(
        model,
        (x, y),
        loss=nn.MSELoss(reduction="sum"),
        optimizer=torch.optim.SGD(model.parameters(), lr=1e-3),
        steps=STEPS,
        directory=tmp_path_factory.mktemp("match") / "autograd",
        progress=False,
    )


def by_hand(directory, mistake="", since=1):
    """The same training with a backward pass written out; the mistake is made from a step on."""
    model, x, y = made()
    w1, b1, w2, b2 = (parameter.detach().clone() for parameter in model.parameters())
    with everystep.record(run=directory, w1=w1, b1=b1, w2=w2, b2=b2) as recording:
        for number, (rows, targets) in enumerate(recording.steps([(x, y)] * STEPS), start=1):
            wrong = mistake if number >= since else ""
            hidden = rows @ w1.T + b1
            active = hidden.clamp(min=0)
            difference = active @ w2.T + b2 - targets
            recording.log(loss=difference.pow(2).sum())
            d_prediction = difference if wrong == "factor" else 2 * difference
            d_active = d_prediction @ w2
            # After the ReLU, nothing is below 0.
            d_hidden = d_active * ((active >= 0) if wrong == "mask" else (hidden > 0))
            d_w1 = (rows.T @ d_hidden).T
            d_b1 = d_hidden.mean(0) if wrong == "mean" else d_hidden.sum(0)
            d_w2, d_b2 = d_prediction.T @ active, d_prediction.sum(0)
            if wrong == "sign":
                d_w2 = -d_w2
            for weight, gradient in ((w1, d_w1), (b1, d_b1), (w2, d_w2), (b2, d_b2)):
                weight -= 1e-3 * gradient
    return recording.run


def test_a_right_backward_pass_by_hand_matches_at_all_steps(by_autograd, tmp_path):
    found = by_autograd.match(by_hand(tmp_path / "hand"))
    assert found.is_match
    assert found.step == STEPS
    assert found.found == found.of == 8
    assert found.suspects == (None, None)
    assert found.to_text().endswith(f"step {STEPS} matches")


@pytest.mark.parametrize("since", [1, 4])
@pytest.mark.parametrize(
    ("mistake", "missing", "operator"),
    [
        ("factor", "gradients['2.bias']", "aten.mse_loss_backward.default"),
        ("mask", "gradients['0.bias']", "aten.threshold_backward.default"),
        ("mean", "gradients['0.bias']", "aten.sum.dim_IntList"),
        ("sign", "parameters['2.weight']", "aten.add_.Tensor"),
    ],
)
def test_the_first_wrong_result_of_a_backward_pass_is_named(
    by_autograd, tmp_path, mistake, missing, operator, since
):
    found = by_autograd.match(by_hand(tmp_path / "hand", mistake, since))
    assert not found.is_match
    assert found.step == since
    assert any(name.startswith(missing) for name in found.end)
    expected, written = found.suspects
    assert expected.observed.operation.operator == operator
    # What autograd's kernel of the loss computes in between is in no tensor.
    assert written.has_known_inputs == (mistake != "factor")


def test_what_matches_and_what_does_not_is_said_in_the_terminal(
    by_autograd, tmp_path, everystep_command
):
    hand = by_hand(tmp_path / "hand", "mean")
    code, out, _ = everystep_command("diff", by_autograd.directory, hand.directory, "--by-values")
    assert code == 1
    assert "missing     gradients['0.bias']" in out
    assert "result of hand that autograd does not have, from what both have:" in out
    assert "aten.mean.dim" in out
    code, out, _ = everystep_command(
        "diff", by_autograd.directory, hand.directory, "--by-values", "--step", 1, "--json"
    )
    assert json.loads(out)["suspects"][1]["operator"] == "aten.mean.dim"
    code, _, err = everystep_command("diff", by_autograd.directory, hand.directory, "--step", 1)
    assert code == 2
    assert "--step needs --by-values" in err


def test_other_modules_optimizers_and_kernels_of_the_same_mathematics_match(by_autograd, tmp_path):
    model, x, y = made()

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = model[0], model[2]

        def forward(self, x):
            return self.second(self.first(x).relu())

    own = Named()
    options = {"loss": nn.MSELoss(reduction="sum"), "steps": STEPS, "progress": False}
    descent = everystep.GradientDescent(own.parameters(), lr=1e-3)
    other = everystep.train(own, (x, y), optimizer=descent, directory=tmp_path / "a", **options)
    assert by_autograd.match(other).is_match
    assert other.match(by_autograd).is_match


def test_other_weights_at_the_beginning_are_said_to_be_missing(by_autograd, tmp_path):
    torch.manual_seed(9)
    model = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 4))
    _, x, y = made()
    other = everystep.train(
        model, (x, y), loss=nn.MSELoss(reduction="sum"), steps=2, progress=False,
        optimizer=torch.optim.SGD(model.parameters(), lr=1e-3), directory=tmp_path / "other",
    )  # fmt: skip
    found = by_autograd.match(other)
    assert found.step == 1
    assert "parameters['0.weight']" in found.begin
    with pytest.raises(UsageError, match="expected another run"):
        by_autograd.match("other")
