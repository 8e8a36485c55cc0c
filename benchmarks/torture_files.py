"""Alters every file of a small run, bit by bit, and looks whether everystep says so.

    python -m benchmarks.torture_files            # every byte of small files, 2,000 of large ones
    python -m benchmarks.torture_files 50         # 50 alterations of each file

Each alteration is of a copy: a flipped bit, or the file cut off there. Then the run is opened, listed
and verified, and its losses and a step are read. What comes of it is one of

    refused   an error that names the run or a file of it
    said      everything that is shown comes with what is wrong
    sound     nothing is said, and everything that is shown is as it was recorded
    WRONG     something else is shown, and nothing is said

and anything else (a traceback, more than a minute) is a failure, too.
"""

from __future__ import annotations

import random
import shutil
import sqlite3
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import everystep
from everystep.errors import DamageWarning, EverystepError
from everystep.recording.blocks import LOSS
from everystep.recording.database import Database
from everystep.recording.run import RecordedRun

__all__ = ["Alteration", "alterations", "killed_run", "main", "outcome", "shown", "small_run"]

#: Files of up to so many bytes are altered at every byte, larger ones at so many.
SMALL, SAMPLES = 2_000, 2_000
LONGEST_SECONDS = 60.0
COLUMNS = ("refused", "said", "sound", "WRONG", "failed")


class Alteration(NamedTuple):
    """What is done to a file: the bit to flip at a byte, or None: the file is cut off there."""

    file: str
    place: int
    bit: int | None

    def apply(self, run: Path) -> None:
        """Alter the file of a run."""
        path = run / self.file
        content = bytearray(path.read_bytes())
        if self.bit is None:
            path.write_bytes(content[: self.place])
        else:
            content[self.place] ^= 1 << self.bit
            path.write_bytes(content)


def small_run(directory: Path) -> Path:
    """Train a small run with measurements and a few states, finished."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    x, y = torch.randn(12, 3), torch.randn(12, 1)
    everystep.train(
        model,
        (x, y),
        loss=nn.MSELoss(),
        optimizer=everystep.GradientDescent(model.parameters(), lr=0.05),
        steps=40,
        validation=0.25,
        evaluate_every=10,
        directory=directory,
        progress=False,
    )
    with closing(sqlite3.connect(directory / "run.sqlite")) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return directory


def killed_run(source: Path, directory: Path) -> Path:
    """Return a copy of a run whose newest rows are in the write-ahead log, as after a kill."""
    shutil.copytree(source, directory)
    with closing(Database.change(directory / "run.sqlite")) as database:
        losses = [loss for _, loss in database.losses_between(11, 40)]
        with database.transaction():
            database.connection.execute("DELETE FROM steps WHERE step > 10")
            database.open_blocks({(LOSS, 0)})
            database.write_facts({"status": "running"})
            database.seal_blocks()
        database.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        for step, loss in enumerate(losses, start=11):
            with database.transaction():
                database.write_losses(step, [loss])
                database.seal_blocks()
        for name in ("run.sqlite", "run.sqlite-wal"):
            shutil.copy(directory / name, directory / f"{name}.kept")
    for name in ("run.sqlite", "run.sqlite-wal"):
        (directory / f"{name}.kept").replace(directory / name)
    (directory / "run.sqlite-shm").unlink(missing_ok=True)
    return directory


def alterations(run: Path, most: int, seed: int = 0) -> Iterator[Alteration]:
    """Yield up to `most` flips of each file of a run, and a tenth as many cuts."""
    draw = random.Random(seed)
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        size, name = path.stat().st_size, str(path.relative_to(run))
        places = (
            range(size)
            if size <= min(most, SMALL)
            else sorted(draw.sample(range(size), min(size, most)))
        )
        for count, place in enumerate(places):
            yield Alteration(name, place, draw.randrange(8))
            if count % 10 == 0:
                yield Alteration(name, place, None)


def shown(directory: Path) -> tuple[dict[str, Any], list[str]]:
    """Return what is shown of a run, and what is said to be wrong with it.

    Raises:
        EverystepError: it cannot be opened.
    """
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DamageWarning)
        summary = RecordedRun(directory).summary()
        run = everystep.open(directory)
        found: dict[str, Any] = {"summary": summary._replace(directory=Path(), name="", damage=None)}
        for what, ask in (
            ("losses", lambda: run.losses.rows()),
            ("measurements", lambda: run.measurements.rows()),
            ("verified", lambda: run.verify(processes=1, progress=False)),
            ("step", lambda: run[7]),
        ):
            try:
                found[what] = ask()
            except EverystepError as error:
                said.append(str(error))
        verified, step = found.pop("verified", None), found.pop("step", None)
        if verified is not None and not verified.is_exact:
            said += [repr(verified)]
        if step is not None:
            found["step"] = (step.loss, step.gradients["0.weight"].tolist())
            said += [] if step.is_exact else ["the step is not exact"]
        said += run.problems
    said += [str(each.message) for each in caught] + ([summary.damage] if summary.damage else [])
    return found, said


def outcome(directory: Path, expected: dict[str, Any]) -> tuple[str, str]:
    """Return what came of an alteration, one of `COLUMNS`, and in words why."""
    began = time.monotonic()
    try:
        found, said = shown(directory)
    except EverystepError as error:
        return "refused", str(error)
    except Exception:
        return "failed", traceback.format_exc(limit=-3)
    if time.monotonic() - began > LONGEST_SECONDS:
        return "failed", "it took more than a minute"
    if said:
        return "said", said[0]
    other = [what for what in expected if found.get(what) != expected[what]]
    return ("WRONG", ", ".join(other)) if other else ("sound", "")


def main(most: int = SAMPLES) -> int:
    """Alter a finished and a killed run, and print a table; return 1 if something is wrong."""
    is_wrong = False
    with tempfile.TemporaryDirectory() as folder:
        finished = small_run(Path(folder) / "finished")
        for run in (finished, killed_run(finished, Path(folder) / "killed")):
            expected, _ = shown(Path(shutil.copytree(run, Path(folder) / "as-it-was")))
            shutil.rmtree(Path(folder) / "as-it-was")
            counts: dict[str, Counter[str]] = {}
            for alteration in alterations(run, most):
                copy = Path(shutil.copytree(run, Path(folder) / "altered"))
                alteration.apply(copy)
                what, why = outcome(copy, expected)
                counts.setdefault(alteration.file, Counter())[what] += 1
                if what in ("WRONG", "failed"):
                    is_wrong = True
                    print(f"{run.name}: {alteration}: {what}: {why}", file=sys.stderr, flush=True)
                shutil.rmtree(copy)
            print(f"\n{run.name:<44}{'altered':>9}" + "".join(f"{name:>9}" for name in COLUMNS))
            for file, count in counts.items():
                numbers = "".join(f"{count[name] or '':>9}" for name in COLUMNS)
                print(f"{file:<44}{sum(count.values()):>9}{numbers}", flush=True)
    return int(is_wrong)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
