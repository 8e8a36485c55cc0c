"""What is wrong with a run is named with its place, and a repaired copy has what can be brought back."""

import json
import os
import shutil
import sqlite3
from contextlib import closing

import pytest
import torch
from tests.sealing import seal_files
from tests.training.by_hand import by_train, new_training
from torch import nn

import everystep
from everystep.errors import RunError
from everystep.recording.recorder import Recorder
from everystep.recording.snapshots import SnapshotPlan


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A run of 40 steps with a state after every eighth; no test may change it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("sound"))
        patch.setattr(SnapshotPlan, "choose_interval", lambda plan, *_: setattr(plan, "interval", 8))
        patch.setattr(Recorder, "is_behind", False)
        directory = by_train(new_training(), steps=40).directory.absolute()
    with closing(sqlite3.connect(directory / "run.sqlite")) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return directory


@pytest.fixture
def damaged(sound, tmp_path):
    """Make a copy that SQL has changed."""

    def make(*statements):
        run = shutil.copytree(sound, tmp_path / "damaged")
        with closing(sqlite3.connect(run / "run.sqlite")) as database, database:
            for statement in statements:
                database.execute(statement)
        return run

    return make


def is_same(run, sound):
    one, other = everystep.open(run), everystep.open(sound)
    return one.losses.equals(other.losses) and one.verify(progress=False).is_exact


def test_a_sound_run_is_healthy(sound, everystep_command):
    code, out, _ = everystep_command("doctor", sound)
    assert code == 0
    assert (
        "losses: 40\n" in out
        and "losses, measurements, facts, states, data, programs, by their digests" in out
    )
    assert out.endswith("is healthy\n")


def test_one_bit_in_a_program_is_reported_by_every_command(damaged, everystep_command):
    run = damaged()
    program = run / "programs" / "1.json"
    program.write_text(program.read_text().replace('"gradient/0.bias"', '"gradient/4.bias"'))
    for command in (
        ("step", run, 7), ("verify", run), ("doctor", run), ("why", run, 7, "loss"),
        ("measure", run, "norm(gradients['0.bias'])"), ("when", run, "max(updates['0.bias']) > 9"),
        ("rows", run, 7), ("fork", run, "--at", 7, "--run", "fork", "-q"),
    ):  # fmt: skip
        code, out, err = everystep_command(*command)
        assert code and "programs/1.json was changed after recording" in out + err, command
    with pytest.raises(RunError, match=r"programs/1\.json was changed after recording"):
        everystep.open(run)[7]
    found = json.loads(everystep_command("doctor", run, "--json")[1])
    assert not found["healthy"] and found["unchecked"] == []


def test_a_gradient_has_the_shape_of_its_parameter(damaged):
    run = damaged()
    program = run / "programs" / "1.json"
    data = json.loads(program.read_text())
    data["gradients"]["0.bias"] = data["gradients"]["2.bias"]
    program.write_text(json.dumps(data))
    seal_files(run)
    with pytest.raises(RunError, match=r"the gradient of '0\.bias' does not have its shape"):
        everystep.open(run)[7]


@pytest.mark.parametrize(
    ("gone", "unopened"),
    [((0,), "none of steps 1 to 9"), ((0, 8), "none of steps 1 to 17"), (range(0, 48, 8), "no step")],
)
def test_without_its_first_states_a_run_opens_from_the_next(damaged, everystep_command, gone, unopened):
    run = damaged()
    for step in gone:
        shutil.rmtree(run / "snapshots" / f"{step:06d}")
    code, out, _ = everystep_command("doctor", run, "--repair", "copy")
    assert code == 1
    assert "steps after it open from the state before it" not in out
    assert out.count(f"without it, {unopened} can be opened, and the run cannot be verified") == len(
        gone
    )
    assert f"the state before the first step is missing: {unopened} can be opened" in out
    copy = everystep.open("copy")
    assert unopened in str(copy.facts.repaired.problems)
    with pytest.raises(everystep.RunError, match=r"from its first state|no readable snapshot"):
        copy.verify(progress=False)
    if len(gone) < 3:
        first = 8 * len(gone) + 2
        assert copy[first].loss == copy.losses["loss"][first - 1]
        with pytest.raises(everystep.RunError):
            copy[first - 1]


def test_a_copy_that_cannot_be_replayed_is_not_complete(damaged, everystep_command):
    run = damaged()
    data = run / "data.safetensors"
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    code, out, _ = everystep_command("doctor", run, "--repair", "copy")
    assert code == 1 and "copy/data.safetensors was changed after recording" in out
    assert "data.safetensors" in str(everystep.open("copy").facts.repaired.problems)
    with pytest.raises(everystep.RunError, match="was changed after recording"):
        everystep.open("copy").verify(progress=False)


@pytest.mark.parametrize(
    ("statements", "problem"),
    [
        (["DELETE FROM steps WHERE step BETWEEN 10 AND 20"], "steps 10 to 20 are missing"),
        (["DELETE FROM steps WHERE step > 30"], "its database ends at step 30"),
        (["UPDATE steps SET loss = 1 WHERE step = 17"], "losses of steps 1 to 40 are not as they were"),
        (["DELETE FROM steps"], "finished with 40 steps, but its database ends at step 0"),
        (["UPDATE steps SET step = -3 WHERE step = 1"], "steps begin at -3"),
    ],
)  # fmt: skip
def test_lost_losses_are_taken_again(damaged, sound, everystep_command, statements, problem):
    run = damaged(*statements)
    code, out, _ = everystep_command("doctor", run, "--repair", "copy")
    assert code == 0
    assert problem in out and "damaged is damaged" in out
    assert is_same("copy", sound)
    copy = everystep.open("copy")
    assert copy.status == "finished" and copy.doctor().is_healthy
    assert copy.facts.repaired.again and str(run) == copy.facts.repaired.run
    assert copy.snapshots == everystep.open(sound).snapshots


