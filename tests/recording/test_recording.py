import os
import sqlite3
import sys
import threading
from contextlib import closing
from copy import deepcopy
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tests.descent import trained
from tests.sealing import sql
from torch import nn

import everystep
from everystep.recording import connection
from everystep.recording import database as database_module
from everystep.recording.database import Database, reading
from everystep.recording.snapshots import SnapshotPlan

train = partial(trained, steps=5)


def test_any_sqlite_client_reads_the_run_while_training_goes_on(small, monkeypatch):
    monkeypatch.setattr("everystep.training.writer.FLUSH_SECONDS", 0.0)
    model, x, y = small
    calls, seen = [], []

    def watching(prediction, target):
        calls.append(1)
        while len(calls) == 20 and not seen:
            with closing(sqlite3.connect("run/run.sqlite")) as connection:
                seen.extend(connection.execute("SELECT step FROM steps").fetchall())
        assert not seen or everystep.open("run").status == "running"
        return nn.functional.mse_loss(prediction, target)

    run = train(model, (x, y), loss=watching, steps=25, run="./run")
    assert 0 < len(seen) < 20
    assert run.status == "finished"


def test_what_is_written_while_a_run_is_opened_is_no_damage(small, monkeypatch):
    model, x, y = small
    run = train(model, (x, y))
    writer = Database.change(run.directory / "run.sqlite")
    read = Database.numbers

    def numbers(database, query, *values, **named):
        """Read the digest of the facts; a writer then replaces both."""
        found = read(database, query, *values, **named)
        if "digest" in query and database is not writer:
            with writer.transaction():
                writer.write_facts({"seconds": 1000.0})
        return found

    monkeypatch.setattr(Database, "numbers", numbers)
    assert everystep.open(run.directory).facts.seconds == 1000.0  # and nothing warns
    writer.close()


def test_the_directory_is_that_of_the_design(small):
    model, x, y = small
    run = train(model, (x, y), validation=(x[:2], y[:2]))
    assert run.directory.as_posix() == "runs/sequential-1"
    data = load_file(run.directory / "data.safetensors")
    assert torch.equal(data["x"], x)
    assert torch.equal(data["validation_y"], y[:2])
    model.load_state_dict(load_file(run.directory / "snapshots/000005/parameters.safetensors"))
    experiment = everystep.train_experiment("two-layer", {"steps": 1}, progress=False)
    text = (experiment.directory / "experiment.toml").read_text()
    (experiment.directory / "again.toml").write_text(text)
    again = everystep.train_experiment(experiment.directory / "again.toml", progress=False)
    assert again.losses.equals(experiment.losses)


def test_a_run_is_never_overwritten(small):
    model, x, y = small
    train(model, (x, y), run="./here")
    with pytest.raises(
        everystep.RunError, match="here already exists, and everystep never overwrites a run"
    ):
        train(model, (x, y), run="./here")
    names = [train(model, (x, y), steps=1).name for _ in range(2)]
    assert names == ["sequential-1", "sequential-2"]
    assert [run.name for run in everystep.runs("runs")] == names


def test_trainings_in_threads_do_not_disturb_each_other(small):
    _, x, y = small

    def train_some():
        for _ in range(3):
            train(nn.Linear(4, 2), (x, y), steps=4, engine="eager")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=train_some) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert [run.status for run in everystep.runs()] == ["finished"] * 12
    assert all(run.verify(progress=False, processes=1).is_exact for run in everystep.runs())


