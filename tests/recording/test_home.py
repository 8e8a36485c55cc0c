"""A run's directory that is moved, left behind or removed while the run is written."""

import os
import shutil
import sys
from pathlib import Path

import pytest
from tests.recording.test_disk import loop
from tests.snapshots import take_snapshots_every

import everystep
from everystep.errors import RecordingError, RunError
from everystep.recording import recorder
from everystep.recording.database import Database
from everystep.views.progress import Silent

STEPS = 600


@pytest.fixture(autouse=True)
def snapshots_on_the_way(monkeypatch):
    take_snapshots_every(monkeypatch, 64)


class Midway(Silent):
    """Does something once, in the middle of a training."""

    def __init__(self, does):
        self._does = does

    def advance(self, first_step, losses):
        if first_step > 100 and self._does is not None:
            does, self._does = self._does, None
            does()


def trained(does):
    return everystep.train_experiment("two-layer", {"steps": STEPS}, run="runs/a", progress=Midway(does))


def assert_whole(run):
    assert len(run) == STEPS and run.facts.status == "finished"
    assert run[STEPS // 2].is_exact
    assert run.snapshots[-1] == STEPS


def test_a_training_stays_in_its_directory_when_the_process_goes_elsewhere(tmp_path):
    def leave():
        Path("elsewhere").mkdir()
        os.chdir("elsewhere")

    run = trained(leave)
    assert run.directory == tmp_path / "runs" / "a"
    assert_whole(run)
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells where an open directory is")
def test_a_training_follows_its_directory():
    run = trained(lambda: Path("runs/a").rename("runs/b"))
    assert run.name == "b"
    assert_whole(run)
    assert [path.name for path in Path("runs").iterdir()] == ["b"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells where an open directory is")
def test_a_directory_is_followed_that_moves_as_a_state_is_written(monkeypatch):
    def moved(folder, state, *others, write=recorder.write_snapshot):
        if state.step and Path("runs/a").exists():
            Path("runs/a").rename("runs/b")
        return write(folder, state, *others)

    monkeypatch.setattr(recorder, "write_snapshot", moved)
    assert_whole(trained(lambda: None))
    assert [path.name for path in Path("runs").iterdir()] == ["b"]


def test_a_training_stops_when_its_directory_is_gone():
    def remove():
        while Path("runs/a").exists():
            shutil.rmtree("runs/a", ignore_errors=True)

    # The database may go a moment before its directory.
    with pytest.raises(RecordingError, match=r"runs/a(/run\.sqlite)? was removed"):
        trained(remove)
    assert not Path("runs/a").exists()


def test_a_training_stops_when_its_database_is_gone():
    database = Path("runs/a/run.sqlite")
    with pytest.raises(RecordingError, match=r"run\.sqlite was removed while it was being written"):
        loop(database.parent, {20: database.unlink})
    assert not database.exists()


@pytest.mark.parametrize("has_database", [True, False])
def test_states_without_the_steps_before_them_are_not_removed(has_database):
    # As in a copy of a run that is being written, without the log of its database.
    run = loop("runs/a")
    for path in run.directory.glob("run.sqlite*"):
        path.unlink()
    if has_database:
        Database.create(run.directory / "run.sqlite").close()
    kept = sorted(run.directory.rglob("*"))
    with pytest.raises(RunError, match=r"a state after step 40, but no run\.sqlite with the steps"):
        everystep.record(run=run.directory, resume=True)
    assert sorted(run.directory.rglob("*")) == kept


def test_a_loop_follows_its_directory_too(tmp_path):
    run = loop("runs/a", {20: lambda: os.chdir("runs")})
    assert (len(run), run.directory) == (40, tmp_path / "runs" / "a")
    assert run.verify(progress=False).is_exact
