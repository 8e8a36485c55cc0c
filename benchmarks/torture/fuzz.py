"""Random loops, step functions, tables, experiments and runs, for as long as asked.

`tests/fuzz` has what is drawn and what must hold; the quick part runs with the tests.
"""

from __future__ import annotations

import itertools
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from everystep import numerics

numerics.prepare()  # before torch computes

from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from tests.fuzz import experiments, loops, run_directories, tables  # noqa: E402

from benchmarks.torture_files import shown, small_run  # noqa: E402

__all__ = ["KINDS", "Found", "fuzz", "report"]

#: What draws cases, and what checks one: it returns what came of it, or raises.
Property = tuple[Any, Callable[[Any], str]]
#: Cases that are drawn from one seed.
AT_ONCE = 100


@dataclass
class Found:
    """What came of the cases of a kind: how often which outcome, and what failed."""

    kind: str
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def fuzz(seconds: float, first_seed: int, only: str | None = None) -> list[Found]:
    """Try each kind for its share of the time; print each failure on stderr."""
    kinds = [name for name in KINDS if only is None or name in only.split(",")]
    warnings.simplefilter("ignore")
    return [_fuzz(name, seconds / len(kinds), first_seed) for name in kinds]


def report(results: list[Found]) -> str:
    """Return counts as a table in Markdown."""
    lines = ["| what | cases | outcomes | failed |", "|---|--:|---|--:|"]
    for found in results:
        outcomes = ", ".join(f"{count:,} {name}" for name, count in found.outcomes.most_common())
        cases = found.outcomes.total() + len(found.failures)
        lines.append(f"| {found.kind} | {cases:,} | {outcomes} | {len(found.failures)} |")
    return "\n".join(lines)


def _fuzz(kind: str, seconds: float, first_seed: int) -> Found:
    found, until = Found(kind), time.monotonic() + seconds
    folder = Path(tempfile.mkdtemp(prefix="everystep-fuzz-"))
    strategy, check = KINDS[kind](folder)

    def one(case: Any) -> None:
        if time.monotonic() > until:
            return
        try:
            found.outcomes[check(case).partition(":")[0]] += 1
        except Exception:
            found.failures.append(f"{kind}: {case}\n{traceback.format_exc(limit=-3)}")
            print(found.failures[-1], file=sys.stderr, flush=True)

    options = settings(
        max_examples=AT_ONCE, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    for number in itertools.count(first_seed):
        if time.monotonic() > until:
            break
        drawing: Any = given(strategy)
        seed(number)(options(drawing(one)))()
    shutil.rmtree(folder, ignore_errors=True)
    return found


# Each makes what its cases need in a folder, and returns a property.


def _runs(folder: Path) -> Property:
    run = small_run(folder / "run")
    expected, _ = shown(Path(shutil.copytree(run, folder / "as-it-was")))
    alter_and_look = run_directories.alter_and_look
    return run_directories.ALTERATIONS, lambda case: alter_and_look(case, run, expected, folder)


def _in(strategy: Any, check: Callable[[Any, Path], str]) -> Callable[[Path], Property]:
    return lambda folder: (strategy, lambda case: check(case, folder))


def _in_new_places(strategy: Any, check: Callable[[Any, Path], str]) -> Callable[[Path], Property]:
    return lambda folder: (strategy, _in_a_new_place(folder, check))


def _in_a_new_place(folder: Path, check: Callable[[Any, Path], str]) -> Callable[[Any], str]:
    numbers = itertools.count()

    def checked(case: Any) -> str:
        place = folder / f"run-{next(numbers)}"
        try:
            return check(case, place)
        finally:
            shutil.rmtree(place, ignore_errors=True)

    return checked


#: By name, what is tried.
KINDS: dict[str, Callable[[Path], Property]] = {
    "loops": _in_new_places(loops.LOOPS, loops.record_and_compare),
    "resumed": _in_new_places(loops.STOPPED, loops.resume_and_compare),
    "forked": _in_new_places(loops.FORKED, loops.fork_and_compare),
    "functions": _in_new_places(loops.FUNCTIONS, loops.train_and_compare),
    "tables": _in(tables.TABLES, tables.read_and_compare),
    "experiments": _in(experiments.EXPERIMENTS, experiments.load_and_compare),
    "runs": _runs,
}
