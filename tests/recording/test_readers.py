"""Readers beside a writer; `make torture` does this at length."""

import subprocess
import sys
from pathlib import Path

import numpy as np
from benchmarks.torture.readers import digest_of, torn

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
