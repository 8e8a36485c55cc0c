"""The line of code behind each operation: that of the user's code which called it."""

import ast
import hashlib
import importlib
import json
import os
import runpy
from contextlib import chdir
from functools import partial

import pytest
import torch
from tests.descent import descend, looped, trained
from torch import nn

import everystep
from everystep.program.step_program import Program

SCRIPT = """
import torch
from torch import nn
import everystep

def penalty(mean, spread):
    return (spread.exp() - mean).pow(2).sum()

class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x + x

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2.5

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 6)

    def forward(self, x):
        mean, spread = self.inner(x).chunk(2, 1)
        return Doubled.apply(mean), spread

def scaled(gradient):
    return gradient * 0.25

torch.manual_seed(0)
model = Model()
model.inner.bias.register_hook(scaled)
optimizer = torch.optim.Adam(model.parameters())
batches = [torch.randn(5, 4) for _ in range(6)]
with everystep.record(model=model, optimizer=optimizer, run="./lined") as recording:
    for x in recording.steps(batches):
        mean, spread = model(x)
        loss = penalty(mean, spread)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recording.log(loss=loss)
"""


@pytest.fixture(scope="module")
def lined(tmp_path_factory):
    """A recorded script, and its lines by number."""
    place = tmp_path_factory.mktemp("lined")
    (place / "train.py").write_text(SCRIPT)
    os.utime(place / "train.py", (1e9, 1e9))
    with chdir(place):
        runpy.run_path("train.py", run_name="__main__")
    return everystep.open(place / "lined"), SCRIPT.splitlines()


def lines_of(step, name=None, phase=None):
    """Return the text of the line of each operation, or of those of an operator, or of a phase."""
    return [
        seen.line.text
        for seen in step.operations
        if name in (None, seen.operation.name) and phase in (None, seen.operation.phase)
    ]


def test_each_operation_has_its_line_and_the_text_is_that_of_the_file(lined):
    run, text = lined
    for step in (run[1], run[2], run[6]):
        for seen in step.operations:
            for line in (seen.line, *seen.line.callers):
                assert (line.file, text[line.line - 1].strip()) == ("train.py", line.text)
    called = {seen.operation.name: seen.line for seen in run[3].operations}
    assert called["addmm"].text == "mean, spread = self.inner(x).chunk(2, 1)"
    assert called["addmm"].function == "forward"
    assert [line.text for line in called["addmm"].callers] == ["mean, spread = model(x)"]
    assert called["exp"].text == "return (spread.exp() - mean).pow(2).sum()"
    assert [line.text for line in called["exp"].callers] == ["loss = penalty(mean, spread)"]
    assert str(called["exp"]) == "train.py:7  return (spread.exp() - mean).pow(2).sum()"


def test_the_backward_pass_has_the_lines_of_the_forward_pass_and_of_code_that_runs_in_it(lined):
    step = lined[0][4]
    backward = lines_of(step, phase="backward")
    assert lines_of(step, "mm", "backward") == ["mean, spread = self.inner(x).chunk(2, 1)"]
    assert backward.count("return gradient * 2.5") == 1
    assert backward.count("return gradient * 0.25") == 1
    assert backward[0] == "return (spread.exp() - mean).pow(2).sum()"
    assert lines_of(step, "ones_like") == ["loss.backward()"]


def test_an_optimizer_has_the_line_of_its_step(lined):
    assert set(lines_of(lined[0][2], phase="update")) == {"optimizer.step()"}
    clipped = lines_of(lined[0][2], "_foreach_norm")
    assert clipped == ["nn.utils.clip_grad_norm_(model.parameters(), 1.0)"]


def test_the_run_keeps_the_digest_of_the_file_and_not_the_file(lined):
    run, _ = lined
    program = json.loads((run.directory / "programs" / "1.json").read_text())
    assert program["sources"] == {"train.py": hashlib.sha256(SCRIPT.encode()).hexdigest()}
    everything = b"".join(path.read_bytes() for path in run.directory.rglob("*") if path.is_file())
    assert b"class Doubled" not in everything


def test_lines_are_shown_by_commands(lined, everystep_command):
    place = lined[0].directory

    def shown(*arguments):
        code, out, _ = everystep_command(*arguments)
        assert code == 0
        return out

    whole = shown("step", place, "3", "--lines").splitlines()
    at = next(n for n, line in enumerate(whole) if "self.inner(x).chunk" in line)
    assert whole[at].strip() == "train.py:24  mean, spread = self.inner(x).chunk(2, 1)"
    assert whole[at + 1].split()[0] == "#0"
    assert "train.py:24" not in shown("step", place, "3")
    assert "called by train.py:38  loss = penalty" in shown("step", place, "3", "--op", "2")
    assert "train.py:7  return (spread.exp()" in shown("why", place, "3", "loss")
    operations = json.loads(shown("step", place, "3", "--json"))["operations"]
    assert operations[0]["line"]["line"] == 24


