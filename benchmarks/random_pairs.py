"""Whether random pairs of torch's modules and optimizers have the bits of the loop, and verify.

`python -m benchmarks.random_pairs [--count 600] [--seed 0] [--only NUMBER]`. A pair is a sample of
torch's own list of modules, in train or eval mode, in float32 or float64, and an optimizer of
`torch.optim` with random settings, perhaps with a scheduler and with clipped gradients. It is trained by
a loop written out by hand and by everystep, from equal objects; losses, parameters, gradients, buffers,
generators and all that the optimizer holds must have the same bits. All runs are then verified by new
processes, 50 in each. What the loop by hand cannot train (an optimizer that refuses its settings) is
drawn again. Prints counts, the reasons for eager steps, and each failure.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from everystep import numerics

numerics.prepare()  # before torch computes

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tests.training.by_hand import Made, by_hand, by_train, contents  # noqa: E402
from torch import nn, optim  # noqa: E402
from torch.optim import lr_scheduler  # noqa: E402

import everystep  # noqa: E402
from everystep.recording.facts import EAGERLY  # noqa: E402

__all__ = ["Pair", "main"]

STEPS = 12
RUNS_A_PROCESS = 50

#: Optimizers that need what a pair does not have, and why.
LEFT_OUT = {"LBFGS": "needs a closure", "SparseAdam": "needs sparse gradients"}

#: Settings that many optimizers have, and what is drawn for them; the default most often.
COMMON: dict[str, Sequence[Any]] = {
    "weight_decay": (0, 0, 0.01, 0.1),
    "maximize": (False, False, False, True),
    "foreach": (None, None, True, False),
    "fused": (None, None, True, False),
    # On a CPU, only what is fused too.
    "capturable": (False, False, False, False, False, True),
    "amsgrad": (False, True),
    "momentum": (0, 0.9),
    "nesterov": (False, True),
    "dampening": (0, 0, 0.1),
    "centered": (False, True),
    "lr_decay": (0, 0.01),
    "decoupled_weight_decay": (False, True),
    "betas": ((0.9, 0.999), (0.5, 0.9)),
}

#: Of a scheduler: how it is made from an optimizer.
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=4, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, milestones=[3, 7], gamma=0.3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=STEPS),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(
        o, max_lr=0.02, total_steps=STEPS + 1, cycle_momentum=False
    ),
    "OneCycleLR of the momentum too": lambda o: lr_scheduler.OneCycleLR(
        o, max_lr=0.02, total_steps=STEPS + 1
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.ConstantLR(o, total_iters=3), lr_scheduler.ExponentialLR(o, gamma=0.9)],
        milestones=[3],
    ),
}


@dataclass(frozen=True)
class Pair:
    """A sample of a module, and an optimizer with settings; all that is needed to make them again.

    sample: the number of the sample in torch's list; scheduler: a key of `SCHEDULERS`.
    """

    number: int
    module: str
    sample: int
    training: bool
    dtype: str
    optimizer: str
    settings: dict[str, Any] = field(hash=False)
    tensor_lr: bool
    scheduler: str | None
    max_grad_norm: float | None

    def __str__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self.settings.items())
        parts = [
            f"{self.number}: {self.module}-{self.sample} {self.dtype}",
            "train" if self.training else "eval",
            f"{self.optimizer}({settings}){' of a tensor lr' if self.tensor_lr else ''}",
        ]
        parts += [self.scheduler] if self.scheduler else []
        parts += [f"max_grad_norm={self.max_grad_norm}"] if self.max_grad_norm else []
        return "; ".join(parts)

    def make(self) -> Made:
        """Return new objects; the same numbers at every call."""
        torch_modules = _torch_modules()
        torch.manual_seed(self.number)
        random.seed(self.number)
        np.random.seed(self.number)
        dtype = getattr(torch, self.dtype)
        model, x, y, loss = torch_modules.make_sample(
            self.module, self.sample, dtype=dtype, training=self.training
        )
        optimizer = self._optimizer(model)
        scheduler = SCHEDULERS[self.scheduler](optimizer) if self.scheduler else None
        return Made(model, x, y, loss, optimizer, scheduler)

    def _optimizer(self, model: nn.Module) -> optim.Optimizer:
        settings = dict(self.settings)
        if self.tensor_lr:
            settings["lr"] = torch.tensor(settings["lr"])
        parameters = [p for p in model.parameters() if self.optimizer != "Muon" or p.dim() == 2]
        made: optim.Optimizer = getattr(optim, self.optimizer)(parameters, **settings)
        return made


@dataclass
class Counts:
    """What came of all pairs; the pairs that failed come with what failed."""

    trained: int = 0
    redrawn: int = 0
    same: int = 0
    by_program: int = 0
    exact: int = 0
    eager: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[str, Pair]] = field(default_factory=list)


def main() -> None:
    """Train and verify all pairs, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=600, help="pairs to train (600)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (0)")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="only the pair of this number")
    parser.add_argument("--verify", type=Path, metavar="DIRECTORY", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.verify is not None:
        verify_all(options.verify, options.seed)
        return
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        os.environ["XDG_CACHE_HOME"] = f"{place}/cache"
        counts = try_pairs(options.count, options.seed, options.only, Path(place))
    print(report(counts, time.perf_counter() - begin))
    sys.exit(1 if counts.failures else 0)


def try_pairs(count: int, seed: int, only: int | None, place: Path) -> Counts:
    """Train `count` pairs, and verify their runs in new processes."""
    counts = Counts()
    runs: dict[str, Pair] = {}
    batch = place / "runs"
    numbers = range(10 * count) if only is None else [only]
    for number in numbers:
        if counts.trained == count:
            break
        pair = draw(number, seed)
        try_one(pair, batch / str(number), counts, runs)
        if len(runs) == RUNS_A_PROCESS or (counts.trained == count and runs):
            verify_in_a_new_process(batch, seed, runs, counts)
            runs, batch = {}, place / f"runs after {number}"
        _progress(counts, count, pair)
    if runs:
        verify_in_a_new_process(batch, seed, runs, counts)
    _progress(counts, count, None)
    return counts


def draw(number: int, seed: int) -> Pair:
    """Return a pair, the same one for the same numbers."""
    choose = random.Random(f"{seed} {number}")
    names = [name for name in _torch_modules().listed_modules() if name not in _not_trained()]
    module = choose.choice(names)
    kind = choose.choice(_optimizers())
    known = inspect.signature(getattr(optim, kind)).parameters
    settings = {name: choose.choice(values) for name, values in COMMON.items() if name in known}
    settings = {name: value for name, value in settings.items() if value != known[name].default}
    training = choose.random() < 0.7
    scheduler = choose.choice([None, *SCHEDULERS])
    if scheduler == "ReduceLROnPlateau" and not training:
        scheduler = None  # the loop by hand trains in train mode after it has evaluated
    return Pair(
        number=number,
        module=module,
        sample=choose.randrange(_torch_modules().sample_count(module)),
        training=training,
        dtype=choose.choice(["float32", "float64"]),
        optimizer=kind,
        settings={"lr": choose.choice([0.001, 0.01])} | settings,
        tensor_lr=choose.random() < 0.2,
        scheduler=scheduler if choose.random() < 0.6 else None,
        max_grad_norm=choose.choice([None, None, 0.1, 1.0]),
    )


def try_one(pair: Pair, directory: Path, counts: Counts, runs: dict[str, Pair]) -> None:
    """Train by hand and by everystep, and compare; what has a run is put among the runs."""
    options: dict[str, Any] = {"steps": STEPS, "max_grad_norm": pair.max_grad_norm}
    try:
        made = pair.make()
        losses = by_hand(made, **options)
    except Exception:
        counts.redrawn += 1
        return
    expected = contents(made)
    counts.trained += 1
    made = pair.make()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            run = by_train(made, run=directory, **options)
    except Exception as error:
        counts.failures.append((f"{type(error).__name__}: {error}", pair))
        return
    runs[directory.name] = pair
    engine = run.facts.training.engine
    if engine.reason is None:
        counts.by_program += 1
    else:
        counts.eager[engine.reason] += 1
    found = contents(made)
    differ = [name for name in expected | found if expected.get(name) != found.get(name)]
    if not _same(run.losses["loss"].to_list(), losses):
        differ.insert(0, "loss")
    if differ:
        counts.failures.append((f"other bits than by hand: {', '.join(differ[:4])}", pair))
    else:
        counts.same += 1


def _same(recorded: Sequence[float | None], losses: Sequence[float]) -> bool:
    """Return whether both are the same numbers; a loss that is not a number is recorded as none."""
    numbers = [math.nan if loss is None else loss for loss in recorded]
    return len(numbers) == len(losses) and all(
        one == other or (math.isnan(one) and math.isnan(other))
        for one, other in zip(numbers, losses, strict=True)
    )


# Verifying, in a process that has trained nothing.


def verify_in_a_new_process(directory: Path, seed: int, runs: dict[str, Pair], counts: Counts) -> None:
    """Verify the runs of a directory, and count those that are exact."""
    module = "benchmarks.random_pairs"
    command = [sys.executable, "-m", module, "--verify", str(directory), "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    words = dict(json.loads(line) for line in done.stdout.splitlines())
    for name, pair in runs.items():
        word = words.get(name, f"the process ended with {done.returncode}: {done.stderr[-300:]}")
        if word is None:
            counts.exact += 1
        else:
            counts.failures.append((f"not verified: {word}", pair))


def verify_all(directory: Path, seed: int) -> None:
    """Verify every run of a directory; print the name of each, and what is not exact, as JSON lines."""
    for path in sorted(directory.iterdir()):
        try:
            word = verify_one(path, seed)
        except Exception as error:
            word = f"{type(error).__name__}: {error}"
        print(json.dumps([path.name, word]), flush=True)


def verify_one(path: Path, seed: int) -> str | None:
    """Return what is not exact of a run, or None; what it trained is made again only for eager steps."""
    run = everystep.open(path)
    if (run.facts.training.engine or EAGERLY).eager_from is not None:
        made = draw(int(path.name), seed).make()
        run = everystep.open(
            path, model=made.model, loss=made.loss, optimizer=made.optimizer, data=(made.x, made.y)
        )
    found = run.verify(processes=1, progress=False)
    if found.is_exact:
        return None
    states = sorted({difference.tensor for difference in found.states})
    parts = [f"{found.different_steps} losses differ"] if found.different_steps else []
    parts += [f"{', '.join(states[:4])} differ in snapshots"] if states else []
    return "; ".join([*parts, *found.problems])


# What is printed.


def report(counts: Counts, seconds: float) -> str:
    """Return the counts, why steps were eager, and every failure, as lines."""
    lines = [
        f"torch {torch.__version__}: {counts.trained} pairs of {STEPS} steps, in {seconds:.0f} seconds; "
        f"{counts.redrawn} others cannot be trained by hand.",
        f"- {counts.same} have the bits of the loop by hand,",
        f"- {counts.exact} are verified by a new process,",
        f"- {counts.by_program} are taken by program.",
    ]
    lines += [f"  - {number} eagerly: {reason}" for reason, number in counts.eager.most_common()]
    lines.append(f"{len(counts.failures)} failures" + (":" if counts.failures else "."))
    failed: dict[str, list[Pair]] = {}
    for word, pair in counts.failures:
        failed.setdefault(word, []).append(pair)
    for word, pairs in sorted(failed.items(), key=lambda each: -len(each[1])):
        lines += [f"- {len(pairs)}: {word}", *(f"  - {pair}" for pair in pairs)]
    return "\n".join(lines)


def _progress(counts: Counts, count: int, pair: Pair | None) -> None:
    if pair is None or pair.number % 20 == 0:
        failed = len(counts.failures)
        print(f"{counts.trained} of {count} pairs, {failed} failures", file=sys.stderr, flush=True)


# What is known of torch, imported when it is needed: torch's list of modules takes seconds.


@cache
def _torch_modules() -> Any:
    from hypothesis import settings

    settings.register_profile("everystep", deadline=None)
    from tests.step import torch_modules

    return torch_modules


def _not_trained() -> dict[str, str]:
    names: dict[str, str] = _torch_modules().NOT_TRAINED
    return names


@cache
def _optimizers() -> list[str]:
    """Return the names of torch's optimizers that can train any pair."""
    return sorted(
        name
        for name, kind in vars(optim).items()
        if isinstance(kind, type) and issubclass(kind, optim.Optimizer)
        if kind is not optim.Optimizer and name not in LEFT_OUT
    )


if __name__ == "__main__":
    main()
