"""Every question has one answer: what `--json` prints is what the page gets."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tests.descent import descend, looped
from tests.page.serving import Application
from torch import nn

import everystep
from everystep.page import task_process as page_task
from everystep.page.routes.tasks import QUESTIONS
from everystep.page.worker import Openers, answers
from everystep.recording.summary import Summary
from everystep.views.plain import plain_data

#: An experiment by its program, one with validation in batches, a model of the user's own, a step
#: function, and a loop that makes NaN.
RUNS = ("chapter", "wine", "own", "function", "broken")


class Said(page_task.Voice):
    """Keeps the messages of a task."""

    def __init__(self):
        self.said = {}

    def say(self, event, content, data=b""):
        self.said[event] = json.loads(json.dumps(content, allow_nan=False))


class Squared(nn.Linear):
    """A module of the user's own: Python runs its steps."""

    def forward(self, x):
        return super().forward(x) ** 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Five runs, and one of the chapter's network with another learning rate."""
    place = tmp_path_factory.mktemp("answers") / "runs"
    for name, lr in (("chapter", 1e-4), ("other", 2e-4)):
        settings = {"steps": 6, "optimizer.lr": lr, "batch_size": 12}
        everystep.train_experiment("two-layer", settings, run=place / name, progress=False)
    everystep.train_experiment("wine", {"steps": 6}, run=place / "wine", progress=False)
    torch.manual_seed(0)
    x, y, model = torch.randn(8, 3), torch.randn(8, 1), Squared(3, 1)
    given = {"loss": nn.MSELoss(), "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    everystep.train(model, (x, y), **given, steps=6, run=place / "own", progress=False)

    def step(x):
        return descend(optimizer, parts["model"](x).square().mean())

    parts = {"model": nn.Linear(3, 1)}
    parts["optimizer"] = optimizer = torch.optim.Adam(parts["model"].parameters())
    everystep.train(step, x.split(2), parts=parts, epochs=1, run=place / "function", progress=False)
    batches = [torch.full((4, 3), value) for value in (1.0, torch.inf, 1.0)]
    looped(nn.Linear(3, 1), batches, lambda model, x: model(x).square().mean(), run=place / "broken")
    return place


@pytest.fixture
def here(runs, monkeypatch):
    monkeypatch.chdir(runs.parent)
    return runs


@pytest.fixture
def printed(everystep_command):
    """Return what a command prints as JSON, or its error."""

    def printed(*arguments):
        _, out, err = everystep_command(*arguments, "--json")
        return json.loads(out) if out else err.strip().rpartition("everystep: ")[2]

    return printed


def of_page(run, kind, **given):
    """Return the answer of a task of the page to the fields that it reads of a request."""
    voice, given = Said(), given | {"one": str(run)}
    asked = {name: read(given.get(name), name) for name, read in QUESTIONS[kind].items()}
    asked.pop("one", None)
    page_task.do({"task": kind, "run": str(run), "asked": asked}, voice)
    return voice.said.get("result") or voice.said["error"]["error"]


def assert_within(printed, result, but=()):
    """Assert that the page gets all that is printed, or the same error."""
    if isinstance(printed, str):
        assert printed == result
    else:
        assert {key: result[key] for key in printed.keys() - set(but)} == {
            key: value for key, value in printed.items() if key not in but
        }


@pytest.mark.parametrize("name", RUNS)
def test_questions_about_a_step(here, name, printed):
    def asked(kind, **fields):
        request = {"kind": kind, "run": str(here / name), "step": 2, "name": None} | fields
        (answer,) = answers(Openers(), [json.dumps(request)])
        return json.loads(answer.data)

    assert asked("content") == printed("step", name, 2)
    assert asked("rows") == printed("rows", name, 2)
    why = printed("why", name, 2, "loss", "--back", 1, "--terms", 8)
    assert asked("why", name="loss", id=None) == why


def test_lists_of_runs_and_of_losses(here, printed):
    page = Application(here)
    found = printed("runs", here)
    assert found == page.json("/api/runs")["runs"]
    assert [*Summary._fields, "problem"] == [*found[0]] and len(found) == len(RUNS) + 1
    for name in RUNS:
        known = page.json(f"/api/runs/{name}/table")
        rows = [dict(zip(known["columns"], row, strict=True)) for row in known["rows"]]
        table = printed("losses", name)
        assert [row.keys() for row in rows] == [row.keys() for row in table]
        for row, of_page in zip(table, rows, strict=True):
            numbers = [float("nan" if each is None else each) for each in row.values()]
            same = [float(each or "nan") for each in of_page.values()]
            assert numbers == pytest.approx(same, rel=1e-7, nan_ok=True)


@pytest.mark.parametrize("name", RUNS)
def test_questions_to_a_run(here, name, printed):
    run = Path(here.name, name)
    assert_within(printed("verify", name), of_page(run, "verify"))
    assert printed("doctor", name) == plain_data(everystep.doctor(run).data())
    found = printed("when", name, "loss < 1e9", "--all")
    assert_within(found, of_page(run, "when", condition="loss < 1e9", which="all"))
    assert printed("first-nonfinite", name) == of_page(run, "first-nonfinite")["found"]
    assert (name == "broken") == (printed("first-nonfinite", name) is not None)


@pytest.mark.parametrize("name", RUNS)
def test_questions_that_train_or_write(here, name, printed):
    run = Path(here.name, name)
    asked = {"at": 2, "until": 3, "rows": [1, 2], "each": True, "by": "loss"}
    options = ["--at", 2, "--until", 3, "--without-rows", "1,2", "--each", "--by", asked["by"]]
    assert_within(printed("what-if", name, *options), of_page(run, "what-if", **asked))
    found = printed("rerun", name, "--precision", "float64")
    rerun = of_page(run, "rerun", precision="float64")
    assert_within(found, rerun, but=("recorded", "losses", "others"))  # which the page draws
    assert rerun["losses"]["values"] == pytest.approx(found["losses"], nan_ok=True)
    measured = printed("measure", name, "loss * 2", "--name", "twice", "--overwrite")
    asked = {"expression": "loss * 2", "name": "twice", "overwrite": True}
    of_values = of_page(run, "measure", **asked)
    assert_within(measured, of_values, but=("values",))
    assert len(measured["values"]) == of_values["values"]


@pytest.mark.parametrize("pair", [*((name, "other") for name in RUNS), ("chapter", "copy")])
def test_two_runs(here, pair, printed):
    if "copy" in pair and not (here / "copy").exists():
        shutil.copytree(here / "chapter", here / "copy")
    one, other = pair
    found = of_page(here / one, "compare", other=str(here / other), thorough=True)
    assert_within(printed("diff", one, other, "--thorough"), found)
    match = everystep.open(one).match(everystep.open(other), 1)
    assert printed("match", one, other, "--step", 1) == match.data()
    shutil.rmtree(here / "copy", ignore_errors=True)
