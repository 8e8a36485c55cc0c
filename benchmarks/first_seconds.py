"""What a user waits for at the terminal: whole processes, from the shell to the prompt, alternating.

`python -m benchmarks.first_seconds [--rounds N] [--processor]`. A command is compared with a script that
does as much of the same as it can: the loop by hand, or `import torch`. Commands that need no torch
have no reference. Medians over the rounds, after one that is not counted. `--processor` counts processor
time with one thread, which holds on a busy machine, too.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

__all__ = ["main"]

IMPORT = "import torch"

CHAPTER = """
import torch
torch.manual_seed(0)
x, y = torch.randn(64, 1000), torch.randn(64, 10)
model = torch.nn.Sequential(torch.nn.Linear(1000, 100), torch.nn.ReLU(), torch.nn.Linear(100, 10))
loss_of = torch.nn.MSELoss(reduction="sum")
for t in range(500):
    loss = loss_of(model(x), y)
    print(t + 1, loss.item())
    model.zero_grad()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= parameter.grad * 1e-4
"""

DIGITS = """
import sklearn.datasets
import torch
digits = sklearn.datasets.load_digits()
x = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
y = torch.tensor(digits.target)
torch.manual_seed(0)
order = torch.randperm(len(x))
training, validation = order[359:], order[:359]
model = torch.nn.Sequential(
    torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.ReLU(),
    torch.nn.Conv2d(16, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
    torch.nn.Flatten(), torch.nn.Dropout(0.25), torch.nn.Linear(512, 10),
)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
loss_of = torch.nn.CrossEntropyLoss()
for rows in training[torch.randperm(len(training))].split(64):
    loss = loss_of(model(x[rows]), y[rows])
    print(loss.item())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
model.eval()
with torch.no_grad():
    print((model(x[validation]).argmax(1) == y[validation]).float().mean().item())
"""


class Row(NamedTuple):
    """A command of `everystep`, and the script that it is compared with, if there is one."""

    command: str
    script: str | None = None
    name: str = ""


ROWS = [
    Row("train --run runs/new", CHAPTER, "the loop by hand"),
    Row("train digits --epochs 1 --run runs/new", DIGITS, "the loop by hand"),
    Row("step chapter 137", IMPORT, "`import torch`"),
    Row("verify chapter", IMPORT, "`import torch`"),
    Row("when chapter 'loss < 1'", IMPORT, "`import torch`"),
    Row("diff chapter other", IMPORT, "`import torch`"),
    Row("--help"),
    Row("runs"),
    Row("losses chapter"),
    Row("table chapter -o table.html"),
    Row("plot chapter -o plot.png"),
    Row("report chapter -o report.html"),
]


def main() -> None:
    """Print a row for each command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_seconds", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--processor", action="store_true", help="count processor time, of one thread")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1" if arguments.processor else "2"
    # As after an installation by pip, which compiles all modules.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    seconds_of = _processor_seconds if arguments.processor else _seconds
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        _seconds(_everystep("train --run runs/chapter"), place)
        _seconds(_everystep("train --set seed=1 --run runs/other"), place)
        print("| everystep | seconds | compared with | seconds | ratio |")
        print("| --- | --: | --- | --: | --: |")
        for row in ROWS:
            _print_row(row, arguments.rounds, place, seconds_of)


def _print_row(row: Row, rounds: int, place: Path, seconds_of: Callable[[str, Path], float]) -> None:
    command = _everystep(row.command)
    script = None if row.script is None else f"{_quoted(sys.executable)} script.py"
    (place / "script.py").write_text(row.script or "")
    own: list[float] = []
    other: list[float] = []
    for round_ in range(rounds + 1):
        for is_own in (True, False) if round_ % 2 else (False, True):
            if is_own:
                shutil.rmtree(place / "runs" / "new", ignore_errors=True)
                own.append(seconds_of(command, place))
            elif script is not None:
                other.append(seconds_of(script, place))
    seconds = statistics.median(own[1:])
    if not other:
        print(f"| `{row.command}` | {seconds:.2f} | | | |")
        return
    ratio = statistics.median(one / two for one, two in zip(own[1:], other[1:], strict=True))
    compared = statistics.median(other[1:])
    print(f"| `{row.command}` | {seconds:.2f} | {row.name} | {compared:.2f} | {ratio:.2f} |")


def _everystep(command: str) -> str:
    return f"{_quoted(str(Path(sys.executable).with_name('everystep')))} {command}"


def _quoted(path: str) -> str:
    return f'"{path}"'


def _seconds(command: str, place: Path) -> float:
    """Run a command in a shell; return the seconds that it took."""
    started = time.perf_counter()
    done = subprocess.run(command, shell=True, cwd=place, check=False, capture_output=True)
    assert done.returncode in (0, 1), done.stderr.decode()
    return time.perf_counter() - started


def _processor_seconds(command: str, place: Path) -> float:
    """Run a command in a shell; return the seconds that processors worked for it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    _seconds(command, place)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
