"""Where two trainings part, computed by hand, operation after operation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import everystep
from benchmarks.faults.setups import Setup, Setups
from everystep import numerics
from everystep.experiment.batches import Batches
from everystep.step.state import same_bits

__all__ = ["Parting", "Seen", "parting"]


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


def parting(setups: Setups, runs: tuple[everystep.Run, everystep.Run]) -> Parting | None:
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


class _Forward(NamedTuple):
    """The tensors of a forward pass, and its operations."""

    before: Tensor
    hidden: Tensor
    given: Tensor
    prediction: Tensor
    loss: Tensor
    seen: list[Seen]


def _by_hand(setup: Setup) -> Iterator[list[Seen]]:
    """Yield what each operation of each step gives, in the order in which torch runs them."""
    model, x, y = setup.make()
    first, last = _layers(model)
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
        forward = _forward(setup, model, batch_x, batch_y)
        backward, gradients = _backward(setup, model, forward)
        seen = [*forward.seen, *backward, *_update(setup, optimizer, parameters, gradients)]
        yield [each._replace(results=[t.detach().clone() for t in each.results]) for each in seen]


def _layers(model: nn.Sequential) -> tuple[nn.Linear, nn.Linear]:
    first, last = model[0], model[-1]
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    return first, last


def _forward(setup: Setup, model: nn.Sequential, x: Tensor, y: Tensor) -> _Forward:
    first, last = _layers(model)
    before = nn.functional.linear(x, first.weight, first.bias)
    hidden = model[1](before)
    seen = [
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
    loss = nn.functional.mse_loss(prediction, y, reduction=setup.reduction)
    seen += [
        Seen("forward", str(len(model) - 1), "aten.addmm.default", [prediction]),
        Seen("loss", None, "aten.mse_loss.default", [loss]),
    ]
    return _Forward(before, hidden, given, prediction, loss, seen)


def _backward(setup: Setup, model: nn.Sequential, forward: _Forward) -> tuple[list[Seen], list[Tensor]]:
    """Return the operations, and the gradients of the parameters."""
    first, last = _layers(model)
    end = str(len(model) - 1)
    wanted = [forward.prediction, forward.given, last.weight, last.bias]
    wanted += [forward.hidden, forward.before, first.weight, first.bias]
    slopes = torch.autograd.grad(forward.loss, wanted)
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
    seen = [Seen("backward", None, "aten.ones_like.default", [torch.ones_like(forward.loss)])]
    for position, ((module, operator), slope) in enumerate(zip(operators, slopes, strict=True)):
        if position != 4 or setup.dropout:
            seen.append(Seen("backward", module, operator, [slope]))
    return seen, [slopes[6], slopes[7], slopes[2], slopes[3]]


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
        with _Operations() as operations:
            optimizer.step()
        seen += operations.seen
    return seen


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects the operations of an optimizer's step, with a copy of what each gave."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[Seen] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and str(func) != "aten.lift_fresh.default":
            given = result.detach().clone() if isinstance(result, Tensor) else torch.tensor(result)
            self.seen.append(Seen("update", None, str(func), [given]))
        return result


_ACTIVATIONS = {
    "Tanh": ("aten.tanh.default", "aten.tanh_backward.default"),
    "ReLU": ("aten.relu.default", "aten.threshold_backward.default"),
}
