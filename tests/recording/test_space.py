"""What runs take on the disk, and how they are removed."""

import json
import shutil

import pytest
import torch
from filelock import FileLock
from torch import nn

import everystep


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two runs and a fork in runs/, the working directory being that of all."""
    monkeypatch.chdir(tmp_path)
    everystep.train_experiment("two-layer", {"steps": 20}, run="runs/first").fork(5, run="runs/fork")
    model = nn.Linear(300, 300)
    with everystep.record(model=model, run="runs/large") as recording:
        for x in recording.steps([torch.randn(50, 300) for _ in range(3)]):
            recording.log(loss=model(x).sum())
    return tmp_path / "runs"


def test_what_runs_take_is_listed_by_kind_the_largest_first(runs, everystep_command):
    (runs / "large" / "mine.txt").write_text("x" * 5000)
    found = json.loads(everystep_command("du", "--json")[1])
    totals = [each["total"] for each in found]
    assert totals == sorted(totals, reverse=True)
    of = {each["name"]: each for each in found}
    kinds = ("snapshots", "batches", "data", "programs", "database", "others")
    for each in found:
        assert each["total"] == sum(each[kind] for kind in kinds)
    assert of["large"]["snapshots"] > 2 * 300 * 300 * 4
    assert of["large"]["batches"] >= 3 * 50 * 300 * 4
    assert of["large"]["others"] >= 5000
    assert of["first"]["data"] >= 64 * 1000 * 4
    # A fork has its parent's data as hard links, which count once.
    assert of["first"]["data"] == 0 or of["fork"]["data"] < 64 * 1000 * 4
    code, table, _ = everystep_command("du")
    assert code == 0
    assert [line.split()[0] for line in table.splitlines()] == ["run", *of, "all"]
    assert everystep_command("du", "large")[1].splitlines()[1].split()[0] == "large"


def test_a_removed_run_is_gone_and_its_fork_is_whole(runs, everystep_command):
    code, out, err = everystep_command("rm", "first", "--force")
    assert (code, out) == (0, "")
    assert err.startswith("removed runs/first (")
    assert not (runs / "first").exists()
    assert everystep.open("runs/fork").verify().is_exact


def test_files_of_others_stay(runs, everystep_command):
    (runs / "large" / "best.pt").write_text("mine")
    err = everystep_command("rm", "large", "--force")[2]
    assert "runs/large still has best.pt, which everystep did not write" in err
    assert [path.name for path in (runs / "large").iterdir()] == ["best.pt"]


def test_nothing_is_removed_without_a_yes_or_while_it_is_written(runs, everystep_command):
    code, _, err = everystep_command("rm", "first", "large")
    assert code == 2
    assert "pass --force" in err
    with FileLock(runs / "first" / "run.lock"):
        code, _, err = everystep_command("rm", "first", "--force")
    assert code != 0
    assert "is being written" in err
    code, _, err = everystep_command("rm", "none", "--force")
    assert code != 0
    assert "no run 'none'" in err
    assert everystep.open("runs/first").verify().is_exact


def test_a_directory_without_runs(runs, everystep_command):
    shutil.rmtree(runs)
    runs.mkdir()
    assert everystep_command("du") == (0, "", "runs has no runs\n")
