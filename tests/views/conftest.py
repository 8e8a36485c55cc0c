"""A short run of the chapter's network, and copies of it with other losses."""

import shutil

import pytest
from tests.sealing import seal, sql

import everystep
from everystep.recording.recorded_run import RecordedRun


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run that no test may change."""
    directory = tmp_path_factory.mktemp("trained") / "run"
    everystep.train_experiment("two-layer", {"steps": 50}, run=directory, progress=False)
    return directory


@pytest.fixture
def changed(trained, tmp_path):
    """Make a copy of the run with another name, changed by SQL, each statement with its rows."""

    def change(*statements, name="changed"):
        place = shutil.copytree(trained, tmp_path / name)
        sql(place, *((statement, [*rows]) for statement, rows in statements))
        seal(place)
        return RecordedRun(place)

    return change


@pytest.fixture
def run_of(changed):
    """Make a run with these losses and measurements (name, step, value)."""

    def make(losses, measurements=(), name="changed"):
        return changed(
            ("DELETE FROM steps WHERE step > ?", [(0,)]),
            ("INSERT INTO steps VALUES (?, ?)", enumerate(losses, 1)),
            ("UPDATE facts SET value = ? WHERE key = 'steps'", [(str(len(losses)),)]),
            ("INSERT INTO measurements VALUES (?, ?, ?)", measurements),
            name=name,
        )

    return make
