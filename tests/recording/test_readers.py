"""Readers next to a writer; `make torture` does this at length."""

import subprocess
import sys
import warnings
from contextlib import closing
from pathlib import Path

import pytest
import torch

import everystep
from everystep.errors import DamageWarning
from everystep.recording.database import FILE_NAME, Database
from everystep.recording.recorded_run import RecordedRun

ROOT = Path(__file__).parents[2]


@pytest.mark.sweep
def test_readers_beside_a_writer_see_no_torn_run():
    code = "from benchmarks.torture.readers import readers; print(readers(2, 300))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stdout + done.stderr


def test_a_run_that_ends_while_it_is_read_is_neither_damaged_nor_killed(tmp_path, small, monkeypatch):
    model, x, y = small
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    training = {"loss": torch.nn.MSELoss(), "optimizer": optimizer, "progress": False}
    place = tmp_path / "run"
    everystep.train(model, (x, y), steps=9, run=place, **training)
    finished = RecordedRun(place).facts
    # What a reader sees that began before the last steps were committed; state 9 is on disk by now.
    with closing(Database.change(place / FILE_NAME)) as database, database.transaction():
        database.forget_after(5)
        database.write_facts({"status": "running"})
    with pytest.warns(DamageWarning, match="steps 6 to 9 are missing"):
        run = everystep.open(place)
    running = run.facts
    assert len(run.losses) == 5
    is_held = [True]
    for module in ("recorded_run", "health"):
        monkeypatch.setattr(f"everystep.recording.{module}.is_locked", lambda path: is_held[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(RecordedRun(place).losses) == 5
    is_held[:] = [False]
    assert run.status_by(running) == "killed"
    monkeypatch.setattr(RecordedRun, "facts", finished)
    assert run.status_by(running) == "finished"
