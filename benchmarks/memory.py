"""What a step by program asks for: Python objects, torch's memory, and growth over many steps.

`python -m benchmarks.memory`. Objects are those that tracemalloc finds more of after 1,000 steps than
before, made in everystep; memory is what torch's profiler sees kernels ask the allocator for within
one step, all given back; growth is that of the process over 10,000 steps (fewer of the slow ones).
"""

from __future__ import annotations

import gc
import time
import tracemalloc
from pathlib import Path

from everystep import numerics

numerics.prepare()  # before torch computes

import torch  # noqa: E402

from benchmarks.workloads import WORKLOADS, Workload  # noqa: E402
from everystep.experiment.batches import Batches  # noqa: E402
from everystep.program.bound import BoundProgram  # noqa: E402
from everystep.program.calls import without_autograd  # noqa: E402
from everystep.training.model_step import Training  # noqa: E402
from everystep.training.stepper import Stepper  # noqa: E402

__all__ = ["main"]

SECONDS_OF_GROWTH = 20


def main() -> None:
    """Print a row for each workload."""
    print(f"{'workload':<16}{'program kB':>12}{'state kB':>10}{'objects':>9}", end="")
    print(f"{'asked for in a step: program':>30}{'eager':>12}{'growth kB':>11}{'steps':>8}")
    seen = set()
    for workload in WORKLOADS:
        if (workload.network, workload.update) not in seen:
            seen.add((workload.network, workload.update))
            _print_row(workload)


def _print_row(workload: Workload) -> None:
    start = workload.make()
    batches = Batches(len(start.x), workload.batch_size).of(start.x, start.y)
    optimizer = workload.optimizer(start.model.parameters())
    training = Training(start.model, start.loss, optimizer, batches, torch.device("cpu"))
    x, y = training.batch(3)
    bound = _bound(training)
    state = sum(tensor.nbytes for tensor in training.named_state().values())
    asked_eagerly = _asked(lambda: training.step(x, y))
    with without_autograd():
        asked = _asked(bound.run)
        objects = _objects(bound)
        growth, steps = _growth(bound)
    print(
        f"{workload.key:<16}{bound.temporary_bytes / 1e3:>12,.1f}{state / 1e3:>10,.1f}{objects:>9}"
        f"{asked / 1e3:>27,.1f} kB{asked_eagerly / 1e3:>9,.1f} kB{growth:>11,.0f}{steps:>8,}"
    )


def _bound(training: Training) -> BoundProgram:
    """Return the program of a training's steps, on its tensors, after some steps."""
    stepper = Stepper(training, None, 3, "eager")
    for number in (1, 2, 3):
        stepper.watch(number, *training.batch(number))
    batch = dict(zip("xy", training.batch(3), strict=True))
    program = stepper.watched.program_of_last()
    stepper.watched.finish()
    assert program is not None
    given = program.built.program, training.parts.state(), program.inputs, batch, training.device
    bound = BoundProgram(*given)
    bound.load(batch)
    bound.put(program.numbers)
    with without_autograd():
        for _ in range(4):  # from then on, an optimizer calls its operators directly
            bound.run()
    return bound


def _asked(step: object) -> int:
    """Return how many bytes a step asks the allocator for."""
    step()  # type: ignore[operator]
    with torch.profiler.profile(profile_memory=True) as profile:
        step()  # type: ignore[operator]
    events = profile.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0)


def _objects(bound: BoundProgram) -> int:
    """Return how many more objects of everystep there are after 1,000 steps."""
    gc.collect()
    tracemalloc.start()
    for _ in range(100):  # Python keeps a few tuples and dicts to use again
        bound.run()
    before = tracemalloc.take_snapshot()
    for _ in range(1000):
        bound.run()
    after = tracemalloc.take_snapshot()
    tracemalloc.stop()
    return sum(
        each.count_diff
        for each in after.compare_to(before, "lineno")
        if each.count_diff > 0 and "everystep/program" in str(each.traceback)
    )


def _growth(bound: BoundProgram) -> tuple[float, int]:
    """Return how many kB the process grows by, and over how many steps."""

    started = time.perf_counter()
    bound.run()
    steps = min(10_000, int(SECONDS_OF_GROWTH / max(1e-9, time.perf_counter() - started)))
    before = _resident()
    for _ in range(steps):
        bound.run()
    return _resident() - before, steps


def _resident() -> float:
    """Return the memory of the process in kB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("VmRSS")))


if __name__ == "__main__":
    main()
