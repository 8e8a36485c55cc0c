"""Forks with other gradients: as a loop by hand that changes them between backward and the update."""

import html
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import everystep
from everystep.errors import ExperimentError, ExpressionError, RunError, UsageError
from everystep.experiment.batches import Batches
from everystep.gradient_descent import GradientDescent
from everystep.views.summary import facts_in_order

ROWS, STEPS, AT = 20, 14, 4
W0, B2 = "gradients['0.weight']", "gradients['2.bias']"
CLIPPED = {W0: f"clip({W0}, -0.01, 0.02)"}
OPTIMIZERS = {
    "GradientDescent": lambda p: GradientDescent(p, lr=0.5),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
}


def made(optimizer="Adam"):
    torch.manual_seed(3)
    x, y = torch.randn(ROWS, 4), torch.randint(0, 3, (ROWS,))
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    make = OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer
    return model, x, y, make(model.parameters())


def trained(directory, optimizer="Adam", **options):
    model, x, y, made_optimizer = made(optimizer)
    settings = {"steps": STEPS, "batch_size": 6, "seed": 5} | options
    return everystep.train(
        model, (x, y), loss=nn.CrossEntropyLoss(), optimizer=made_optimizer, directory=directory,
        progress=False, **settings,
    )  # fmt: skip


def forked(run, replace, directory, at=AT, **options):
    return run.fork(at, replace=replace, directory=directory, progress=False, **options)


def by_hand(change, optimizer="Adam", after=AT, steps=STEPS, batch_size=6, clip_norm=None):
    """Losses, and the last parameters, of a loop that changes gradients after a step.

    change: called with the gradients and the parameters by name, the step and the loss; returns new
    gradients by name.
    """
    model, x, y, made_optimizer = made(optimizer)
    parameters = dict(model.named_parameters())
    order, losses = Batches(ROWS, batch_size, seed=5), []
    for step in range(1, steps + 1):
        rows = order.indices(step)
        rows = slice(None) if rows is None else rows
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        made_optimizer.zero_grad()
        loss.backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        if step > after:
            gradients = {name: parameter.grad for name, parameter in parameters.items()}
            values = {name: parameter.detach() for name, parameter in parameters.items()}
            for name, gradient in change(gradients, values, step, loss.item()).items():
                parameters[name].grad = gradient
        made_optimizer.step()
        losses.append(loss.item())
    return losses, {name: parameter.detach() for name, parameter in parameters.items()}


def assert_is(run, hand):
    losses, parameters = hand
    opened = everystep.open(run.directory)
    assert opened.losses["loss"].to_list() == losses
    for name, tensor in opened.parameters(len(losses)).items():
        assert torch.equal(tensor, parameters[name]), name
    assert opened.verify(processes=1, progress=False).is_exact


def clipped(gradients, parameters, step, loss):
    return {"0.weight": gradients["0.weight"].clamp(-0.01, 0.02)}


# The bits of a loop by hand.


@pytest.mark.parametrize("batch_size", [6, None])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_fork_with_a_replaced_gradient_is_the_loop_by_hand(tmp_path, optimizer, batch_size):
    run = trained(tmp_path / "run", optimizer, batch_size=batch_size)
    fork = forked(run, CLIPPED, tmp_path / "fork")
    assert_is(fork, by_hand(clipped, optimizer, batch_size=batch_size))
    assert fork.facts.training.engine.eager_from is None
    assert fork.facts.training.engine.checks


@pytest.mark.parametrize("optimizer", ["GradientDescent", "SGD"])
def test_it_is_replaced_after_clipping_by_norm(tmp_path, optimizer):
    run = trained(tmp_path / "run", optimizer, clip_norm=0.3)
    fork = forked(run, CLIPPED, tmp_path / "fork")
    assert_is(fork, by_hand(clipped, optimizer, clip_norm=0.3))


def normalized(gradients, parameters, step, loss):
    g = gradients["0.weight"]
    return {"0.weight": g / max(1, g.norm().item()) * (1 / step)}


def swapped(gradients, parameters, step, loss):
    first = gradients["2.weight"] if step < 8 or loss > 2 else 0.5 * parameters["2.weight"]
    return {"0.bias": gradients["2.weight"][0], "2.weight": first, "2.bias": torch.zeros(3)}


