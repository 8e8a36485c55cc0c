"""What is wrong with a run is named with its place, and what can be read is written, with its digest."""

import csv
import json
import os
import shutil
import sqlite3
import struct
from contextlib import closing
from pathlib import Path

import pytest
import torch
from tests.descent import files_of, looped, trained
from tests.sealing import seal_files, sql
from tests.snapshots import take_snapshots_every
from tests.training.by_hand import by_train, new_training
from torch import nn

import everystep
from everystep.errors import RunError


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A run of 40 steps with a state after every eighth; no test may change it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("sound"))
        take_snapshots_every(patch, 8)
        directory = by_train(new_training(), steps=40).directory.absolute()
    sql(directory, "PRAGMA wal_checkpoint(TRUNCATE)")
    return directory


@pytest.fixture
def damaged(sound, tmp_path):
    """Make a copy that SQL has changed."""

    def make(*statements):
        run = shutil.copytree(sound, tmp_path / "damaged")
        sql(run, *statements)
        return run

    return make


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
        ("rows", run, 7), ("fork", run, "--at", 7, "--run", "./fork", "-q"),
    ):  # fmt: skip
        code, out, err = everystep_command(*command)
        assert code and "programs/1.json was changed after recording" in out + err, command
    with pytest.raises(RunError, match=r"programs/1\.json was changed after recording"):
        everystep.open(run)[7]
    found = json.loads(everystep_command("doctor", run, "--json")[1])
    assert not found["is_healthy"]


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
    code, out, _ = everystep_command("doctor", run)
    assert code == 1
    assert "steps after it open from the state before it" not in out
    assert out.count(f"without it, {unopened} can be opened, and the run cannot be verified") == len(
        gone
    )
    opened = everystep.open(run)
    with pytest.raises(everystep.RunError, match=r"from its first state|no readable snapshot"):
        opened.verify(progress=False)
    if len(gone) < 3:
        first = 8 * len(gone) + 2
        assert opened[first].loss == opened.losses["loss"][first - 1]
        with pytest.raises(everystep.RunError):
            opened[first - 1]


def test_a_run_whose_database_has_no_first_state_says_so(damaged):
    found = str(everystep.doctor(damaged("DELETE FROM files WHERE name LIKE 'snapshots/000000/%'")))
    assert "the state before the first step is missing: none of steps 1 to 9 can be opened" in found


def exported(run, everystep_command):
    """Return the rows that `doctor --export` writes."""
    code, out, err = everystep_command("doctor", run, "--export", "numbers.csv")
    assert code == 1 and "is damaged" in out and "numbers.csv" in err
    with Path("numbers.csv").open(newline="") as file:
        return [*csv.DictReader(file)]


def losses_of(rows):
    return {int(row["step"]): float(row["value"]) for row in rows if row["series"] == "loss"}


@pytest.mark.parametrize(
    ("statements", "problem"),
    [
        (["DELETE FROM steps WHERE step = 10"], "  step 10 is missing, and later ones are there"),
        (["DELETE FROM steps WHERE step BETWEEN 10 AND 20"], "steps 10 to 20 are missing"),
        (["DELETE FROM steps WHERE step > 30"], "its database ends at step 30"),
        (["UPDATE steps SET loss = 1 WHERE step = 17"], "losses of steps 1 to 40 do not match"),
        (["DELETE FROM steps"], "finished with 40 steps, but its database ends at step 0"),
        (["UPDATE steps SET step = -3 WHERE step = 1"], "steps begin at -3"),
    ],
)  # fmt: skip
def test_numbers_that_are_lost_or_altered_are_named_and_the_others_exported(
    damaged, sound, everystep_command, statements, problem
):
    run = damaged(*statements)
    code, out, _ = everystep_command("doctor", run)
    assert code == 1
    assert problem in out and out.endswith("damaged is damaged\n")
    rows = exported(run, everystep_command)
    digests = {(int(row["step"]) > 0, row["digest"]) for row in rows if row["series"] == "loss"}
    assert digests <= {(True, "differs"), (False, "none")}
    with closing(sqlite3.connect(run / "run.sqlite")) as database:
        assert losses_of(rows) == dict(database.execute("SELECT step, loss FROM steps"))


