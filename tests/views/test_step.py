"""A step opened in the terminal: the exact output."""

import copy
import io
import json
import math
import re

import pytest
import torch
from rich.console import Console
from tests.descent import descend
from torch import nn

import everystep
from everystep.errors import UsageError
from everystep.recording.recorded_run import RecordedRun
from everystep.recording.texts import shortest
from everystep.replay.opened_step import statistics
from everystep.replay.run_replay import Replay
from everystep.training.objects import Objects
from everystep.views.formatting import TIMES
from everystep.views.mathematics import mathematics
from everystep.views.step_data import step_data
from everystep.views.step_text import PHASES, step_text


@pytest.fixture
def opened():
    """Train, and open a step: the step, and the facts of the run."""

    def opened(model, x, y, number, *, optimizer=None, loss=None, objects=None, steps=4, **options):
        optimizer = optimizer or everystep.GradientDescent(model.parameters(), lr=1e-4)
        everystep.train(
            model,
            (x, y),
            loss=loss or nn.MSELoss(reduction="sum"),
            optimizer=optimizer,
            steps=steps,
            progress=False,
            run="./run",
            **options,
        )
        run = RecordedRun("run")
        return Replay(run, objects).step(number), run.facts

    return opened


def data_of(step, **options):
    data = step_data(step, RecordedRun("run"), **options)
    json.dumps(data, allow_nan=False)
    return data


def text_of(step, facts, **options):
    return step_text(step, facts, **options).plain


CHAPTER = """\
two-layer-1, step 137 of 137

loss      SHORT, in full LOSS
replayed  bit-identical, without your code

batch     all 64 rows, in order
  x  float32  64{by}1,000
  y  float32  64{by}10

forward
       module  formula
  #0   0       x · 0.weightᵀ + 0.bias      64{by}100
  #1   1       relu(#0)                    64{by}100
  #2   2       #1 · 2.weightᵀ + 2.bias     64{by}10

loss      MSELoss(reduction='sum')
  #3           loss = sum((#2 - y)²)       number

zero_grad drops the gradients of step 136
  0.weight.grad
  0.bias.grad
  2.weight.grad
  2.bias.grad

backward
       module  formula
  #4           ∂loss = 1                   number
  #5           ∂#2 = 2 * (#2 - y)          64{by}10
  #6   2       ∂#1 = ∂#2 · 2.weight        64{by}100
  #7   2       2.weight.grad = ∂#2ᵀ · #1   10{by}100
  #8   2       2.bias.grad = sum(∂#2, 0)   1{by}10
  #9   1       ∂#0 = ∂#1 if #1 > 0 else 0  64{by}100
  #10  0       0.weight.grad = ∂#0ᵀ · x    100{by}1,000
  #11  0       0.bias.grad = sum(∂#0, 0)   1{by}100

update    GradientDescent, lr = 0.0001
  param - param.grad * 0.0001
  torch.sub(param, torch.mul(param.grad, 0.0001))
  0.weight
  0.bias
  2.weight
  2.bias
"""


def test_the_chapters_step_reads_in_its_order_and_fits_a_hundred_columns(chapter, opened):
    step, facts = opened(*chapter, 137, steps=137)
    lines = text_of(step, facts, name="two-layer-1").splitlines()
    assert max(map(len, lines)) <= 100
    rest = iter(lines)
    assert step.loss == pytest.approx(0.8888, rel=2e-3)  # other processors round differently
    shown = CHAPTER.replace("SHORT", f"{step.loss:.4g}").replace("LOSS", shortest(step.loss))
    for expected in shown.replace("{by}", TIMES).splitlines():
        assert any(line.startswith(expected) for line in rest), expected
    seen = statistics(step.activations["1"])
    [relu] = [line for line in lines if "relu(#0)" in line]
    assert relu.split()[4:] == [
        *(f"{value:.4g}" for value in (seen.mean, seen.std, seen.minimum, seen.maximum)),
        f"{100 * seen.zeros:.3g}%",
    ]


def test_a_batch_without_tensors_has_its_values_alone():
    model = nn.Linear(2, 1)
    with everystep.record(run="./run", model=model) as recording:
        for number in recording.steps([7]):
            recording.log(loss=(number * model(torch.ones(2))).sum())
    run = RecordedRun("run")
    text = text_of(Replay(run, None).step(1), run.facts)
    assert "\nbatch     no tensors\n  batch  7\n\n" in text


def test_the_first_step_has_no_gradients_to_drop(small, opened):
    assert "zero_grad no gradients to drop yet" in text_of(*opened(*small, 1))


