"""What the server answers about runs, and for the files of the page."""

import json
import math
import os
import posixpath
import re
from pathlib import Path
from urllib.parse import quote

import pytest
import torch
from tests.page.serving import Application

import everystep
from everystep.numerics import Numerics
from everystep.page.routes.runs import routes
from everystep.recording.facts import BatchFacts, DataFacts, Facts, LossFacts, ModuleFacts, TrainingFacts
from everystep.views.facts_text import facts_in_order

STATIC = Path(everystep.__file__).parent / "page" / "static"


@pytest.fixture
def chapter_run(shelf):
    """The chapter's network, fifty steps of it, and a fork."""
    run = everystep.train_experiment(
        "two-layer", {"steps": 50, "optimizer.lr": 1e-4}, run=shelf / "chapter"
    )
    run.fork(20, run=shelf / "child", steps=30, lr=2e-4)
    return run


def test_everything_about_a_run(chapter_run, page, shelf):
    about = page.json("/api/runs/chapter")
    json.dumps(about, allow_nan=False)
    assert (about["name"], about["status"], about["ending"]) == ("chapter", "finished", None)
    assert (about["steps"], about["planned"]) == (50, 50)
    facts = [list(row) for row in facts_in_order(chapter_run.facts)]
    assert about["facts"] == [*facts, ["seed", "0"]]
    assert [title for title, _, _ in about["details"]] == ["numerics", "versions"]
    assert about["times"].startswith("started 20")
    losses = chapter_run.losses["loss"].to_list()
    assert [(mark["what"], mark["step"]) for mark in about["landmarks"]] == [
        ("first", 1), ("last", 50), ("smallest", losses.index(min(losses)) + 1),
    ]  # fmt: skip
    assert float(about["landmarks"][1]["full"]) == pytest.approx(losses[-1], rel=1e-7)
    assert about["nonfinite"] is None
    assert about["parent"] is None
    assert about["forks"] == [{"name": "child", "at": 20}]
    assert about["has_experiment"] is True
    assert about["layers"] == {"weight": "0.weight", "active": "1"}
    assert about["settings"]["optimizer.lr"] == 1e-4
    assert about["settings"]["model.layers[1]"] == "ReLU()"
    assert about["settings"]["steps"] == 50
    assert about["snapshots"] == chapter_run.snapshots
    assert about["measurements"] == []
    assert about["directory"] == "chapter"  # as commands name it; of another shelf, by its path
    shelf.rename("other")
    assert (
        Application(Path("other").absolute()).json("/api/runs/chapter")["directory"] == "other/chapter"
    )
    Path("other").rename(shelf)
    child = page.json("/api/runs/child")
    assert (child["parent"], child["forks"]) == (["chapter", 20], [])
    assert child["settings"]["optimizer.lr"] == 2e-4


def test_an_experiment_that_was_changed_since_does_not_speak_for_the_run(chapter_run, page):
    path = chapter_run.directory / "experiment.toml"
    path.write_text(path.read_text() + "\n# changed\n")
    about = page.json("/api/runs/chapter")
    assert (about["has_experiment"], about["settings"]) == (False, {})
    assert "was changed after recording" in about["experiment_problem"]
    path.unlink()
    assert "experiment.toml is missing" in page.json("/api/runs/chapter")["experiment_problem"]


