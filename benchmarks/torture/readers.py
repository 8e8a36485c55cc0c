"""Readers beside a writer: what each reads must be a prefix of what the finished run has."""

from __future__ import annotations

import hashlib
import multiprocessing
import random
import tempfile
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tests.descent import trained
from torch import nn

import everystep
from everystep.errors import RunError
from everystep.recording.database import FILE_NAME
from everystep.recording.recorded_run import RecordedRun

__all__ = ["Seen", "digest_of", "readers", "torn"]

MEASURED = "validation_loss"
#: Of so many reads one replays a step; it takes much longer than the others.
REPLAYS = 20


class Seen(NamedTuple):
    """What a reader has seen.

    reads: how often of each kind; losses, measured: length and digest of each reading; problems: what
    failed, in words.
    """

    reads: Counter[str]
    losses: list[tuple[int, str]]
    measured: list[tuple[int, str]]
    problems: list[str]


def readers(count: int, steps: int, seed: int = 0) -> list[str]:
    """Train for so many steps at full speed, and read the run in `count` processes meanwhile.

    Prints what was read; returns the failures.
    """
    with tempfile.TemporaryDirectory(prefix="everystep-readers-") as folder:
        place = Path(folder) / "run"
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(count + 1, context) as pool:
            reading = [pool.submit(_read, place, seed + number) for number in range(count)]
            seconds = pool.submit(_train, place, steps).result()
            seen = [each.result() for each in reading]
        run = RecordedRun(place)
        losses, measured = _losses(run), _measured(run)
    failures = [problem for each in seen for problem in each.problems]
    failures += torn("losses", [one for each in seen for one in each.losses], losses)
    failures += torn(MEASURED, [one for each in seen for one in each.measured], measured)
    if len(losses) != steps:
        failures.append(f"the run has {len(losses):,} of {steps:,} steps")
    reads = sum((each.reads for each in seen), Counter[str]())
    print(f"{count} readers, {steps:,} steps in {seconds:.1f} s; {dict(reads)}")
    return failures


def _train(place: Path, steps: int) -> float:
    """Train a small network, and return how many seconds that took."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    began = time.monotonic()
    data = torch.randn(64, 8), torch.randn(64, 1)
    descent = everystep.GradientDescent(model.parameters(), lr=0.01)
    trained(model, data, optimizer=descent, steps=steps, validation=0.25, evaluate_every=10, run=place)
    return time.monotonic() - began


def _read(place: Path, seed: int) -> Seen:
    """Read a run in every way until it is finished."""
    warnings.simplefilter("error")  # a run that seems damaged meanwhile is a torn read
    draw, seen = random.Random(seed), Seen(Counter(), [], [], [])
    while not (place / FILE_NAME).is_file():
        time.sleep(0.01)
    status = "running"
    while status == "running" and not seen.problems:
        try:
            run = RecordedRun(place)
            run.check()
            facts = run.facts
            if facts.trained is None:  # the run is just being created
                continue
            status = run.status_by(facts)
            _read_numbers(run, seen)
            if draw.randrange(REPLAYS) == 0 and seen.losses[-1][0]:
                step = draw.randint(1, seen.losses[-1][0])
                if not everystep.open(place)[step].is_exact:
                    seen.problems.append(f"step {step} does not replay")
                seen.reads["steps"] += 1
        except (RunError, Warning) as error:
            seen.problems.append(f"{type(error).__name__}: {error}")
    return seen


def _read_numbers(run: RecordedRun, seen: Seen) -> None:
    losses = _losses(run)
    seen.losses.append((len(losses), digest_of(losses)))
    summary: Any = run.summary()
    if summary.steps < len(losses) or summary.damage is not None:
        seen.problems.append(
            f"the summary has {summary.steps} steps after {len(losses)}: {summary.damage}"
        )
    measured = _measured(run)
    seen.measured.append((len(measured), digest_of(measured)))
    seen.reads.update(["losses", "summary", "measurements", "facts"])


def _losses(run: RecordedRun) -> NDArray[np.float64]:
    return run.losses["loss"].to_numpy().astype(np.float64)


def _measured(run: RecordedRun) -> NDArray[np.float64]:
    known = run.measured(MEASURED) if MEASURED in run.measurement_names else {}
    return np.array([*known.items()], np.float64).reshape(-1, 2)


def digest_of(numbers: NDArray[np.float64]) -> str:
    """Return the digest of a reading."""
    return hashlib.sha256(numbers.tobytes()).hexdigest()


def torn(what: str, seen: list[tuple[int, str]], whole: NDArray[np.float64]) -> list[str]:
    """Return which readings are not the beginning of the whole."""
    return [
        f"{what}: a reading of {length:,} is not the beginning of the {len(whole):,} recorded"
        for length, digest in sorted(set(seen))
        if digest_of(whole[:length]) != digest
    ]
