"""Bound steps: programs of a run that are bound to the state of a replay, for many steps in a row.

The interpreter runs any step. A program on fixed memory runs the same operations
faster, once it is bound, which takes some milliseconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from everystep.errors import ProgramError
from everystep.experiment.batches import RowsOf
from everystep.program.bound import BoundProgram
from everystep.program.interpreter import Interpreter
from everystep.program.memory import copy_into
from everystep.program.number_slots import READ
from everystep.program.operation import TensorSpec
from everystep.program.program import Program
from everystep.program.steady_operations import has_fixed_shapes
from everystep.recording.contents import Given, Inputs
from everystep.recording.database import Repeat
from everystep.step.check import same_bits

__all__ = ["BoundStep", "BoundSteps", "replace_state"]

Number = int | float
#: A program is bound once it has run, or is about to run, so many steps.
WORTH = 8
#: Bytes of their own that bound programs may have, together.
MOST_BYTES = 1_000_000_000
#: What no row of a run has as its numbers or its inputs.
_NOTHING = b"nothing"
BATCH, INPUT, GENERATOR = "batch/", "input/", "generator/"


@dataclass(eq=False)
class BoundStep:
    """A program that is bound, and what it was given last.

    batch: the names of the tensors of the batch that it reads; outside, contents: the other inputs that
    it has, and where their bytes are, by storage; is_by_rule: whether its batch is of a rule;
    places: where the state is; era: of `BoundSteps`, when it was last known to be there; reads: the
    operations that read a number; steps: that it ran; numbers, inputs: of the row that was put into it,
    as the database has them; recorded: these numbers; generator: the state to draw from, if any;
    digests: of the state after the step.
    """

    live: BoundProgram
    batch: list[str]
    outside: dict[str, Given]
    contents: dict[str, Tensor]
    is_by_rule: bool
    places: list[int]
    era: int
    reads: list[int]
    steps: int = 0
    numbers: bytes | None = _NOTHING
    inputs: bytes | None = _NOTHING
    recorded: list[Number] = field(default_factory=list)
    generator: Tensor | None = None
    digests: dict[str, str] = field(default_factory=dict)

    def put(self, row: Repeat, numbers: Callable[[Repeat], list[Number]]) -> bool:
        """Put the numbers of a row; return whether they fit."""
        if row.numbers == self.numbers:
            return True
        self.numbers = _NOTHING
        self.recorded = numbers(row)
        try:
            self.live.put(self.recorded)
        except (ProgramError, ValueError, OverflowError):
            return False
        self.numbers = row.numbers
        return True

    def is_for(self, given: Inputs, *, is_by_rule: bool) -> bool:
        """Tell whether it is bound to inputs of the same names as those of a step."""
        return is_by_rule == self.is_by_rule and self.outside.keys() == _outside(given).keys()

    def load(self, row: Repeat, given: Inputs, tensors: Callable[[Repeat], dict[str, Tensor]]) -> bool:
        """Load the inputs of a row; return whether they fit.

        tensors: returns them by name.
        """
        if row.inputs == self.inputs:
            return True
        self.inputs = _NOTHING
        names = [name for name in given.given if name.startswith(GENERATOR)]
        if names not in ([], [f"{GENERATOR}0"]):
            return False  # it sets a generator between two draws
        self.digests, self.generator = given.digests, None
        outside = _outside(given)
        is_other = outside != self.outside
        if any(f"{BATCH}{name}" in given.given for name in self.batch) or names or is_other:
            found = tensors(row)
            others = [(c, found.get(f"{INPUT}{name}")) for name, c in self.contents.items()]
            if any(o is None or (o.shape, o.dtype) != (c.shape, c.dtype) for c, o in others):
                return False
            for content, other in others if is_other else ():
                assert other is not None
                content.copy_(other)
            self.outside = outside
            self.generator = found.get(f"{GENERATOR}0")
            batch = {name: found.get(f"{BATCH}{name}") for name in self.batch}
            if not _fit(batch, self.live):
                return False
            self.live.load({name: tensor for name, tensor in batch.items() if tensor is not None})
        self.inputs = row.inputs
        return True

    def load_rows(self, step: int, rule: RowsOf) -> bool:
        """Write the rows of a batch to where the program reads them; return whether they fit."""
        if rule.is_fixed:
            return True
        targets = [self.live.tensor(name) for name in self.batch]
        count = rule.shape(step)
        if self.batch == ["x", "y"] and all(t.is_contiguous() and len(t) == count for t in targets):
            rule.into(step, *targets)
            return True
        batch = {n: tensor for n, tensor in zip("xy", rule(step), strict=True) if n in self.batch}
        if not _fit(batch, self.live):
            return False
        self.live.load(batch)
        return True

    def different_read(self) -> str | None:
        """Return the first number that the step read and that differs from the recording, in words."""
        for place, index in zip(self.live.reads, self.reads, strict=True):
            found, known = self.live.numbers[place], self.recorded[place]
            if found != known and (found == found or known == known):
                reason = f"returns {found} to Python, but the recording has {known}"
                return f"operation #{index}, {READ}, {reason}"
        return None


class BoundSteps:
    """The bound programs of a run, by their numbers.

    Args:
        state: the tensors that they run on, by name; the dictionary is shared with whoever replays.
        device: where they run.
    """

    def __init__(self, state: dict[str, Tensor], device: torch.device) -> None:
        self._state = state
        self._device = device
        self._bound: dict[int, BoundStep] = {}
        self._interpreted: Counter[int] = Counter()
        #: Programs that the interpreter runs.
        self._left: set[int] = set()
        self._era = 0
        self._latest: BoundStep | None = None

    def touched(self) -> None:
        """Something else has changed the state, or replaced tensors of it."""
        self._era += 1
        self._latest = None

    def interpreted(self, row: Repeat) -> None:
        """The interpreter has run a step."""
        if row.program is not None:
            self._interpreted[row.program] += 1
        self.touched()

    def find(self, row: Repeat, interpreter: Interpreter) -> BoundStep | None:
        """Return the program of a step, if it is bound to the state as it is now."""
        assert row.program is not None
        bound = self._bound.get(row.program)
        if bound is None or bound.era == self._era:
            return bound
        places = self._laid(interpreter)
        if places == bound.places:
            bound.era = self._era
            return bound
        self.drop(row.program)
        return None

    def drop(self, program: int) -> None:
        """Give up a bound program; if it did not pay, for good."""
        if self._bound.pop(program).steps < WORTH:
            self._left.add(program)

    def is_worth(self, row: Repeat, ahead: Sequence[Repeat]) -> bool:
        """Tell whether to bind the program of a step. ahead: the steps that are about to run."""
        if row.program is None or row.program in self._left:
            return False
        count = sum(each.program == row.program for each in ahead)
        return count + self._interpreted[row.program] >= WORTH

    def bind(
        self,
        row: Repeat,
        interpreter: Interpreter,
        given: Inputs,
        tensors: Mapping[str, Tensor],
        rule: RowsOf | None,
    ) -> BoundStep | None:
        """Bind the program of a step to the state; return None if the interpreter must run it.

        Args:
            row: of the step.
            interpreter: its program.
            given, tensors: its inputs.
            rule: where rows of the batch come from, None if they are among the inputs.
        """
        assert row.program is not None
        program = interpreter.program
        names = set("xy") if rule is not None else {n.removeprefix(BATCH) for n in tensors}
        batch = [name for name in interpreter.inputs if name in names]
        outside = {n.removeprefix(INPUT): t for n, t in tensors.items() if n.startswith(INPUT)}
        outside = {name: each for name, each in outside.items() if name in program.storages}
        places = self._laid(interpreter)
        live = None
        contents = {
            name: tensor.to("cpu" if program.storages[name].host else self._device, copy=True)
            for name, tensor in outside.items()
        }
        if places is not None and _can_be_bound(program, batch, outside):
            live = self._live(program, row.step, batch, contents, rule)
        if places is None or live is None:
            self._left.add(row.program)
            return None
        reads = [n for n, each in enumerate(program.operations) if each.operator == READ]
        known = _outside(given), contents, rule is not None
        bound = self._bound[row.program] = BoundStep(live, batch, *known, places, self._era, reads)
        while len(self._bound) > 1 and self._bytes() > MOST_BYTES:
            del self._bound[next(iter(self._bound))]
        return bound

    def _live(
        self,
        program: Program,
        step: int,
        batch: list[str],
        contents: Mapping[str, Tensor],
        rule: RowsOf | None,
    ) -> BoundProgram | None:
        rows = {} if rule is None else dict(zip("xy", rule(step), strict=True))
        rows = {name: rows[name] for name in batch if name in rows}
        fixed = rows if rule is not None and rule.is_fixed else {}
        if not all(_is_alike_spec(tensor, program.tensors[name]) for name, tensor in rows.items()):
            return None
        try:
            return BoundProgram(program, self._state, contents, batch, self._device, fixed=fixed)
        except ProgramError:
            return None

    def _bytes(self) -> int:
        return sum(each.live.temporary_bytes for each in self._bound.values())

    def end(self, bound: BoundStep) -> None:
        """Let the state be as a step that just ran leaves it."""
        bound.steps += 1
        if bound is self._latest:
            return
        for name in bound.live.program.gone:
            self._state.pop(name, None)
        self._state.update(bound.live.ends)
        # The tensors that this program itself reads are where they were.
        self._era += 1
        bound.era = self._era
        self._latest = bound

    def _laid(self, interpreter: Interpreter) -> list[int] | None:
        """Lay out the state as a program expects; return where it is, None if it does not fit."""
        before = [self._state.get(name) for name in interpreter.state]
        try:
            interpreter.lay_state(self._state)
        except ProgramError:
            return None
        now = [self._state[name] for name in interpreter.state]
        if any(one is not other for one, other in zip(before, now, strict=True)):
            self.touched()
        return [tensor.untyped_storage().data_ptr() for tensor in now]


def _can_be_bound(program: Program, batch: Sequence[str], outside: Collection[str]) -> bool:
    """Tell whether a program can run many steps in a row on the same memory.

    Not if it has shapes that depend on numbers, writes into its inputs, or reads what a step before has
    left in memory that it writes into again.
    """
    written = {
        program.tensors[name].storage
        for each in program.operations
        for name in (*filter(None, each.results), *each.written())
    }
    inputs = {*program.of_kind("input")}
    ends = {program.storage_of(name).kind for name in program.ends.values()}
    return (
        has_fixed_shapes(program)
        and written.isdisjoint(inputs)
        and ends <= {"temporary"}
        and program.state_names.isdisjoint(program.ends)
        and {program.tensors[name].storage for name in batch}.isdisjoint(outside)
    )


def _outside(given: Inputs) -> dict[str, Given]:
    """Return the inputs that do not belong to the batch."""
    return {name: each for name, each in given.given.items() if name.startswith(INPUT)}


def _fit(batch: Mapping[str, Tensor | None], live: BoundProgram) -> bool:
    return all(
        each is not None and _is_alike_spec(each, live.program.tensors[name])
        for name, each in batch.items()
    )


def _is_alike_spec(tensor: Tensor, spec: TensorSpec) -> bool:
    return tuple(tensor.shape) == spec.shape and tensor.dtype == spec.torch_dtype


def replace_state(
    state: dict[str, Tensor],
    tensors: Mapping[str, Tensor],
    copies: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> None:
    """Give tensors of a state other values, in their memory if they fit: programs may be bound to it.

    copies: returns copies of those that do not fit, which replace the tensors of the state.
    """
    on: dict[int, list[str]] = {}
    for name, tensor in state.items():
        on.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
    left = dict(tensors)
    for names in on.values():
        if not all(name in tensors and _is_alike(state[name], tensors[name]) for name in names):
            continue
        for name in names:
            copy_into(state[name], tensors[name])
        if len(names) == 1 or all(same_bits(state[name], tensors[name]) for name in names):
            for name in names:
                del left[name]
    state.update(copies(left))


def _is_alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and other.layout == torch.strided
