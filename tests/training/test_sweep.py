"""Sweeps: many settings, each an ordinary run, from the command line and in Python."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.page.serving import Application
from tests.training.swept import here, stopping, trained

import everystep
from everystep.errors import ExperimentError, RunError, UsageError
from everystep.experiment.grid import combinations, experiments_of, parse_values


@pytest.fixture
def in_this_process(monkeypatch):
    monkeypatch.setattr("everystep.replay.processes.pool", here)


SMALL = {"steps": 6, "data.N": 8, "data.D_in": 5, "model.layers": ["Linear(5, 10)"]}


def parameters(run):
    return sorted((name, each.tolist()) for name, each in run.parameters(-1).items())


def test_a_sweep_is_ordinary_runs_with_the_bits_of_each_alone(everystep_command, in_this_process):
    options = [f"--set={path}={value}".replace("'", '"') for path, value in SMALL.items()]
    values = ["--set", "optimizer.lr=1e-3,1e-2", "--set", "seed=0..1"]
    code, out, err = everystep_command("sweep", "two-layer", *options, *values)
    assert code == 0
    heading, *rows, last = out.splitlines()
    assert heading.split()[:4] == ["optimizer.lr", "seed", "status", "steps"]
    losses = [float(row.split()[4]) for row in rows]
    assert losses == sorted(losses) and last == "4 of 4 runs finished: runs/two-layer-sweep-1"
    assert "lr=0.01,seed=1: finished, loss" in err
    name = "two-layer-sweep-1/lr=0.01,seed=1"
    settings = SMALL | {"optimizer.lr": 1e-2, "seed": 1, "threads": 1}
    alone = everystep.train_experiment("two-layer", settings, run="alone", progress=False)
    found = alone.diff(everystep.open(name), thorough=True)
    assert found.is_same and not found.experiments and found.names[1] == name
    assert (alone.directory / "experiment.toml").read_text() == (
        Path("runs", name, "experiment.toml").read_text()
    )
    # Finished runs stay; more values train more.
    more = [*values[:-1], "seed=0..2", "--run", "two-layer-sweep-1", "--resume", "--json"]
    before = Path("runs", name, "run.sqlite").stat().st_mtime_ns
    code, out, err = everystep_command("sweep", "two-layer", *options, *more)
    assert (code, err.count(": finished")) == (0, 2)
    assert {each["settings"]["seed"] for each in json.loads(out)["cases"]} == {0, 1, 2}
    assert Path("runs", name, "run.sqlite").stat().st_mtime_ns == before
    code, _, err = everystep_command("sweep", "two-layer", *options[1:], *more, "--set=steps=7")
    assert code == 2 and "lr=0.01,seed=1: was trained with different settings: steps 6 | 7" in err
    # All lists, questions and plots find them.
    names = [run.name for run in everystep.runs()]
    assert len(names) == 7 and names[-1] == "two-layer-sweep-1/lr=0.01,seed=2"
    assert name in everystep_command("runs")[1]
    assert "did you mean" in everystep_command("step", "lr=0.01,seed=1", "1")[2]
    assert "is a sweep: everystep runs" in everystep_command("resume", "two-layer-sweep-1")[2]
    assert len(everystep_command("runs", "two-layer-sweep-1")[1].splitlines()) == 7
    assert everystep_command("plot", "two-layer-sweep-1", "-o", "sweep.png")[0] == 0
    assert everystep_command("plot", "two-layer-sweep-1", "-m", "validation_loss")[0] == 2
    fork = everystep.open(name).fork(3, lr=0.5, progress=False)
    assert str(fork.directory) == "runs/two-layer-sweep-1,lr=0.01,seed=1-fork-1"
    page = Application(Path("runs").absolute())
    listed = page.ask("/api/runs").json()["runs"]
    assert {each["name"] for each in listed} == {*names, fork.name}
    assert page.ask(f"/api/runs/{name.replace('/', '%2F')}").json()["forks"][0]["name"] == fork.name
    assert len(page.ask(f"/api/runs/{name}/curve").json()["steps"]) == 6
    assert Application(Path("runs/two-layer-sweep-1").absolute()).ask("/api/runs").json()["runs"]


def test_a_run_that_fails_is_reported_and_the_others_continue(everystep_command, in_this_process):
    options = ["--set=steps=3", "--set=stop_on_nan=true", "--run", "some"]
    values = [
        "--set",
        "optimizer.lr=1e-4,1e30",
        "--set",
        'model.layers[0]="Linear(9, 100)","Linear(1000, 100)"',
    ]
    code, out, err = everystep_command("sweep", "two-layer", *options, *values)
    assert code == 1
    assert "1 of 4 runs finished" in out and "lr=1e+30" in out
    assert "stopped: the loss is " in err and "expects 9 features" in err
    # What a NaN has stopped is not continued.
    code, _, err = everystep_command("sweep", "two-layer", *options, *values, "--resume")
    assert code == 1 and "stopped" not in err and "2 of 4 runs" in err
    assert everystep_command("sweep", "two-layer", *options, *values)[0] == 2


@pytest.mark.sweep
def test_runs_of_a_function_go_on_after_kills_and_ctrl_c(monkeypatch):
    """Each in a process of its own; continued in this one, which another run ends by Ctrl-C."""
    settings = {"lr": 0.1, "seed": [1], "what": ["is killed", "stops all"]}
    options = {"run": "own", "processes": 1, "progress": False}
    with pytest.raises(KeyboardInterrupt, match=r"--run runs/own --resume"):
        everystep.sweep(trained, settings, **options)

    def ends():
        return {run.name.partition("=")[2]: run.status for run in everystep.runs("runs/own")}

    assert ends() == {"is-killed": "killed", "stops-all": "stopped"}
    monkeypatch.setattr("everystep.replay.processes.pool", here)
    settings["what"] += ["raises", "is stopped"]
    assert not everystep.sweep(trained, settings, **options, resume=True).is_finished
    finished = dict.fromkeys(("is-killed", "stops-all"), "finished")
    assert ends() == finished | {"raises": "failed", "is-stopped": "stopped"}
    found = everystep.sweep(trained, settings, **options, resume=True)
    assert found.is_finished and len(found.runs) == 4 and found.metric == "accuracy"
    assert len({str(parameters(run)) for run in found.runs}) == 1
    assert all(run.facts.config["seed"] == 1 and run.verify().is_exact for run in found.runs[:2])
    assert found.table()["what"].to_list() and "what" in found.to_text()
    with pytest.raises(
        RunError, match=r"what=raises: was trained with different settings: lr 0.1 \| 0.2"
    ):
        everystep.sweep(trained, settings | {"lr": 0.2}, **options, resume=True)
    assert "4 of 4" in found._repr_html_() and found.plot() is not None


def test_a_call_that_a_condition_has_stopped_is_over(in_this_process):
    options = {"run": "own", "progress": False}
    for _ in range(2):
        found = everystep.sweep(stopping, {"lr": [0.1, 0.2], "width": 2}, **options)
        assert found.is_finished and sorted(len(run) for run in found.runs) == [1, 6], found
        options["resume"] = True
    with pytest.raises(RunError, match=r"lr=0.1: was trained with different settings: width 2 \| 3"):
        everystep.sweep(stopping, {"lr": [0.1, 0.2], "width": 3}, **options)


def test_what_a_sweep_cannot_call_is_said_before_anything_begins(monkeypatch):
    def within(lr):
        """Not at the top of a module."""

    for function in (within, lambda lr: None):
        with pytest.raises(UsageError, match="must import it"):
            everystep.sweep(function, {"lr": [1, 2]})
    with pytest.raises(UsageError, match=r"cannot be called with \{'rate': 1\}"):
        everystep.sweep(trained, {"rate": [1, 2]})
    with pytest.raises(UsageError, match="cannot be called"):
        everystep.sweep(trained, {"lr": [within]})
    with pytest.raises(UsageError, match="name its directory"):
        everystep.sweep(trained, {"lr": [1]}, resume=True)
    with monkeypatch.context() as patch, pytest.raises(UsageError, match="start it without torchrun"):
        patch.setenv("TORCHELASTIC_RUN_ID", "1")
        everystep.sweep(trained, {"lr": [1]})
    monkeypatch.setattr("everystep.api.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="Ray is not installed: pip install ray"):
        everystep.sweep(trained, {"lr": [1]}, ray=True)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["seed=0,0"], "seed: has the value 0 twice"),
        (["seed="], "write path=value,value"),
        (["optimizer.lr=1e-3,,1"], "write path=value,value"),
        (["seed=3..1"], "seed: has no values"),
        (["seed=1,2", "seed=3"], "seed: is set twice"),
        (["seed=0..5000"], "5,001 runs; more than 1,000 need --force"),
        (["steps=5,6", "epochs=1"], "steps=5 and steps=6 would be the same run"),
        (
            ["optimizer.lr=-1,1e-3", "optimizr.lr=1", "seed=0..1"],
            "optimizr: unknown key; did you mean optimizer?\n"
            "  optimizer: GradientDescent: lr must be a finite number",
        ),
        ([], "nothing to vary"),
    ],
)
def test_all_faults_are_reported_at_once(settings, problem):
    with pytest.raises(ExperimentError) as raised:
        experiments_of("two-layer", combinations(parse_values(settings)), 1)
    assert problem in str(raised.value)


def test_names_of_runs_are_short_distinct_and_plain():
    values = parse_values(
        ["optimizer.lr=1e-3,1e-05", "model.layers[1]='Tanh()',GELU( )", "a.lr=[1, 2],[3]"]
    )
    assert values["a.lr"] == [[1, 2], [3]]
    names = list(combinations(values))
    assert names[0] == "optimizer.lr=0.001,model.layers-1=Tanh,a.lr=-1-2"
    assert len(names) == 8 and all(
        set(name) <= set("abcdefghijklmnopqrstuvwxyzTELGU=,.-+0123456789") for name in names
    )
    assert list(combinations({"optimizer.lr": [1e-3], "seed": range(2)})) == ["seed=0", "seed=1"]
    assert list(combinations({"x": ["a b", "a/b"]})) == ["x=a-b-1", "x=a-b-2"]
    assert list(combinations({"x": torch.tensor([0.5, 2]), "y": np.array(3)})) == ["x=0.5", "x=2.0"]
