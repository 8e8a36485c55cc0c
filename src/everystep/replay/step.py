"""A step opened: everything in it, in the chapter's order, as tensors; and what takes it again."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from everystep.errors import UsageError
from everystep.program.execute import Observed
from everystep.program.operation import Phase
from everystep.step.advance import Hook
from everystep.step.observe import Observation
from everystep.step.state import State

__all__ = ["Batch", "ReplayStepper", "Segment", "Statistics", "Step", "Update", "statistics"]


@dataclass(frozen=True)
class Batch:
    """The batch of a step.

    tensors: by their path in the batch (N, ...); the two of a pair are called `x` and `y`; rows: which
    rows of the data these are (N), None where they are all, in order, or where nobody knows; nested: the
    batch as it was nested, with the tensors in it.
    """

    tensors: dict[str, Tensor]
    rows: Tensor | None = None
    nested: Any = None

    @property
    def x(self) -> Tensor:
        """The first of a pair."""
        return self["x"]

    @property
    def y(self) -> Tensor:
        """The second of a pair."""
        return self["y"]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            known = ", ".join(self.tensors) or "none"
            raise UsageError(f"the batch of this step has no tensor {name!r}; it has: {known}")
        return self.tensors[name]


class Segment(NamedTuple):
    """Operations `first` to `last` of a step, which belong together.

    part: the model whose forward pass it is, or the optimizer whose update, where there are several.
    """

    phase: Phase
    part: str | None
    first: int
    last: int


class Update(NamedTuple):
    """A parameter before the update and after it."""

    before: Tensor
    after: Tensor

    @property
    def change(self) -> Tensor:
        """What was added to the parameter."""
        return self.after - self.before

    @property
    def relative_size(self) -> float:
        """The 2-norm of the change over that of the parameter before it; infinite where that is 0."""
        change, before = (_norm(tensor) for tensor in (self.change, self.before))
        return change / before if before else (math.inf if change else 0.0)


@dataclass(frozen=True)
class Step:
    """Step `number` of a run, which takes state `number - 1` to state `number`.

    Everything but `updates` is what the forward and the backward pass saw, on state `number - 1`. All
    tensors are copies, on the device that the step was taken on.

    loss: as it was taken again; recorded_loss: as the run has it; departed_at: the first step, up to
    this one, whose loss was another than the recorded one when it was taken again, None if there was
    none; batch; parameters, buffers: by name; activations: what each module gave, by its path (a tuple
    where it gave several tensors); dropped: gradients of the step before, which zero_grad drops;
    gradients: by parameter, as backward left them (clipping is the first part of the update);
    updates: by parameter; operations: in order, with inputs and results; hyperparameters: the lr and
    its like, `lr[1]` of the second param group; is_by_program: whether a program took it, or Python;
    epoch: from 0.
    """

    number: int
    loss: float
    recorded_loss: float
    departed_at: int | None
    batch: Batch
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    activations: dict[str, Any]
    dropped: dict[str, Tensor]
    gradients: dict[str, Tensor]
    updates: dict[str, Update]
    operations: tuple[Observed, ...]
    hyperparameters: dict[str, float]
    is_by_program: bool
    epoch: int

    @property
    def is_exact(self) -> bool:
        """Whether every step taken again on the way here, and this one, had the recorded loss."""
        return self.departed_at is None

    def segments(self, parts: Collection[str] = ()) -> list[Segment]:
        """Return the operations in the order in which they happened, those of a phase together.

        What a loop computes before the first forward pass is not part of a loss.

        parts: names of models and optimizers to tell apart.
        """
        found: list[Segment] = []
        phases = [seen.operation.phase for seen in self.operations]
        forward = phases.index("forward") if "forward" in phases else 0
        for index, seen in enumerate(self.operations):
            phase, path = seen.operation.phase, seen.operation.module or ""
            if phase == "loss" and index < forward:
                phase = "other"
            own = path.partition(".")[0] if phase in ("forward", "update") else ""
            part = own if own in parts else None
            if found and (found[-1].phase, found[-1].part) == (phase, part):
                found[-1] = found[-1]._replace(last=index)
            else:
                found.append(Segment(phase, part, index, index))
        return found

    @cached_property
    def bytes(self) -> int:
        """How much memory its tensors take."""
        tensors = [*self.batch.tensors.values(), *self.parameters.values(), *self.buffers.values()]
        tensors += [*self.dropped.values(), *(update.after for update in self.updates.values())]
        for seen in self.operations:
            tensors += [*seen.inputs.values(), *seen.results.values()]
        storages = (tensor.untyped_storage() for tensor in tensors)
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def __repr__(self) -> str:
        exact = "bit for bit" if self.is_exact else f"not as recorded from step {self.departed_at} on"
        return (
            f"<everystep step {self.number}: loss {self.loss:.6g}, {exact}; "
            f"{len(self.operations)} operations, {len(self.updates)} updates>"
        )


class ReplayStepper(Protocol):
    """What a replay needs of a recorded training, one of everystep or a loop of the user.

    state: the number of the step after which the state is, None before one is loaded.
    """

    state: int | None
    #: Whether a state holds the gradients that the next step needs: otherwise they are made once more.
    has_gradients_in_state: bool

    @property
    def has_gradients(self) -> bool:
        """Whether the gradients that the last step left are there."""
        return True

    def load(self, state: State) -> None:
        """Bring everything to a state from disk."""

    def save(self) -> Any:
        """Return a copy of the state as it is now, which has `tensors`."""

    def restore(self, step: int, saved: Any) -> None:
        """Bring everything back to what `save` returned after `step`."""

    def capture(self) -> State:
        """Return the state as it is now, as it is written to disk."""

    def settle(self) -> None:
        """Let what happened after the last step be so, before anything else is done."""

    def run(self, last: int) -> Tensor:
        """Take the steps up to `last`; return their losses (steps), on the CPU."""

    def watch(self, last: int, hook: Hook) -> Tensor:
        """Take the steps up to `last` while a hook looks; return their losses (steps), on the CPU.

        The next step is by program; the first that is not ends the way, and so may the hook.
        """
        raise AssertionError("no program takes its steps in the place of Python")

    def observe(self) -> Observation:
        """Take the next step, and return all that is in it."""

    def named_state(self) -> dict[str, Tensor]:
        """Return the live tensors of the state by name."""

    def gradients(self) -> dict[str, Tensor]:
        """Return copies of the gradients that the last step has left, by parameter."""

    def hyperparameters(self) -> dict[str, float]:
        """Return the learning rates, and what else is worth a word."""

    def module_paths(self) -> list[str]:
        """Return the paths of modules, of which not each need run at each step."""

    def given(self, number: int) -> bytes:
        """Return what tells apart what the next step is given besides its state: settings and batch."""

    def batch(self, number: int) -> Batch:
        """Return the batch of a step."""

    def epoch(self, number: int) -> int:
        """Return the epoch of a step, from 0; a loop of the user says nothing of epochs."""
        return 0

    def is_by_program(self, number: int) -> bool:
        """Tell whether a program takes a step in the place of Python; none does in a user's loop."""
        return False


