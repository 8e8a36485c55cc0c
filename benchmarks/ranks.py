"""Loops of several processes: what recording costs, and whether killed ranks resume to the same bits.

`torchrun --nproc-per-node 2 -m benchmarks.ranks` times steps with DistributedDataParallel, the loop as
it is and by `everystep.record` in each process, alternating: the mean of all steps after the tenth, the
median of the rounds.

`python -m benchmarks.ranks --kills 20 [--processes 2] [--seed 0]` kills a random rank at a random step,
resumes, kills another, and so on, until the training ends; then it compares weights and losses with a
training that nothing has ended, and verifies the run. `--training shuffled_mean`: of a model by
`everystep.train`, in place of a loop.

`python -m benchmarks.ranks --trainings [--steps 1000]` trains `benchmarks.ranks_trainings` in 2 and in 4
processes, as they are and recorded, and compares the weights and the losses of all ranks; then it
replays every step of every rank. `--planted` records them with something different on one rank, in 2
processes, and asks `diff` where.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from everystep import numerics

numerics.prepare()  # before torch computes

import torch  # noqa: E402
from tests.descent import descend  # noqa: E402
from tests.training import ranks_loops  # noqa: E402
from torch import distributed  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

import everystep  # noqa: E402
from benchmarks.ranks_trainings import PLANTED_AT  # noqa: E402
from benchmarks.record import WARM_UP, Loop, chapter, digits, transformer  # noqa: E402

#: Steps of the loop that is killed.
STEPS = 18
ROUNDS = 3


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--training", default="epochs")
    parser.add_argument("--trainings", action="store_true")
    parser.add_argument("--planted", action="store_true")
    parser.add_argument("--steps", type=int, default=1000)
    asked = parser.parse_args()
    if asked.kills:
        sys.exit(kill(asked.kills, asked.processes, random.Random(asked.seed), asked.training))
    if asked.trainings:
        sys.exit(train(asked.steps))
    if asked.planted:
        sys.exit(plant(asked.steps))
    distributed.init_process_group("gloo")
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        distributed.broadcast_object_list(folder)
        for make in (chapter, digits, transformer):
            cost(make, Path(folder[0]))
        distributed.barrier()  # rank 0 removes it
    distributed.destroy_process_group()


def cost(make: Any, folder: Path) -> None:
    """Print what recording a loop costs in each of the processes."""
    torch.manual_seed(0)
    plain: list[float] = []
    recorded: list[float] = []
    for number in range(ROUNDS):
        for times, is_recorded in ((plain, False), (recorded, True)):
            times.append(step_seconds(copy.deepcopy(make()), folder / f"{number}", is_recorded))
        distributed.barrier()
        shutil.rmtree(folder / f"{number}", ignore_errors=True)
    if distributed.get_rank() == 0:
        one, two = (1e3 * statistics.median(times) for times in (plain, recorded))
        print(f"| {make.__doc__.rstrip('.')} | {one:.3g} | {two:.3g} | {two / one:.2f} |", flush=True)


def step_seconds(loop: Loop, run: Path, is_recorded: bool) -> float:
    """Return the mean seconds of a step of a loop. run: where it is recorded."""
    model = DistributedDataParallel(loop.model)
    times: list[float] = []

    def train(batches: Iterable[Any], log: Any) -> None:
        for x, y in batches:
            times.append(time.perf_counter())
            log(descend(loop.optimizer, loop.loss(model(x), y)))

    batches = [loop.batch] * (loop.steps // 4)
    distributed.barrier()
    if is_recorded:
        with everystep.record(run=run, model=model, optimizer=loop.optimizer) as recording:
            train(recording.steps(batches), lambda loss: recording.log(loss=loss))
    else:
        train(batches, torch.Tensor.item)
    return (times[-1] - times[WARM_UP]) / (len(times) - WARM_UP - 1)


def train(steps: int) -> int:
    """Train in 2 and 4 processes, recorded and not; return 1 if there is a difference."""
    failures = 0
    print("| | processes | steps replayed | bit-identical | weights and losses as without everystep |")
    for name in ("digits", "transformer"):
        for processes in (2, 4):
            with tempfile.TemporaryDirectory() as folder:
                given = [name, "--steps", f"{steps}"]
                plain = _trained(Path(folder), processes, given)
                found = _trained(Path(folder), processes, [*given, "--run", f"{folder}/run"])
                run = everystep.open(f"{folder}/run")
                verified = run.verify(progress=False)
                losses = [rank.losses["loss"].to_list() for rank in run.ranks]
                replayed = processes * verified.steps
                is_same = found == plain and losses == [each for _, each in plain]
                is_whole = verified.is_exact and verified.steps == steps
                failures += not (is_same and is_whole)
                print(f"| {name} | {processes} | {replayed:,} | {is_whole} | {is_same} |", flush=True)
    return int(failures > 0)


#: What `--planted` plants: in which training, the rank and the step that `diff` must name.
_PLANTED = {
    "row": ("digits", 1, PLANTED_AT),
    "ulp": ("digits", 1, PLANTED_AT),
    "set_epoch": ("digits", 1, 24),  # an epoch of 1,438 rows has 23 steps in 2 processes
    "no_sync": ("transformer", 0, 1),
}


def plant(steps: int) -> int:
    """Record trainings with and without a difference; return 1 if `diff` names another place."""
    failures = 0
    print("| planted | rank | step | operation | cause |")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("digits", "transformer"):
            given = [name, "--steps", f"{steps}", "--run", f"{folder}/{name}"]
            _trained(Path(folder), 2, given)
        for planted, (name, rank, step) in _PLANTED.items():
            place = f"{folder}/{planted}"
            given = [name, "--steps", f"{steps}", "--run", place, "--planted", planted]
            _trained(Path(folder), 2, given)
            found = everystep.open(f"{folder}/{name}").diff(everystep.open(place), progress=False)
            where = int(found.names[0].partition("/ranks/")[2] or 0)
            seen = found.operation
            failures += seen is None or (where, seen.step) != (rank, step)
            if seen is not None:
                names = " | ".join(dict.fromkeys(each.operation.operator for each in seen.sides))
                causes = "; ".join(seen.causes)
                print(f"| {planted} | {where} | {seen.step} | #{seen.index} {names} | {causes} |")
    return int(failures > 0)


def _trained(place: Path, processes: int, arguments: list[str]) -> list[Any]:
    """Train in several processes; return what each prints."""
    given = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": f"{processes}"}
    command = [sys.executable, "-m", "benchmarks.ranks_trainings", *arguments]
    started = [
        subprocess.Popen(
            command,
            env=given | {"RANK": f"{rank}", "STORE": f"{place}/store"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    said = [each.communicate()[0] for each in started]
    (place / "store").unlink(missing_ok=True)
    return [json.loads(each.splitlines()[-1]) for each in said]


def kill(kills: int, processes: int, draw: random.Random, training: str) -> int:
    """Kill trainings `kills` times, and print the failures; return 1 if there are any."""
    failures, trainings, done = 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "whole")
        wanted = _launched(whole, processes, training, RECORDED="1")
        losses = [each.losses for each in everystep.open(whole / "runs" / training).ranks]
        while done < kills:
            place, step, trainings = Path(folder, f"{trainings}"), 0, trainings + 1
            environment = {"RECORDED": "1"}
            while step < STEPS and done < kills:
                step = draw.randint(step + 1, STEPS)
                rank = draw.randrange(processes)
                _launched(place, processes, training, **environment, KILL=f"{rank},{step}")
                environment["RESUME"], done = "1", done + 1
            found = _launched(place, processes, training, **environment)
            run = everystep.open(place / "runs" / training)
            pairs = zip(run.ranks, losses, strict=True)
            is_same = found == wanted and all(rank.losses.equals(known) for rank, known in pairs)
            if not (is_same and run.verify().is_exact):
                failures += 1
                print(f"training {trainings} differs: {found}, {run.verify()!r}", file=sys.stderr)
            shutil.rmtree(place)
    print(f"{done} kills of a rank among {processes}, {trainings} trainings, {failures} failures")
    return int(failures > 0)


def _launched(place: Path, processes: int, training: str, **environment: str) -> list[Any]:
    """Run the loop in several processes; return the digest of the weights of each, or None."""
    place.mkdir(exist_ok=True)
    given = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path]),
    }
    given |= {"WORLD_SIZE": str(processes), "STORE": str(place / "store")} | environment
    command = [sys.executable, ranks_loops.__file__, training]
    started = [
        subprocess.Popen(command, cwd=place, env=given | {"RANK": str(rank)}, stderr=subprocess.DEVNULL)
        for rank in range(processes)
    ]
    for each in started:
        each.wait()
    (place / "store").unlink(missing_ok=True)
    files = [place / f"digests-{rank}.json" for rank in range(processes)]
    return [json.loads(file.read_text())[training] if file.exists() else None for file in files]


if __name__ == "__main__":
    main()