def test_what_is_no_run_is_told(tmp_path):
    with pytest.raises(everystep.RunError, match="everystep train"):
        everystep.open("nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(everystep.RunError, match=r"is not a run: run\.sqlite is missing"):
        everystep.open("empty")
    (tmp_path / "empty" / "run.sqlite").write_text("this is not a database, but long enough to look at")
    with pytest.raises(everystep.RunError, match="cannot be read"):
        everystep.open("empty")
    (tmp_path / "other").mkdir()
    sql("other", "CREATE TABLE t (x)")
    with pytest.raises(everystep.RunError, match="not of an everystep run"):
        everystep.open("other")
    with pytest.raises(everystep.RunError, match="is not a directory"):
        everystep.runs("nowhere")


def test_a_run_of_a_newer_format_is_refused_with_the_cure(small):
    model, x, y = small
    run = train(model, (x, y))
    sql(run.directory, "PRAGMA user_version = 99")
    with pytest.raises(everystep.RunError, match="newer everystep"):
        everystep.open(run.directory)


def test_a_state_that_was_not_reached_is_an_error(small):
    model, x, y = small
    run = train(model, (x, y))
    assert run.snapshots == [0, 5]
    with pytest.raises(everystep.RunError, match="no step 6: it has steps 1 to 5"):
        run.parameters(6)
    assert torch.equal(run.parameters(-1)["0.bias"], model[0].bias)
    assert [*run.parameters(-1)] == [*model.state_dict()]
    assert torch.equal(run.parameters(-6)["0.bias"], run.parameters(0)["0.bias"])
    with pytest.raises(everystep.RunError, match="no step -7: it has steps 1 to 5"):
        run.parameters(-7)


@given(st.integers(1, 200), st.floats(1e-6, 1.0), st.floats(1e-6, 0.1), st.integers(1, 400))
def test_snapshots_stay_within_the_budget_at_multiples_of_a_power_of_two(size, step, cost, steps):
    plan = SnapshotPlan(budget=1000)
    plan.add(0, size)
    plan.choose_interval(step, cost)
    is_needed = plan.interval * step * 0.03 / 2 < cost  # half of it would cost too much time
    assert plan.interval * step * 0.03 >= cost
    assert plan.interval * step <= 0.08 or is_needed or plan.interval == 1
    assert 2 * plan.interval * step > 0.08
    for t in range(1, steps + 1):
        if plan.is_due(t):
            gone = plan.add(t, size)
            assert 0 not in gone
            assert t not in gone
        assert sum(plan.kept.values()) <= 1000 or len(plan.kept) == 2
        assert all(s % plan.interval == 0 or s == max(plan.kept) for s in plan.kept)
    assert plan.interval & (plan.interval - 1) == 0


def test_thinned_snapshots_are_gone_from_disk_too(small):
    model, x, y = small
    run = train(model, (x, y), steps=400, snapshot_budget=60_000)
    on_disk = sorted(int(path.name) for path in (run.directory / "snapshots").iterdir())
    assert on_disk == run.snapshots
    with reading(run.directory / "run.sqlite") as database:
        assert sum(row.size for row in database.snapshots()) <= 60_000 or len(on_disk) == 2


def test_the_files_of_a_snapshot_are_readable_by_those_who_can_read_the_run(small):
    model, x, y = small
    run = train(model, (x, y), run="./run", steps=3)
    modes = {path.stat().st_mode for path in run.directory.glob("snapshots/*/*")}
    assert modes == {(run.directory / "run.sqlite").stat().st_mode}


def test_a_place_that_cannot_be_written_is_named(small, tmp_path):
    model, x, y = small
    (tmp_path / "file").write_text("")
    with pytest.raises(everystep.RecordingError, match="choose a writable place"):
        train(model, (x, y), run="file/run")
    with pytest.raises(everystep.RecordingError, match="cannot create the run's directory"):
        train(model, (x, y), run="/proc/run")


@pytest.mark.skipif(os.name != "posix", reason="directories are made read-only by their mode")
def test_a_run_that_can_only_be_read_is_read(small):
    model, x, y = small
    run = train(model, (x, y))
    for path in (run.directory / "run.sqlite", run.directory):
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert len(everystep.open(run.directory).losses) == 5
    run.directory.chmod(0o755)


def test_another_program_that_locks_the_database_for_good_ends_the_training(small, monkeypatch):
    model, x, y = small
    monkeypatch.setattr(database_module, "PATIENCE", 0.01)
    locked = []

    def locking(prediction, target):
        if not locked:
            locked.append(sqlite3.connect("run/run.sqlite", isolation_level=None))
            locked[0].execute("BEGIN IMMEDIATE")
        return nn.functional.mse_loss(prediction, target)

    with pytest.raises(everystep.RecordingError, match="database is locked"):
        train(model, (x, y), loss=locking, run="./run")
    locked[0].close()


def test_a_run_that_was_read_at_rest_shows_what_is_written_later(small, tmp_path, monkeypatch):
    monkeypatch.setattr(connection, "_TICK", 0)
    run, opened, losses = tmp_path / "run", None, []
    for steps in (3, 5):
        model, *data = map(deepcopy, small)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        with everystep.record(run=run, resume=True, model=model, optimizer=optimizer) as recording:
            for x, y in recording.steps([data] * steps):
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(model(x), y)
                loss.backward()
                optimizer.step()
                recording.log(loss=loss)
        opened = opened or everystep.open(run)
        for _ in range(2):  # the second is read from the database that the first has opened
            losses.append(len(opened.losses))
            assert len(opened) == steps and opened.verify(progress=False).is_exact
        assert not [*run.glob("run.sqlite-*")]
    assert losses == [3, 3, 5, 5]
