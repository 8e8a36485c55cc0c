"""Stand-in: a program that runs a user's step in place of its Python.

Two facts together allow it. The step was *read*: as long as what it uses from outside stays the same,
its source makes the same calls of torch functions. And it was *followed*: on such a state and such a
batch, it runs the operations of an earlier step. The program is compared with Python's step on a copy of
the state, at first and at steps 2, 4, 8, ..., bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from everystep.errors import ProgramError
from everystep.program.execute import without_autograd
from everystep.program.live import LiveProgram
from everystep.program.operation import TensorSpec
from everystep.program.operators import draws_random_numbers
from everystep.program.plain import READ, PlainProgram, lies_as
from everystep.step.comparison import Comparison
from everystep.step.cursor import Cursor, OptimizerStep
from everystep.step.optimizer_numbers import OptimizerNumbers
from everystep.step.parts import Parts
from everystep.step.path import Path
from everystep.step.plain import BuiltPath
from everystep.step.purity.attributes import NotProvenError
from everystep.step.purity.step_reader import Event
from everystep.step.purity.values import Read
from everystep.step.taken import TakenByProgram

__all__ = ["StandIn"]

Number = int | float


class StandIn:
    """Runs the steps with a batch of one kind.

    Args:
        parts: of the training.
        built: the program.
        path: what each step does.
        seen: the Python step that it was built from.
        events: what happens in a step besides operations, in order.
        batch: the names of the tensors of the batch.
        plain: logged values of each step that are not tensors: numbers that never change, or were read.
        reads: the places of the numbers that a step reads and only logs.
        is_quiet: whether only torch's code runs between two steps.

    path: what each step does; has_schedules: whether it advances schedules; difference: compares a step
    of Python with the program, as `Comparison` has it.

    Raises:
        NotProvenError: the next step may do something else; says what.
    """

    def __init__(
        self,
        parts: Parts,
        built: BuiltPath,
        path: Path,
        seen: Cursor,
        events: Sequence[Event],
        batch: Sequence[str],
        plain: Mapping[str, Any],
        reads: set[int],
        *,
        is_quiet: bool,
    ) -> None:
        self._parts = parts
        self._built = built
        self.path = path
        self._numbers = [*seen.numbers]
        self._contents = dict(seen.contents)
        self._batch = [*batch]
        self._plain = plain
        self._optimizer_steps, self._schedules = _steps_of(seen.optimizer_steps, events)
        self._draws = any(draws_random_numbers(each.operator) for each in path.operations)
        self._optimizer_numbers = OptimizerNumbers()
        self._parameters = {name: p for p, name in parts.parameter_names().items()}
        plain_program = PlainProgram(built.program, parts.device)
        self._state = plain_program.state
        self._moves = [name for name in self._state if name.startswith("gradient/")]
        self._is_quiet = is_quiet
        self._places: list[int] = []
        self._era: int | None = None
        self._live: LiveProgram | None = None
        #: The batch that the program holds, and the numbers of the next step, until something else runs.
        self._loaded: list[Tensor] = []
        self._predicted: list[Number] | None = None
        ranges = [(step.begin, step.end) for step in self._optimizer_steps]
        outside = [p for p in path.places_of_reads() if not any(b <= p < e for b, e in ranges)]
        if not reads.issuperset(outside):
            raise NotProvenError("a function of torch branches on a number in a tensor")
        #: Of the numbers that Python reads itself: the places among those that the program has.
        self._read = {place: built.kept.index(place) for place in outside if place in built.kept}
        reason = self._reason_against()
        if reason is not None:
            raise NotProvenError(reason)
        compared = plain_program, self._bind, self._inputs, self._read
        self.difference = Comparison(parts, built, *compared, draws=self._draws).difference
        lying = {path.tensors[number].storage: name for name, number in path.named}
        self._written = [
            lying[storage] for each in path.operations for storage in each.writes if storage in lying
        ]
        self.has_schedules = bool(self._schedules)

    def _reason_against(self) -> str | None:
        path = self.path
        other = [name for name, _ in path.ends if not name.startswith("gradient/")]
        other += [name for name in path.gone if not name.startswith("gradient/")]
        if other:
            return f"{other[0].partition('/')[2]} is another tensor after each step"
        for name, value in self._plain.items():
            if isinstance(value, Read) and value.place not in self._built.kept:
                return f"{name} is returned as a Python number; return the tensor"
        tensors, storages = self._built.program.tensors, self._built.program.storages
        for name in self._batch:
            if name in tensors and storages[tensors[name].storage].kind != "input":
                return f"{name} of the batch shares memory with a part"
        for name, tensor in self._built.program.ends.items():
            if storages[tensors[tensor].storage].kind != "temporary":
                return f"the gradient of {name.partition('/')[2]} shares memory with something else"
        given = {p for p in self._built.inputs.values() if p not in self._contents}
        if any(not given.isdisjoint(each.writes) for each in path.operations):
            return "the step changes its batch"
        for seen in path.operations:
            if str(seen.operator) != READ and _is_shaped(seen, path):
                return f"{seen.operator} returns shapes that depend on values"
        if self._draws and self._parts.device.type != "cpu":
            return "random numbers are drawn on a device other than the CPU"
        return None

    def is_ready(self, state: Mapping[str, Tensor], era: int) -> bool:
        """Tell whether the tensors of the state have the layout of the program; bind it to them.

        era: within the same era, only programs have run.
        """
        if era != self._era:
            self._loaded, self._predicted = [], None
        elif self._live is not None and not self._moves:
            return True
        found = {name: state[name] for name in self._state if name in state}
        if len(found) < len(self._state):
            return False
        places = [tensor.untyped_storage().data_ptr() for tensor in found.values()]
        for name, tensor in found.items():
            is_known = era == self._era and not name.startswith("gradient/")
            if not is_known and not lies_as(tensor, self._state[name]):
                return False
        if self._live is None or places != self._places:
            if not _share_as(found, self._state):
                return False
            try:
                self._live = self._bind(found)
            except ProgramError:
                return False
            self._places, self._loaded = places, []
        self._era = era
        return True

    @property
    def bytes(self) -> int:
        """The memory that the program holds besides the state and the batch."""
        return 0 if self._live is None else self._live.temporary_bytes

    def let_go(self) -> None:
        """Give up the memory of the program; `is_ready` binds it again."""
        self._live = None

    def take(
        self, state: dict[str, Tensor], batch: Mapping[str, Tensor], *, is_settled: bool
    ) -> tuple[TakenByProgram, dict[str, Any]]:
        """Run a step on the live tensors, as `is_ready` has found them; return it, and what it logs.

        Args:
            state: these tensors, which become those after the step.
            batch: its tensors, by name.
            is_settled: nothing has run since the last step, which a program ran.

        Raises:
            NotProvenError: an optimizer would take another step than before; nothing was done yet.
            RuntimeError: a kernel refuses its arguments.
        """
        live = self._live
        assert live is not None
        numbers = self.numbers()
        for schedule in self._schedules:
            schedule.step()
        tensors = [*batch.values()]
        is_loaded = [*map(id, tensors)] == [*map(id, self._loaded)]
        taken = TakenByProgram(self.path, numbers, self._contents, is_still=is_settled)
        if self._draws:
            taken.generators[0] = torch.get_rng_state()
        with without_autograd():
            if not is_loaded:
                live.load(batch)
                self._loaded = tensors
            done = live.take(self._built.numbers(numbers))
        if self._draws:
            taken.drawn = torch.get_rng_state()
        if any(state.get(name) is not tensor for name, tensor in live.ends.items()):
            self._hand_out(state, live.ends)
            taken.is_still = False
        for name in self.path.gone:
            if name in state:
                self._set_gradient(state, name, None)
                taken.is_still = False
        if not is_settled:  # a graph that somebody keeps must notice the writes
            written = [state[name] for name in self._written if name in state]
            torch.autograd.graph.increment_version(written)
        read = {place: done.numbers[index] for place, index in self._read.items()}
        for place, number in read.items():
            numbers[place] = number
        logged = {
            name: read[value.place] if isinstance(value, Read) else value
            for name, value in self._plain.items()
        }
        return taken, done.given | logged

    def release(self, state: dict[str, Tensor]) -> bool:
        """Give the parts copies of the gradients that the program writes into; return whether it did.

        To be called before other code runs, which may keep them.
        """
        ends = {} if self._live is None else self._live.ends
        lent = {name: tensor for name, tensor in ends.items() if state.get(name) is tensor}
        for name, tensor in _copies(lent).items():
            self._set_gradient(state, name, tensor)
        return bool(lent)

    def _hand_out(self, state: dict[str, Tensor], ends: Mapping[str, Tensor]) -> None:
        """Set the gradients to those that the program made.

        Other code may keep them, and a step that begins with them must not write into them: both get
        copies.
        """
        own = ends if self._is_quiet and not self._moves else _copies(ends)
        for name, tensor in own.items():
            self._set_gradient(state, name, tensor)

    def _set_gradient(self, state: dict[str, Tensor], name: str, gradient: Tensor | None) -> None:
        self._parameters[name.removeprefix("gradient/")].grad = gradient
        if gradient is None:
            state.pop(name, None)
        else:
            state[name] = gradient

    def _bind(self, state: Mapping[str, Tensor]) -> LiveProgram:
        contents = {name.removeprefix("input/"): tensor for name, tensor in self._inputs().items()}
        return LiveProgram(self._built.program, state, contents, self._batch, self._parts.device)

    def _inputs(self) -> dict[str, Tensor]:
        """Return the bytes of inputs that are not in the batch, by the name of their storage."""
        found = {}
        for name, storage in self._built.inputs.items():
            content = self._contents.get(storage)
            if content is not None:
                known = self._built.program.storages[name]
                found[f"input/{name}"] = content if known.host else content.to(self._parts.device)
        return found

    def foresees(self, numbers: Sequence[Number], seen: Sequence[Number]) -> bool:
        """Tell whether the numbers of a Python step were predicted, except those that it reads."""
        return len(numbers) == len(seen) and all(
            repr(one) == repr(two)
            for place, (one, two) in enumerate(zip(numbers, seen, strict=True))
            if place not in self._read
        )

    def numbers(self) -> list[Number]:
        """Return the numbers of the next step.

        Raises:
            NotProvenError: an optimizer runs another step than before.
        """
        if self._predicted is not None:
            return self._predicted.copy()
        numbers = self._numbers.copy()
        is_constant = True
        for what in self._optimizer_steps:
            predicted = self._optimizer_numbers.predict(what.optimizer, what.gradients)
            if predicted is None or predicted.structure != what.structure:
                raise NotProvenError("the optimizer runs another step than before")
            own = predicted.operators(what.way)
            numbers[what.begin : what.end] = [n for _, each in own for n in each]
            is_constant &= predicted.is_constant
        self._predicted = numbers.copy() if is_constant else None
        return numbers


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of tensors of a program; what shares memory still does."""
    memory: dict[int, torch.UntypedStorage] = {}
    found = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        if storage._cdata not in memory:
            memory[storage._cdata] = storage.clone()  # type: ignore[no-untyped-call]
        copy = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        found[name] = copy.set_(
            memory[storage._cdata], tensor.storage_offset(), tensor.shape, tensor.stride()
        )
    return found


