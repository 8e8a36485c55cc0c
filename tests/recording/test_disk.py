"""A disk that is slow, full or read-only, a database that is locked, files that cannot be locked."""

import errno
import fcntl
import os
import platform
import resource
import shutil
import sqlite3
import threading
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from tests.descent import descend
from tests.page.serving import written
from tests.snapshots import take_snapshots_every

import everystep
from everystep.errors import RecordingError, RunError
from everystep.recording import connection, lock, recorder
from everystep.recording.database import Database
from everystep.recording.recorded_run import RecordedRun
from everystep.training import writer


def loop(directory, events=(), is_done=lambda: True):
    """Record a loop of 40 steps, or more, in which something happens after some; returns the run."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with everystep.record(run=Path(directory), model=model, optimizer=optimizer) as recording:
        while recording.step_count < 40 or not is_done():
            with recording.step(torch.randn(8, 4)):
                recording.log(loss=descend(optimizer, model(torch.randn(8, 4)).pow(2).mean()))
            dict(events).get(recording.step_count, lambda: None)()
    return recording.run


@pytest.mark.parametrize("mode", ["IMMEDIATE", "EXCLUSIVE"])
def test_steps_wait_while_another_program_holds_the_database(mode, monkeypatch):
    """The loop itself holds the database until that is reported: a step that waited would never end."""
    monkeypatch.setattr(writer, "FLUSH_SECONDS", 0.0)
    said = []
    with ExitStack() as held:

        def hold():
            other = sqlite3.connect("run/run.sqlite", timeout=60, isolation_level=None)
            held.callback(other.close)
            other.execute(f"BEGIN {mode}")
            monkeypatch.setattr(recorder, "LATE_SECONDS", 0.0)

        def say(text):
            if "another program that has locked run.sqlite" in text:
                said.append(text)
                held.close()

        monkeypatch.setattr(recorder, "say", say)
        run = loop("run", {10: hold}, is_done=lambda: said)
    assert len(run) >= 40 and run.status == "finished"
    assert len(said) == 1
    assert run.verify(progress=False).is_exact


def test_a_slow_disk_does_not_stop_the_training(monkeypatch):
    """The disk is so slow that it waits for the loop."""
    monkeypatch.setattr(recorder, "LATE_SECONDS", 0.0)
    take_snapshots_every(monkeypatch, 8)
    sync, is_fast = os.fsync, threading.Event()
    is_fast.set()
    monkeypatch.setattr(os, "fsync", lambda file: (is_fast.wait(), sync(file)))
    said = []

    def say(text):
        said.append(text)
        if "the last steps are still being written to run: the disk is slow" in text:
            is_fast.set()

    monkeypatch.setattr(recorder, "say", say)
    run = loop("run", {10: is_fast.clear})
    assert len(run) == 40 and run.status == "finished"
    assert is_fast.is_set() and len(said) == 2


@pytest.fixture
def without_locks(monkeypatch):
    def fails(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fails)
    lock._say_without_locks.cache_clear()


def test_a_training_works_where_files_cannot_be_locked(without_locks, capfd):
    statuses = []
    run = loop("run", {10: lambda: statuses.append(RecordedRun("run").status)})
    assert (len(run), run.status, statuses) == (40, "finished", ["running"])
    run.measure("loss", name="again", progress=False)
    assert capfd.readouterr().err.count("cannot be locked") == 1


def running(directory, **writer):
    writer = {"process": os.getpid(), "host": platform.node(), "since": datetime.now(UTC)} | writer
    run = written(directory, [1.0], status="running", writer=writer)
    (run / "run.lock").touch()
    return run


def test_without_locks_the_named_writer_decides(without_locks, tmp_path):
    parent = running(tmp_path / "alive", process=os.getppid())
    assert RecordedRun(parent).status == "running"
    named = f"process {os.getppid()} on {platform.node()}"
    with pytest.raises(RunError, match=named), lock.locked(parent):
        pass
    assert RecordedRun(running(tmp_path / "dead", process=2**31 - 1)).status == "killed"
    with lock.locked(tmp_path / "dead"):
        pass
    elsewhere = running(tmp_path / "elsewhere", host="another")
    assert RecordedRun(elsewhere).status == "running"
    for path in elsewhere.iterdir():
        os.utime(path, (0, 0))
    assert RecordedRun(elsewhere).status == "killed"


def test_a_killed_run_that_can_only_be_read_has_the_steps_of_its_log(tmp_path, monkeypatch):
    run = written(tmp_path / "run", [2.0, 1.0], status="running")
    database = Database.change(run / "run.sqlite")
    with database.transaction():
        database.write_losses(3, [0.5])
    shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("*-shm"))
    database.close()
    connect = sqlite3.connect

    def only_reading(path, *arguments, **named):
        if str(path).endswith("?mode=ro"):
            raise sqlite3.OperationalError("unable to open database file")
        return connect(path, *arguments, **named)

    monkeypatch.setattr(connection.sqlite3, "connect", only_reading)
    killed = RecordedRun(tmp_path / "copy")
    assert killed.losses["loss"].to_list() == [2.0, 1.0, 0.5]
    assert killed.summary().last_loss == 0.5
    assert not (tmp_path / "copy" / "run.sqlite-shm").exists()


def test_the_list_leaves_nothing_beside_a_run_that_nobody_writes(tmp_path):
    run = written(tmp_path / "run", [2.0, 1.0])
    before = sorted(path.name for path in run.iterdir())
    assert RecordedRun(run).summary().last_loss == 1.0
    assert sorted(path.name for path in run.iterdir()) == before


def test_a_run_on_a_full_disk_says_that_it_failed_and_resumes(monkeypatch):
    settings = {
        "steps": 400,
        "data.N": 16,
        "data.D_in": 4,
        "data.D_out": 2,
        "model.layers": ["Linear(4, 2)"],
    }
    whole = everystep.train_experiment("two-layer", settings, run="./whole", progress=False)
    write, written = recorder.write_snapshot, []

    def full(folder, state, first):
        written.append(state.step)
        if len(written) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(folder, state, first)

    with monkeypatch.context() as patch:
        patch.setattr(recorder, "write_snapshot", full)
        with pytest.raises(RecordingError, match=r"No space left on device; .* and resume it"):
            everystep.train_experiment("two-layer", settings, run="./run", progress=False)
    run = everystep.open("run")
    assert (run.status, run.facts.reason) == (
        "failed",
        "writing the run failed: No space left on device",
    )
    assert len(run) > 0 and not run.problems and run.verify(progress=False).is_exact
    resumed = run.resume(progress=False)
    assert resumed.losses.equals(whole.losses) and resumed.status == "finished"


def test_a_run_on_a_full_disk_is_failed_though_nothing_fits_any_more(monkeypatch, everystep_command):
    transaction = Database.transaction
    spare = Path("run/run.spare")
    assert not spare.exists()

    @contextmanager
    def full(database):
        with transaction(database):
            yield
            if spare.exists() and database.newest_step() >= 20:
                raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Database, "transaction", full)
        code, _, err = everystep_command("train", "--steps", 400, "--run", "./run", "-q")
    assert code == 1 and "database or disk is full" in err and not spare.exists()
    _, out, err = everystep_command("runs", ".")
    assert " failed " in out and "damaged" not in out + err
    assert everystep_command("resume", "run", "-q")[0] == 0
    assert everystep_command("verify", "run")[0] == 0


def test_a_resume_on_a_full_disk_does_not_deny_what_the_run_has(monkeypatch):
    run = everystep.train_experiment("two-layer", {"steps": 3}, run="./run", progress=False)

    def full(size):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(recorder.os, "urandom", full)
        with pytest.raises(
            RecordingError, match=r"what it had is saved\. Free some space, .* resume it"
        ):
            run.resume(5, progress=False)
    assert len(run.resume(5, progress=False)) == 5


def test_a_measurement_on_a_full_disk_leaves_the_run_whole(everystep_command):
    settings = {"steps": 3000, "data.N": 4, "data.D_in": 2, "data.D_out": 1}
    settings |= {"model.layers": ["Linear(2, 1)"]}
    everystep.train_experiment("two-layer", settings, run="./whole", progress=False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (33_000, 41_232, 60_000):  # bytes that the log may have, of some 100,000
        run = shutil.copytree("whole", Path(f"run-{size}"))
        with closing(sqlite3.connect(run / "run.sqlite")) as reader:  # so that the log stays
            reader.execute("SELECT count(*) FROM facts").fetchone()
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            try:
                code, _, err = everystep_command("measure", run, "loss + 1", "--name", "more")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert code == 1 and "run.sqlite cannot be written" in err
            code, out, err = everystep_command("losses", run, "--last", 1)
            assert (code, err) == (0, "") and "3000" in out
            assert everystep_command("doctor", run)[0] == 0
    assert everystep_command("measure", run, "loss + 1", "--name", "more")[0] == 0
    opened = everystep.open(run)
    assert len(opened.measured("more")) == 3000 and opened.damage is None


def test_names_with_spaces_and_signs_of_200_characters(everystep_command):
    name = "a name with spaces ü 学习 # % ? & ' \" " + "x" * 150
    place = Path("many runs ü") / name
    code, _, err = everystep_command("train", "--steps", 20, "--run", place, "-q")
    assert code == 0, err
    for command in (
        ["runs", place.parent], ["runs", place.parent, "--json"], ["losses", place],
        ["step", place, 7], ["verify", place], ["doctor", place], ["diff", place, place],
        ["when", place, "loss < 1e9"], ["measure", place, "norm(gradients['0.weight'])"],
        ["table", place, "-o", "a b.html"], ["plot", place, "-o", "a b.png"],
        ["report", place, "-o", "r ü.html"],
        ["fork", place, "--at", 7, "--run", place.parent / "fork ?", "-q"],
        ["resume", place, "--steps", 30, "-q"],
    ):  # fmt: skip
        code, _, err = everystep_command(*command)
        assert code == 0, (command, err)
