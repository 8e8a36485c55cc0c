"""Every question has one answer: what `--json` prints is what the page gets."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tests.descent import looped
from tests.page.serving import Application
from torch import nn

import everystep
from everystep.page import task_process as page_task
from everystep.page.routes.tasks import QUESTIONS
from everystep.page.worker import Openers, answers

RUNS = ("chapter", "other", "broken")


class Said(page_task.Voice):
    """Keeps the messages of a task."""

    def __init__(self):
        self.said = {}

    def say(self, event, content, data=b""):
        self.said[event] = json.loads(json.dumps(content, allow_nan=False))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three runs: the chapter's network, with another learning rate, and a loop that makes NaN."""
    place = tmp_path_factory.mktemp("answers") / "runs"
    for name, lr in (("chapter", 1e-4), ("other", 2e-4)):
        settings = {"steps": 6, "optimizer.lr": lr, "batch_size": 12}
        everystep.train_experiment("two-layer", settings, run=place / name, progress=False)
    batches = [torch.full((4, 3), value) for value in (1.0, torch.inf, 1.0)]
    looped(nn.Linear(3, 1), batches, lambda model, x: model(x).square().mean(), run=place / "broken")
    return place


@pytest.fixture
def here(runs, monkeypatch):
    monkeypatch.chdir(runs.parent)
    return runs


def printed(everystep_command, *arguments):
    return json.loads(everystep_command(*arguments, "--json")[1])


def of_page(run, kind, **given):
    """Return the answer of a task of the page to the fields that it reads of a request."""
    voice, given = Said(), given | {"one": str(run)}
    asked = {name: read(given.get(name), name) for name, read in QUESTIONS[kind].items()}
    asked.pop("one", None)
    page_task.do({"task": kind, "run": str(run), "asked": asked}, voice)
    return voice.said["result"]


def assert_within(printed, result, but=()):
    """Assert that the page gets all that is printed."""
    assert {key: result[key] for key in printed.keys() - set(but)} == {
        key: value for key, value in printed.items() if key not in but
    }


@pytest.mark.parametrize("name", ["chapter", "broken"])
def test_steps_numbers_and_rows(here, name, everystep_command):
    def asked(kind, **fields):
        request = {"kind": kind, "run": str(here / name), "step": 2, "name": None} | fields
        (answer,) = answers(Openers(), [json.dumps(request)])
        return json.loads(answer.data)

    assert asked("content") == printed(everystep_command, "step", name, 2)
    assert asked("rows") == printed(everystep_command, "rows", name, 2)
    why = printed(everystep_command, "why", name, 2, "loss", "--back", 1, "--terms", 8)
    assert asked("why", name="loss", id=None) == why


def test_the_list_of_runs(here, everystep_command):
    found = printed(everystep_command, "runs", here)
    assert found == Application(here).json("/api/runs")["runs"] and len(found) == len(RUNS)


@pytest.mark.parametrize("name", ["chapter", "broken"])
def test_questions_to_a_run(here, name, everystep_command):
    run = Path(here, name)
    assert_within(printed(everystep_command, "verify", name), of_page(run, "verify"))
    found = printed(everystep_command, "when", name, "loss < 1e9", "--all")
    assert_within(found, of_page(run, "when", condition="loss < 1e9", which="all"))
    if name == "broken":
        found = printed(everystep_command, "first-nonfinite", name)
        assert found == of_page(run, "first-nonfinite")["found"]
        return
    asked = {"at": 2, "until": 4, "rows": [1, 2], "each": True, "by": "norm(gradients['0.bias'])"}
    options = ["--at", 2, "--until", 4, "--without-rows", "1,2", "--each", "--by", asked["by"]]
    assert printed(everystep_command, "what-if", name, *options) == of_page(run, "what-if", **asked)
    found = printed(everystep_command, "rerun", name, "--precision", "float64")
    rerun = of_page(run, "rerun", precision="float64")
    assert_within(found, rerun, but=("recorded", "losses", "others"))  # which the page draws
    assert rerun["losses"]["values"] == pytest.approx(found["losses"])


@pytest.mark.parametrize("pair", [("chapter", "other"), ("chapter", "copy"), ("other", "broken")])
def test_two_runs(here, pair, everystep_command):
    if "copy" in pair and not (here / "copy").exists():
        shutil.copytree(here / "chapter", here / "copy")
    one, other = pair
    found = of_page(here / one, "compare", other=str(here / other), thorough=True)
    assert_within(printed(everystep_command, "diff", one, other, "--thorough"), found)
    shutil.rmtree(here / "copy", ignore_errors=True)
