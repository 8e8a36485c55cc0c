"""Config and tags: kept, shown, searched and compared."""

import argparse
import dataclasses
import json

import pytest
import torch
from tests.descent import looped
from torch import nn

import everystep


@dataclasses.dataclass
class Settings:
    width: int = 4
    dtype: torch.dtype = torch.float32


def record(name, **options):
    """Record two steps."""
    torch.manual_seed(0)
    options |= {"run": name, "optimizer": None}
    return looped(nn.Linear(3, 1), [torch.ones(2, 3)] * 2, lambda model, x: model(x).sum(), **options)


@pytest.mark.parametrize(
    ("config", "plain"),
    [
        ({"lr": 0.1, "model": {"width": 64}}, {"lr": 0.1, "model": {"width": 64}}),
        (argparse.Namespace(seed=3, name="a"), {"seed": 3, "name": "a"}),
        (Settings(), {"width": 4, "dtype": "torch.float32"}),
        ({1: (2, {3}), "far": float("inf")}, {"1": [2, [3]], "far": "inf"}),
    ],
)
def test_a_config_is_kept_as_plain_data(config, plain):
    run = record("a", config=config)
    assert run.facts.config == plain
    assert run.summary().config == plain


def test_tags_and_config_are_shown_and_searched(everystep_command):
    record("runs/one", config={"model": {"width": 64}}, tags=["baseline", "two  words", "baseline"])
    record("runs/two", tags=["other"])
    code, listed, _ = everystep_command("runs", "--tag", "baseline", "--tag", "two words")
    assert code == 0
    assert [line.split()[0] for line in listed.splitlines()] == ["run", "one"]
    runs = json.loads(everystep_command("runs", "--json")[1])
    assert {run["name"]: run["tags"] for run in runs} == {
        "one": ["baseline", "two words"],
        "two": ["other"],
    }
    assert "model.width: 64" in everystep.open("runs/one").report()
    nothing = everystep_command("runs", "--tag", "nothing")
    assert nothing[1:] == ("", "runs has no runs with the tag nothing\n")


def test_a_config_that_differs_is_named_by_diff_and_is_no_difference_of_the_training():
    one = record("one", config={"lr": 0.1, "name": "a"})
    other = record("other", config={"lr": 0.1, "name": "b"})
    found = one.diff(other)
    assert found.experiments == {"config.name": ("a", "b")}
    assert found.is_same


def test_a_resumed_run_keeps_its_config_or_takes_the_new_one():
    record("again", config={"epochs": 1}, tags=["first"])
    assert record("again", resume=True).facts.config == {"epochs": 1}
    run = record("again", resume=True, config={"epochs": 2})
    assert (run.facts.config, run.facts.tags) == ({"epochs": 2}, ("first",))


@pytest.mark.parametrize("of_function", [False, True])
def test_train_has_them_too(tmp_path, of_function):
    def train(steps, **options):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        parts = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1)}
        options |= {"steps": steps, "run": tmp_path / "run", "progress": False}
        if of_function:
            batches = [torch.ones(2, 3)] * 3
            return everystep.train(lambda x: model(x).sum(), batches, parts=parts, **options)
        data, optimizer = (torch.ones(4, 3), torch.ones(4, 1)), parts["optimizer"]
        return everystep.train(model, data, loss=nn.MSELoss(), optimizer=optimizer, **options)

    first = train(1, config={"epochs": 1}, tags=["first"])
    assert (first.facts.config, first.facts.tags) == ({"epochs": 1}, ("first",))
    assert "epochs: 1" in first.report()
    assert train(2, resume=True).facts.config == {"epochs": 1}
    again = train(3, resume=True, config={"epochs": 2})
    assert (len(again), again.facts.config, again.facts.tags) == (3, {"epochs": 2}, ("first",))


def test_experiments_have_tags(everystep_command):
    everystep.train_experiment("two-layer", {"steps": 1}, tags=["one"], progress=False)
    everystep_command("train", "--steps", 1, "--quiet", "--tag", "baseline", "--tag", "other")
    tags = [run.facts.tags for run in everystep.runs()]
    assert tags == [("one",), ("baseline", "other")]
    everystep_command("train", "--steps", 2, "--run", "runs/two-layer-1", "--resume", "--tag", "two")
    assert everystep.open("two-layer-1").facts.tags == ("two",)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"config": [1, 2]}, "config is a list; pass a dict"),
        ({"config": {"a": "x" * 2_000_000}}, "a run holds at most 1,000,000"),
        ({"tags": "baseline"}, "tags: must be a list, not 'baseline'"),
        ({"tags": ["", 3, "x" * 200]}, r"tags\[0\].*\n.*tags\[1\].*\n.*tags\[2\]"),
        ({"tags": [str(n) for n in range(101)]}, "101 tags are too many"),
    ],
)
def test_what_a_run_cannot_hold_is_refused_before_it_begins(tmp_path, options, problem):
    with pytest.raises(everystep.UsageError, match=problem):
        record("refused", **options)
    assert not (tmp_path / "refused").exists()