def test_runs_in_a_line_each_also_those_that_cannot_be_read(chapter_run, write_run, page, shelf):
    write_run("nan", [math.nan, math.inf], steps=7, status="stopped")
    (shelf / "broken").mkdir()
    (shelf / "broken" / "run.sqlite").write_text("no database")
    (shelf / "empty").mkdir()
    (shelf / "file").write_text("")
    answer = page.json("/api/runs")
    assert answer["directory"] == "runs"
    runs = {run["name"]: run for run in answer["runs"]}
    assert list(runs) == ["broken", "chapter", "child", "nan"]
    assert "cannot be read" in runs["broken"]["problem"]
    assert runs["broken"]["status"] is None
    assert runs["nan"] | {"started": ""} == {
        "name": "nan", "directory": str(shelf / "nan"), "status": "stopped", "steps": 2, "planned": 7,
        "first_loss": "nan",
        "last_loss": "inf", "nonfinite_step": None, "optimizer": None, "lr": [], "batch_size": None,
        "validation": None, "seconds": None, "started": "", "parent": None, "note": None,
        "config": {}, "tags": [], "damage": None, "problem": None,
    }  # fmt: skip
    assert runs["child"]["parent"] == ["chapter", 20]
    told = [runs["chapter"][key] for key in ("optimizer", "lr", "batch_size", "nonfinite_step")]
    assert told == ["GradientDescent", [0.0001], 64, None]
    assert runs["chapter"]["seconds"] > 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00", runs["chapter"]["started"])


def test_the_list_follows_what_happens(write_run, page, shelf):
    run = write_run("a", [1.0])
    page.json("/api/runs")
    run.rename(shelf / "b")
    assert [run["name"] for run in page.json("/api/runs")["runs"]] == ["b"]
    (shelf / "b" / "run.sqlite").unlink()
    shelf.rename(shelf.parent / "elsewhere")
    assert page.json("/api/runs")["runs"] == []


def test_a_picture_of_the_losses(write_run, page):
    write_run("run", [100.0, math.nan, 1e-3])
    line = page.json("/api/runs/run/sparkline")
    assert line["path"].startswith("M5.0 5.0")
    assert line["is_log"] is True
    assert len(line["marks"]) == 1
    assert (line["width"], line["height"]) == (320, 72)


def test_rates_and_measurements_with_their_first_and_last_values(write_run, page):
    measured = [("lr", 1, 0.1), ("lr", 9, 0.05), ("lr[1]", 1, 1.0), ("lrx", 2, math.nan)]
    measured += [("validation_accuracy", 9, 0.5)]
    other = {"better": None, "is_share": False}
    write_run("run", [1.0] * 9, measured, **FACTS)
    found = page.json("/api/runs/run")["measurements"]
    assert found == [
        {"name": "lr", "count": 2, "first": 0.1, "last": 0.05, "is_rate": True} | other,
        {"name": "lr[1]", "count": 1, "first": 1.0, "last": 1.0, "is_rate": True} | other,
        {"name": "lrx", "count": 1, "first": "nan", "last": "nan", "is_rate": False} | other,
        {"name": "validation_accuracy", "count": 1, "first": 0.5, "last": 0.5, "is_rate": False}
        | {"better": "up", "is_share": True},
    ]


TRAINING = TrainingFacts(
    device="cpu", seed=0, data=DataFacts(source="random", rows=1, x=(1, 1), y=(1, 1)),
    batches=BatchFacts(batch_size=None, drop_last=False, seed=0, steps_per_epoch=1),
    modules={"": ModuleFacts(class_name="m")}, parameters=1, optimizers={}, schedulers={},
    loss=LossFacts(class_name="l", is_torchs=False, settings={}, modules={}),
    max_grad_norm=None, evaluate_every=None, numerics=Numerics.read(torch.device("cpu")), versions={},
)  # fmt: skip
FACTS = Facts(steps=9, trained=TRAINING).rows() | {"status": "stopped"}


OUTSIDE = [
    "...", "%2e%2e", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "..%5c..", "%00", "a%00b", "~", "nothing",
    "x" * 5000, "%F0%9F%92%A5", "%ff", "C%3A", "runs%2fsecret", "secret", "%2Fetc",
]  # fmt: skip


