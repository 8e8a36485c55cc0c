"""Data larger than memory: the memory and the time that it takes to train on it, and to go back.

`python -m benchmarks.large_data --gigabytes 30 --folder /scratch [--format npy]` makes a table of so
many gigabytes of float32 (in Parquet, a directory of files with few different numbers, which compress to
a quarter), trains an experiment on it, opens steps, verifies and forks the run, each in a process of its
own, and prints the seconds and the peak memory of each, that of its children included: all that is
resident (what processes share counts once), and what is not of a file, which the system cannot take
back. It removes what it made.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl

__all__ = ["main"]

COLUMNS, BLOCK = 256, 100_000
#: What each process runs; the rows are shuffled, with a validation split in none.
ACTIONS = {
    "train": "everystep.train_experiment('experiment.toml', run='run', progress=False)",
    "open a step": "assert everystep.open('run')[MIDDLE].is_exact",
    "verify": "assert everystep.open('run').verify().is_exact",
    "fork": "everystep.open('run').fork(MIDDLE, lr=1e-4, run='fork', progress=False)",
    "verify the fork": "assert everystep.open('fork').verify().is_exact",
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=3)
    parser.add_argument("--folder", type=Path, help="for the data, the cache and the runs")
    parser.add_argument("--format", choices=["parquet", "npy"], default="parquet")
    parser.add_argument("--steps", type=int, default=2000)
    asked = parser.parse_args()
    rows = int(asked.gigabytes * 1e9 / 4 / COLUMNS)
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        folder = Path(name)
        began = time.perf_counter()
        source = (_arrays if asked.format == "npy" else _table)(folder, rows)
        size = sum(each.stat().st_size for each in folder.rglob("*") if each.is_file())
        print(f"{rows:,} rows, {COLUMNS} columns, {size / 1e9:.1f} GB of {asked.format}", end=" ")
        print(f"made in {time.perf_counter() - began:.0f} s")
        (folder / "experiment.toml").write_text(
            f"steps = {asked.steps}\nbatch_size = 256\nthreads = 1\n[data]\n{source}"
            f'[model]\nlayers = ["Linear({COLUMNS}, 64)", "ReLU()", "Linear(64, 1)"]\n'
            '[loss]\nname = "MSELoss"\n[optimizer]\nname = "AdamW"\nlr = 1e-3\n'
        )
        print(f"{'':18}{'seconds':>10}{'resident':>12}{'anonymous':>12}")
        for what, action in ACTIONS.items():
            seconds, resident, anonymous = _measured(
                folder, action.replace("MIDDLE", str(asked.steps // 2))
            )
            print(
                f"{what:18}{seconds:10.1f}{resident / 1e6:9.2f} GB{anonymous / 1e6:9.2f} GB", flush=True
            )
        cache = sum(each.stat().st_size for each in (folder / "cache").rglob("*") if each.is_file())
        runs = sum(each.stat().st_size for each in (folder / "runs").rglob("*") if each.is_file())
        print(f"the cache takes {cache / 1e9:.2f} GB, the two runs {runs / 1e6:.1f} MB")


def _block(random: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return features of 256 different numbers, and a target that depends on them."""
    x = random.integers(-128, 128, (rows, COLUMNS), dtype=np.int8).astype(np.float32) / 64
    return x, x[:, :8].sum(axis=1, keepdims=True) ** 2


def _arrays(folder: Path, rows: int) -> str:
    random = np.random.default_rng(0)
    for name, width in (("x", COLUMNS), ("y", 1)):
        with (folder / f"{name}.npy").open("wb") as file:
            about = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
            np.lib.format.write_array_header_1_0(file, about)
    with (folder / "x.npy").open("ab") as x_file, (folder / "y.npy").open("ab") as y_file:
        for begin in range(0, rows, BLOCK):
            x, y = _block(random, min(BLOCK, rows - begin))
            x.tofile(x_file)
            y.tofile(y_file)
    return 'source = "arrays"\nx = "x.npy"\ny = "y.npy"\n'


def _table(folder: Path, rows: int) -> str:
    random = np.random.default_rng(0)
    (folder / "table").mkdir()
    for number, begin in enumerate(range(0, rows, BLOCK)):
        x, y = _block(random, min(BLOCK, rows - begin))
        frame = pl.DataFrame({f"c{place}": x[:, place] for place in range(COLUMNS)} | {"y": y[:, 0]})
        frame.write_parquet(folder / "table" / f"{number:05}.parquet")
    return 'source = "table"\npath = "table"\ntarget = "y"\n'


def _measured(folder: Path, action: str) -> tuple[float, int, int]:
    """Return the seconds of a process, and the peak of what it and its children hold, in kilobytes."""
    environment = os.environ | {"EVERYSTEP_CACHE": str(folder / "cache")}
    began = time.perf_counter()
    command = [sys.executable, "-c", f"import everystep\nif __name__ == '__main__': {action}"]
    resident = anonymous = 0
    with subprocess.Popen(command, cwd=folder, env=environment) as process:
        while process.poll() is None:
            found = [_memory(each) for each in _family(process.pid)]
            resident = max(resident, sum(each[0] for each in found))
            anonymous = max(anonymous, sum(each[1] for each in found))
            time.sleep(0.2)  # adding up what processes share takes a while itself
    if process.returncode:
        raise SystemExit(f"{action} failed")
    return time.perf_counter() - began, resident, anonymous


def _family(number: int) -> list[int]:
    children: list[int] = []
    for path in Path(f"/proc/{number}/task").glob("*/children"):
        try:
            children += map(int, path.read_text().split())
        except OSError:  # it has ended
            continue
    return [number, *(each for child in children for each in _family(child))]


def _memory(number: int) -> tuple[int, int]:
    try:
        _, *lines = Path(f"/proc/{number}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0, 0
    found = dict(line.split(":", 1) for line in lines)
    return tuple(int(found[name].split()[0]) for name in ("Pss", "Pss_Anon"))  # type: ignore[return-value]


if __name__ == "__main__":
    main()
