"""Whether diff finds injected faults: the exact step and the exact operation, and how fast.

`python -m benchmarks.faults [--count 500] [--seed 0]`. A pair of small runs, one of them with a random
fault of one of seven kinds, is compared by diff. Where the two part is computed apart from that: both
trainings are written out by hand, operation after operation, and gone through in lockstep until a
result has other bits. Pairs in which no operation of any step has other bits are counted apart.
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
from collections.abc import Callable, Iterator
from contextlib import chdir
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from everystep import numerics

numerics.prepare()  # before torch computes

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import everystep  # noqa: E402
from everystep.experiment.batches import Batches  # noqa: E402
from everystep.replay.diff import Difference  # noqa: E402
from everystep.step.check import same_bits  # noqa: E402

__all__ = ["main"]

Fault = Callable[[nn.Sequential, Tensor, Tensor], None]


@dataclass(frozen=True)
class Setup:
    """A training: Linear, activation, perhaps Dropout, Linear; the mean or the sum of squares.

    fault: changes the model, x or y before the first step, or draws a random number; changes: at which
    states a fork begins, and its lr or its seed.
    """

    seed: int
    rows: int
    sizes: tuple[int, int, int]
    activation: str
    dropout: float
    reduction: str
    batch_size: int | None
    optimizer: str
    lr: float
    steps: int
    threads: int = 1
    fault: Fault = lambda model, x, y: None
    changes: dict[int, dict[str, float]] = field(default_factory=dict)

    def make(self) -> tuple[nn.Sequential, Tensor, Tensor]:
        """Return the model and the data; seeds torch's generator."""
        torch.manual_seed(self.seed)
        n_in, hidden, n_out = self.sizes
        x, y = torch.randn(self.rows, n_in), torch.randn(self.rows, n_out)
        layers: list[nn.Module] = [nn.Linear(n_in, hidden), getattr(nn, self.activation)()]
        layers += [nn.Dropout(self.dropout)] * bool(self.dropout)
        model = nn.Sequential(*layers, nn.Linear(hidden, n_out))
        with torch.no_grad():
            self.fault(model, x, y)
        return model, x, y

    def optimizer_of(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer, whose every operation is known."""
        if self.optimizer == "GradientDescent":
            return everystep.GradientDescent(model.parameters(), lr=self.lr)
        kind = getattr(torch.optim, self.optimizer)
        optimizer: torch.optim.Optimizer = kind(model.parameters(), lr=self.lr, foreach=False)
        return optimizer


class Seen(NamedTuple):
    """An operation of a step, and what it gave."""

    phase: str
    module: str | None
    operator: str
    results: list[Tensor]

    @property
    def place(self) -> tuple[str, str | None, str]:
        """What is known of it besides numbers."""
        return self.phase, self.module, self.operator


class Parting(NamedTuple):
    """Where two runs part: the step, and which of its operations (from 0)."""

    step: int
    position: int
    operation: tuple[str, str | None, str]


class Outcome(NamedTuple):
    """What came of a pair: where the bits part, if they do, and what diff says."""

    kind: str
    expected: Parting | None
    found: Parting | None
    found_thoroughly: Parting | None
    seconds: float


def main() -> None:
    """Print a row for each kind of fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500, help="pairs of runs")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    outcomes = []
    with tempfile.TemporaryDirectory() as place, chdir(place):
        for number in range(arguments.count):
            kind = list(KINDS)[number % len(KINDS)]
            outcomes.append(_outcome(kind, number, chance))
            if not _is_exact(outcomes[-1]):
                print(f"pair {number}: {outcomes[-1]}", file=sys.stderr)
    print(_table(outcomes))