def _share_as(state: Mapping[str, Tensor], specs: Mapping[str, TensorSpec]) -> bool:
    """Tell whether the tensors of a state share memory exactly as a program says."""
    places = {(specs[name].storage, t.untyped_storage()._cdata) for name, t in state.items()}
    storages, memories = zip(*places, strict=True) if places else ((), ())
    return len(set(storages)) == len(set(memories)) == len(places)


def _steps_of(
    optimizer_steps: Sequence[OptimizerStep], events: Sequence[Event]
) -> tuple[list[OptimizerStep], list[LRScheduler]]:
    """Return the optimizer steps and the advancing schedules, each in order.

    Raises:
        NotProvenError: an optimizer's step was not seen as a whole, or its schedule advances before it.
    """
    seen = {id(step.optimizer): step for step in optimizer_steps}
    steps: list[OptimizerStep] = []
    schedules: list[LRScheduler] = []
    for event in events:
        if event.kind == "schedule":
            schedules.append(event.what)
        elif id(event.what) not in seen:
            raise NotProvenError(f"{type(event.what).__name__} does not treat all its parameters alike")
        elif any(schedule.optimizer is event.what for schedule in schedules):
            raise NotProvenError("a schedule advances before its optimizer steps")
        else:
            steps.append(seen[id(event.what)])
    return steps, schedules


def _is_shaped(seen: Any, path: Path) -> bool:
    """Tell whether the shapes of an operation's results depend on values."""
    tags = seen.operator.tags
    if torch.Tag.data_dependent_output in tags:
        return True
    if torch.Tag.dynamic_output_shape not in tags:
        return False
    if seen.operator.overloadpacket.__name__ not in ("index", "_unsafe_index"):
        return True
    indices = [index for index in seen.arguments[1] if isinstance(index, str)]
    return any(path.tensors[int(index[1:])].dtype in (torch.bool, torch.uint8) for index in indices)
