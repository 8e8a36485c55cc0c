"""Loops and step functions of random actions: each must do the same recorded, and open again.

A loop is data: two models, two optimizers, and for each turn a list of actions. An action that torch
refuses (a second backward pass, say) is caught by the loop, which goes on, as people's loops do. A step
function takes the first turn of a loop at each step.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from pytest import MonkeyPatch
from tests.descent import Unrecorded, seeded
from tests.snapshots import take_snapshots_every
from tests.training.engine_cases import Signs
from torch import Tensor, nn, optim
from torch.func import functional_call
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import everystep
from everystep.errors import EverystepError, TrainingError

__all__ = [
    "FORKED",
    "FUNCTIONS",
    "LOOPS",
    "STOPPED",
    "Function",
    "Loop",
    "Played",
    "fork_and_compare",
    "play",
    "record_and_compare",
    "resume_and_compare",
    "train_and_compare",
]

#: What an action is: its name, and a small number that it may use.
Action = tuple[str, int]

MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)),
    "drops": lambda: nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)
    ),
    "tied": lambda: _Tied(),
    "recurrent": lambda: _Recurrent(),
    "double": lambda: nn.Sequential(nn.Linear(6, 4), nn.GELU(), nn.LayerNorm(4), nn.Linear(4, 3)),
}


OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "SGD": lambda p: optim.SGD(p, lr=0.05),
    "momentum": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "Adam": lambda p: optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW fused": lambda p: optim.AdamW(p, lr=0.01, fused=True),
    "RMSprop foreach": lambda p: optim.RMSprop(p, lr=0.01, foreach=True, centered=True),
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.05),
    "descent": lambda p: everystep.GradientDescent(p, lr=0.05),
    "averaged": lambda p: optim.NAdam(p, lr=0.01),
    "signs": lambda p: Signs(p, lr=0.01),
}


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.last.weight = self.first.weight
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        found: Tensor = self.last(self.first(x).relu())[:, :3]
        return found


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(2, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.new_zeros(len(x), 4)
        for part in x.split(2, dim=1):
            hidden = self.cell(part, hidden)
        found: Tensor = self.head(hidden)
        return found


class _Removed:
    def __init__(self, handle: Any) -> None:
        self.close = handle.remove


class MishapError(Exception):
    """What a loop raises itself."""


@dataclass(frozen=True)
class Loop:
    """A loop as data.

    models, optimizers: keys; data: how batches come; turns: their actions; interval: the steps between
    two snapshots, 0 as everystep chooses them.
    """

    models: tuple[str, str]
    optimizers: tuple[str, str]
    data: str
    turns: tuple[tuple[Action, ...], ...]
    interval: int


@dataclass
class Played:
    """What a loop did. told: what torch refused; states: digests of the model after each turn; left:
    digests of all that it left; losses: what it logged as loss, at each turn that ended.
    """

    told: list[str]
    states: list[str]
    left: dict[str, str]
    losses: list[float]


# What a loop carries, and its actions.


class Things:
    """What the actions of a loop work on."""

    def __init__(self, loop: Loop) -> None:
        seeded()
        self.models = [MODELS[name]() for name in loop.models]
        self.optimizers = [
            OPTIMIZERS[name](list(model.parameters()))
            for name, model in zip(loop.optimizers, self.models, strict=True)
        ]
        self.scheduler = optim.lr_scheduler.ExponentialLR(self.optimizers[0], gamma=0.9)
        self.average = copy.deepcopy(self.models[0]).eval()
        self.carried: dict[str, Any] = {"hidden": torch.zeros(3), "count": 0}
        self.generator = torch.Generator().manual_seed(5)
        self.beginning = [copy.deepcopy(model.state_dict()) for model in self.models]
        self.saved = [copy.deepcopy(optimizer.state_dict()) for optimizer in self.optimizers]
        self.loss: Tensor | None = None
        self.kept: Tensor | None = None
        self.logged = math.nan

    def parts(self) -> dict[str, Any]:
        model, other = self.models
        one, two = self.optimizers
        return {
            **{"model": model, "other": other, "one": one, "two": two, "scheduler": self.scheduler},
            **{"average": self.average, "carried": self.carried},
        }

    def state(self) -> dict[str, Tensor]:
        """Return what `run.parameters` returns, sorted by name."""
        found = dict(self.models[0].state_dict())
        for name, model in (("other", self.models[1]), ("average", self.average)):
            found |= {f"{name}.{key}": tensor for key, tensor in model.state_dict().items()}
        return dict(sorted(found.items()))

    def parameters(self, number: int) -> list[Tensor]:
        return list(self.models[number % 2].parameters())

    def add(self, loss: Tensor) -> None:
        self.loss = loss if self.loss is None else self.loss + loss


ACTIONS: dict[str, Callable[[Things, Any, Tensor, Tensor, int], Any]] = {}


def action(function: Callable[[Things, Any, Tensor, Tensor, int], Any]) -> Any:
    ACTIONS[function.__name__] = function
    return function


@action
def forward(t, recording, x, y, n):
    t.add(functional.mse_loss(t.models[n % 2](x), y))


@action
def forward_of_noise(t, recording, x, y, n):
    t.add(functional.smooth_l1_loss(t.models[n % 2](x + 0.1 * torch.randn_like(x)), y))


@action
def forward_detached(t, recording, x, y, n):
    aim = t.models[n % 2](x).detach()
    t.add(functional.mse_loss(t.models[1 - n % 2](x), aim))


@action
def forward_without_gradients(t, recording, x, y, n):
    with torch.no_grad():
        t.carried["hidden"] = t.models[n % 2](x).mean(0)


@action
def forward_of_what_is_carried(t, recording, x, y, n):
    t.add((t.models[n % 2](x) * t.carried["hidden"]).pow(2).mean())


@action
def backward(t, recording, x, y, n):
    if t.loss is not None:
        t.loss.backward(retain_graph=n % 3 == 0)


@action
def backward_anew(t, recording, x, y, n):
    functional.mse_loss(t.models[n % 2](x), y).backward()


@action
def gradients_by_hand(t, recording, x, y, n):
    parameters = [p for p in t.parameters(n) if p.requires_grad]
    if t.loss is not None and parameters:
        found = torch.autograd.grad(t.loss, parameters, allow_unused=True, retain_graph=True)
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = gradient


@action
def step(t, recording, x, y, n):
    t.optimizers[n % 2].step()


@action
def zero(t, recording, x, y, n):
    t.optimizers[n % 2].zero_grad(set_to_none=n < 4)


@action
def clip(t, recording, x, y, n):
    (nn.utils.clip_grad_norm_ if n % 2 else nn.utils.clip_grad_value_)(t.parameters(n // 2), 0.1)


@action
def scale_gradients(t, recording, x, y, n):
    for parameter in t.parameters(n):
        if parameter.grad is not None:
            parameter.grad.mul_(0.5)


@action
def drop_a_gradient(t, recording, x, y, n):
    t.parameters(n)[0].grad = None


@action
def freeze(t, recording, x, y, n):
    t.parameters(n)[n % 3].requires_grad_(n >= 4)


@action
def mode(t, recording, x, y, n):
    t.models[n % 2].train(n >= 4)


@action
def edit(t, recording, x, y, n):
    with torch.no_grad():
        parameter = t.parameters(n)[n % 3]
        [parameter.mul_, parameter.sub_][n % 2](0.9)
        parameter[0] = 0.1 * n


@action
def edit_data(t, recording, x, y, n):
    t.parameters(n)[0].data.add_(torch.randn(()) * 0.01)


@action
def replace_data(t, recording, x, y, n):
    parameter = t.parameters(n)[0]
    parameter.data = parameter.data.clone() * 0.5


@action
def replace_a_parameter(t, recording, x, y, n):
    module = next(m for m in t.models[n % 2].modules() if isinstance(m, nn.Linear))
    module.bias = nn.Parameter(torch.full_like(module.bias, 0.1))
    if n >= 4:
        t.optimizers[n % 2].add_param_group({"params": [module.bias]})


@action
def edit_a_batch(t, recording, x, y, n):
    x.add_(0.5)


@action
def average(t, recording, x, y, n):
    with torch.no_grad():
        pairs = zip(t.average.parameters(), t.models[0].parameters(), strict=True)
        for one, two in pairs:
            one.lerp_(two, 0.1) if n % 2 else one.copy_(two)


@action
def load_model(t, recording, x, y, n):
    t.models[n % 2].load_state_dict(t.beginning[n % 2])


@action
def load_optimizer(t, recording, x, y, n):
    saved = t.saved[n % 2]  # torch takes its tensors, so that later steps change them
    t.optimizers[n % 2].load_state_dict(saved if n < 4 else copy.deepcopy(saved))


@action
def save_optimizer(t, recording, x, y, n):
    t.saved[n % 2] = copy.deepcopy(t.optimizers[n % 2].state_dict())


@action
def forget_moments(t, recording, x, y, n):
    t.optimizers[n % 2].state.clear()


@action
def rate(t, recording, x, y, n):
    t.optimizers[n % 2].param_groups[0]["lr"] = 0.01 * (n + 1)


@action
def advance_scheduler(t, recording, x, y, n):
    t.scheduler.step()


@action
def draw(t, recording, x, y, n):
    drawn = [
        lambda: torch.rand(3),
        lambda: torch.rand(3, generator=t.generator),
        lambda: torch.full((3,), random.random()),
        lambda: torch.from_numpy(np.random.rand(3).astype(np.float32)),
    ]
    t.carried["hidden"] = drawn[n % 4]()


@action
def seed(t, recording, x, y, n):
    torch.manual_seed(n)


@action
def branch(t, recording, x, y, n):
    if t.loss is not None and t.loss.item() > 0.2 * n:
        t.add(t.loss * 0.5)


@action
def count(t, recording, x, y, n):
    t.carried["count"] += 1
    t.add(t.models[0](x).mean() * t.carried["count"])


@action
def keep(t, recording, x, y, n):
    t.kept = t.loss if n % 2 else t.models[0](x).mean().detach()


@action
def use_what_was_kept(t, recording, x, y, n):
    if t.kept is not None:
        t.add(t.kept * 0.5)


@action
def forget_loss(t, recording, x, y, n):
    t.loss = None


@action
def log(t, recording, x, y, n):
    if t.loss is not None:
        recording.log(loss=t.loss)
        t.logged = t.loss.item()


@action
def log_a_number(t, recording, x, y, n):
    number = [0.0, -0.0, math.nan, math.inf, -math.inf, 1e300, 5e-324, 0.1][n]
    recording.log(loss=number)
    t.logged = number


@action
def log_others(t, recording, x, y, n):
    recording.log(norm=sum(p.detach().norm() for p in t.parameters(n)), number=n, flag=True)


@action
def evaluate(t, recording, x, y, n):
    with recording.paused(), torch.no_grad():
        t.average(x).mean().item()


@action
def mishap(t, recording, x, y, n):
    with contextlib.suppress(MishapError):
        t.add(t.models[n % 2](x).sum())
        raise MishapError


@action
def make_infinite(t, recording, x, y, n):
    if t.loss is not None:
        t.loss = t.loss / 0.0


@action
def swap_with_average(t, recording, x, y, n):
    for one, two in zip(t.models[0].parameters(), t.average.parameters(), strict=True):
        one.data, two.data = two.data, one.data


@action
def zero_now_and_then(t, recording, x, y, n):
    t.carried["count"] += 1
    if t.carried["count"] % (2 + n % 3) == 0:
        t.optimizers[n % 2].zero_grad(set_to_none=n >= 4)


@action
def step_with_closure(t, recording, x, y, n):
    def closure():
        t.optimizers[n % 2].zero_grad()
        loss = functional.mse_loss(t.models[n % 2](x), y)
        loss.backward()
        return loss

    t.loss = t.optimizers[n % 2].step(closure)


@action
def step_by_hand(t, recording, x, y, n):
    with torch.no_grad():
        for parameter in t.parameters(n):
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad


@action
def forward_checkpointed(t, recording, x, y, n):
    found = checkpoint(t.models[n % 2], x, use_reentrant=n >= 4)
    t.add(functional.mse_loss(found, y))


@action
def forward_in_half(t, recording, x, y, n):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = t.models[n % 2](x)
    t.add(functional.mse_loss(found.float(), y))


@action
def forward_with_hook(t, recording, x, y, n):
    with t.models[n % 2].register_forward_hook(lambda module, given, found: found * 0.5):
        t.add(functional.mse_loss(t.models[n % 2](x), y))


@action
def hook_on_gradients(t, recording, x, y, n):
    parameter = t.parameters(n)[0]
    if parameter.requires_grad:
        with contextlib.closing(_Removed(parameter.register_hook(lambda gradient: gradient * 0.5))):
            functional.mse_loss(t.models[n % 2](x), y).backward()


@action
def functional_forward(t, recording, x, y, n):
    model = t.models[n % 2]
    moved = {name: each * 0.9 for name, each in model.named_parameters()}
    t.add(functional.mse_loss(functional_call(model, moved, (x,)), y))


@action
def penalty_of_gradients(t, recording, x, y, n):
    parameters = [p for p in t.parameters(n) if p.requires_grad]
    if parameters:
        loss = functional.mse_loss(t.models[n % 2](x), y)
        found = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        t.add(sum(each.pow(2).sum() for each in found if each is not None))


@action
def keep_the_best(t, recording, x, y, n):
    if t.loss is not None and t.loss.item() < t.carried.get("best", math.inf):
        t.carried["best"] = t.loss.item()
        t.carried["weights"] = copy.deepcopy(t.models[0].state_dict())


@action
def load_the_best(t, recording, x, y, n):
    if "weights" in t.carried:
        t.models[0].load_state_dict(t.carried["weights"])


#: Programs may run them: they neither read numbers nor change what only Python knows.
PURE = {
    *("forward", "forward_of_noise", "forward_detached", "forward_of_what_is_carried", "backward"),
    *("backward_anew", "gradients_by_hand", "step", "zero", "clip", "scale_gradients"),
    *("drop_a_gradient", "edit", "edit_data", "average", "load_model", "swap_with_average"),
    *("step_by_hand", "step_with_closure", "forward_checkpointed", "forward_in_half"),
    *("forward_with_hook", "functional_forward", "penalty_of_gradients"),
}
#: Steps of a step function.
STEPS = 14
#: They end a turn.
ENDS = {"continue", "break", "raise"}


class Alone(Unrecorded):
    """A recording that does nothing."""

    def paused(self) -> Any:
        return contextlib.nullcontext()


def play(
    loop: Loop,
    record: Callable[..., Any],
    until: int | None = None,
    rates: Mapping[int, float] = MappingProxyType({}),
) -> Played:
    """Run a loop.

    until: the turn before which a `break` ends it; rates: learning rates that turns begin with, by turn.
    """
    things = Things(loop)
    played = Played([], [], {}, [])
    try:
        with (
            MonkeyPatch.context() as patch,
            contextlib.suppress(MishapError),
            record(**things.parts()) as recording,
        ):
            if loop.interval:
                take_snapshots_every(patch, loop.interval)
            for number, batch in recording.steps(enumerate(_batches(loop))):
                for group in chain(*[optimizer.param_groups for optimizer in things.optimizers]):
                    group["lr"] = rates.get(number, group["lr"])
                _turn(things, recording, batch, loop.turns[number], played)
                if loop.turns[number][-1:] == (("break", 0),) or number + 1 == until:
                    break
    except EverystepError as error:
        played.told.append(f"{type(error).__name__}: {error}")
    played.left = _left(things)
    return played


def _turn(
    things: Things, recording: Any, batch: Any, actions: tuple[Action, ...], played: Played
) -> None:
    x, y = _pair(batch)
    things.loss, things.logged = None, math.nan
    for name, number in actions:
        if name == "raise":
            raise MishapError
        if name in ENDS:
            break
        try:
            ACTIONS[name](things, recording, x, y, number)
        except (RuntimeError, ValueError, IndexError) as error:
            if isinstance(error, EverystepError):
                raise
            played.told.append(f"{name}: {type(error).__name__}: {error}")
    with recording.paused():
        played.states.append(digest(things.state()))
    played.losses.append(things.logged)


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    return (batch["x"], batch["more"][0]) if isinstance(batch, dict) else batch


def _batches(loop: Loop) -> Iterator[Any]:
    generator = torch.Generator().manual_seed(1)
    count = len(loop.turns)
    x, y = (torch.randn(8 * count, n, generator=generator) for n in (6, 3))
    if loop.data == "loader":
        yield from DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
    for one, two in zip(x.split(8), y.split(8), strict=True):
        if loop.data == "nested":
            yield {"x": one.clone(), "more": [two, "words", None, 3]}
        elif loop.data == "views":
            yield one, two
        elif loop.data == "drawn":
            yield torch.randn(8, 6), two


def digest(tensors: dict[str, Tensor]) -> str:
    """Return one digest of names, dtypes, shapes and bits."""
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _left(t: Things) -> dict[str, str]:
    """Return digests of everything that a loop leaves."""
    left = {f"model {n}": digest(model.state_dict()) for n, model in enumerate(t.models)}
    for n, model in enumerate(t.models):
        named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        left[f"gradients {n}"] = digest(named)
        left[f"frozen {n}"] = repr([p.requires_grad for p in model.parameters()])
    for n, optimizer in enumerate(t.optimizers):
        left[f"optimizer {n}"] = repr(_plain(optimizer.state_dict()))
    left |= {"average": digest(t.average.state_dict()), "carried": repr(_plain(t.carried))}
    left["scheduler"] = repr(_plain(t.scheduler.state_dict()))
    left["torch"] = digest({"": torch.get_rng_state()})
    left["numpy"] = repr(np.random.rand(2).tolist())
    left["python"] = repr(random.random())
    return left


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return digest({"": value})
    if isinstance(value, dict):  # nothing depends on the order in which an optimizer made its entries
        return {key: _plain(value[key]) for key in sorted(value, key=str)}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


# What is compared.


def record_and_compare(loop: Loop, directory: Path) -> str:
    """Record a loop and verify its run; return "exact", or "empty": it has no step.

    Raises:
        AssertionError: something differs that should not, or an error is not in words.
    """
    alone = play(loop, lambda **parts: Alone())
    recorded = play(loop, lambda **parts: everystep.record(run=directory, **parts))
    assert recorded.told == alone.told
    assert recorded.left == alone.left
    run = everystep.open(directory)
    losses = [repr(float(loss)) for loss in _losses(run)]
    assert losses == [_as_recorded(loss) for loss in alone.losses[: len(losses)]]
    # A turn that does nothing before `break` is not a step: `zip` ends so.
    nothing = ("break", 0) in loop.turns[len(alone.losses) - 1] and math.isnan(alone.losses[-1])
    assert len(alone.losses) - nothing <= len(losses) <= len(alone.losses)
    if not losses:
        return "empty"
    verified = run.verify(processes=1, progress=False)
    assert verified.is_exact, repr(verified)
    for number, loss in enumerate(losses, start=1):
        step = run[number]
        assert step.is_exact and repr(float(step.loss) + 0.0) == loss, number
        assert digest(dict(sorted(run.parameters(number).items()))) == alone.states[number - 1], number
    return "exact"


#: They change what a loop carries outside of its parts, which a continued loop does not have.
NOT_RESUMED = {"keep", "use_what_was_kept", "save_optimizer"}


def resume_and_compare(stopped: tuple[Loop, int], directory: Path) -> str:
    """Record a loop up to a turn, continue, and fork it there; return "same", or why it is refused.

    Raises:
        AssertionError: it does not end with the bits of the loop that was not stopped.
    """
    loop, until = stopped
    run, fork = directory / "run", directory / "fork"
    alone = play(loop, lambda **parts: Alone())
    play(loop, lambda **parts: everystep.record(run=run, **parts), until)
    again = play(loop, lambda **parts: everystep.record(run=run, resume=True, **parts))
    if refused := _errors(again):
        return f"refused: {refused[0]}"
    _compare_continued(alone, again, run)
    at = min(until, len(everystep.open(run).losses))
    forked = play(loop, lambda **parts: everystep.record(run=fork, fork=run, at=at, **parts))
    if refused := _errors(forked):
        return f"fork refused: {refused[0]}"
    _compare_continued(alone, forked, fork)
    return "same"


def _errors(played: Played) -> list[str]:
    return [text for text in played.told if text.startswith(("RunError", "UsageError"))]


def _compare_continued(alone: Played, again: Played, directory: Path) -> None:
    different = [name for name, found in again.left.items() if found != alone.left[name]]
    assert not different, different
    run = everystep.open(directory)
    losses = [repr(float(loss)) for loss in _losses(run)]
    assert losses == [_as_recorded(loss) for loss in alone.losses[: len(losses)]]
    verified = run.verify(processes=1, progress=False)
    assert verified.is_exact, repr(verified)


#: They set a rate themselves, or add parameters with a rate of their own.
NOT_FORKED = {"rate", "advance_scheduler", "load_optimizer", "replace_a_parameter"}


def fork_and_compare(forked: tuple[Loop, int, float], directory: Path) -> str:
    """Record a loop, and fork it at another rate by its programs; return "same", or why it is refused.

    Raises:
        AssertionError: a step of the fork differs from that of the loop with this rate.
    """
    loop, at, rate = forked
    # A run with a scheduler has no other rate.
    play(loop, lambda scheduler, **parts: everystep.record(run=directory / "run", **parts))
    run = everystep.open(directory / "run")
    at = min(at, len(run.losses) - 1)
    if at < 0:
        return "empty"
    try:
        fork = run.fork(at, lr=rate, run=directory / "fork", progress=False)
    except EverystepError as error:
        return f"refused: {error}"
    by_hand = play(loop, lambda **parts: Alone(), rates={at: rate})
    losses = [repr(float(loss)) for loss in _losses(fork)]
    assert losses == [_as_recorded(loss) for loss in by_hand.losses[: len(losses)]]
    for number in range(1, len(losses) + 1):
        found = digest(dict(sorted(fork.parameters(number).items())))
        assert found == by_hand.states[number - 1], number
    assert fork.verify(processes=1, progress=False).is_exact
    return "same" if len(losses) == len(run.losses) else "same, up to a number that Python reads"


@dataclass(frozen=True)
class Function:
    """A step function, of which each step has the actions of a loop's first turn.

    is_vouched: whether programs may run its steps.
    """

    loop: Loop
    is_vouched: bool

    def make(self) -> tuple[Things, list[Any], Callable[[Any], Any]]:
        """Return what its actions work on, its batches, and the step; the same at every call."""
        things = Things(self.loop)

        def step(batch: Any) -> Any:
            x, y = _pair(batch)
            things.loss = None
            for name, number in self.loop.turns[0]:
                ACTIONS[name](things, Alone(), x, y, number)
            return 0.0 if things.loss is None else things.loss

        return things, list(_batches(self.loop)), step


def train_and_compare(function: Function, directory: Path) -> str:
    """Train by hand and by everystep; return who ran the steps, "program" or "python", or "raises".

    A step that is vouched for may be "refused".

    Raises:
        AssertionError: a bit differs, or the run does not verify.
    """
    alone, batches, step = function.make()
    losses, error = [], None
    try:
        for number in range(STEPS):
            losses.append(float(step(batches[number % len(batches)])) + 0.0)
    except Exception as raised:
        error = str(raised)
    left = _left(alone)
    things, batches, step = function.make()
    engine = "program" if function.is_vouched else "auto"
    options = {"steps": STEPS, "run": directory, "engine": engine, "progress": False}
    try:
        run = everystep.train(step, batches, parts=things.parts(), **options)
    except TrainingError as refused:
        assert function.is_vouched and "no program can run these steps" in str(refused), refused
        return "refused"
    except Exception as raised:
        assert error is not None and error in str(raised), raised
        return "raises"
    assert error is None, error
    found = _left(things)
    assert found == left, [name for name in left if left[name] != found[name]]
    assert repr(_losses(run)) == repr(losses)
    verified = run.verify(processes=1, progress=False)
    assert verified.is_exact, repr(verified)
    by = run.facts.training.loop.function
    return "program" if by is not None and by.by_program else "python"


def _losses(run: everystep.Run) -> list[float]:
    return [math.nan if loss is None else loss for loss in run.losses["loss"].to_list()]


def _as_recorded(loss: float) -> str:
    return repr(float(loss) + 0.0)  # SQLite stores -0.0 as 0.0


_actions = st.tuples(st.sampled_from(sorted(ACTIONS)), st.integers(0, 7))
_ordinary = st.sampled_from(
    [
        (("forward_of_noise", 0), ("backward", 1), ("step", 0), ("zero", 0), ("log", 0)),
        (("forward", 0), ("backward", 1), ("step", 0), ("zero", 0), ("log", 0)),
        (("zero", 5), ("forward", 1), ("backward", 1), ("clip", 1), ("step", 1), ("log", 0)),
    ]
)
_mixed = st.tuples(_ordinary, st.lists(st.tuples(_actions, st.integers(0, 5)), max_size=4)).map(
    lambda pair: _inserted(*pair)
)


def _inserted(actions: tuple[Action, ...], more: list[tuple[Action, int]]) -> tuple[Action, ...]:
    found = list(actions)
    for each, place in more:
        found.insert(place, each)
    return tuple(found)


_turns = _mixed | st.lists(_actions, max_size=8).map(tuple)
_ending = st.sampled_from([(), (), (), (), (), (("continue", 0),), (("break", 0),), (("raise", 0),)])


@st.composite
def _loops(draw: Any) -> Loop:
    kinds = draw(st.lists(_turns, min_size=1, max_size=3))
    chosen = draw(st.lists(st.integers(0, len(kinds) - 1), min_size=1, max_size=8))
    turns = [kinds[number] for number in chosen]
    turns[-1] = turns[-1] + draw(_ending)
    pair = lambda keys: st.tuples(st.sampled_from(sorted(keys)), st.sampled_from(sorted(keys)))  # noqa: E731
    kind = draw(st.sampled_from(["loader", "nested", "views", "drawn"]))
    interval = draw(st.sampled_from([0, 1, 2, 3]))
    return Loop(draw(pair(MODELS)), draw(pair(OPTIMIZERS)), kind, tuple(turns), interval)


#: Random loops.
LOOPS = _loops()


def _is_resumed(loop: Loop) -> bool:
    actions = [each for turn in loop.turns for each in turn]
    return not any(
        name in NOT_RESUMED
        or name in ENDS
        or (name == "draw" and number % 4 == 1)
        or (name == "load_optimizer" and number < 4)
        for name, number in actions
    )


#: Random loops, and the turn after which they stop and continue.
STOPPED = st.tuples(LOOPS.filter(_is_resumed), st.integers(1, 7))


def _is_forked(loop: Loop) -> bool:
    return NOT_FORKED.isdisjoint(name for turn in loop.turns for name, _ in turn)


#: Random loops, the step after which they are forked, and the rate from there on.
FORKED = st.tuples(LOOPS.filter(_is_forked), st.integers(0, 6), st.sampled_from([0.0, 1e-3, 0.2]))


@st.composite
def _functions(draw: Any) -> Function:
    is_vouched = draw(st.booleans())
    among = st.tuples(st.sampled_from(sorted(PURE if is_vouched else ACTIONS)), st.integers(0, 7))
    more = draw(st.lists(st.tuples(among, st.integers(0, 5)), max_size=4))
    turn = _inserted(tuple(each for each in draw(_ordinary) if each[0] != "log"), more)
    return Function(replace(draw(LOOPS), turns=(turn,) * 4), is_vouched)


#: Random step functions.
FUNCTIONS = _functions()