def decayed(gradients, parameters, step, loss):
    g, w = gradients["0.weight"], parameters["0.weight"]
    return {"0.weight": torch.where(g.abs() > g.std().item(), 0.1 * w, g - g.mean().item())}


EXPRESSIONS = {
    "step": (normalized, {W0: f"{W0} / max(1, norm({W0})) * (1 / step)"}),
    "several": (
        swapped,
        {
            "gradients['0.bias']": "gradients['2.weight'][0]",
            "gradients['2.weight']": "gradients['2.weight'] if step < 8 or loss > 2 "
            "else 0.5 * parameters['2.weight']",
            B2: "0",
        },
    ),
    "elements": (
        decayed,
        {W0: f"where(abs({W0}) > std({W0}), 0.1 * parameters['0.weight'], {W0} - mean({W0}))"},
    ),
}


@pytest.mark.parametrize("batch_size", [6, None])
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_expressions_read_the_step_other_gradients_and_parameters(tmp_path, name, batch_size):
    change, replace = EXPRESSIONS[name]
    run = trained(tmp_path / "run", "SGD", batch_size=batch_size)
    fork = forked(run, replace, tmp_path / "fork")
    assert_is(fork, by_hand(change, "SGD", batch_size=batch_size))
    assert fork.facts.training.engine.eager_from is None


def test_all_read_the_gradients_as_backward_left_them(tmp_path):
    run = trained(tmp_path / "run", "SGD")
    fork = forked(
        run,
        {B2: "gradients['0.bias'][:3]", "gradients['0.bias']": f"sum({B2}) * parameters['0.bias']"},
        tmp_path / "fork",
    )

    def both(gradients, parameters, step, loss):
        total = gradients["2.bias"].sum().item()
        return {"2.bias": gradients["0.bias"][:3].clone(), "0.bias": total * parameters["0.bias"]}

    assert_is(fork, by_hand(both, "SGD"))


@pytest.mark.parametrize("engine", ["eager", "program"])
def test_each_engine_gives_these_bits(tmp_path, engine):
    run = trained(tmp_path / "run", "SGD", engine=engine)
    fork = forked(run, {W0: f"{W0} * (step % 3)"}, tmp_path / "fork")
    hand = by_hand(lambda g, p, step, loss: {"0.weight": g["0.weight"] * (step % 3)}, "SGD")
    assert everystep.open(fork.directory).losses["loss"].to_list() == hand[0]