NAMED = [
    route.path
    for route in routes
    if "{name}" in route.path and "GET" in route.methods and not route.path.endswith("events")
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_name_leads_out_of_the_directory(write_run, page, shelf, name):
    write_run("run", [1.0]).rename(shelf.parent / "secret")
    (shelf.parent / "secret.sqlite").write_text("")
    for route in NAMED:
        answer = page.ask(route.replace("{name}", name))
        assert answer.status_code == 404
        assert len(answer.text) < 6000
        assert str(answer.json()["error"])


@pytest.mark.parametrize(
    "name", ["<img src=x onerror=alert(1)>", "a b", "ü", "100%", "a?b#c", "'\"", "a\\b"]
)
def test_a_run_may_have_any_name(write_run, page, name):
    write_run(name, [1.0])
    assert page.json(f"/api/runs/{quote(name, safe='')}/table")["total"] == 1
    assert page.json("/api/runs")["runs"][0]["name"] == name


@pytest.mark.parametrize(
    "path", ["/", "/runs/x", "/runs/%3Cb%3E", "/compare", "/overlay?run=x", "/?step=3"]
)
def test_every_place_is_the_same_page(page, path):
    answer = page.ask(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    links = re.findall('<link rel="modulepreload" href="(.*)">\n', answer.text)
    assert bool(links) == path.startswith("/runs/")
    assert all(page.ask(link).status_code == 200 for link in links)
    without = re.sub('<link rel="modulepreload".*\n', "", answer.text)
    assert without == (STATIC / "index.html").read_text()


def test_the_page_has_all_files_that_it_asks_for(page):
    asked = set()
    for path in STATIC.rglob("*.*"):
        text, folder = path.read_text(), path.relative_to(STATIC).parent
        asked |= set(re.findall(r"[\"']/static/([\w./-]+)", text))
        for name in re.findall(r"(?:from |import\()\"(\.{1,2}/[\w./-]+)\"", text):
            asked.add(posixpath.normpath(f"{folder.as_posix()}/{name}"))
    assert {"base.css", "uPlot.min.css", "app.js", "step/step.js", "datatables.js", "uPlot.js"} <= asked
    types = {".js": "text/javascript", ".css": "text/css"}
    for name in asked:
        answer = page.ask(f"/static/{name}")
        assert answer.status_code == 200, name
        assert answer.headers["content-type"].partition(";")[0] == types[Path(name).suffix]


def test_a_file_that_the_browser_has_is_not_sent_again(page):
    answer = page.ask("/static/app.js")
    tag = answer.headers["etag"]
    assert answer.headers["cache-control"] == "no-cache"
    for known in (tag, f'"x", {tag}'):
        again = page.ask("/static/app.js", headers=page.headers | {"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert page.ask("/static/app.js", headers=page.headers | {"If-None-Match": '"x"'}).status_code == 200
    assert page.ask("/static/app.js", "HEAD").headers["etag"] == tag


@pytest.mark.parametrize(
    "path",
    ["/static/", "/static/nothing.js", "/static/../app.py", "/static/%2e%2e/app.py",
     "/static/..%2fapp.py",
     "/static/__init__.py", "/static/app.js/", "/nothing", "/runs/", "/runs/a/b",
     "/api", "/api/", "/api/x",
     "//etc/passwd", "/static//etc/passwd"],
)  # fmt: skip
def test_there_is_nothing_else(page, path):
    answer = page.ask(path)
    assert answer.status_code == 404
    if path.startswith("/api/"):
        assert "no page at" in answer.json()["error"]


def test_what_is_only_read_cannot_be_written(page):
    for method in ("PUT", "PATCH", "DELETE"):
        assert page.ask("/api/runs", method).status_code == 405


def test_names_that_are_no_text_are_told_apart(write_run, page, shelf):
    for name in (b"bad\xff\xfename", b"bad\xfe\xffname"):
        write_run(os.fsdecode(name), [1.0, 2.0], **FACTS)
    names = [run["name"] for run in page.json("/api/runs")["runs"]]
    assert len(set(names)) == 2
    for name in names:
        assert page.json(f"/api/runs/{quote(name)}")["name"] == name


def test_a_request_that_is_too_long_is_refused(write_run, page):
    write_run("one", [1.0])
    answer = page.ask("/api/runs/one/note", "POST", json={"note": "n" * 2_000_000})
    assert answer.status_code == 400
    assert "longer than 1,000,000 bytes" in answer.json()["error"]
