"""Stand-in: a program that runs a user's step in place of its Python.

Two facts together allow it. The step was *read*: as long as what it uses from outside stays the same,
its source makes the same calls of torch functions. And it was *recognized*: the same calls, on such a
state and such a batch, run the same operations. The result of the program is compared with Python's step
on a copy of the state, at first and at steps 2, 4, 8, ..., bit for bit.
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
from everystep.program.plain import READ, PlainProgram, lay_inputs, lay_state, lies_as, tensor_on
from everystep.step.check import same_bits
from everystep.step.checkpoint import PartsCheckpoint
from everystep.step.parts import Parts
from everystep.step.path import Path
from everystep.step.plain import BuiltPath
from everystep.step.purity.attributes import NotProvenError
from everystep.step.purity.step_reader import Event
from everystep.step.purity.values import Read
from everystep.step.recognition.optimizer_numbers import OptimizerNumbers
from everystep.step.recognition.recognizer import OptimizerStep, Recognizer

__all__ = ["StandIn", "TakenByProgram"]

Number = int | float


class TakenByProgram:
    """A step that a program ran, as a watch would have observed it.

    numbers, generators, drawn: as in `Watch`.
    """

    surprise = changed_elsewhere = None
    is_paused = is_empty = False

    def __init__(self, path: Path, numbers: Sequence[Number], contents: Mapping[int, Tensor]) -> None:
        self.numbers = numbers
        self.generators: dict[int, Tensor] = {}
        self.drawn: Tensor | None = None
        self.unseen: dict[str, int] = {}
        self.changed_unseen: list[str] = []
        self._path = path
        self._contents = contents

    def content(self, storage: int) -> Tensor | None:
        """Return the bytes of an input that is not in the batch."""
        return self._contents.get(storage)

    def end(self, state: Mapping[str, Tensor], loss: Any) -> Path:
        """Return what the step did."""
        return self._path


class StandIn:
    """Runs the steps with a batch of one kind.

    Args:
        parts: of the training.
        built: the program.
        path: what each step does; has_schedules: whether it advances schedules.
        seen: the recognizer of the Python step that it was built from.
        events: what happens in a step besides operations, in order.
        batch: the names of the tensors of the batch.
        plain: logged values of each step that are not tensors: numbers that never change, or were read.
        reads: the places of the numbers that a step reads and only logs.

    path: what each step does; has_schedules: whether it advances schedules.

    Raises:
        NotProvenError: the next step may do something else; says what.
    """

    def __init__(
        self,
        parts: Parts,
        built: BuiltPath,
        path: Path,
        seen: Recognizer,
        events: Sequence[Event],
        batch: Sequence[str],
        plain: Mapping[str, Any],
        reads: set[int],
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
        self._state = PlainProgram(built.program, parts.device).state
        self._places: list[int] = []
        self._era: int | None = None
        self._live: LiveProgram | None = None
        ranges = [(step.begin, step.end) for step in self._optimizer_steps]
        outside = [p for p in path.places_of_reads() if not any(b <= p < e for b, e in ranges)]
        if not reads.issuperset(outside):
            raise NotProvenError("a function of torch branches on a number in a tensor")
        #: Of the numbers that Python reads itself: the places among those that the program has.
        self._read = {place: built.kept.index(place) for place in outside if place in built.kept}
        reason = self._reason_against()
        if reason is not None:
            raise NotProvenError(reason)
        self._replaced = [name for name in built.program.ends if name not in self._state]
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
        tensors = [state.get(name) for name in self._state]
        if any(tensor is None for tensor in tensors):
            return False
        found = {n: t for n, t in zip(self._state, tensors, strict=True) if t is not None}
        places = [tensor.untyped_storage().data_ptr() for tensor in found.values()]
        for name, tensor in found.items():
            is_known = era == self._era and not name.startswith("gradient/")
            if not is_known and not lies_as(tensor, self._state[name]):
                return False
        if self._live is None or places != self._places:
            if not _share_as(found, self._state):
                return False
            try:
                self._live = self._bind(found, self._inputs())
            except ProgramError:
                return False
            self._places = places
        self._era = era
        return True

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
        assert self._live is not None
        numbers = self.numbers()
        for schedule in self._schedules:
            schedule.step()
        for name in self._replaced:  # so that their memory is free
            self._set_gradient(state, name, None)
        taken = TakenByProgram(self.path, numbers, self._contents)
        if self._draws:
            taken.generators[0] = torch.get_rng_state()
        with without_autograd():
            done = self._live.run(batch, self._built.numbers(numbers))
        if self._draws:
            taken.drawn = torch.get_rng_state()
        for name, tensor in done.ends.items():
            self._set_gradient(state, name, tensor)
        for name in self.path.gone:
            self._set_gradient(state, name, None)
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

    def _set_gradient(self, state: dict[str, Tensor], name: str, gradient: Tensor | None) -> None:
        self._parameters[name.removeprefix("gradient/")].grad = gradient
        if gradient is None:
            state.pop(name, None)
        else:
            state[name] = gradient

    def difference(
        self,
        before: PartsCheckpoint,
        batch: Mapping[str, Tensor],
        numbers: Sequence[Number],
        logged: Mapping[str, Any],
    ) -> str | None:
        """Run a step that Python just ran, on a copy; return in words what differs, or None.

        Args:
            before: the parts before the step.
            batch: copies of its tensors.
            numbers: of the step.
            logged: what Python's step has given.
        """
        device = self._parts.device
        plain = PlainProgram(self._built.program, device)
        copies = dict(before.copies)
        lay_state(plain, copies, device)
        inputs = self._inputs() | {f"batch/{name}": tensor for name, tensor in batch.items()}
        laid = lay_inputs(plain, inputs)
        given = {
            name: tensor_on(laid[spec.storage].to(device).untyped_storage(), spec)
            for name, spec in plain.inputs.items()
            if name in batch
        }
        live = self._bind({name: copies[name] for name in self._state}, self._inputs())
        after = torch.get_rng_state()
        torch.set_rng_state(before.generators.torch_cpu)
        try:
            with without_autograd():
                done = live.run(given, self._built.numbers(numbers))
            is_drawn_alike = not self._draws or torch.equal(torch.get_rng_state(), after)
        finally:
            torch.set_rng_state(after)
        state = self._parts.state()
        now = {name: copies[name] for name in self._state if name in state} | done.ends
        other = (n for n, tensor in now.items() if n not in state or not same_bits(state[n], tensor))
        name = next(other, None)
        if name is not None:
            return f"the program computes other values of {name.partition('/')[2]} than Python"
        for place, index in self._read.items():
            if repr(done.numbers[index]) != repr(numbers[place]):
                return "the program reads another number than Python"
        for name, tensor in done.given.items():
            value = logged.get(name)
            if isinstance(value, Tensor) and not same_bits(
                value.detach().reshape(()), tensor.reshape(())
            ):
                return f"the program computes another {name} than Python"
        return None if is_drawn_alike else "the program draws other random numbers than Python"

    def _bind(self, state: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> LiveProgram:
        contents = {name.removeprefix("input/"): tensor for name, tensor in inputs.items()}
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
        numbers = self._numbers.copy()
        for what in self._optimizer_steps:
            predicted = self._optimizer_numbers.predict(what.optimizer, what.gradients)
            if predicted is None or predicted.structure != what.structure:
                raise NotProvenError("the optimizer runs another step than before")
            own = predicted.operators(what.way)
            numbers[what.begin : what.end] = [n for _, each in own for n in each]
        return numbers


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
