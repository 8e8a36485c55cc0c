"""Long trainings: do memory, disk and speed stay as they were, and does so long a run open quickly?

`python -m benchmarks.soak [--steps 1000000] [--kinds train,loop] [--directory DIR]`. Trains a
small network in a process of its own and measures that process from outside, twice a second: its
memory, what the run takes on disk, and its steps per second. Then it times commands on that run, and on
one of 1,000 steps. Runs stay in DIR and are used again if they are there.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from everystep.recording.recorded_run import RecordedRun

__all__ = ["main"]

#: Ten batches that come again, and rows that all fit in memory: what is measured is everystep.
BEFORE = """
import sys
import everystep, torch
from torch import nn
directory, steps, budget = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
x, y = torch.randn(80, 4), torch.randn(80, 1)
batches = [(x[row : row + 8], y[row : row + 8]) for row in range(0, 80, 8)]
loss_of, optimizer = nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=1e-4)
def endless():
    for step in range(steps):
        yield batches[step % 10]
"""
KINDS = {
    "train": """
everystep.train(model, (x, y), loss=loss_of, optimizer=optimizer, steps=steps, batch_size=8,
                run=directory, snapshot_budget=budget, progress=False)
""",
    "loop": """
parts = {"model": model, "optimizer": optimizer}
with everystep.record(run=directory, snapshot_budget=budget, **parts) as recording:
    for x, y in recording.steps(endless()):
        optimizer.zero_grad()
        loss = loss_of(model(x), y)
        loss.backward()
        optimizer.step()
        recording.log(loss=loss)
""",
}
#: Megabytes that snapshots may take.
BUDGET = 4
#: Part of the steps that is not counted: caches fill, and the first snapshots are close together.
WARM_UP = 0.1
SHORT = 1000
ROUNDS = 3
#: What is asked of a run; N is its last step.
COMMANDS = {
    "runs": ("runs", "DIRECTORY"),
    "losses --last 5": ("losses", "RUN", "--last", "5"),
    "step RUN N/2": ("step", "RUN", "HALF"),
    "step RUN N": ("step", "RUN", "LAST"),
}
EVERYSTEP = [sys.executable, "-c", "from everystep.cli import main; main()"]


class Sample(NamedTuple):
    """A training at a moment: seconds since its start, recorded steps, bytes in memory and on disk."""

    seconds: float
    steps: int
    memory: int
    disk: int


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--directory", type=Path, help="keep the runs here, and use them again")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = asked.directory or Path(folder)
        print(
            f"{'kind':<10}{'steps':>12}{'steps/s':>10}{'last/first':>12}{'memory MB':>11}{'growth':>9}"
            f"{'disk MB':>9}{'bytes/step':>12}{'verified':>10}"
        )
        for kind in asked.kinds.split(","):
            for steps in (SHORT, asked.steps):
                _train(kind, place / f"{kind}-{steps}" / "run", steps)
        for kind in asked.kinds.split(","):
            _print_commands(place, kind, asked.steps)


def _train(kind: str, run: Path, steps: int) -> None:
    """Train, unless the run is there; print what was measured meanwhile."""
    if run.exists():
        return
    run.parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-c", BEFORE + KINDS[kind], str(run), str(steps), str(BUDGET * 1_000_000)]
    )
    began, samples = time.monotonic(), list[Sample]()
    while process.poll() is None:
        time.sleep(0.5)
        if (run / "run.sqlite").exists() and (memory := _memory(process.pid)):
            newest = RecordedRun(run).summary().steps
            samples.append(Sample(time.monotonic() - began, newest, memory, _disk(run)))
    if process.returncode:
        raise SystemExit(f"{kind}: the training ended with {process.returncode}")
    if steps > SHORT:
        _print_row(kind, steps, samples, run)


def _print_row(kind: str, steps: int, samples: list[Sample], run: Path) -> None:
    warm = [each for each in samples if WARM_UP * steps <= each.steps < steps]
    third = len(warm) // 3
    if third < 2:
        raise SystemExit(f"{kind}: {steps:,} steps end too soon to be measured; set more --steps")
    speeds = [_speed(warm[:third]), _speed(warm[-third:])]
    memory = [statistics.median(each.memory for each in part) for part in (warm[:third], warm[-third:])]
    verified = subprocess.run([*EVERYSTEP, "verify", str(run)], capture_output=True, check=False)
    print(
        f"{kind:<10}{steps:>12,}{_speed(warm):>10,.0f}{speeds[1] / speeds[0]:>12.2f}"
        f"{memory[1] / 1e6:>11,.0f}{memory[1] / memory[0] - 1:>9.1%}"
        f"{max(each.disk for each in samples) / 1e6:>9.1f}{_disk(run) / steps:>12.1f}"
        f"{'yes' if verified.returncode == 0 else 'NO':>10}",
        flush=True,
    )


def _speed(samples: list[Sample]) -> float:
    return (samples[-1].steps - samples[0].steps) / (samples[-1].seconds - samples[0].seconds)


def _memory(process: int) -> int:
    """Return the bytes of memory that a process holds; 0 if it has ended."""
    try:
        pages = Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()
    except OSError:
        return 0
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") if len(pages) > 1 else 0


def _disk(run: Path) -> int:
    found = 0
    for directory, _, names in os.walk(run):
        for name in names:
            with suppress(OSError):  # of a snapshot that was just thinned out
                found += (Path(directory) / name).stat().st_size
    return found


def _print_commands(place: Path, kind: str, steps: int) -> None:
    print(f"\n{kind}: seconds of a command, {SHORT:,} and {steps:,} steps, medians of {ROUNDS}")
    for name, command in COMMANDS.items():
        seconds = [
            statistics.median(
                _seconds(command, place / f"{kind}-{each}" / "run", each) for _ in range(ROUNDS)
            )
            for each in (SHORT, steps)
        ]
        print(f"{name:<20}{seconds[0]:>8.2f}{seconds[1]:>8.2f}", flush=True)


def _seconds(command: tuple[str, ...], run: Path, steps: int) -> float:
    meant = {"DIRECTORY": run.parent, "RUN": run, "HALF": steps // 2, "LAST": steps}
    began = time.monotonic()
    subprocess.run(
        [*EVERYSTEP, *(str(meant.get(word, word)) for word in command)],
        check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return time.monotonic() - began


if __name__ == "__main__":
    main()
