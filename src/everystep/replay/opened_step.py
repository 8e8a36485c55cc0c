"""An opened step: everything in it, as tensors, in the chapter's order; and the protocol of replays."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from everystep.errors import UsageError
from everystep.program.observed import OVERWRITING, Observed, unset_results
from everystep.program.operation import Phase
from everystep.replay.shown import Shown, same_content
from everystep.signature import checked
from everystep.step.observe import Observation, Places

if TYPE_CHECKING:
    from everystep.answers.rows import Rows
    from everystep.answers.why import Why

__all__ = [
    "Batch",
    "Segment",
    "Statistics",
    "Step",
    "Update",
    "norm",
    "observed_step",
    "of_kind",
    "statistics",
]

#: The public face of a step, which the reference describes: `dir(step)`.
_PUBLIC = [
    *("number", "epoch", "loss", "recorded_loss", "is_exact", "diverged_at", "batch"),
    *("parameters", "buffers", "activations", "gradients", "updates", "operations"),
    *("hyperparameters", "state", "end", "rows", "why", "data", "ranks"),
]


@dataclass(frozen=True, eq=False)
class Batch:
    """The batch of a step.

    tensors: by their path in the batch (N, ...); those of a pair are called `x` and `y`; rows: the row
    numbers in the data (N), None if they are all rows in order, or unknown; nested: the batch in its
    original nesting, with its tensors; source: the name of the rows' data.
    """

    tensors: dict[str, Tensor]
    rows: Tensor | None = None
    nested: Any = None
    source: str = "the data"

    __eq__ = same_content

    def __repr__(self) -> str:
        tensors = ", ".join(f"{n} {tuple(t.shape)} {t.dtype}" for n, t in self.tensors.items())
        return f"<batch: {tensors or 'no tensors'}>"

    @property
    def whole(self) -> str:
        """What its row numbers refer to: the source of the data, or the batch if that is unknown."""
        return "the batch" if self.rows is None else self.source

    @property
    def count(self) -> int:
        """The number of rows: that of its first tensor that has any."""
        return next((len(tensor) for tensor in self.tensors.values() if tensor.dim()), 0)

    def number(self, place: int) -> int:
        """Return the number of a row in the data, its place in the batch where that is unknown."""
        return place if self.rows is None else int(self.rows[place])

    @property
    def x(self) -> Tensor:
        """The first tensor of a pair."""
        return self["x"]

    @property
    def y(self) -> Tensor:
        """The second tensor of a pair."""
        return self["y"]

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the tensors: `x, y = step.batch`."""
        return iter(self.tensors.values())

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            known = ", ".join(self.tensors) or "none"
            raise UsageError(f"the batch of this step has no tensor {name!r}; known: {known}")
        return self.tensors[name]


class Segment(NamedTuple):
    """Consecutive operations of a step, from `first` to `last`.

    part: the model that runs its forward pass, or the optimizer that updates, if there are several.
    """

    phase: Phase
    part: str | None
    first: int
    last: int


class Update(NamedTuple):
    """A parameter before and after the update."""

    before: Tensor
    after: Tensor

    def __repr__(self) -> str:
        shape, size = tuple(self.before.shape), self.relative_size
        return f"<update of {shape} {self.before.dtype}, relative size {size:.4g}>"

    @property
    def change(self) -> Tensor:
        """The difference, after - before."""
        return self.after - self.before

    @property
    def relative_size(self) -> float:
        """The 2-norm of the change divided by that of the parameter before it; infinite if that is 0."""
        change, before = (norm(tensor) for tensor in (self.change, self.before))
        return change / before if before else (math.inf if change else 0.0)