def test_a_repair_never_writes_into_the_damaged_run(damaged):
    run = damaged("DELETE FROM steps WHERE step = 7")

    def contents():
        names = (path for path in run.rglob("*") if path.is_file() and path.suffix != ".sqlite-shm")
        return {path: content for path in names if (content := path.read_bytes())}

    before = contents()
    everystep.doctor(run, repair="copy", progress=False)
    assert contents() == before
    with pytest.raises(everystep.RunError, match="already exists"):
        everystep.doctor(run, repair=run, progress=False)


def test_states_that_only_the_disk_knows_tell_which_steps_are_missing(damaged, sound):
    run = damaged(
        "DELETE FROM steps WHERE step > 20", "DELETE FROM snapshots WHERE step > 20",
        "UPDATE facts SET value = '\"running\"' WHERE key = 'status'",
    )  # fmt: skip
    found = everystep.doctor(run, repair="copy", progress=False)
    assert any("steps 21 to 40 are missing" in str(each) for each in found.findings)
    assert (found.repaired.steps, found.repaired.planned) == (40, 40)
    assert everystep.open("copy").losses.equals(everystep.open(sound).losses)
    assert everystep.open("copy").snapshots[-1] == 40


def test_a_state_that_is_altered_is_left_out_of_the_copy(damaged, sound):
    run = damaged("DELETE FROM steps WHERE step = 18")
    path = run / "snapshots" / "000016" / "parameters.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    found = everystep.doctor(run, repair="copy", progress=False)
    assert any(each.place == "snapshots/000016" for each in found.findings)
    assert not found.repaired.is_complete and "000016 was changed" in found.repaired.problems[0]
    assert is_same("copy", sound)
    assert 16 not in everystep.open("copy").snapshots


def test_steps_that_cannot_be_taken_again_are_named(damaged, everystep_command):
    run = damaged("DELETE FROM steps WHERE step BETWEEN 10 AND 20")
    for program in (run / "programs").glob("*.json"):
        program.unlink()
    code, out, _ = everystep_command("doctor", run, "--repair", "copy", "--json")
    found = json.loads(out)
    assert code == 1
    assert {each["place"] for each in found["findings"]} >= {"programs/1.json", "run.sqlite, steps"}
    assert found["repaired"]["steps"] == 0 and not found["repaired"]["complete"]
    assert any("steps 1 to 40 could not be brought back" in p for p in found["repaired"]["problems"])
    assert everystep.open("copy").status == "stopped"


def test_steps_that_lead_elsewhere_are_not_passed_off_as_right(damaged):
    run = damaged("DELETE FROM steps WHERE step BETWEEN 10 AND 20")
    for program in (run / "programs").glob("*.json"):
        program.write_text(program.read_text().replace("aten.tanh.default", "aten.sin.default"))
    seal_files(run)
    found = everystep.doctor(run, repair="copy", progress=False)
    assert not found.repaired.is_complete
    assert any("do not lead to the state after step 8" in each for each in found.repaired.problems)
    assert found.repaired.steps == 0


@pytest.mark.parametrize("missing", [1, 5000])
def test_a_database_that_is_cut_off_is_salvaged(damaged, sound, missing):
    run = damaged()
    os.truncate(run / "run.sqlite", (run / "run.sqlite").stat().st_size - missing)
    try:
        found = everystep.doctor(run, repair="copy", progress=False)
    except everystep.RunError as error:
        assert "cannot be read" in str(error) or "invalid" in str(error)
    else:
        assert "cut off" in str(found.findings)
        assert len(everystep.open("copy")) == found.repaired.steps


def test_a_loop_of_your_own_is_repaired_too(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(20, 4), torch.randn(20, 2)
    with everystep.record(model=model, optimizer=optimizer) as recording:
        for number in recording.steps(range(20)):
            loss = nn.functional.mse_loss(model(x[number : number + 1]), y[number : number + 1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recording.log(loss=loss)
    run, losses = recording.run, recording.run.losses
    with closing(sqlite3.connect(run.directory / "run.sqlite")) as database, database:
        database.execute("DELETE FROM steps WHERE step > 12")
    found = everystep.doctor(run.directory, repair="copy", progress=False)
    assert found.repaired.again == ((1, 20),) and found.repaired.is_complete
    assert everystep.open("copy").losses.equals(losses)


def test_a_removed_experiment_is_named(tmp_path, everystep_command):
    run = everystep.train_experiment(
        "two-layer", {"steps": 20}, directory=tmp_path / "run", progress=False
    )
    (run.directory / "experiment.toml").unlink()
    opened = everystep.open(run.directory)
    assert opened.verify(progress=False).is_exact
    code, out, _ = everystep_command("doctor", run.directory)
    assert code == 1
    assert "experiment.toml is missing, though the run was trained by it; put it back" in out
    code, _, error = everystep_command("fork", run.directory, "--at", 5, "--set", "seed=3")
    assert code == 2
    assert "experiment.toml of run is missing, and its programs cannot go on alone" in error
    assert "put the file back, or pass the objects" in error

    fork = opened.fork(5, lr=1e-3, directory=tmp_path / "fork", progress=False)
    assert fork.verify(progress=False).is_exact
    code, _, error = everystep_command("resume", run.directory, "--steps", 30)
    assert code == 0
    assert "experiment.toml is missing, so programs alone take the steps" in error
    resumed = everystep.open(run.directory)
    plain = everystep.train_experiment(
        "two-layer", {"steps": 30}, directory=tmp_path / "plain", progress=False
    )
    assert resumed.losses.equals(plain.losses) and resumed.verify(progress=False).is_exact
