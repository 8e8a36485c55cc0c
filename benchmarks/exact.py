"""Whether every step of long runs comes back, bit for bit, in a new process.

`python -m benchmarks.exact [--steps 10000] [--count 60]`. Trains so many of the configurations of the
tests (optimizers, schedules, batches, models, losses) for so many steps, with one thread and with two
in turn, runs `everystep verify` in a process of its own, and prints what was not the same.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from everystep import numerics

numerics.prepare()  # before torch computes

from tests.training.by_hand import by_train  # noqa: E402
from tests.training.engine_cases import CASES  # noqa: E402

__all__ = ["main", "verified"]

#: These must be among them, whatever the count.
WANTED = ("dropout", "batch", "convolution", "short", "float64", "bfloat16", "Adam", "SGD", "clip")


def main() -> None:
    """Print a line for each configuration that differs, and a sum."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000, help="of each run")
    parser.add_argument("--count", type=int, default=60, help="configurations")
    arguments = parser.parse_args()
    started = time.perf_counter()
    chosen = _chosen(arguments.count)
    different = snapshots = 0
    for number, case in enumerate(chosen):
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder) / "run"
            options = case.options | {"steps": arguments.steps, "threads": 1 + number % 2}
            by_train(case.make(), run=directory, **options)
            found = verified(directory)
        snapshots += found["snapshots"]
        if not found["is_exact"] or found["steps"] != arguments.steps:
            different += 1
            print(f"{case.name}: {found}")
    print(
        f"{len(chosen)} configurations of {arguments.steps:,} steps, every other one with two threads: "
        f"{different} with a mismatch; {snapshots:,} snapshots compared; "
        f"{time.perf_counter() - started:.0f} s"
    )


def verified(directory: Path) -> dict[str, Any]:
    """Return what `everystep verify --json` answers in a process that did not train the run."""
    command = [str(Path(sys.executable).parent / "everystep"), "verify", str(directory), "--json"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _chosen(count: int) -> list[Any]:
    """Return configurations with steps that run as programs, the wanted ones first."""
    # OneCycleLR is made for a number of steps.
    known = [case for case in CASES if case.eager is None and "OneCycle" not in case.name]
    first = [case for case in known if any(word in case.name for word in WANTED)]
    rest = [case for case in known if case not in first]
    return (first + rest)[:count]


if __name__ == "__main__":
    main()
