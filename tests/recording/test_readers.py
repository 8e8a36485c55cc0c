"""Readers next to a writer; `make torture` does this at length."""

import subprocess
import sys
import warnings
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.torture.readers import digest_of, torn

import everystep
from everystep.errors import DamageWarning
from everystep.recording.database import FILE_NAME, Database
from everystep.recording.run import RecordedRun

ROOT = Path(__file__).parents[2]


def test_readers_beside_a_writer_see_no_torn_run():
    command = [
        sys.executable,
        "-m",
        "benchmarks.torture",
        "readers",
        "--steps",
        "2000",
        "--readers",
        "4",
    ]
    done = subprocess.run([*command, "--steps", "1000"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failures" in done.stdout


def test_a_torn_reading_is_found():
    whole = np.arange(5.0)
    broken = np.array([0.0, 1.0, 3.0])
    assert torn("losses", [(len(part), digest_of(part)) for part in (whole[:2], whole)], whole) == []
    assert torn("losses", [(3, digest_of(broken))], whole) == [
        "losses: a reading of 3 is not the beginning of the 5 recorded"
    ]


def test_a_run_that_ends_while_it_is_read_is_neither_damaged_nor_killed(tmp_path, small, monkeypatch):
    model, x, y = small
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    training = {"loss": torch.nn.MSELoss(), "optimizer": optimizer, "progress": False}
    place = tmp_path / "run"
    everystep.train(model, (x, y), steps=9, directory=place, **training)
    finished = RecordedRun(place).facts
    # What a reader sees that began before the last steps were committed; state 9 is on disk by now.
    with closing(Database.change(place / FILE_NAME)) as database, database.transaction():
        database.forget_after(5)
        database.write_facts({"status": "running"})
        database.seal_blocks()
    with pytest.warns(DamageWarning, match="steps 6 to 9 are missing"):
        run = RecordedRun(place)
    running = run.facts
    assert len(run.losses) == 5
    is_held = [True]
    for name in ("is_locked", "has_log"):
        monkeypatch.setattr(f"everystep.recording.run.{name}", lambda path: is_held[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(RecordedRun(place).losses) == 5
    is_held[:] = [False]
    assert run.status_by(running) == "killed"
    monkeypatch.setattr(RecordedRun, "facts", finished)
    assert run.status_by(running) == "finished"
