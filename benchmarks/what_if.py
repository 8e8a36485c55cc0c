"""64 trainings without a row each, over 70 steps of digits: by `run.what_if`, and from the start.

`python -m benchmarks.what_if [--rounds N]`. A run of digits is 200 steps. What the loss at step 200
becomes without each row of the batch of step 131 in turn, from state 130 on, is computed by
`run.what_if`, and by 64 plain loops of 200 steps that leave the row out from step 131 on, alternating,
with the same number of threads. Prints seconds, and exits with 1 if a loss has other bits.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from everystep import numerics

numerics.prepare()  # before torch computes

import torch  # noqa: E402

import everystep  # noqa: E402
from everystep.experiment.batches import Batches  # noqa: E402
from everystep.experiment.device import select  # noqa: E402
from everystep.experiment.specification import Experiment, load  # noqa: E402
from everystep.training.from_experiment import experiment_job  # noqa: E402

__all__ = ["main"]

AT, STEPS = 130, 200


def main() -> None:
    """Print the seconds of both."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.what_if", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    experiment = load("digits", {"epochs": None, "steps": STEPS})
    with tempfile.TemporaryDirectory() as folder:
        run = everystep.train_experiment(experiment, directory=Path(folder) / "run", progress=False)
        plain, replayed, others = [], [], 0
        for _ in range(rounds):
            started = time.perf_counter()
            found = run.what_if(AT, STEPS, without_rows_of=AT + 1, each=True, progress=False)
            replayed.append(time.perf_counter() - started)
            started = time.perf_counter()
            losses = [_by_hand(experiment, case.rows) for case in found.cases]
            plain.append(time.perf_counter() - started)
            others += sum(
                tuple(hand[AT:]) != case.losses for hand, case in zip(losses, found.cases, strict=True)
            )
    ratio = statistics.median(one / two for one, two in zip(replayed, plain, strict=True))
    one, two = statistics.median(replayed), statistics.median(plain)
    print(f"{len(found.cases)} trainings without a row, {torch.get_num_threads()} threads")
    print(f"from state {AT} to step {STEPS} by what_if: {one:.2f} s")
    print(f"plain loops of {STEPS} steps: {two:.2f} s; ratio {ratio:.2f}")
    print(f"trainings with other bits: {others}")
    raise SystemExit(bool(others))


def _by_hand(experiment: Experiment, rows: tuple[int, ...]) -> list[float]:
    """Return the losses of the loop by hand, without some rows after step `AT`."""
    made = experiment_job(experiment, "digits", select("cpu"))
    assert made.data is not None
    training, x, y, losses = made.training, made.data.x, made.data.y, []
    batches = Batches(len(x), experiment.batch_size, experiment.seed, experiment.drop_last)
    for step in range(1, STEPS + 1):
        indices = batches.indices(step)
        assert indices is not None
        if step > AT:
            indices = indices[torch.isin(indices, torch.tensor(rows), invert=True)]
        loss = training.loss(training.model(x[indices]), y[indices])
        training.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        training.optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


if __name__ == "__main__":
    main()