def _table(outcomes: list[Outcome]) -> str:
    lines = [
        f"torch {torch.__version__}, {os.cpu_count()} cores",
        "",
        "| fault | pairs | bits differ | exact step | exact operation | only thoroughly | median ms |",
        "|---|---|---|---|---|---|---|",
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
        thorough = sum(
            each.found != each.expected and each.found_thoroughly == each.expected for each in differ
        )
        milliseconds = statistics.median(each.seconds for each in own) * 1000 if own else math.nan
        lines.append(
            f"| {kind} | {len(own)} | {len(differ)} | {steps} | {operations} | {thorough} "
            f"| {milliseconds:.1f} |"
        )
    wrong = sum(each.expected is None and each.found is not None for each in outcomes)
    lines += ["", f"operations named where no bits differ: {wrong}"]
    return "\n".join(lines)


def _is_exact(outcome: Outcome) -> bool:
    return outcome.found == outcome.expected


def _outcome(kind: str, number: int, chance: random.Random) -> Outcome:
    setups = KINDS[kind](_setup(number, chance), chance)
    one = _train(setups[0])
    other = _fork(one, setups[1]) if setups[1].changes else _train(setups[1])
    expected = _parting(setups, (one, other))
    started = time.perf_counter()
    found = one.diff(other, progress=False)
    seconds = time.perf_counter() - started
    thoroughly = found
    if _parting_of(found) != expected:
        thoroughly = one.diff(other, thorough=True, progress=False)
    return Outcome(kind, expected, _parting_of(found), _parting_of(thoroughly), seconds)


def _train(setup: Setup) -> everystep.Run:
    model, x, y = setup.make()
    return everystep.train(
        model,
        (x, y),
        loss=nn.MSELoss(reduction=setup.reduction),
        optimizer=setup.optimizer_of(model),
        batch_size=setup.batch_size,
        steps=setup.steps,
        threads=setup.threads,
        progress=False,
    )


def _fork(run: everystep.Run, setup: Setup) -> everystep.Run:
    ((at, changed),) = setup.changes.items()
    seed = changed.get("seed")
    return run.fork(at, lr=changed.get("lr"), seed=None if seed is None else int(seed), progress=False)


def _parting_of(found: Difference) -> Parting | None:
    if found.operation is None:
        return None
    observed = found.operation.one or found.operation.other
    assert observed is not None
    operation = observed.operation
    place = operation.phase, operation.module, operation.operator
    return Parting(found.operation.step, found.operation.index, place)


# Where two trainings part, computed by hand.


def _parting(setups: tuple[Setup, Setup], runs: tuple[everystep.Run, everystep.Run]) -> Parting | None:
    """Go through both by hand, step by step; the losses must be those of the runs."""
    recorded = [run.losses["loss"].to_list() for run in runs]
    names = [seen.place for seen in _steps_of(setups[0])[0]]
    known = [
        (o.operation.phase, o.operation.module, o.operation.operator) for o in runs[0][1].operations
    ]
    assert names == known, f"by hand {names}, in the run {known}"
    # Each by itself: they draw from the same generator, and may have other thread counts.
    taken = [_steps_of(setup) for setup in setups]
    for number, (one, other) in enumerate(zip(*taken, strict=True), start=1):
        for seen, losses in zip((one, other), recorded, strict=True):
            loss = next(each.results[0] for each in seen if each.phase == "loss")
            known_loss = losses[number - 1]
            assert loss.item() == known_loss or not math.isfinite(known_loss)
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            if not all(map(same_bits, a.results, b.results)):
                return Parting(number, index, a.place)
    return None


def _steps_of(setup: Setup) -> list[list[Seen]]:
    with numerics.in_force(setup.threads):
        return list(_by_hand(setup))


def _by_hand(setup: Setup) -> Iterator[list[Seen]]:
    """Yield what each operation of each step gives, in the order in which torch runs them."""
    model, x, y = setup.make()
    first, last = model[0], model[-1]
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    end = str(len(model) - 1)
    parameters: list[Tensor] = [first.weight, first.bias, last.weight, last.bias]
    optimizer = setup.optimizer_of(model)
    seed = setup.seed
    for number in range(1, setup.steps + 1):
        for name, value in setup.changes.get(number - 1, {}).items():
            if name == "lr":
                optimizer.param_groups[0]["lr"] = value
            else:
                seed = int(value)
                torch.manual_seed(seed)
        rows = Batches(setup.rows, setup.batch_size, seed).indices(number)
        batch_x, batch_y = (x, y) if rows is None else (x[rows], y[rows])
        seen: list[Seen] = []
        before = nn.functional.linear(batch_x, first.weight, first.bias)
        hidden = model[1](before)
        seen += [
            Seen("forward", "0", "aten.addmm.default", [before]),
            Seen("forward", "1", _ACTIVATIONS[setup.activation][0], [hidden]),
        ]
        given = hidden
        if setup.dropout:
            drawn = torch.empty_like(hidden).bernoulli_(1 - setup.dropout)
            noise = drawn / (1 - setup.dropout)
            given = hidden * noise
            seen += [
                Seen("forward", "2", "aten.bernoulli_.float", [drawn]),
                Seen("forward", "2", "aten.div_.Scalar", [noise]),
                Seen("forward", "2", "aten.mul.Tensor", [given]),
            ]
        prediction = nn.functional.linear(given, last.weight, last.bias)
        loss = nn.functional.mse_loss(prediction, batch_y, reduction=setup.reduction)
        seen += [
            Seen("forward", end, "aten.addmm.default", [prediction]),
            Seen("loss", None, "aten.mse_loss.default", [loss]),
        ]
        wanted = [prediction, given, last.weight, last.bias, hidden, before, first.weight, first.bias]
        slopes = torch.autograd.grad(loss, wanted)
        operators = [
            (None, "aten.mse_loss_backward.default"),
            (end, "aten.mm.default"),
            (end, "aten.mm.default"),
            (end, "aten.sum.dim_IntList"),
            ("2", "aten.mul.Tensor"),
            ("1", _ACTIVATIONS[setup.activation][1]),
            ("0", "aten.mm.default"),
            ("0", "aten.sum.dim_IntList"),
        ]
        for position, ((module, operator), slope) in enumerate(zip(operators, slopes, strict=True)):
            if position != 4 or setup.dropout:
                seen.append(Seen("backward", module, operator, [slope]))
        gradients = [slopes[6], slopes[7], slopes[2], slopes[3]]
        seen += _update(setup, optimizer, parameters, gradients)
        yield [each._replace(results=[t.detach().clone() for t in each.results]) for each in seen]


def _update(
    setup: Setup,
    optimizer: torch.optim.Optimizer,
    parameters: list[Tensor],
    gradients: list[Tensor],
) -> list[Seen]:
    seen = []
    lr = optimizer.param_groups[0]["lr"]
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
            if setup.optimizer == "GradientDescent":
                change = gradient * lr
                seen.append(Seen("update", None, "aten.mul.Tensor", [change]))
                after = parameter.sub_(change)
                seen.append(Seen("update", None, "aten.sub_.Tensor", [after.clone()]))
            elif setup.optimizer == "SGD":
                after = parameter.add_(gradient, alpha=-lr)
                seen.append(Seen("update", None, "aten.add_.Tensor", [after.clone()]))
    if setup.optimizer == "Adam":
        optimizer.step()
        after_all = [parameter.detach().clone() for parameter in parameters]
        seen.append(Seen("update", None, "torch.optim.Adam", after_all))
    return seen


_ACTIVATIONS = {
    "Tanh": ("aten.tanh.default", "aten.tanh_backward.default"),
    "ReLU": ("aten.relu.default", "aten.threshold_backward.default"),
}


# Random trainings, and faults of seven kinds.

Setups = tuple[Setup, Setup]


def _setup(number: int, chance: random.Random) -> Setup:
    rows = chance.randint(8, 40)
    return Setup(
        seed=number,
        rows=rows,
        sizes=(chance.randint(2, 12), chance.randint(3, 24), chance.randint(1, 4)),
        activation=chance.choice(["Tanh", "ReLU"]),
        dropout=chance.choice([0.0, 0.2]),
        reduction="mean",
        batch_size=chance.choice([None, chance.randint(2, rows)]),
        optimizer=chance.choice(["GradientDescent", "SGD", "Adam"]),
        lr=chance.choice([0.001, 0.01, 0.05]),
        steps=chance.randint(10, 60),
    )


def _place(tensor: Tensor, chance: random.Random) -> tuple[int, ...]:
    return tuple(chance.randrange(size) for size in tensor.shape)


def _parameter_fault(change: Callable[[Tensor], Tensor]) -> Callable[[Setup, random.Random], Setups]:
    def make(setup: Setup, chance: random.Random) -> Setups:
        number = chance.randrange(4)
        parameters = list(setup.make()[0].parameters())
        place = _place(parameters[number], chance)

        def fault(model: nn.Sequential, x: Tensor, y: Tensor) -> None:
            tensor = list(model.parameters())[number]
            tensor[place] = change(tensor[place])

        return setup, replace(setup, fault=fault)

    return make


def _up(value: Tensor) -> Tensor:
    return torch.nextafter(value, torch.tensor(math.inf))


def _swapped_rows(setup: Setup, chance: random.Random) -> Setups:
    one, other = chance.sample(range(setup.rows), 2)

    def fault(model: nn.Sequential, x: Tensor, y: Tensor) -> None:
        for tensor in (x, y):
            tensor[[one, other]] = tensor[[other, one]]

    return setup, replace(setup, fault=fault)


def _shifted_draw(setup: Setup, chance: random.Random) -> Setups:
    """One more number is drawn before the first step, or other ones from some step on."""
    setup = replace(setup, dropout=0.2)
    if chance.random() < 0.5:
        at = chance.randrange(setup.steps)
        setup = replace(setup, batch_size=None)
        return setup, replace(setup, changes={at: {"seed": chance.randrange(10**6)}})

    def fault(model: nn.Sequential, x: Tensor, y: Tensor) -> None:
        torch.rand(1)

    return setup, replace(setup, fault=fault)


def _other_lr(setup: Setup, chance: random.Random) -> Setups:
    at = chance.randrange(setup.steps)
    lr = chance.choice([setup.lr / 2, setup.lr * 1.01, setup.lr * 3])
    return setup, replace(setup, changes={at: {"lr": lr}})


def _data_value(setup: Setup, chance: random.Random) -> Setups:
    _, x, y = setup.make()
    is_input, by = chance.random() < 0.7, chance.choice([0.0, 1.0, -0.25])
    place = _place(x if is_input else y, chance)

    def fault(model: nn.Sequential, x: Tensor, y: Tensor) -> None:
        tensor = x if is_input else y
        tensor[place] = tensor[place] + by if by else _up(tensor[place])

    return setup, replace(setup, fault=fault)


def _threads(setup: Setup, chance: random.Random) -> Setups:
    """Sums of many numbers depend on how many threads share them."""
    wide = replace(
        setup,
        rows=300,
        sizes=(setup.sizes[0], setup.sizes[1], chance.choice([100, 300, 400, 500])),
        reduction=chance.choice(["mean", "sum"]),
        batch_size=chance.choice([None, 280]),
        lr=1e-7,
        steps=8,
    )
    return wide, replace(wide, threads=2)


KINDS: dict[str, Callable[[Setup, random.Random], Setups]] = {
    "an ulp in a weight": _parameter_fault(_up),
    "a sign flip": _parameter_fault(torch.neg),
    "a swapped pair of rows": _swapped_rows,
    "a shifted random draw": _shifted_draw,
    "another lr from step k": _other_lr,
    "a changed data value": _data_value,
    "another thread count": _threads,
}


if __name__ == "__main__":
    logging.captureWarnings(True)
    main()