def test_what_differs_overflows_or_mixes_rows_is_shown_with_its_line(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)

    def train(name, reduction):
        text = f"return x.pow(2).{reduction}() * factor"
        lines = ["def loss_of(x, factor):", "    x = x - x.mean(0)", f"    {text}"]
        (tmp_path / f"{name}_loss.py").write_text("\n".join(lines))
        os.utime(tmp_path / f"{name}_loss.py", (1e9, 1e9))
        loss_of = importlib.import_module(f"{name}_loss").loss_of
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        batches = [torch.randn(4, 3) for _ in range(4)]
        with everystep.record(model=model, optimizer=optimizer, run=tmp_path / name) as recording:
            for x in recording.steps(batches):
                loss = loss_of(model(x), 1.0 if recording.step_count < 3 else 1e39)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                recording.log(loss=loss)
        return everystep.open(tmp_path / name), text

    (one, mean), (other, total) = train("one", "mean"), train("other", "sum")
    difference = one.diff(other)
    first = difference.data()["operation"]
    assert [first[side]["line"]["text"] for side in ("one", "other")] == [mean, total]
    shown = [line.split() for line in difference.to_text().splitlines()]
    start = next(n for n, words in enumerate(shown) if words[:1] == ["line"])
    assert [shown[start][1], shown[start + 1][0]] == ["one:", "other:"]
    assert [shown[start][3:], shown[start + 1][2:]] == [mean.split(), total.split()]
    assert one.first_nonfinite().operation.line.text == mean
    way = one.why(4, "gradients['weight'][0, 0]").to_text().partition("through")[2]
    assert "one_loss.py:2" in way.partition("began here")[0] and mean in way
    assert "one_loss.py:2  x = x - x.mean(0)" in one.rows(1).to_text()
    assert one.rows(1).data()["gradients"]["weight"]["line"]["line"] == 2
    rerun = one.rerun(precision="float64", progress=False)
    assert rerun.beyond.line.text == mean and mean in rerun.to_text()


def test_steps_that_torch_alone_takes_have_no_lines(tmp_path):
    run = trained(nn.Linear(3, 1), (torch.randn(8, 3), torch.randn(8, 1)), steps=3, run=tmp_path / "run")
    assert {seen.line for seen in run[2].operations} == {None}


def test_a_step_function_has_the_lines_of_its_code(tmp_path):
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def step(batch):
        loss = model(batch).square().mean()
        return descend(optimizer, loss)

    parts, batches = {"model": model, "optimizer": optimizer}, [torch.randn(4, 3)] * 3
    run = everystep.train(step, batches, parts=parts, epochs=1, run=tmp_path / "function")
    seen = run[2].operations[0]
    assert seen.line.text == "loss = model(batch).square().mean()"
    assert seen.line.callers == ()


def test_a_file_that_has_changed_since_it_was_loaded_has_no_text(tmp_path, monkeypatch):
    module = tmp_path / "changed.py"
    module.write_text("def loss_of(model, x):\n    return model(x).square().mean()\n")
    monkeypatch.syspath_prepend(tmp_path)
    import changed

    os.utime(module, (2e9, 2e9))
    run = looped(nn.Linear(3, 1), [torch.randn(4, 3)] * 2, changed.loss_of, optimizer=None)
    line = run[2].operations[0].line
    assert (line.place.endswith("changed.py:2"), line.text) == (True, "")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda data: data["lines"][0].update(above=3), "a line of code is called by a later one"),
        (lambda data: data["lines"][0].update(above=0), "a line of code is called by a later one"),
        (lambda data: data["lines"][0].update(text="\x1b[31m"), "String should match pattern"),
        (lambda data: data["lines"][0].update(file="x" * 2000), "at most 1000 characters"),
        (lambda data: data["operations"][0].update(line=len(data["lines"])), "unknown line of code"),
        (lambda data: data.update(lines=[]), "unknown line of code"),
    ],
)
def test_a_strangers_lines_are_checked(lined, change, problem):
    data = json.loads((lined[0].directory / "programs" / "1.json").read_text())
    change(data)
    with pytest.raises(everystep.RunError, match=problem):
        Program.from_json(json.dumps(data))


class Descent(torch.optim.Optimizer):
    """An optimizer of one's own, in the file of the loop, without `no_grad`."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    def step(self, closure):
        loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(parameter.grad.data, alpha=-0.1)
        return loss


@pytest.mark.parametrize("kind", [torch.optim.Adam, partial(torch.optim.LBFGS, max_iter=3), Descent])
def test_what_a_closure_does_is_no_update(kind, tmp_path):
    model = nn.Linear(3, 1)
    optimizer = kind(model.parameters(), lr=0.1)
    with everystep.record(model=model, optimizer=optimizer, run=tmp_path / "run") as recording:
        for x in recording.steps([torch.randn(4, 3) for _ in range(3)]):

            def closure(x=x):
                optimizer.zero_grad()
                loss = model(x).square().mean()
                loss.backward()
                return loss

            recording.log(loss=optimizer.step(closure))
    phases = {}
    for seen in everystep.open(tmp_path / "run")[2].operations:
        phases.setdefault(seen.operation.phase, set()).add(seen.line.text)
    if kind is Descent:
        assert "parameter.data.add_(parameter.grad.data, alpha=-0.1)" in phases["update"]
    else:
        assert phases["update"] == {"recording.log(loss=optimizer.step(closure))"}
        assert "loss = model(x).square().mean()" in phases["forward"] & phases["loss"]
        assert "loss = model(x).square().mean()" in phases["backward"]


def test_generated_code_and_a_working_directory_that_is_gone_do_no_harm(tmp_path, monkeypatch):
    source = "def loss_of(model, x):\n    return model(x).square().mean()\n"
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if hasattr(node, "lineno"):
            node.lineno = node.end_lineno = 0
    space = {}
    exec(compile(tree, "made", "exec"), space)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    here.rmdir()
    batches, options = [torch.randn(4, 3)] * 2, {"run": tmp_path / "run", "optimizer": None}
    run = looped(nn.Linear(3, 1), batches, space["loss_of"], **options)
    assert run.verify(processes=1, progress=False).is_exact
    assert run[2].operations[0].line.file == "made"
