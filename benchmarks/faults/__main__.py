"""Whether diff finds injected faults: the exact step and the exact operation, and how fast.

`python -m benchmarks.faults [--count 500] [--seed 0]`. A pair of small runs, one of them with a random
fault of one of seven kinds, is compared by diff. Where the two part is computed apart from that: both
trainings are written out by hand, operation after operation, and gone through in lockstep until a
result has other bits. Pairs in which no operation of any step has other bits are counted apart.

`python -m benchmarks.faults --kinds` plants one difference of each kind (an argument of a module, a
setting of an optimizer, a cell of the data, ...), and compares step, operation and cause with the truth.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import random
import statistics
import sys
import tempfile
import time
from contextlib import chdir
from typing import NamedTuple

from everystep import numerics

numerics.prepare()  # before torch computes

import torch  # noqa: E402
from tests.descent import trained  # noqa: E402
from torch import nn  # noqa: E402

import everystep  # noqa: E402
from benchmarks.faults.by_hand import Parting, parting  # noqa: E402
from benchmarks.faults.kinds.judging import all_kinds, judged, place_of, table  # noqa: E402
from benchmarks.faults.setups import KINDS, Setup, random_setup  # noqa: E402
from everystep.answers.diff import Difference  # noqa: E402

__all__ = ["main"]


class Outcome(NamedTuple):
    """What came of a pair: where the bits part, if they do, and what diff says."""

    kind: str
    expected: Parting | None
    found: Parting | None
    seconds: float


def main() -> None:
    """Print a row for each kind of fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500, help="pairs of runs")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--kinds", action="store_true", help="plant each kind of difference once")
    arguments = parser.parse_args()
    if arguments.kinds:
        print(_kinds())
        return
    chance = random.Random(arguments.seed)
    outcomes = []
    with tempfile.TemporaryDirectory() as place, chdir(place):
        for number in range(arguments.count):
            kind = list(KINDS)[number % len(KINDS)]
            outcomes.append(_outcome(kind, number, chance))
            if not _is_exact(outcomes[-1]):
                print(f"pair {number}: {outcomes[-1]}", file=sys.stderr)
    print(_table(outcomes))


def _kinds() -> str:
    found = []
    for kind in all_kinds():
        with tempfile.TemporaryDirectory() as place, chdir(place):
            found.append(judged(kind))
    return f"torch {torch.__version__}\n\n{table(found)}"


def _table(outcomes: list[Outcome]) -> str:
    lines = [
        f"torch {torch.__version__}, {os.cpu_count()} cores",
        "",
        "| fault | pairs | bits differ | exact step | exact operation | median ms |",
        "|---|---|---|---|---|---|",
    ]
    for kind in (*KINDS, "all"):
        own = [each for each in outcomes if kind in (each.kind, "all")]
        differ = [each for each in own if each.expected is not None]
        steps = sum(
            each.found is not None
            and each.expected is not None
            and each.found.step == each.expected.step
            for each in differ
        )
        operations = sum(each.found == each.expected for each in differ)
        milliseconds = statistics.median(each.seconds for each in own) * 1000 if own else math.nan
        lines.append(
            f"| {kind} | {len(own)} | {len(differ)} | {steps} | {operations} | {milliseconds:.1f} |"
        )
    wrong = sum(each.expected is None and each.found is not None for each in outcomes)
    lines += ["", f"operations named where no bits differ: {wrong}"]
    return "\n".join(lines)


def _is_exact(outcome: Outcome) -> bool:
    return outcome.found == outcome.expected


def _outcome(kind: str, number: int, chance: random.Random) -> Outcome:
    setups = KINDS[kind](random_setup(number, chance), chance)
    one = _train(setups[0])
    other = _fork(one, setups[1]) if setups[1].changes else _train(setups[1])
    expected = parting(setups, (one, other))
    started = time.perf_counter()
    found = one.diff(other, progress=False)
    seconds = time.perf_counter() - started
    return Outcome(kind, expected, _parting_of(found), seconds)


def _train(setup: Setup) -> everystep.Run:
    model, x, y = setup.make()
    loss, optimizer = nn.MSELoss(reduction=setup.reduction), setup.optimizer_of(model)
    settings = {"batch_size": setup.batch_size, "steps": setup.steps, "threads": setup.threads}
    run: everystep.Run = trained(model, (x, y), loss=loss, optimizer=optimizer, **settings)
    return run


def _fork(run: everystep.Run, setup: Setup) -> everystep.Run:
    ((at, changed),) = setup.changes.items()
    seed = changed.get("seed")
    return run.fork(at, lr=changed.get("lr"), seed=None if seed is None else int(seed), progress=False)


def _parting_of(found: Difference) -> Parting | None:
    parted, place = found.operation, place_of(found)
    return None if parted is None or place is None else Parting(parted.step, parted.index, place)


if __name__ == "__main__":
    logging.captureWarnings(True)
    main()
