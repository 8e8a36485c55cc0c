"""Interrupts trainings in every way, and looks whether they resume to the bits of a whole run.

`python -m benchmarks.torture kill [--kills 1000] [--seed 0]`: SIGKILL at random instants.
`python -m benchmarks.torture operations [--each N]`: death at every operation on files, or each N-th.
`python -m benchmarks.torture power`: the last files torn, empty or missing, the write-ahead log cut.
`python -m benchmarks.torture signals`: SIGTERM and Ctrl-C, after which the run must be closed.
`python -m benchmarks.torture disk`: a disk that is too small, then larger (as root).
`python -m benchmarks.torture slow [--seconds 20]`: each sync of the disk takes up to three seconds.
`python -m benchmarks.torture readers [--readers 10] [--steps N]`: readers beside a training.
`python -m benchmarks.torture fuzz [--seconds 600] [--only loops,tables]`: random loops, resumed loops,
step functions, tables, experiments and altered runs.
Prints a table, each failure on stderr, and exits with 1 if there is one.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process with other threads cannot be forked

from benchmarks.torture.disk import full_disks
from benchmarks.torture.kill import kills
from benchmarks.torture.operations import STEPS, operations
from benchmarks.torture.power import losses_of_power
from benchmarks.torture.readers import readers
from benchmarks.torture.signals import signals
from benchmarks.torture.slow import slow_disks
from benchmarks.torture.trainings import named
from benchmarks.torture.trial import each, failed, references, table

#: Seconds, unless asked for others: for which things are drawn, and of each training on a slow disk.
SECONDS = {"fuzz": 600.0, "slow": 20.0}
#: What can be asked for, and what its table counts.
WHATS = {"kill": "kills", "operations": "kills", "power": "losses of power", "signals": "signals"}
WHATS |= {"disk": "full disks"} | dict.fromkeys(("slow", "readers", "fuzz"), "")


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.torture")
    parser.add_argument("what", choices=WHATS)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--each", type=int, default=1, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="names of trainings, or of what to fuzz, separated by commas")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--readers", type=int, default=10)
    parser.add_argument("--steps", type=int, default=100_000, help="of the training that is read")
    parser.add_argument("--seconds", type=float, help="begin no trial after these")
    asked = parser.parse_args()
    asked.seconds = asked.seconds or SECONDS.get(asked.what, float("inf"))
    if asked.what == "fuzz":
        sys.exit(_fuzz(asked))
    began = time.monotonic()
    if asked.what in ("readers", "slow"):
        if asked.what == "slow":
            found = slow_disks(asked.seconds)
        else:
            found = readers(asked.readers, asked.steps, asked.seed)
        print(*found, f"{len(found)} failures, {time.monotonic() - began:,.0f} seconds", sep="\n")
        sys.exit(1 if found else 0)
    steps = STEPS if asked.what in ("operations", "power") else None
    with references(named(asked.only), steps) as known:
        trials = {
            "kill": lambda: kills(known, asked.kills, asked.seed),
            "operations": lambda: operations(known),
            "power": lambda: losses_of_power(known, asked.seed),
            "signals": lambda: signals(known),
            "disk": lambda: full_disks(known),
        }[asked.what]()
        chosen = trials[asked.seed % asked.each :: asked.each]
        results = each(chosen, asked.processes, asked.seconds)
    print(table(results, WHATS[asked.what]))
    for reason in sorted({one.reason for one in results if one.reason}):
        print(f"said: {reason}", file=sys.stderr)
    failures = failed(results)
    print(f"{len(failures)} failures, {time.monotonic() - began:,.0f} seconds, seed {asked.seed}")
    sys.exit(1 if failures else 0)


def _fuzz(asked: argparse.Namespace) -> int:
    from benchmarks.torture.fuzz import fuzz, report  # imports what the others do without

    began = time.monotonic()
    results = fuzz(asked.seconds, asked.seed, asked.only)
    print(report(results))
    failures = sum(len(found.failures) for found in results)
    print(f"{failures} failures, {time.monotonic() - began:,.0f} seconds, seed {asked.seed}")
    return 1 if failures else 0


if __name__ == "__main__":
    main()
