"""How long a directory of many runs takes: the list in the terminal, and the page's.

`python -m benchmarks.many_runs [--runs 3000] [--rounds 3]`. Trains one small run, copies it as often as
asked for, and prints seconds until the first rows are there, and until all are: of `everystep runs`,
plain and as JSON, and of the page in Chromium, which draws rows as they are scrolled to. Every page is
that of a new server.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.page import MAIN, browser_started, page_opened, served

__all__ = ["copies", "main"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = copies(Path(folder), asked.runs)
        print(f"{asked.runs:,} runs{'first rows':>30}{'all':>10}")
        for what, arguments in (("everystep runs", []), ("everystep runs --json", ["--json"])):
            _print(what, [_listed(runs, arguments) for _ in range(asked.rounds)])
        _print("page", [_shown(runs, asked.runs) for _ in range(asked.rounds)])


def copies(folder: Path, count: int) -> Path:
    """Return a directory with so many copies of one finished run."""
    import everystep

    run = folder / "one"
    everystep.train_experiment("two-layer", {"steps": 50}, run=run, progress=False)
    for name in ("data.safetensors", "run.sqlite-wal", "run.sqlite-shm"):  # no list reads them
        (run / name).unlink(missing_ok=True)
    for path in run.glob("snapshots/*/*"):
        path.unlink()
    runs = folder / "runs"
    for number in range(1, count + 1):
        shutil.copytree(run, runs / f"run-{number}")
    return runs


def _listed(runs: Path, arguments: list[str]) -> tuple[float, float]:
    """Return seconds until the first run is listed, and until the command has ended."""
    command = [sys.executable, "-c", MAIN, "runs", str(runs), *arguments]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.readline()
        first = time.perf_counter() - began
        process.stdout.read()
    return first, time.perf_counter() - began


def _shown(runs: Path, count: int) -> tuple[float, float]:
    """Return seconds until the page has its first rows, and until it has all."""
    with served(runs) as (_, address), browser_started() as browser:
        began = time.perf_counter()
        page: Any = page_opened(browser, address, "/")
        page.wait_for_selector("table.runs tbody tr")
        first = time.perf_counter() - began
        while page.inner_text("header .lead") != f"{count} runs":
            time.sleep(0.02)
        return first, time.perf_counter() - began


def _print(what: str, seconds: list[tuple[float, float]]) -> None:
    first, whole = (median(times) for times in zip(*seconds, strict=True))
    print(f"{what:<32}{first:>8.2f}{whole:>10.2f}", flush=True)


if __name__ == "__main__":
    main()
