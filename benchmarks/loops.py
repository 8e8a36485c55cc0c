"""The loops of the tests for longer: each as it is and recorded, and every step taken again.

`python -m benchmarks.loops [--steps 1000]`. Prints for each whether losses and weights have the bits of
the loop by itself, whether every step and snapshot comes back in a process that does not know the loop,
how many programs there are, and how large the run is.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from everystep import numerics

numerics.prepare()  # before torch computes, or bits depend on where tensors lie in memory

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tests.training.loops import LOOPS, unrecorded  # noqa: E402

import everystep  # noqa: E402

__all__ = ["main"]

_REPLAY = """
import json, sys
import everystep
found = everystep.open(sys.argv[1]).verify(progress=False)
print(json.dumps([found.is_exact, found.snapshots, str(found.first_loss), found.problems]))
"""


def main() -> None:
    """Print a row for each loop."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loops", description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    steps = parser.parse_args().steps
    print("| loop | steps | same bits | every step again | snapshots | programs | MB |")
    print("| --- | --: | --- | --- | --: | --: | --: |")
    wrong = [name for name in LOOPS if not _print_row(name, steps)]
    raise SystemExit(f"not as they should be: {', '.join(wrong)}" if wrong else 0)


def _print_row(name: str, steps: int) -> bool:
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place) / "run"
        _seed()
        expected = LOOPS[name](steps, unrecorded)
        _seed()
        found = LOOPS[name](steps, lambda **parts: everystep.record(run=directory, **parts))
        is_same = _bits(found) == _bits(expected)
        output = subprocess.run(
            [sys.executable, "-c", _REPLAY, str(directory)], capture_output=True, text=True, check=True
        )
        is_exact, snapshots, first, problems = json.loads(output.stdout)
        run = everystep.open(directory)
        size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()) / 1e6
        again = "yes" if is_exact else f"no: {first} {problems}"
        loop = run.facts.training.loop
        programs = loop.programs if loop else 0
        same = "yes" if is_same else "NO"
        print(f"| {name} | {len(run):,} | {same} | {again} | {snapshots} | {programs:,} | {size:.3g} |")
    return is_same and bool(is_exact)


def _seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def _bits(trained: tuple[list[float], list[dict[str, Any]]]) -> Any:
    losses, states = trained
    tensors = [tensor for state in states for tensor in state.values()]
    return losses, [tensor.contiguous().view(-1).view(torch.uint8).tolist() for tensor in tensors]


if __name__ == "__main__":
    main()