def test_exported_numbers_of_a_sound_run_have_the_recorded_digests(sound, tmp_path):
    run = everystep.open(sound)
    assert run.doctor(export=tmp_path / "numbers.csv").is_healthy
    with (tmp_path / "numbers.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    assert [*losses_of(rows).values()] == run.losses["loss"].to_list()
    assert {row["digest"] for row in rows} == {"same"}


def test_doctor_never_writes_into_the_run(damaged):
    run = damaged("DELETE FROM steps WHERE step = 7")
    before = files_of(run)
    everystep.doctor(run, export="numbers.csv")
    assert files_of(run) == before


def test_states_that_only_the_disk_knows_tell_which_steps_are_missing(damaged):
    run = damaged(
        "DELETE FROM steps WHERE step > 20", "DELETE FROM files WHERE name > 'snapshots/000020/z'",
        "UPDATE facts SET value = '\"running\"' WHERE key = 'status'",
    )  # fmt: skip
    found = everystep.doctor(run)
    assert any("steps 21 to 40 are missing" in str(each) for each in found.findings)


@pytest.mark.parametrize("missing", [1, 5000, 9000])
def test_of_a_database_that_is_cut_off_the_pages_that_are_there_are_exported(
    damaged, sound, everystep_command, missing
):
    run = damaged()
    os.truncate(run / "run.sqlite", (run / "run.sqlite").stat().st_size - missing)
    assert "cut off" in str(everystep.doctor(run).findings)
    found = losses_of(exported(run, everystep_command))
    expected = dict(enumerate(everystep.open(sound).losses["loss"].to_list(), 1))
    assert found == {step: expected[step] for step in found}


def test_a_malformed_page_loses_its_own_rows_only(tmp_path, everystep_command):
    run = tmp_path / "long"
    model = nn.Linear(2, 1)
    data, optimizer = (
        (torch.randn(4, 2), torch.randn(4, 1)),
        torch.optim.SGD(model.parameters(), lr=0.01),
    )
    losses = trained(model, data, optimizer=optimizer, steps=3000, run=run).losses["loss"].to_list()
    sql(run, "PRAGMA wal_checkpoint(TRUNCATE)")
    content = bytearray((run / "run.sqlite").read_bytes())
    middle = content.index(struct.pack(">d", losses[1500]))
    page = middle - middle % 4096
    content[page : page + 8] = b"\xff" * 8
    (run / "run.sqlite").write_bytes(content)
    code, _, err = everystep_command("losses", run)
    assert code == 2 and "run.sqlite cannot be read: database disk image is malformed" in err
    rows = exported(run, everystep_command)
    found = losses_of(rows)
    assert 2000 < len(found) < 3000 and {1, 3000} <= found.keys()
    assert found == {step: losses[step - 1] for step in found}
    assert {row["digest"] for row in rows if row["series"] == "loss"} == {"differs"}


def test_a_file_that_is_no_database_has_nothing_to_export(damaged, everystep_command):
    run = damaged()
    (run / "run.sqlite").write_bytes(b"nothing" * 3000)
    code, out, err = everystep_command("doctor", run, "--export", "numbers.csv")
    assert code == 2 and "parameters of states 000000" in out
    assert "run.sqlite cannot be read" in err and not Path("numbers.csv").exists()


def test_rows_of_batches_are_compared_with_their_digests(everystep_command):
    torch.manual_seed(0)
    x, y = torch.randn(20, 40), torch.randn(20, 2)

    def loss_of(model, row):
        return nn.functional.mse_loss(model(x[row : row + 4]), y[row : row + 4])

    run = looped(nn.Linear(40, 2), range(0, 20, 4), loss_of).directory
    code, out, _ = everystep_command("doctor", run)
    assert code == 0 and "batches, by their digests" in out
    file = run / "batches" / "1.bin"
    whole = file.read_bytes()
    for changed in (whole[:200] + bytes([whole[200] ^ 1]) + whole[201:], whole[:-1]):
        file.write_bytes(changed)
        code, out, _ = everystep_command("doctor", run)
        assert code == 1 and out.count("problem ") == 1
        assert "batches/1.bin was changed after recording" in out
    file.unlink()
    code, out, _ = everystep_command("doctor", run)
    assert code == 1 and "batches/1.bin cannot be read" in out


def test_a_removed_experiment_is_named(tmp_path, everystep_command):
    run = everystep.train_experiment("two-layer", {"steps": 20}, run=tmp_path / "run", progress=False)
    (run.directory / "experiment.toml").unlink()
    opened = everystep.open(run.directory)
    assert opened.verify(progress=False).is_exact
    code, out, _ = everystep_command("doctor", run.directory)
    assert code == 1
    assert "experiment.toml is missing, though the run was trained by it; put it back" in out
    code, _, error = everystep_command("fork", run.directory, "--at", 5, "--set", "seed=3")
    assert code == 2
    assert "experiment.toml of run is missing, and its programs cannot continue it alone" in error
    assert "put the file back, or pass the objects" in error

    fork = opened.fork(5, lr=1e-3, run=tmp_path / "fork", progress=False)
    assert fork.verify(progress=False).is_exact
    code, _, error = everystep_command("resume", run.directory, "--steps", 30)
    assert code == 0
    assert "experiment.toml is missing, so programs alone take the steps" in error
    resumed = everystep.open(run.directory)
    plain = everystep.train_experiment(
        "two-layer", {"steps": 30}, run=tmp_path / "plain", progress=False
    )
    assert resumed.losses.equals(plain.losses) and resumed.verify(progress=False).is_exact