@dataclass(frozen=True, eq=False)
class Step(Shown):
    """Step `number` of a run; it takes state `number - 1` to state `number`.

    Everything except `updates` is from the forward and the backward pass, on state `number - 1`. All
    tensors are copies on the CPU.

    loss: from the replay; recorded_loss: from the recording; diverged_at: the first step, up to this
    one, with a replay that differs from the recording, or None; batch; activations: the output of each
    module, by its path (a tuple if it returned several tensors); gradients: by parameter, after the
    backward pass, before clipping (which is the first part of the update); operations: in order, with
    inputs and results; places: the memory that the names of its tensors refer to; state, end: every
    tensor of the state before the step, and after it, by its name in the run
    (`optimizer/0.weight/exp_avg`); hyperparameters: the lr and similar settings, `lr[1]` for the second
    param group; epoch: from 0, None of the user's own loop; earlier: opens another step of the run;
    of_ranks: returns a step of all ranks; view: how it is shown.
    """

    number: int
    loss: float
    recorded_loss: float
    diverged_at: int | None
    batch: Batch
    activations: dict[str, Any]
    gradients: dict[str, Tensor]
    operations: tuple[Observed, ...]
    places: Places = field(repr=False, compare=False)
    state: dict[str, Tensor] = field(repr=False, compare=False)
    end: dict[str, Tensor] = field(repr=False, compare=False)
    hyperparameters: dict[str, float] = field(default_factory=dict)
    epoch: int | None = None
    earlier: Callable[[int], Step] | None = field(default=None, repr=False, compare=False)
    of_ranks: Callable[[int], Sequence[Step]] | None = field(default=None, repr=False, compare=False)

    @property
    def ranks(self) -> Sequence[Step]:
        """The same step of all processes that trained together, by rank; each opens when accessed."""
        return (self,) if self.of_ranks is None else self.of_ranks(self.number)

    @property
    def is_exact(self) -> bool:
        """Whether the replay of this step, and of all steps on the way here, matches the recording."""
        return self.diverged_at is None

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters before the step, by name."""
        return of_kind(self.state, "parameter")

    @cached_property
    def buffers(self) -> dict[str, Tensor]:
        """The buffers before the step, by name."""
        return of_kind(self.state, "buffer")

    @cached_property
    def updates(self) -> dict[str, Update]:
        """The parameters before and after the step, by name; without those that left the model in it."""
        before, after = self.parameters, of_kind(self.end, "parameter")
        return {name: Update(before[name], after[name]) for name in before if name in after}

    @cached_property
    def dropped(self) -> dict[str, Tensor]:
        """The gradients of the previous step that zero_grad drops, by parameter."""
        pending = of_kind(self.state, "gradient").items()
        return {name: gradient for name, gradient in pending if not self._is_added_to(name)}

    def _is_added_to(self, parameter: str) -> bool:
        """Return whether the step adds to the gradient of the step before, rather than dropping it."""
        tensors = self.places.tensors
        # The first operation on its memory decides: a `zero_` or a `copy_` drops what was there.
        spec = tensors.get(f"gradient/{parameter}")
        if spec is None:
            return False
        for seen in self.operations:
            read, made = (
                {tensors[name].storage for name in names}
                for names in (seen.inputs, [*seen.results, *seen.written])
            )
            if spec.storage in read | made:
                return spec.storage in read and "zero" not in seen.operation.name
        return False

    @cached_property
    def phases(self) -> list[Phase]:
        """The phase of each operation.

        Operations of a loop before its first forward pass, or after its last backward pass, are `other`,
        not part of a loss.
        """
        phases = [seen.operation.phase for seen in self.operations]
        forward = phases.index("forward") if "forward" in phases else 0
        backward = max((i for i, p in enumerate(phases) if p == "backward"), default=len(phases))
        return [
            "other" if phase == "loss" and not forward <= index <= backward else phase
            for index, phase in enumerate(phases)
        ]

    def segments(self, parts: Collection[str] = ()) -> list[Segment]:
        """Return the operations in order, grouped by phase.

        parts: names of models and optimizers to keep apart.
        """
        found: list[Segment] = []
        for index, (phase, seen) in enumerate(zip(self.phases, self.operations, strict=True)):
            path = seen.operation.module or ""
            # Only these two belong to a part; what backward does is of the loss.
            own = path.partition(".")[0] if phase in ("forward", "update") else ""
            part = own if own in parts else None
            if found and (found[-1].phase, found[-1].part) == (phase, part):
                found[-1] = found[-1]._replace(last=index)
            else:
                found.append(Segment(phase, part, index, index))
        return found

    @checked
    def why(self, expression: str, *, back: int = 0, depth: int = 1, terms: int = 5) -> Why:
        """Return where a number of the step comes from; see `Run.why`.

        Raises:
            UsageError: the expression is not one number that the step made or read.
            RunError: an earlier step cannot be opened.
        """
        from everystep.answers.why import why

        return why(self, expression, back=back, depth=depth, terms=terms)

    @property
    def rows(self) -> Rows:
        """How much each row of the batch contributes to the loss and to each gradient."""
        # Without this step where it is kept, which would be a cycle: a step holds much memory.
        return replace(self._rows, view=self.view and self.view._replace(step=self))

    @cached_property
    def _rows(self) -> Rows:
        from everystep.answers.rows import rows_of

        return rows_of(self)

    @cached_property
    def unset(self) -> frozenset[tuple[int, str, str]]:
        """Tensors of operations without numbers, because a kernel left its own bytes there.

        As (number of the operation, `inputs` or `results`, name). Such memory may hold anything that was
        computed before, so it is never shown.
        """
        found: set[tuple[int, str, str]] = set()
        unset: dict[str, bool] = {}  # by name, as of the operations run so far
        for number, seen in enumerate(self.operations):
            for name in seen.inputs:
                # `relu~2` is another view of the memory of `relu`.
                base = name.partition("~")[0]
                # A program has no operations that only allocate memory.
                is_first = base not in unset and "/" not in base and name in seen.results
                if unset.get(base) or (is_first and seen.operation.name in OVERWRITING):
                    found.add((number, "inputs", name))
            without_numbers = unset_results(seen.operation)
            for name in seen.results:
                unset[name.partition("~")[0]] = name in without_numbers
            found |= {(number, "results", name) for name in without_numbers}
        return frozenset(found)

    @cached_property
    def bytes(self) -> int:
        """The memory that its tensors use, in bytes."""
        tensors = [*self.batch.tensors.values(), *self.state.values(), *self.end.values()]
        for seen in self.operations:
            tensors += [*seen.inputs.values(), *seen.results.values()]
        # By storage: many operations show the same copy.
        storages = (tensor.untyped_storage() for tensor in tensors)
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def __dir__(self) -> list[str]:
        return _PUBLIC

    def __repr__(self) -> str:
        exact = f"differs from the recording from step {self.diverged_at} on"
        if self.is_exact:
            exact = "replayed" if self.places.loss is None else "bit-identical"
        return (
            f"<everystep step {self.number}: loss {self.loss:.6g}, {exact}; "
            f"{len(self.operations)} operations, {len(self.updates)} updates>"
        )


def observed_step(number: int, observation: Observation, batch: Batch) -> Step:
    """Return a step that was observed."""
    loss = float(observation.loss)
    activations = {
        path: given[0] if len(given) == 1 else given for path, given in observation.activations.items()
    }
    operations = tuple(observation.operations)
    known = observation.gradients, operations, observation.places
    states = observation.before, observation.after
    return Step(number, loss, loss, None, batch, activations, *known, *states)


def of_kind(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Return the tensors with a name such as `parameter/0.weight`, without their kind."""
    prefix = f"{kind}/"
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


