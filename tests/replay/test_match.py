"""Trainings of the same mathematics that are written differently, and mistakes in one of them."""

import json
import math
import re
from functools import partial

import pytest
import torch
from tests.descent import looped, trained
from torch import nn

import everystep
from everystep.errors import RunError, UsageError

STEPS = 6


def made():
    torch.manual_seed(0)
    x, y = torch.randn(32, 10), torch.randn(32, 4)
    return nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 4)), x, y


@pytest.fixture(scope="module")
def by_autograd(tmp_path_factory):
    model, x, y = made()
    optimizer, loss = torch.optim.SGD(model.parameters(), lr=1e-3), nn.MSELoss(reduction="sum")
    place = tmp_path_factory.mktemp("match") / "autograd"
    return trained(model, (x, y), loss=loss, optimizer=optimizer, steps=STEPS, run=place)


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


@pytest.mark.sweep(every=3)
@pytest.mark.parametrize(
    ("mistake", "missing", "operator", "since"),
    [
        ("factor", "gradients['2.bias']", "aten.mse_loss_backward.default", 4),
        ("mask", "gradients['0.bias']", "aten.threshold_backward.default", 4),
        ("mean", "gradients['0.bias']", "aten.sum.dim_IntList", 4),
        ("sign", "parameters['2.weight']", "aten.add_.Tensor", 1),
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


def loss_of(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


@pytest.mark.parametrize(
    "change", [{"maximize": True}, {"lr": 2e-4}, {"foreach": True}], ids=lambda each: next(iter(each))
)
def test_updates_smaller_than_rounding_of_the_parameters_are_compared(tmp_path, change):
    runs = []
    for place, more in (("one", {}), ("other", change)):
        model, *batch = made()
        optimizer = partial(torch.optim.SGD, **{"lr": 1e-4} | more)
        run = tmp_path / place
        runs.append(looped(model, [batch] * 2, loss_of, run=run, optimizer=optimizer))
    found = runs[0].match(runs[1])
    assert found.is_match == ("foreach" in change)
    assert found.step == (2 if found.is_match else 1)
    assert all(name.endswith(" after the step") for name in found.end)


def test_what_matches_and_what_does_not_is_said_in_the_terminal(
    by_autograd, tmp_path, everystep_command
):
    hand = by_hand(tmp_path / "hand", "mean")
    code, out, _ = everystep_command("match", by_autograd.directory, hand.directory)
    assert code == 1
    assert "missing     gradients['0.bias']" in out
    assert "result of hand that autograd does not have, from what both have:" in out
    assert "aten.mean.dim" in out
    code, out, _ = everystep_command(
        "match", by_autograd.directory, hand.directory, "--step", 1, "--json"
    )
    assert json.loads(out)["suspects"][1]["observed"]["operator"] == "aten.mean.dim"


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
    other = everystep.train(own, (x, y), optimizer=descent, run=tmp_path / "a", **options)
    assert by_autograd.match(other).is_match
    assert other.match(by_autograd).is_match


@pytest.mark.parametrize("factors", [(1e38, -1e38), (1e38, math.nan)])
def test_infinities_of_two_signs_do_not_match_nor_an_infinity_and_nan(tmp_path, factors):
    runs = []
    for factor in factors:
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        batches = [torch.ones(2, 3)]
        # At rate 0: an update by an infinity would make one of the other sign, which is found, too.
        options = {"run": tmp_path / f"of {factor}", "optimizer": partial(torch.optim.SGD, lr=0.0)}
        runs.append(looped(model, batches, lambda m, x, f=factor: (m(x) * 1e38 * f).sum(), **options))
    assert not runs[0].match(runs[1]).is_match
    assert runs[0].match(runs[0]).is_match


def test_other_weights_at_the_beginning_are_said_to_be_missing(by_autograd, tmp_path):
    torch.manual_seed(9)
    model = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 4))
    _, x, y = made()
    other = everystep.train(
        model, (x, y), loss=nn.MSELoss(reduction="sum"), steps=2, progress=False,
        optimizer=torch.optim.SGD(model.parameters(), lr=1e-3), run=tmp_path / "other",
    )  # fmt: skip
    found = by_autograd.match(other)
    assert found.step == 1
    assert "parameters['0.weight']" in found.begin
    with pytest.raises(UsageError, match="other: must be a run"):
        by_autograd.match("other")


def by_optimizer(directory, make, *, seed=0, module=nn.Tanh, prepare=None):
    """A network of two layers; prepare: called for the parameters before each update."""
    torch.manual_seed(seed)
    x, y = torch.randn(64, 10), torch.randn(64, 4)
    model = nn.Sequential(nn.Linear(10, 16), module(), nn.Linear(16, 4))
    optimizer = make(model.parameters())
    with everystep.record(run=directory, model=model, optimizer=optimizer) as recording:
        for rows, targets in recording.steps([(x, y)] * STEPS):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(rows), targets)
            loss.backward()
            if prepare is not None:
                prepare([*model.parameters()])
            optimizer.step()
            recording.log(loss=loss)
    return recording.run


