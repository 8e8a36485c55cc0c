"""The list of runs, read while they are written."""

import shutil

from tests.page.serving import written

from everystep.recording.database import Database
from everystep.recording.recorded_run import RecordedRun


def test_the_list_leaves_nothing_beside_a_run_that_nobody_writes(tmp_path):
    run = written(tmp_path / "run", [2.0, 1.0])
    before = sorted(path.name for path in run.iterdir())
    assert RecordedRun(run).summary().last_loss == 1.0
    assert sorted(path.name for path in run.iterdir()) == before


def test_steps_that_are_only_in_the_log_are_listed(tmp_path):
    run = written(tmp_path / "run", [2.0, 1.0])
    database = Database.change(run / "run.sqlite")
    with database.transaction():
        database.write_losses(3, [0.5])
    shutil.copytree(run, tmp_path / "copy")  # as a killed process leaves it
    database.close()
    assert RecordedRun(tmp_path / "copy").summary().last_loss == 0.5
