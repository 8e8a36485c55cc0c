"""Alters every file of a small run, bit by bit, and looks whether everystep says so.

    python -m benchmarks.torture_files            # every byte of small files, 2,000 of large ones
    python -m benchmarks.torture_files 50         # 50 alterations of each file
    python -m benchmarks.torture_files 50 names   # only of texts in the database: names, settings
    python -m benchmarks.torture_files 5 commands # each alteration through every command

Each alteration is of a copy: a flipped bit, or the file cut off there. Then the run is opened, listed
and verified, and its losses and a step are read; or every command is run. What comes of it is one of

    refused   an error that names the run or a file of it
    said      everything that is shown comes with what is wrong
    sound     nothing is said, and everything that is shown is as it was recorded
    WRONG     something else is shown, and nothing is said

and anything else (a traceback, more than a minute) is a failure, too.
"""

from __future__ import annotations

import io
import random
import re
import shutil
import sqlite3
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tests.descent import descend, trained
from torch import nn

import everystep
from everystep import cli
from everystep.errors import DamageWarning, EverystepError
from everystep.recording.blocks import LOSS
from everystep.recording.database import Database
from everystep.recording.recorded_run import RecordedRun

__all__ = [
    "Alteration",
    "alterations",
    "killed_run",
    "main",
    "outcome",
    "shown",
    "small_loop",
    "small_run",
]

#: Files of up to so many bytes are altered at every byte, larger ones at so many.
SMALL, SAMPLES = 2_000, 2_000
LONGEST_SECONDS = 60.0
COLUMNS = ("refused", "said", "sound", "WRONG", "failed")
#: Commands, after the run; those that write get a copy of their own.
COMMANDS = [
    ["losses"], ["losses", "--last", "5", "--json"], ["table", "-o", "t.html"], ["step", "7"],
    ["step", "-1", "--json"], ["why", "7", "loss"], ["rows", "7"], ["verify", "--processes", "1"],
    ["when", "norm(gradients['0.weight']) > 0.5"], ["when", "loss < 0.5", "--all"],
    ["diff", "../whole"], ["doctor"], ["measure", "norm(gradients['0.bias'])", "--name", "more"],
    ["fork", "--at", "7", "--steps", "9", "--run", "../fork", "-q"], ["resume", "--steps", "45", "-q"],
]  # fmt: skip
WRITING = ("measure", "fork", "resume")


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
    descent = everystep.GradientDescent(model.parameters(), lr=0.05)
    measured = {"validation": 0.25, "evaluate_every": 10}
    trained(model, (x, y), optimizer=descent, steps=40, run=directory, **measured)
    with closing(sqlite3.connect(directory / "run.sqlite")) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return directory


def killed_run(source: Path, directory: Path) -> Path:
    """Return a copy of a run whose newest rows are in the write-ahead log, as after a kill."""
    shutil.copytree(source, directory)
    with closing(Database.change(directory / "run.sqlite")) as database:
        losses = database.series(LOSS, 11, 40)[1].tolist()
        with database.transaction():
            database.connection.execute("DELETE FROM steps WHERE step > 10")
            database.change_digests(LOSS, dict(enumerate(losses, start=11)))
            database.write_facts({"status": "running"})
        database.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        for step, loss in enumerate(losses, start=11):
            with database.transaction():
                database.write_losses(step, [loss])
        for name in ("run.sqlite", "run.sqlite-wal"):
            shutil.copy(directory / name, directory / f"{name}.kept")
    for name in ("run.sqlite", "run.sqlite-wal"):
        (directory / f"{name}.kept").replace(directory / name)
    (directory / "run.sqlite-shm").unlink(missing_ok=True)
    return directory