@pytest.mark.sweep(every=4)
@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        (torch.optim.Adam, torch.optim.AdamW, False),  # a weight decay of 0.01
        (partial(torch.optim.SGD, weight_decay=1e-4), torch.optim.SGD, False),
        (partial(torch.optim.Adam, eps=1e-8), partial(torch.optim.Adam, eps=1e-7), False),
        (torch.optim.Adam, partial(torch.optim.Adam, foreach=True), True),
        (torch.optim.Adam, partial(torch.optim.Adam, fused=True), True),
        (torch.optim.Adam, partial(torch.optim.AdamW, weight_decay=0.0), True),
        (
            partial(torch.optim.SGD, momentum=0.9),
            partial(torch.optim.SGD, momentum=0.9, foreach=True),
            True,
        ),
    ],
)
def test_what_single_precision_hides_is_compared_in_double(tmp_path, one, other, is_same):
    one, other = (partial(each, lr=1e-3) for each in (one, other))
    runs = [by_optimizer(tmp_path / name, each) for name, each in (("one", one), ("other", other))]
    for found in (runs[0].match(runs[1]), runs[1].match(runs[0])):
        assert (found.is_match, found.step) == (is_same, STEPS if is_same else 1)
        assert found.is_double and found.precisions == ("float32", "float32")
        assert "in double precision, from the same state: both compute in float32" in found.to_text()


def clipped_by_numbers(parameters):
    """Clips gradients by numbers that Python reads in single precision."""
    norm = math.sqrt(sum(each.grad.square().sum().item() for each in parameters))
    for each in parameters:
        each.grad.mul_(min(1.0, 0.1 / (norm + 1e-6)))


def test_numbers_that_python_reads_are_rounded_as_recorded(tmp_path):
    make = partial(torch.optim.SGD, lr=0.1)
    clip = partial(nn.utils.clip_grad_norm_, max_norm=0.1)
    one = by_optimizer(tmp_path / "one", make, prepare=clip)
    other = by_optimizer(tmp_path / "other", make, prepare=clipped_by_numbers)
    assert one.match(other).is_match and other.match(one).is_match
    found = one.match(by_optimizer(tmp_path / "third", make, prepare=partial(clip, max_norm=0.1001)))
    assert (found.is_match, found.step) == (False, 1)


def test_what_double_precision_cannot_decide_is_said(tmp_path):
    runs = [rounded(tmp_path / name, noise=True) for name in ("one", "other")]
    found = runs[0].match(runs[1])
    assert found.is_match and not found.is_double
    assert "draws different random numbers in float64" in found.problem
    assert "in float32 only, not in double precision: aten." in found.to_text()


class Renamed(nn.Module):
    """The layers of a sequence by other names, in another order."""

    def __init__(self, *layers):
        super().__init__()
        self.head, self.body = layers[-1], nn.ModuleList(layers[:-1])

    def forward(self, x):
        for layer in self.body:
            x = layer(x)
        return self.head(x)


def rounded(
    directory,
    dtype=torch.float32,
    *,
    autocast=False,
    module=nn.Tanh,
    noise=False,
    seed=0,
    network=nn.Sequential,
):
    """A classifier with dropout; its loop computes in bfloat16 in some way."""
    torch.manual_seed(seed)
    x, y = torch.randn(32, 10), torch.randint(0, 4, (32,))
    layers = nn.Linear(10, 16), module(), nn.LayerNorm(16), nn.Dropout(0.2), nn.Linear(16, 4)
    model = network(*layers).to(dtype)
    torch.manual_seed(1)

    def loss_of(model, batch):
        given = batch[0].to(dtype)
        if noise:
            given = given + torch.randn_like(given)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return nn.functional.cross_entropy(model(given), batch[1])

    optimizer = partial(torch.optim.AdamW, lr=1e-2)
    return looped(model, [(x, y)] * STEPS, loss_of, run=directory, optimizer=optimizer)


