"""The loops of the tests for longer: each as it is and recorded, and every step taken again.

`python -m benchmarks.loops [--steps 1000]`. Prints for each whether losses and weights have the bits of
the loop by itself, whether every step and snapshot comes back in a process that does not know the loop,
how many programs there are, and how large the run is. The second table is of the steps of the tests that
are functions: also, how many of them a program took.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from everystep import numerics

numerics.prepare()  # before torch computes, or bits depend on where tensors lie in memory

from tests.descent import bits, seeded, unrecorded  # noqa: E402
from tests.training.loops import LOOPS  # noqa: E402
from tests.training.step_functions import CASES  # noqa: E402
from tests.training.test_by_program import by_hand, state_of, trained  # noqa: E402

import everystep  # noqa: E402
from benchmarks.exact import verified  # noqa: E402

__all__ = ["main"]


def main() -> None:
    """Print a row for each loop."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loops", description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    steps = parser.parse_args().steps
    print("| loop | steps | same bits | every step again | snapshots | programs | MB |")
    print("| --- | --: | --- | --- | --: | --: | --: |")
    wrong = [name for name in LOOPS if not _print_row(name, steps)]
    print("\n| step | steps | by program | same bits | every step again |")
    print("| --- | --: | --: | --- | --- |")
    wrong += [name for name in CASES if not _print_function_row(name, steps)]
    raise SystemExit(f"not as they should be: {', '.join(wrong)}" if wrong else 0)


def _print_row(name: str, steps: int) -> bool:
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place) / "run"
        seeded()
        expected = LOOPS[name](steps, unrecorded)
        seeded()
        found = LOOPS[name](steps, lambda **parts: everystep.record(run=directory, **parts))
        is_same = _bits(found) == _bits(expected)
        replayed = verified(directory)
        run = everystep.open(directory)
        size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()) / 1e6
        again = "yes" if replayed["is_exact"] else f"no: {replayed}"
        loop = run.facts.training.loop
        programs = loop.programs if loop else 0
        same = "yes" if is_same else "NO"
        states = replayed["snapshots"]
        print(f"| {name} | {len(run):,} | {same} | {again} | {states} | {programs:,} | {size:.3g} |")
    return is_same and again == "yes"


def _print_function_row(name: str, steps: int) -> bool:
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place) / "run"
        seeded()
        case = CASES[name]()
        expected = by_hand(case, steps), state_of(case)
        seeded()
        case = CASES[name]()
        engine = "program" if case.reason is None else "auto"
        run = trained(case, steps, run=directory, engine=engine)
        is_same = (list(run.losses["loss"]), state_of(case)) == expected
        replayed = verified(directory)
        again = "yes" if replayed["is_exact"] else f"no: {replayed}"
        function = run.facts.training.loop.function
        taken = 0 if function is None else function.by_program
        same = "yes" if is_same else "NO"
        print(f"| {name} | {len(run):,} | {taken:,} | {same} | {again} |")
    return is_same and again == "yes"


def _bits(trained: tuple[list[float], list[dict[str, Any]]]) -> Any:
    losses, states = trained
    tensors = [tensor for state in states for tensor in state.values()]
    return losses, [*map(bits, tensors)]


if __name__ == "__main__":
    main()
