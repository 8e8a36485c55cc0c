"""How fast one can go back in a run: jumps, next and previous steps, verify, measure, diff.

`python -m benchmarks.replay [--steps 100000] [--directory DIR]`. Trains the chapter's network so long,
twice, the second time with one number of the data changed by one unit in the last place, and a small
one ten times as long (kept in DIR, and used again if they are there); then prints a table.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from everystep import numerics

numerics.prepare()  # before torch computes

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

import everystep  # noqa: E402

__all__ = ["main"]

JUMPS = 200
CHAPTER = (1000, 100, 10)


def main() -> None:
    """Print the table."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        place = arguments.directory or Path(folder)
        run = _trained(place / "one", CHAPTER, arguments.steps)
        other = _trained(place / "other", CHAPTER, arguments.steps, changed=True)
        rows = run.snapshot_rows()
        print(f"{len(run):,} steps in {run.facts.seconds:.1f} s; {len(rows)} snapshots,", end=" ")
        print(f"{sum(row.size for row in rows) / 1e6:.0f} MB, {rows[1].step - rows[0].step} steps apart")
        _print_jumps(run)
        _print_seconds("everystep step, from the shell", _shell_seconds(run))
        _print_seconds("diff of the two, in an open process", _seconds(lambda: run.diff(other)))
        _print_ratios("the chapter's network", run)
        _print_ratios("20-32-1", _trained(place / "small", (20, 32, 1), 10 * arguments.steps))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000, help="of each run")
    parser.add_argument("--directory", type=Path, help="keep the runs here, and use them again")
    return parser.parse_args()


def _trained(
    directory: Path, sizes: tuple[int, int, int], steps: int, *, changed: bool = False
) -> everystep.Run:
    """Train a network of these sizes, unless its run is there. changed: by a unit in a number of x."""
    if not directory.exists():
        torch.manual_seed(0)
        x, y = torch.randn(64, sizes[0]), torch.randn(64, sizes[2])
        model = nn.Sequential(nn.Linear(*sizes[:2]), nn.ReLU(), nn.Linear(*sizes[1:]))
        if changed:
            x[17, 3] = torch.nextafter(x[17, 3], torch.tensor(torch.inf))
        optimizer = everystep.GradientDescent(model.parameters(), lr=1e-5)
        loss = nn.MSELoss(reduction="sum")
        everystep.train(model, (x, y), loss=loss, optimizer=optimizer, steps=steps, run=directory)
    return everystep.open(directory)


def _print_ratios(network: str, run: everystep.Run) -> None:
    training = run.facts.seconds or 0.0
    for what, task in (
        ("verify", lambda: run.verify(progress=False)),
        ("measure norm(gradients)", lambda: _measure(run)),
    ):
        seconds = _seconds(task)
        print(
            f"{what + ', ' + network:<44}{seconds:>10.1f} s, training {training:.1f} s: "
            f"{training / seconds:.2f} times its speed"
        )


def _print_jumps(run: everystep.Run) -> None:
    numbers = np.random.default_rng(0).integers(1, len(run) + 1, JUMPS).tolist()
    run[numbers[0]]  # torch computes for the first time
    cold = []
    for number in numbers:
        fresh = everystep.open(run.directory)
        fresh[1]  # programs and data are read once in a process
        cold.append(_seconds(lambda fresh=fresh, number=number: fresh[number]))  # type: ignore[misc]
    opened = everystep.open(run.directory)
    middle = len(run) // 2
    opened[middle]
    following = [_seconds(lambda n=n: opened[n]) for n in range(middle + 1, middle + 101)]  # type: ignore[misc]
    opened = everystep.open(run.directory)
    opened[middle]
    before = [_seconds(lambda n=n: opened[n]) for n in range(middle - 1, middle - 101, -1)]  # type: ignore[misc]
    for what, times in (
        ("cold jump", cold),
        ("next step", following),
        ("previous step, not opened before", before),
    ):
        median, high = (1e3 * float(np.quantile(times, q)) for q in (0.5, 0.95))
        print(
            f"{what:<44}{median:>10.1f} ms, 95% within {high:.1f} ms, all within {1e3 * max(times):.1f}"
        )


def _shell_seconds(run: everystep.Run) -> float:
    command = [str(Path(sys.executable).parent / "everystep"), "step", str(run.directory), "137"]
    times = [
        _seconds(lambda: subprocess.run(command, check=True, capture_output=True)) for _ in range(5)
    ]
    return float(np.median(times))


def _measure(run: everystep.Run) -> None:
    run.measure("norm(gradients['0.weight'])", overwrite=True, name="norm", progress=False)


def _seconds(task: Callable[[], object]) -> float:
    started = time.perf_counter()
    task()
    return time.perf_counter() - started


def _print_seconds(what: str, seconds: float) -> None:
    print(f"{what:<44}{1e3 * seconds:>10.0f} ms")


if __name__ == "__main__":
    main()