class Halving(torch.optim.Optimizer):
    """A user's own, which everystep runs at every step."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.5})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= group["lr"] * parameter.grad


def test_a_users_optimizer_gets_the_replaced_gradient(tmp_path):
    run = trained(tmp_path / "run", Halving)
    fork = forked(run, {W0: f"{W0} * step"}, tmp_path / "fork")
    hand = by_hand(lambda g, p, step, loss: {"0.weight": g["0.weight"] * step}, Halving)
    assert fork.losses["loss"].to_list() == hand[0]
    assert fork.facts.training.engine.live_optimizer == "Halving"
    model, _, _, optimizer = made(Halving)
    opened = everystep.open(fork.directory, model=model, loss=nn.CrossEntropyLoss(), optimizer=optimizer)
    assert opened.verify(processes=1, progress=False).is_exact
    assert torch.equal(opened.parameters(STEPS)["0.weight"], hand[1]["0.weight"])


class Scaled(nn.Module):
    """A model with a parameter of one number, and a buffer."""

    def __init__(self):
        super().__init__()
        self.inner, self.scale = nn.Linear(4, 3), nn.Parameter(torch.tensor(1.5))
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x):
        self.seen += 1
        return self.inner(x) * self.scale


def test_expressions_read_buffers_and_the_batch_and_replace_single_numbers(tmp_path):
    def scaled():
        torch.manual_seed(1)
        model = Scaled()
        x, y = torch.randn(ROWS, 4), torch.randint(0, 3, (ROWS,))
        return model, x, y, torch.optim.SGD(model.parameters(), lr=0.1)

    model, x, y, optimizer = scaled()
    run = everystep.train(
        model, (x, y), loss=nn.CrossEntropyLoss(), optimizer=optimizer, steps=8, batch_size=6, seed=5,
        directory=tmp_path / "run", progress=False,
    )  # fmt: skip
    replace = {
        "gradients['scale']": "norm(gradients['inner.weight']) * gradients['scale']",
        "gradients['inner.bias']": "gradients['inner.bias'] * mean(batch.x) + buffers['seen'] / 100",
    }
    fork = forked(run, replace, tmp_path / "fork", at=3)
    model, x, y, optimizer = scaled()
    losses = []
    for step in range(1, 9):
        rows = Batches(ROWS, 6, seed=5).indices(step)
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        if step > 3:
            scale, bias, weight = model.scale, model.inner.bias, model.inner.weight
            scale.grad = (weight.grad.norm().double() * scale.grad.double()).float()
            bias.grad = bias.grad * x[rows].mean().item() + model.seen / 100
        optimizer.step()
        losses.append(loss.item())
    assert fork.losses["loss"].to_list() == losses
    assert torch.equal(fork.parameters(8)["scale"], model.scale.detach())
    assert fork.verify(processes=1, progress=False).is_exact


# What is recorded.


def test_each_step_opens_in_a_new_process_and_shows_the_gradient_of_backward(tmp_path):
    run = trained(tmp_path / "run", "SGD")
    fork = forked(run, {W0: f"clip({W0}, -0.01, 0.02) / step"}, tmp_path / "fork")
    code = (
        "import sys, torch, everystep\n"
        "run = everystep.open(sys.argv[1])\n"
        "for number in (4, 5, 9):\n"
        "    step = run[number]\n"
        "    assert step.is_exact and step.is_by_program\n"
        "    raw, change = step.gradients['0.weight'], step.updates['0.weight'].change\n"
        "    seen = [o.operation.operator for o in step.operations if o.operation.phase == 'update']\n"
        "    print(number, 'aten.clamp.default' in seen, raw.abs().max().item() > 0.03)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(fork.directory)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["4 False True", "5 True True", "9 True True"]


def test_a_fork_of_a_fork_keeps_it_until_told_otherwise(tmp_path):
    run = trained(tmp_path / "run")
    first = forked(run, CLIPPED, tmp_path / "first")
    second = forked(first, {B2: "0"}, tmp_path / "second", at=7)
    third = forked(second, {W0: W0}, tmp_path / "third", at=10)

    def change(gradients, parameters, step, loss):
        found = clipped(gradients, parameters, step, loss) if step <= 10 else {}
        return found | ({"2.bias": torch.zeros(3)} if step > 7 else {})

    assert_is(third, by_hand(change))
    assert second.facts.training.replaced == {"0.weight": CLIPPED[W0], "2.bias": "0"}
    assert third.facts.training.replaced == {"2.bias": "0"}
    assert run.facts.training.replaced == {}


def test_a_fork_at_a_step_of_its_parent_has_the_parents_gradients(tmp_path):
    run = trained(tmp_path / "run")
    first = forked(run, CLIPPED, tmp_path / "first", at=9)
    again = first.fork(6, directory=tmp_path / "again", progress=False)
    assert again.losses["loss"].to_list() == run.losses["loss"].to_list()


@pytest.mark.parametrize("alone", [False, True])
def test_a_fork_that_is_resumed_keeps_it(tmp_path, alone):
    run = trained(tmp_path / "run")
    fork = forked(run, {W0: f"{W0} / step"}, tmp_path / "fork", steps=9)
    model, _, _, optimizer = made()
    objects = {"model": model, "loss": nn.CrossEntropyLoss(), "optimizer": optimizer}
    further = everystep.open(fork.directory).resume(STEPS, progress=False, **({} if alone else objects))
    assert_is(further, by_hand(lambda g, p, step, loss: {"0.weight": g["0.weight"] / step}))
    assert further.facts.training.replaced == {"0.weight": f"{W0} / step"}


def test_programs_that_read_the_step_need_not_read_the_learning_rate(tmp_path):
    run = trained(tmp_path / "run", "SGD")
    fork = forked(run, {W0: f"{W0} / step"}, tmp_path / "fork")
    opened = everystep.open(fork.directory)
    with pytest.raises(UsageError, match="hold its learning rate as a number"):
        opened.fork(10, lr=0.01, directory=tmp_path / "slow", progress=False)
    same = opened.fork(10, directory=tmp_path / "same", progress=False)
    assert same.losses["loss"].to_list() == fork.losses["loss"].to_list()


def test_a_repaired_fork_keeps_it(tmp_path, everystep_command):
    run = trained(tmp_path / "run")
    fork = forked(run, CLIPPED, tmp_path / "fork")
    everystep_command("doctor", fork.directory, "--repair", "repaired")
    repaired = everystep.open("repaired")
    assert repaired.facts.training.replaced == {"0.weight": CLIPPED[W0]}
    assert repaired.verify(processes=1, progress=False).is_exact


def test_what_if_keeps_it(tmp_path):
    run = trained(tmp_path / "run")
    fork = forked(run, CLIPPED, tmp_path / "fork")
    found = fork.what_if(AT + 2, STEPS, without_rows=[2], progress=False)
    without = fork.fork(AT + 2, without_rows=[2], directory=tmp_path / "without", progress=False)
    assert list(found.cases[0].losses) == without.losses["loss"].to_list()[AT + 2 :]
    assert found.recorded.losses == tuple(fork.losses["loss"].to_list()[AT + 2 :])


def test_diff_names_it_and_views_show_it(tmp_path, everystep_command):
    run = trained(tmp_path / "run")
    fork = forked(run, CLIPPED, tmp_path / "fork")
    found = run.diff(fork, progress=False)
    assert found.operation.step == AT + 1
    assert found.operation.other.operation.operator == "aten.clamp.default"
    assert f'cause       replace: 0.weight None | "{CLIPPED[W0]}"' in found.to_text()
    shown = f"replaced: {W0} = {CLIPPED[W0]}"
    assert shown in dict(facts_in_order(fork.facts))["update"]
    everystep_command("report", fork.directory, "-o", "report.html")
    assert shown in html.unescape(Path("report.html").read_text())
    out = everystep_command("step", fork.directory, 6)[1]
    assert shown in out
    out = everystep_command("step", fork.directory, AT)[1]
    assert "replaced" not in out
    out = everystep_command("step", fork.directory, 6, "--json")[1]
    assert json.loads(out)["replaced"] == {"0.weight": CLIPPED[W0]}


def test_an_experiment_is_forked_from_the_command_line(everystep_command):
    everystep_command("train", "digits", "--steps", 12, "--run", "run", "-q")
    options = ["--replace", f"{W0} = clip({W0}, -1e-3, 1e-3)", "--replace", "gradients['0.bias']=0"]
    code, _, err = everystep_command("fork", "run", "--at", 6, *options, "--run", "fork", "-q")
    assert code == 0, err
    fork = everystep.open("fork")
    assert fork.verify(processes=1, progress=False).is_exact
    assert fork[7].updates["0.bias"].relative_size >= 0
    assert fork.facts.fork.changed == {
        "replace": [f"{W0} = clip({W0}, -1e-3, 1e-3)", "gradients['0.bias'] = 0"]
    }
    code, *_ = everystep_command("fork", "fork", "--at", 9, "--run", "again", "-q")
    assert everystep.open("again").losses["loss"].to_list() == fork.losses["loss"].to_list()


def test_an_experiment_resumes_with_it(everystep_command):
    everystep_command("train", "two-layer", "--steps", 12, "--run", "run", "-q")
    options = ["--at", 4, "--replace", f"{W0}={W0} / step", "-q"]
    everystep_command("fork", "run", *options, "--run", "whole")
    everystep_command("fork", "run", *options, "--until", 8, "--run", "part")
    code, _, err = everystep_command("resume", "part", "--steps", 12, "-q")
    assert code == 0, err
    whole, part = everystep.open("whole"), everystep.open("part")
    assert part.losses["loss"].to_list() == whole.losses["loss"].to_list()
    assert part.verify(processes=1, progress=False).is_exact


# What is refused.


@pytest.mark.parametrize(
    ("replace", "error", "message"),
    [
        ({"gradients['0.weigth']": "0"}, ExpressionError, "did you mean 0.weight or"),
        ({W0: "gradients['0.weigth']"}, ExpressionError, "did you mean 0.weight or"),
        ({"parameters['0.weight']": "0"}, UsageError, "is not a gradient; only whole gradients"),
        ({f"{W0}[0]": "0"}, UsageError, "is not a gradient; only whole gradients"),
        ({"0.weight": "0"}, UsageError, "0.weight is not a gradient; only whole gradients"),
        ({W0: "gradients['2.weight']"}, ExperimentError, "has shape (3, 8), but the gradient has shape"),
        ({W0: f"{W0} > 0"}, ExperimentError, "is bool, but the gradient is float32"),
        ({W0: "batch.x"}, ExperimentError, "has shape (6, 4), but the gradient has shape (8, 4)"),
        ({W0: f"norm({W0})"}, ExperimentError, "is one number, but the gradient has shape (8, 4)"),
        ({W0: f"numel({W0})"}, ExperimentError, "write a constant such as 0 to fill"),
        ({W0: "lr"}, ExpressionError, "lr"),
        ({W0: "activations['0']"}, ExpressionError, "is not known between the backward pass and"),
        ({W0: "updates['0.weight']"}, ExpressionError, "is not known between the backward pass and"),
        ({W0: f"previous.{W0}"}, ExpressionError, "is not known between the backward pass and"),
        ({W0: "rows.loss"}, ExpressionError, "is not known between the backward pass and"),
        ({W0: f"{W0} + gradients['2.weight']"}, ExpressionError, "must match the size"),
        ({W0: f"1 if {W0} > 0 else 0"}, ExpressionError, "use any(...) or all(...)"),
        ({W0: "clip("}, ExpressionError, "clip("),
        ({W0: 0}, UsageError, "write both as text"),
        ({W0: "0", 'gradients["0.weight"]': "1"}, UsageError, "is replaced twice"),
    ],
)  # fmt: skip
def test_what_cannot_replace_a_gradient_is_refused_before_anything_is_written(
    tmp_path, replace, error, message
):
    run = trained(tmp_path / "run", "SGD", steps=6)
    with pytest.raises(error) as caught:
        forked(run, replace, tmp_path / "fork")
    assert message in str(caught.value)
    assert not (tmp_path / "fork").exists()


def test_a_gradient_that_a_step_does_not_have_ends_the_fork(tmp_path):
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.used(x)

    torch.manual_seed(0)
    model, x, y = Half(), torch.randn(ROWS, 4), torch.randint(0, 3, (ROWS,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = everystep.train(
        model, (x, y), loss=nn.CrossEntropyLoss(), optimizer=optimizer, steps=6,
        directory=tmp_path / "run", progress=False,
    )  # fmt: skip
    with pytest.raises(ExperimentError, match="this step has no such gradient"):
        forked(run, {"gradients['unused.weight']": "0"}, tmp_path / "fork", at=2)


def test_your_own_loop_and_programs_alone_say_what_they_need(tmp_path):
    model, x, y, optimizer = made("SGD")
    with everystep.record(model=model, optimizer=optimizer, run=tmp_path / "loop") as recording:
        for _ in recording.steps(range(3)):
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recording.log(loss=loss)
    with pytest.raises(RunError, match="recorded from your own loop"):
        forked(everystep.open(tmp_path / "loop"), {W0: "0"}, tmp_path / "fork", at=2)
    run = trained(tmp_path / "run")
    with pytest.raises(RunError, match=r"pass the objects: fork\(\.\.\., model="):
        forked(everystep.open(run.directory), {W0: "0"}, tmp_path / "fork")


@pytest.mark.parametrize("text", [W0, f"{W0}=0 --replace"])
def test_the_command_says_how_to_write_it(everystep_command, text):
    everystep_command("train", "two-layer", "--steps", 4, "--run", "run", "-q")
    code, _, err = everystep_command("fork", "run", "--at", 2, "--replace", text, "--run", "fork", "-q")
    assert code == 2
    assert err