class Statistics(NamedTuple):
    """Summary statistics of a tensor, computed in float64 from its finite elements.

    zeros: the fraction of elements equal to 0; nonfinite: the number of NaN or infinite elements. For an
    empty tensor all are NaN; without finite elements, the first four are.
    """

    mean: float
    std: float
    minimum: float
    maximum: float
    zeros: float
    nonfinite: int


def statistics(tensor: Tensor) -> Statistics:
    """Return the summary statistics of a tensor; for complex elements, of their absolute values."""
    tensor = tensor.abs() if tensor.is_complex() else tensor.detach()
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    numbers = tensor.permute(order).flatten()  # in the order of memory: a view if possible
    count = len(numbers)
    if not count:
        return Statistics(math.nan, math.nan, math.nan, math.nan, math.nan, 0)
    finite = numbers.double()  # torch counts no zeros of unsigned integers, nor of 8-bit floats
    zeros = (count - int(torch.count_nonzero(finite))) / count
    mean = float(finite.mean())
    if not math.isfinite(mean):  # one NaN or infinity is enough
        finite = finite[torch.isfinite(finite)]
        if not len(finite):
            return Statistics(math.nan, math.nan, math.nan, math.nan, zeros, count)
        mean = float(finite.mean())
    # From the mean, not by squares: these would cancel where the mean is large.
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


def norm(tensor: Tensor) -> float:
    """Return the 2-norm of a tensor."""
    magnitudes = (tensor.abs() if tensor.is_complex() else tensor).detach()
    # In float64: squares overflow float32 from about 1e19 on, and float16 from 256.
    return float(torch.linalg.vector_norm(magnitudes.double()))