class Statistics(NamedTuple):
    """What the numbers of a tensor are like, computed in float64 from those that are finite.

    zeros: the share of numbers equal to 0; nonfinite: how many are NaN or infinite. Of an empty tensor
    all are NaN, and of one without finite numbers the first four.
    """

    mean: float
    std: float
    minimum: float
    maximum: float
    zeros: float
    nonfinite: int


def statistics(tensor: Tensor) -> Statistics:
    """Return what the numbers of a tensor are like; of complex ones, of their absolute values."""
    numbers = _as_they_lie(tensor.abs() if tensor.is_complex() else tensor.detach())
    count = len(numbers)
    if not count:
        return Statistics(math.nan, math.nan, math.nan, math.nan, math.nan, 0)
    zeros = (count - int(torch.count_nonzero(numbers))) / count
    finite = numbers.double()
    mean = float(finite.mean())
    if not math.isfinite(mean):  # which one NaN or infinity is enough for
        finite = finite[torch.isfinite(finite)]
        if not len(finite):
            return Statistics(math.nan, math.nan, math.nan, math.nan, zeros, count)
        mean = float(finite.mean())
    deviations = finite - mean
    minimum, maximum = torch.aminmax(finite)
    return Statistics(
        mean=mean,
        std=math.sqrt(float(deviations.dot(deviations)) / len(finite)),
        minimum=float(minimum),
        maximum=float(maximum),
        zeros=zeros,
        nonfinite=count - len(finite),
    )


def _as_they_lie(tensor: Tensor) -> Tensor:
    """Return the numbers of a tensor in a row, in the order of the memory: a view where that can be."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).flatten()


def _norm(tensor: Tensor) -> float:
    return float(
        torch.linalg.vector_norm(tensor.detach().double() if not tensor.is_complex() else tensor)
    )
