"""Interrupts trainings in every way, and looks whether they resume to the bits of a whole run.

`python -m benchmarks.torture kill [--kills 1000] [--seed 0]`: SIGKILL at random instants.
Prints a table, then each failure, and exits with 1 if there is one.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process with other threads cannot be forked

from benchmarks.torture.kill import kills  # noqa: E402
from benchmarks.torture.trainings import named  # noqa: E402
from benchmarks.torture.trial import each, failed, references, table  # noqa: E402


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.torture")
    parser.add_argument("what", choices=["kill"])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="names of trainings, separated by commas")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no trial after these")
    asked = parser.parse_args()
    began = time.monotonic()
    with references(named(asked.only)) as known:
        trials = kills(known, asked.kills, asked.seed)
        results = each(trials, asked.processes, asked.seconds)
    print(table(results, "kills"))
    failures = failed(results)
    for failure in failures:
        print(failure)
    print(f"{len(failures)} failures, {time.monotonic() - began:,.0f} seconds, seed {asked.seed}")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
