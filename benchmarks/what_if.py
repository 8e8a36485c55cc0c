"""64 trainings without a row each, over 70 steps of digits: by `run.what_if`, and from the start.

`python -m benchmarks.what_if [--rounds N] [--threads N]`. A run of digits is 200 steps. What the loss at
step 200 becomes without each row of the batch of step 131 in turn, from state 130 on, is computed by
`run.what_if`, and by 64 plain loops of 200 steps that leave the row out from step 131 on. They
alternate, each in a process of its own, with the same number of threads. Prints seconds, and exits with
1 if a loss has other bits.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from everystep import numerics

numerics.prepare()  # before torch computes

import torch  # noqa: E402
from tests.descent import descend  # noqa: E402

import everystep  # noqa: E402
from everystep.device import select  # noqa: E402
from everystep.experiment.batches import Batches, RowsOf  # noqa: E402
from everystep.experiment.specification import Experiment, load  # noqa: E402
from everystep.training.from_experiment import experiment_job  # noqa: E402

__all__ = ["main"]

AT, STEPS = 130, 200


def main() -> None:
    """Print the seconds of both."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.what_if", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of the run, and of the loops; default: torch's")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "run"
        settings = {"epochs": None, "steps": STEPS, "threads": asked.threads}
        _in_new_process(_trained, directory, settings)
        plain, replayed, others = [], [], 0
        for _ in range(asked.rounds):
            seconds, cases = _in_new_process(_by_what_if, directory)
            replayed.append(seconds)
            seconds, losses = _in_new_process(_by_loops, settings, [rows for rows, _ in cases])
            plain.append(seconds)
            others += sum(one != two for (_, one), two in zip(cases, losses, strict=True))
    ratio = statistics.median(one / two for one, two in zip(replayed, plain, strict=True))
    one, two = statistics.median(replayed), statistics.median(plain)
    print(f"{len(cases)} trainings without a row, {asked.threads or torch.get_num_threads()} threads")
    print(f"from state {AT} to step {STEPS} by what_if: {one:.2f} s")
    print(f"plain loops of {STEPS} steps: {two:.2f} s; ratio {ratio:.2f}")
    print(f"trainings with other bits: {others}")
    raise SystemExit(bool(others))


def _in_new_process(work: Callable[..., Any], *given: Any) -> Any:
    """Return what a function returns in a process that has not computed before."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as executor:
        return executor.submit(work, *given).result()


def _trained(directory: Path, settings: dict[str, Any]) -> None:
    everystep.train_experiment("digits", settings, run=directory, progress=False)


def _by_what_if(directory: Path) -> tuple[float, list[tuple[tuple[int, ...], tuple[float, ...]]]]:
    """Return the seconds, and of each training the row that is left out, and its losses."""
    run = everystep.open(directory)
    started = time.perf_counter()
    found = run.what_if(AT, STEPS, without_rows_of=AT + 1, each=True, progress=False)
    seconds = time.perf_counter() - started
    return seconds, [(case.rows, case.losses) for case in found.cases]


def _by_loops(
    settings: dict[str, Any], cases: list[tuple[int, ...]]
) -> tuple[float, list[tuple[float, ...]]]:
    """Return the seconds, and the losses of each training after step `AT`."""
    experiment = load("digits", settings)
    with numerics.in_force(experiment.threads or torch.get_num_threads()):
        started = time.perf_counter()
        losses = [_by_hand(experiment, rows) for rows in cases]
        seconds = time.perf_counter() - started
    return seconds, [tuple(each[AT:]) for each in losses]


def _by_hand(experiment: Experiment, rows: tuple[int, ...]) -> list[float]:
    """Return the losses of the loop by hand, without some rows after step `AT`."""
    made = experiment_job(experiment, select("cpu"))
    assert made.data is not None
    assert isinstance(made.training.batch, RowsOf)
    data, training, losses = made.data.tensors(), made.training, []
    x, y = data["x"], data["y"]
    batches = Batches(len(x), experiment.batch_size, experiment.seed, experiment.drop_last)
    left_out = made.training.batch.batches.places(rows)  # they are numbered as in the whole data
    for step in range(1, STEPS + 1):
        indices = batches.indices(step)
        assert indices is not None
        if step > AT:
            indices = indices[torch.isin(indices, left_out, invert=True)]
        loss = training.loss(training.model(x[indices]), y[indices])
        losses.append(descend(training.optimizer, loss).detach())
    return torch.stack(losses).tolist()


if __name__ == "__main__":
    main()
