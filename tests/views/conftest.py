"""A short run of the chapter's network, and copies of it with other losses."""

import shutil
import sqlite3

import pytest
from tests.sealing import seal

import everystep
from everystep.recording.recorded_run import RecordedRun


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run that no test may change."""
    directory = tmp_path_factory.mktemp("trained") / "run"
    everystep.train_experiment("two-layer", {"steps": 50}, run=directory, progress=False)
    return directory


@pytest.fixture
def run_of(trained, tmp_path):
    """Make a run with these losses and measurements (name, step, value)."""

    def make(losses, measurements=(), name="changed"):
        shutil.copytree(trained, tmp_path / name)
        database = sqlite3.connect(tmp_path / name / "run.sqlite")
        database.execute("DELETE FROM steps")
        database.executemany("INSERT INTO steps VALUES (?, ?)", enumerate(losses, 1))
        database.execute("UPDATE facts SET value = ? WHERE key = 'steps'", [str(len(losses))])
        database.executemany("INSERT INTO measurements VALUES (?, ?, ?)", measurements)
        database.commit()
        database.close()
        seal(tmp_path / name)
        return RecordedRun(tmp_path / name)

    return make
