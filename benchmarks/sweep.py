"""Many trainings: a sweep compared with the same runs in turn, and networks trained together.

`python -m benchmarks.sweep [--runs 16] [--epochs 20] [--rounds 3]` times whole commands: one
`everystep sweep digits`, and as many `everystep train digits --threads 1`, which have the same bits.

`python -m benchmarks.sweep --together 64` times 64 networks of one shape: by plain loops in turn, by one
of all networks (`torch.func.vmap` over the parameters), and by `everystep.sweep`, which records each;
OMP_NUM_THREADS sets the threads of the loops. It prints the largest relative difference between the
losses of the two loops, too.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import everystep
from everystep import numerics

numerics.prepare()  # before torch computes

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.func import functional_call, grad_and_value, stack_module_state, vmap  # noqa: E402

from benchmarks.page import MAIN  # noqa: E402
from benchmarks.workloads import WORKLOADS, Perceptron, Workload  # noqa: E402

#: What is trained together, and for how many steps.
TOGETHER = {"chapter-5000": 1000, "small": 5000}


def main() -> None:
    """Print what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep")
    parser.add_argument("--runs", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--together", type=int, default=0)
    asked = parser.parse_args()
    if asked.together:
        for workload in (each for each in WORKLOADS if each.key in TOGETHER):
            _together(workload, asked.together, asked.rounds)
        return
    epochs = ("--set", f"epochs={asked.epochs}")

    def in_turn() -> None:
        for seed in range(asked.runs):
            _command("train", "--seed", str(seed), "--threads", "1", *epochs)

    sweep = partial(_command, "sweep", "--set", f"seed=0..{asked.runs - 1}", *epochs)
    ways: dict[str, Callable[[], None]] = {"everystep sweep": sweep, "everystep train": in_turn}
    print(f"{asked.runs} runs of digits{'seconds':>28}{'of processors':>16}")
    for name, times in _timed(ways, asked.rounds).items():
        seconds, processors = (median(each) for each in zip(*times, strict=True))
        print(f"{name:<32}{seconds:>12.1f}{processors:>16.1f}")


def _processor_seconds() -> float:
    """Return what all processes have used that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _command(name: str, *options: str) -> None:
    """Run a command of digits in a new directory."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", MAIN, name, "digits", *options, "--quiet"]
        subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)


def _timed(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Return the seconds of each way, alternating, and those that processors worked for its commands."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began, used = time.perf_counter(), _processor_seconds()
            way()
            found[name].append((time.perf_counter() - began, _processor_seconds() - used))
    return found


def _together(workload: Workload, count: int, rounds: int) -> None:
    steps, losses, threads = TOGETHER[workload.key], dict[str, Tensor](), torch.get_num_threads()
    ways: dict[str, Callable[[], Any]] = {
        "in turn": lambda: losses.update(turn=_in_turn(workload, count, steps)),
        "together": lambda: losses.update(together=_batched(workload, count, steps)),
        "sweep": partial(_swept, workload, count, steps),
    }
    one, other, swept = (median(s for s, _ in times) for times in _timed(ways, rounds).values())
    far = ((losses["turn"] - losses["together"]).abs() / losses["turn"].abs()).max().item()
    print(
        f"{workload.name}, {count} networks, {steps} steps, {threads} threads: in turn {one:.2f} s, "
        f"together {other:.2f} s, ratio {one / other:.2f}; losses differ by {far:.1e} at most; "
        f"everystep.sweep {swept:.2f} s, ratio {one / swept:.2f}",
        flush=True,
    )


def _swept(workload: Workload, count: int, steps: int) -> None:
    """Train the same networks, with other numbers, as recorded runs of a sweep."""
    assert isinstance(workload.network, Perceptron)
    sizes = workload.network.sizes
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [f"Linear({inputs}, {outputs})", "ReLU()"]
    experiment = {
        "steps": steps,
        "data": {"source": "random", "N": workload.rows, "D_in": sizes[0], "D_out": sizes[-1]},
        "model": {"layers": layers[:-1]},
        "loss": {"name": "MSELoss", "reduction": "sum"},
        "optimizer": {"name": "GradientDescent", "lr": workload.lr},
    }
    with tempfile.TemporaryDirectory() as folder:
        everystep.sweep(experiment, {"seed": range(count)}, run=Path(folder) / "sweep", progress=False)


def _in_turn(workload: Workload, count: int, steps: int) -> Tensor:
    """Return the losses (networks, steps) of a plain loop for each network."""
    found = []
    for _ in range(count):
        start, losses = workload.make(), []
        parameters: list[Tensor] = list(start.model.parameters())
        for _ in range(steps):
            loss = start.loss(start.model(start.x), start.y)
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                torch._foreach_sub_(parameters, gradients, alpha=workload.lr)
            losses.append(loss.detach())
        found.append(torch.stack(losses))
    return torch.stack(found)


def _batched(workload: Workload, count: int, steps: int) -> Tensor:
    """Return the same of one loop that steps all networks."""
    starts = [workload.make() for _ in range(count)]
    model, x, y, measure = starts[0].model, starts[0].x, starts[0].y, starts[0].loss
    parameters = {
        name: each.detach()
        for name, each in stack_module_state([each.model for each in starts])[0].items()
    }

    def loss_of(own: dict[str, Tensor]) -> Tensor:
        found: Tensor = measure(functional_call(model, own, (x,)), y)
        return found

    step, losses = vmap(grad_and_value(loss_of)), []
    for _ in range(steps):
        gradients, loss = step(parameters)
        names = [*parameters]
        torch._foreach_sub_(
            [parameters[n] for n in names], [gradients[n] for n in names], alpha=workload.lr
        )
        losses.append(loss)
    return torch.stack(losses, 1)


if __name__ == "__main__":
    main()
