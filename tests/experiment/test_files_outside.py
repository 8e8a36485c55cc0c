"""A file outside of a run is read only where its user has named it: a stranger's run may name any."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import everystep
from everystep.experiment import source_files
from everystep.page.worker import Openers, answers
from everystep.recording import files as files_of_runs

COMMANDS = [
    ["step", "run", "3"],
    ["verify", "run", "--processes", "1"],
    ["fork", "run", "--at", "3", "-q"],
    ["resume", "run", "--steps", "8", "-q"],
    ["why", "run", "2", "loss"],
    ["rows", "run", "2"],
    ["measure", "run", "norm(gradients['0.weight'])"],
    ["when", "run", "norm(gradients['0.weight']) > 0"],
    ["diff", "run", "other", "--thorough"],
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Two runs of data that neither holds, as if it were large; return its files."""
    monkeypatch.setattr(files_of_runs, "DATA_LIMIT", 10)
    random = np.random.default_rng(0)
    for name, columns in (("x", 1000), ("y", 10)):
        np.save(f"{name}.npy", random.standard_normal((8, columns)).astype(np.float32))
    source = {"source": "arrays", "x": str(tmp_path / "x.npy"), "y": str(tmp_path / "y.npy")}
    for run, lr in (("run", 1e-4), ("other", 2e-4)):
        settings = {"data": source, "steps": 6, "optimizer.lr": lr}
        everystep.train_experiment("two-layer", settings, run=Path(run), progress=False)
    return [source["x"], source["y"]]


@pytest.fixture
def nobody_here(monkeypatch, tmp_path):
    """Open runs as a user who has trained on nothing."""
    monkeypatch.setattr(source_files, "_named", set())
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "of another user"))


def test_who_trained_on_a_file_is_not_asked(here, monkeypatch, everystep_command):
    monkeypatch.setattr(source_files, "_named", set())  # as another process of the same user
    for command in COMMANDS:
        code, _, err = everystep_command(*command)
        assert code == (1 if command[0] == "diff" else 0), (command, err)


def test_nobody_else_reads_a_file_without_being_asked(here, nobody_here, everystep_command, monkeypatch):
    before = sorted(Path().iterdir())
    for command in COMMANDS:
        shutil.copytree("run", "kept")
        code, out, err = everystep_command(*command)
        if command[0] == "diff":  # it has a difference to report all the same
            assert "EVERYSTEP_DATA=" in out + err
        else:
            assert (code, out) == (2, ""), command
            assert f"the data is outside of the run, in '{here[0]}'" in err
            assert f"EVERYSTEP_DATA={os.pathsep.join(here)}" in err
        shutil.rmtree("run")
        Path("kept").rename("run")
    assert sorted(Path().iterdir()) == before
    monkeypatch.setenv("EVERYSTEP_DATA", os.pathsep.join(here))
    for command in COMMANDS[:3]:
        assert everystep_command(*command)[0] == 0


def test_data_that_is_passed_is_asked_for(here, nobody_here):
    x, y = (torch.from_numpy(np.load(file)) for file in here)
    assert everystep.open("run", data=(x, y))[3].is_exact
    with pytest.raises(everystep.DataError, match="EVERYSTEP_DATA"):
        everystep.open("run")[3]


def test_a_fork_with_other_rules_for_the_data_reads_no_file_either(here, nobody_here, everystep_command):
    code, _, err = everystep_command("fork", "run", "--at", "3", "--set", "data.scale=standard", "-q")
    assert code == 2 and "the data is outside of the run" in err
    own = [shutil.copy(file, f"own-{Path(file).name}") for file in here]
    given = [f"data.{name}={Path(file).absolute()}" for name, file in zip("xy", own, strict=True)]
    sets = [part for each in given for part in ("--set", each)]
    code, _, err = everystep_command("fork", "run", "--at", "0", *sets, "-q")
    assert code == 0, err  # the forking user named these files


def test_the_page_has_the_same_rule(here, nobody_here):
    asked = json.dumps({"kind": "content", "run": str(Path("run").absolute()), "step": 3})
    [(_, about, _)] = answers(Openers(), [asked])
    assert about["status"] != 200 and "EVERYSTEP_DATA" in about["about"]["error"]