def test_json_has_every_number_of_the_step(small, opened):
    model, x, y = small
    step, _ = opened(model, x, y, 3, batch_size=7)
    content = data_of(step, values=True)
    known = content["tensors"]
    assert content["loss"] == step.loss
    assert content["batch"]["rows"] == step.batch.rows.tolist()
    assert content["hyperparameters"] == {"lr": 1e-4}
    for key, tensors in (("gradients", step.gradients), ("dropped", step.dropped)):
        assert {each["parameter"] for each in content[key]} == tensors.keys()
        for each in content[key]:
            values = torch.tensor(known[each["tensor"]]["values"])
            assert torch.equal(values, tensors[each["parameter"]])
    for given, (name, update) in zip(content["updates"], step.updates.items(), strict=True):
        assert torch.equal(torch.tensor(known[given["after"]]["values"]), update.after)
        assert (given["parameter"], given["relative_size"]) == (name, update.relative_size)
    for number, (given, seen) in enumerate(zip(content["operations"], step.operations, strict=True)):
        assert given["number"] == number and given["operator"] == seen.operation.operator
        for each in given["results"]:
            values = torch.tensor(known[each["tensor"]]["values"])
            assert torch.equal(values, seen.results[each["name"]])
    assert "values" not in data_of(step)["tensors"]["parameters/0.weight"]


def test_what_is_not_finite_is_highlighted_and_text_in_json(small, opened):
    model, x, y = small
    x[0, 0] = math.inf
    step, facts = opened(model, x, y, 2)
    page = step_text(step, facts)
    assert "not finite" in page.plain and "the loss is not finite" in page.plain
    assert any(span.style == "bold red" for span in page.spans)
    content = data_of(step, values=True)
    assert content["loss"] == "nan"
    assert content["tensors"]["batch.x"]["values"][0][0] == "inf"
    assert content["tensors"]["batch.x"]["nonfinite"] == 1
    assert content["tensors"]["parameters/0.weight"]["norm"] == "nan"


def test_names_are_taken_literally(opened):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleDict({"[red]": nn.Linear(3, 2), "a\x1b[2Jb": nn.Linear(2, 2)})

        def forward(self, x):
            for part in self.parts.values():
                x = part(x)
            return x

    step, facts = opened(Odd(), torch.randn(5, 3), torch.randn(5, 2), 2)
    console = Console(width=100, record=True, file=io.StringIO(), force_terminal=True)
    console.print(step_text(step, facts, name="[bold]run"), soft_wrap=True)
    text = console.export_text()
    assert "parts.[red].weight" in text and "[bold]run, step 2" in text
    assert "\x1b" not in step_text(step, facts).plain
    assert "\x1b" not in step_text(step, facts, operation=1).plain


class Fickle(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x):
        hidden = self.linear(x)
        return hidden * 2 if hidden.sum() > 100 else hidden


def test_an_eager_step(opened):
    model, loss = Fickle(), nn.MSELoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    objects = Objects(*copy.deepcopy((model, loss, optimizer)))
    data = torch.randn(8, 4), torch.randn(8, 2)
    options = {"optimizer": optimizer, "loss": loss, "objects": objects, "engine": "eager"}
    step, facts = opened(model, *data, 3, **options)
    text = text_of(step, facts)
    assert "bit-identical, without your code" in text
    assert "∂loss = 1" in text
    assert "exp_avg    = beta1 * exp_avg + (1 - beta1) * param.grad" in text
    assert re.search(r"by \d+ operations", text)
    data_of(step, values=True)


def test_a_step_that_diverged_says_so(small, opened):
    from dataclasses import replace

    step, facts = opened(*small, 3)
    page = step_text(replace(step, diverged_at=2, recorded_loss=1.5), facts)
    assert "NOT bit-identical, without your code: replayed loss" in page.plain
    assert "recorded 1.5\n" in page.plain and "steps from 2 on differ from the recording" in page.plain
    assert any(span.style == "yellow" for span in page.spans)


@pytest.mark.parametrize("phase", [phase for phase in PHASES if phase != "other"])  # loops have it
def test_each_phase_alone(small, opened, phase):
    step, facts = opened(*small, 2)
    text = text_of(step, facts, phase=phase)
    headings = [line.split()[0] for line in text.split("\n\n", 2)[2].splitlines() if line[:1].strip()]
    assert headings == [phase] + ["grads"] * (phase == "backward")
    operators = {s.operation.operator for s in step.operations if s.operation.phase == phase}
    assert all(operator in text for operator in operators)
    assert len(text_of(step, facts, phase=phase, values=True)) > len(text)


