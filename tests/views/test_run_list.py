"""The list of runs, read while they are written."""

import os
import shutil

from tests.page.serving import written

from everystep.recording.connection import stillness
from everystep.recording.database import Database
from everystep.recording.recorded_run import RecordedRun


def test_the_list_leaves_nothing_beside_a_run_that_nobody_writes(tmp_path):
    run = written(tmp_path / "run", [2.0, 1.0])
    aged(run)
    before = sorted(path.name for path in run.iterdir())
    assert RecordedRun(run, may_be_cut=True).summary().last_loss == 1.0
    assert sorted(path.name for path in run.iterdir()) == before


def aged(run):
    """Let a run be last written a while ago."""
    path = run / "run.sqlite"
    os.utime(path, ns=(10**18, 10**18))
    assert stillness(path) is not None


def test_steps_that_are_only_in_the_log_are_listed(tmp_path):
    run = written(tmp_path / "run", [2.0, 1.0])
    database = Database.change(run / "run.sqlite")
    with database.transaction():
        database.write_losses(3, [0.5])
    shutil.copytree(run, tmp_path / "copy")  # as a killed process leaves it
    database.close()
    os.utime(tmp_path / "copy" / "run.sqlite", ns=(10**18, 10**18))
    assert RecordedRun(tmp_path / "copy", may_be_cut=True).summary().last_loss == 0.5


def test_a_run_that_is_written_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    run = written(tmp_path / "run", [2.0, 1.0])
    aged(run)
    ends, read = Database.ends, []

    def written_meanwhile(database):
        found = ends(database)
        read.append(found)
        if len(read) == 1:
            writer = Database.change(run / "run.sqlite")
            with writer.transaction():
                writer.write_losses(3, [0.5])
            writer.close()
        return found

    monkeypatch.setattr(Database, "ends", written_meanwhile)
    assert RecordedRun(run, may_be_cut=True).summary().last_loss == 0.5
    assert [last for _, _, last in read] == [1.0, 0.5]