@pytest.fixture(scope="module")
def in_single(tmp_path_factory):
    return rounded(tmp_path_factory.mktemp("precision") / "single")


@pytest.mark.sweep(every=2)
@pytest.mark.parametrize(
    "how",
    [
        *({"dtype": torch.bfloat16}, {"autocast": True}),
        *({"autocast": True, "network": Renamed}, {"dtype": torch.bfloat16, "network": Renamed}),
    ],
)
def test_the_same_in_bfloat16_matches_in_double_precision(in_single, tmp_path, how):
    other = rounded(tmp_path / "bfloat16", **how)
    assert other.losses["loss"].to_list() != in_single.losses["loss"].to_list()
    found = in_single.match(other)
    assert found.is_match
    assert (found.step, found.found) == (STEPS, found.of)
    assert found.precisions == ("float32", "bfloat16")
    assert found.losses == (in_single[STEPS].loss, other[STEPS].loss)
    assert "single computes in float32 and bfloat16 computes in bfloat16" in found.to_text()


def test_a_mistake_that_is_smaller_than_the_rounding_of_bfloat16_is_found(in_single, tmp_path):
    class AlmostTanh(nn.Module):
        def forward(self, x):
            return torch.tanh(x * 1.0001)

    other = rounded(tmp_path / "bfloat16", autocast=True, module=AlmostTanh)
    found = in_single.match(other)
    assert (found.is_match, found.step) == (False, 1)
    expected, written = found.suspects
    assert expected.observed.operation.operator == "aten.tanh.default"
    assert written.observed.operation.operator == "aten.mul.Tensor"
    assert expected.has_known_inputs and written.has_known_inputs


def test_other_weights_in_another_precision_are_said_to_be_missing(in_single, tmp_path):
    found = in_single.match(rounded(tmp_path / "other", torch.bfloat16, seed=5))
    assert found.step == 1
    assert {"parameters['0.weight']", "batch.x"} <= {*found.begin}


def test_programs_without_a_double_precision_are_refused(tmp_path):
    one = rounded(tmp_path / "one", noise=True)
    other = rounded(tmp_path / "other", torch.bfloat16, noise=True)
    with pytest.raises(
        RunError, match=r"compute in different precisions.*draws different random numbers"
    ):
        one.match(other)


def adam_by_hand(directory, batches, is_corrected):
    """Adam written out, which counts steps as a number; a mistake leaves out one correction."""
    torch.manual_seed(0)
    weight = nn.Linear(6, 3, bias=False).weight.detach().clone()
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    with everystep.record(run=directory, weight=weight, mean=mean, square=square) as recording:
        for number, x in enumerate(recording.steps(batches), start=1):
            out = x @ weight.T
            recording.log(loss=out.pow(2).mean())
            gradient = (2 * out / out.numel()).T @ x
            mean.mul_(0.9).add_(gradient, alpha=0.1)
            square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            corrected = square / (1 - 0.999**number) if is_corrected else square
            weight -= 1e-2 * (mean / (1 - 0.9**number)) / (corrected.sqrt() + 1e-8)


def test_neither_a_counter_of_steps_nor_a_constant_is_suspect(everystep_command):
    torch.manual_seed(1)
    batches = [torch.randn(8, 6) for _ in range(3)]
    torch.manual_seed(0)
    model, adam = nn.Linear(6, 3, bias=False), partial(torch.optim.Adam, lr=1e-2)
    looped(model, batches, lambda model, x: model(x).pow(2).mean(), run="./torchs", optimizer=adam)
    adam_by_hand("right", batches, is_corrected=True)
    adam_by_hand("wrong", batches, is_corrected=False)
    code, out, _ = everystep_command("match", "torchs", "right")
    assert code == 0 and out.endswith("step 3 matches\n")
    code, out, _ = everystep_command("match", "torchs", "wrong")
    assert code == 1
    suspect = "first       result of torchs that wrong does not have, from what both have:\n"
    assert re.search(suspect + r" +#\d+ aten.div.Tensor, update\n", out)