def small_loop(directory: Path) -> Path:
    """Record a small loop with batches, and a change between two steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [(torch.randn(4, 3), torch.randn(4, 1)) for _ in range(40)]
    with everystep.record(run=directory, model=model, optimizer=optimizer) as recording:
        for x, y in batches:
            with recording.step((x, y)):
                loss = descend(optimizer, nn.functional.mse_loss(model(x), y))
                recording.log(loss=loss, size=x.square().mean())
            if recording.step_count == 5:
                with torch.no_grad():
                    model.state_dict()["0.bias"].add_(1)
    with closing(sqlite3.connect(directory / "run.sqlite")) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return directory


def alterations(
    run: Path, most: int, seed: int = 0, among: Callable[[str, bytes], Sequence[int]] | None = None
) -> Iterator[Alteration]:
    """Yield up to `most` flips of each file of a run, and a tenth as many cuts.

    among: the places in a file, by its name and content; default: all of them.
    """
    draw = random.Random(seed)
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        name, content = str(path.relative_to(run)), path.read_bytes()
        every = range(len(content)) if among is None else among(name, content)
        is_small = len(every) <= min(most, SMALL)
        places = every if is_small else sorted(draw.sample(every, min(len(every), most)))
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


def texts_in(name: str, content: bytes) -> list[int]:
    """Return the places of texts in a database or its log: names of measurements and files, settings."""
    if not name.startswith("run.sqlite"):
        return []
    return [n for found in re.finditer(rb"[\x20-\x7e]{4,}", content) for n in range(*found.span())]


def answered(directory: Path, command: Sequence[str]) -> tuple[int, str, str]:
    """Run a command on a run; return its exit code (99: a traceback), stdout and stderr."""
    name, *more = command
    for other in ("fork", "t.html"):
        place = directory.parent / other
        shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
    own = directory
    if name in WRITING:
        own = Path(shutil.copytree(directory, directory.parent / "own" / directory.name))
    given = [str(directory.parent / each.strip("./")) if "../" in each else each for each in more]
    given = [str(directory.parent / each) if each == "t.html" else each for each in given]
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv, sys.argv = sys.argv, ["everystep", name, str(own), *given]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            cli.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        code = 99
        err.write(traceback.format_exc(limit=-3))
    finally:
        sys.argv = argv
        shutil.rmtree(directory.parent / "own", ignore_errors=True)
    return code, out.getvalue(), err.getvalue()


def answer_outcome(answer: tuple[int, str, str], expected: tuple[int, str, str]) -> tuple[str, str]:
    """Return what came of an alteration in the answer of a command, one of `COLUMNS`, and why."""
    code, out, err = answer
    if code == 99:
        return "failed", err
    if answer == expected:
        return "sound", ""
    is_said = any(word in out + err for word in _DAMAGED)
    if is_said and code in (1, 2):
        return ("said" if out else "refused"), err or out
    return "WRONG", f"exit code {code}: {(err or out)[-300:]}"


#: What a command writes of a run or a file that is not as it was recorded.
_DAMAGED = (
    *("damaged", "was changed", "cannot be read", "cannot be replayed", "is cut off", "problem "),
    *("not match", "not of an everystep run", "missing", "no digest", "differs", "written by"),
    *("is not a run", "does not create", "has no record", "is not the data", "invalid value"),
    *("not a regular file", "does not open", "no readable", "diverge", "not exact", "not bit for bit"),
)


def _altered(
    run: Path, folder: Path, altered: Iterator[Alteration], through: str
) -> Iterator[tuple[Alteration, str, str]]:
    """Yield each alteration of a run with what came of it, and in words why."""
    copy = Path(shutil.copytree(run, folder / "altered"))
    if through == "commands":
        shutil.copytree(run, folder / "whole")
        answers = [answered(copy, command) for command in COMMANDS]
        again = [answered(copy, command) for command in COMMANDS]
        steady = [n for n, pair in enumerate(zip(answers, again, strict=True)) if pair[0] == pair[1]]
        for number in {*range(len(COMMANDS))} - {*steady}:
            print(f"left out: {COMMANDS[number]} {answers[number]} {again[number]}", file=sys.stderr)
    else:
        expected, _ = shown(copy)
    shutil.rmtree(copy)
    for alteration in altered:
        shutil.copytree(run, copy)
        alteration.apply(copy)
        if through == "commands":
            for number in steady:
                what, why = answer_outcome(answered(copy, COMMANDS[number]), answers[number])
                yield alteration, what, f"{' '.join(COMMANDS[number])}: {why}"
        else:
            yield alteration, *outcome(copy, expected)
        shutil.rmtree(copy)
    shutil.rmtree(folder / "whole", ignore_errors=True)


def main(most: int = SAMPLES, through: str = "files") -> int:
    """Alter a finished run, a killed one and a loop; print a table; return 1 if something is wrong."""
    is_wrong = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        finished = small_run(folder / "finished")
        runs = (finished, killed_run(finished, folder / "killed"), small_loop(folder / "loop"))
        for run in runs:
            counts: dict[str, Counter[str]] = {}
            altered = alterations(run, most, among=texts_in if through == "names" else None)
            for alteration, what, why in _altered(run, folder, altered, through):
                counts.setdefault(alteration.file, Counter())[what] += 1
                if what in ("WRONG", "failed"):
                    is_wrong = True
                    print(f"{run.name}: {alteration}: {what}: {why}", file=sys.stderr, flush=True)
            print(f"\n{run.name:<44}{'answers':>9}" + "".join(f"{name:>9}" for name in COLUMNS))
            for file, count in counts.items():
                numbers = "".join(f"{count[name] or '':>9}" for name in COLUMNS)
                print(f"{file:<44}{sum(count.values()):>9}{numbers}", flush=True)
    return int(is_wrong)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if sys.argv[1:] else SAMPLES, *sys.argv[2:3]))