def test_each_operation_alone(small, opened):
    step, facts = opened(*small, 2)
    for number, seen in enumerate(step.operations):
        text = text_of(step, facts, operation=number)
        assert f"operation #{number} of #0 to #{len(step.operations) - 1}" in text
        assert seen.operation.operator in text
        assert all(key in text for key in seen.operation.given())
        assert text.count("strides (") == len(seen.inputs) + len(seen.results)
    assert "reduction  2" in text_of(step, facts, operation=3)
    assert "  default" in text_of(step, facts, operation=0)


def test_what_is_not_there_is_an_error_with_its_cure(small, opened):
    step, facts = opened(*small, 2)
    with pytest.raises(UsageError, match="no phase 'forwards'; did you mean forward"):
        step_text(step, facts, phase="forwards")
    for number in (-1, len(step.operations)):
        with pytest.raises(UsageError, match="numbered from 0 to"):
            step_text(step, facts, operation=number)


def test_rows_are_shortened_unless_all_are_asked_for(small, opened):
    step, facts = opened(*small, 2, batch_size=5)
    rows = step.batch.rows.tolist()
    assert f"rows {rows[0]}, {rows[1]}, {rows[2]}, ... (5 of 20)" in text_of(step, facts)
    assert ", ".join(map(str, rows)) in text_of(step, facts, phase="batch", values=True)


def formulas(step):
    return [str(line) for line in mathematics(step.operations)]


def test_parameters_that_only_an_optimizer_has_are_not_called_as_operations_are(tmp_path):
    weights = [torch.randn(3, 1, requires_grad=True) for _ in range(2)]
    one, two = (torch.optim.SGD([weight], lr=0.1) for weight in weights)
    parts = {"alone": {"optimizer": one}, "both": {"one": one, "two": two}}
    lines = {}
    for name, given in parts.items():
        with everystep.record(run=tmp_path / name, **given) as recording:
            for x in recording.steps([torch.randn(4, 3)]):
                for optimizer, weight in zip(given.values(), weights, strict=False):
                    loss = descend(optimizer, (x @ weight).square().mean())
                recording.log(loss=loss)
        lines[name] = formulas(recording.run[1])
    assert "x · params[0]" in lines["alone"]
    assert "x · one.params[0]" in lines["both"] and "x · two.params[0]" in lines["both"]


@pytest.mark.parametrize(
    "joined",
    [
        lambda hidden, other: hidden + other,
        lambda hidden, other: other * hidden[:, :1],
    ],
)
def test_a_gradient_that_comes_from_two_places_is_not_called_whole(opened, joined):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Tanh()

        def forward(self, x):
            hidden = self.first(x)
            return joined(hidden, self.second(hidden))

    step, _ = opened(Residual(), torch.randn(5, 3), torch.randn(5, 3), 2)
    assert not any(line.startswith("∂#0") for line in formulas(step))
    assert any(line.startswith("∂#") for line in formulas(step))


@pytest.mark.parametrize(
    ("make", "operators", "calls"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.01), "param - 0.01 * param.grad",
         "torch.add(param, param.grad, alpha=-0.01)"),
        (lambda p: torch.optim.AdamW(p, lr=0.01),
         "param      = param * (1 - lr * weight_decay) - lr * mean / (sqrt(square) + eps)",
         "by 8 operations"),
        (lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
         "param      = param - lr * mean / (sqrt(square) + eps)", "aten._fused_adam_"),
    ],
)  # fmt: skip
def test_the_update_in_both_notations(small, opened, make, operators, calls):
    model, x, y = small
    text = text_of(*opened(model, x, y, 3, optimizer=make(model.parameters())))
    assert operators in text
    assert calls in " ".join(text.split())


def test_clipping_is_the_first_part_of_the_update(small, opened):
    text = text_of(*opened(*small, 2, max_grad_norm=0.5))
    update = text[text.index("\nupdate") :]
    assert re.search(r"first, the gradients, with norm \S+, are clipped: max_grad_norm = 0.5", update)
    assert "param - param.grad * 0.0001" in update


def test_a_step_of_a_forks_parent_is_shown_by_the_rules_of_the_parent():
    run = everystep.train_experiment("two-layer", {"steps": 4}, run="./run", progress=False)
    changes = {"optimizer.name": "SGD", "optimizer.momentum": 0.9, "max_grad_norm": 0.5}
    fork = run.fork(2, changes, run="./fork", progress=False)
    text = {number: step_text(fork[number], fork.facts).plain for number in (2, 3)}
    assert "update    GradientDescent" in text[2]
    assert "max_grad_norm" not in text[2]
    assert "update    SGD" in text[3]
    assert "are clipped: max_grad_norm = 0.5" in text[3]
    content = {number: fork[number].data() for number in (2, 3)}
    assert (content[2]["max_grad_norm"], content[3]["max_grad_norm"]) == (None, 0.5)
