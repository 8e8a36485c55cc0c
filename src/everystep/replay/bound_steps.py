"""Bound steps: programs of a run that are bound to the state of a replay, for many steps in a row.

The interpreter runs any step. A program on fixed memory runs the same operations
faster, once it is bound, which takes some milliseconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from everystep.errors import ProgramError
from everystep.experiment.batches import RowsOf
from everystep.program.bound import BoundProgram
from everystep.program.interpreter import Interpreter
from everystep.program.memory import copy_into
from everystep.program.number_slots import READ
from everystep.program.operation import TensorSpec
from everystep.program.steady import has_fixed_shapes
from everystep.program.step_program import Program
from everystep.recording.contents import Given, Inputs
from everystep.recording.database import Repeat
from everystep.replay.recorded_steps import RecordedSteps

__all__ = ["BATCH", "BoundStep", "BoundSteps"]

#: The number of steps, past or planned, for which a program is bound.
WORTH = 8
#: Bytes that bound programs may allocate, together.
MOST_BYTES = 1_000_000_000
#: What no row of a run has as its numbers or its inputs.
_NOTHING = b"nothing"
BATCH, INPUT, GENERATOR = "batch/", "input/", "generator/"


@dataclass(eq=False)
class BoundStep:
    """A bound program, and its last inputs.

    steps: the source of its numbers and inputs; own: the tensors of the state that it is bound to;
    batch: the names of the tensors of the batch that it reads; outside, contents: its other inputs, and
    the location of their bytes, by storage; rule: the source of its batch, None if it is among the
    inputs; era: of `BoundSteps`, when the state was last on its own tensors; count: the steps that it
    ran; put, loaded: numbers and inputs of the row in it, as in the database; recorded: these numbers;
    generator: the state to draw from, if any; digests: of the state after the step.
    """

    live: BoundProgram
    steps: RecordedSteps
    own: dict[str, Tensor]
    batch: list[str]
    outside: dict[str, Given]
    contents: dict[str, Tensor]
    rule: RowsOf | None
    era: int
    count: int = 0
    put: bytes | None = _NOTHING
    loaded: bytes | None = _NOTHING
    recorded: list[int | float] = field(default_factory=list)
    generator: Tensor | None = None
    digests: dict[str, str] = field(default_factory=dict)

    def is_for(self, given: Inputs, rule: RowsOf | None) -> bool:
        """Return whether it is bound to inputs of the same names as those of a step."""
        return rule is self.rule and self.outside.keys() == _outside(given).keys()

    def begin(self, row: Repeat) -> bool:
        """Put the numbers and the inputs of a step where it reads them; return whether they fit."""
        if row.inputs != self.loaded and not self._load(row):
            return False
        if row.numbers != self.put:
            self.put, self.recorded = _NOTHING, self.steps.numbers(row)
            try:
                self.live.put(self.recorded)
            except (ProgramError, ValueError, OverflowError):
                return False
            self.put = row.numbers
        return self.rule is None or self.rule.is_fixed or self._load_rows(row.step, self.rule)

    def _load(self, row: Repeat) -> bool:
        self.loaded = _NOTHING
        given = self.steps.given(row)
        names = [name for name in given.given if name.startswith(GENERATOR)]
        if names not in ([], [f"{GENERATOR}0"]):
            return False  # it sets a generator between two draws
        self.digests, self.generator = given.digests, None
        outside = _outside(given)
        is_other = outside != self.outside
        if any(f"{BATCH}{name}" in given.given for name in self.batch) or names or is_other:
            found = self.steps.inputs(row).tensors
            others = [(c, found.get(f"{INPUT}{name}")) for name, c in self.contents.items()]
            if any(o is None or (o.shape, o.dtype) != (c.shape, c.dtype) for c, o in others):
                return False
            for content, other in others if is_other else ():
                assert other is not None
                content.copy_(other)
            self.outside = outside
            self.generator = found.get(f"{GENERATOR}0")
            batch = {name: found.get(f"{BATCH}{name}") for name in self.batch}
            if not _fit(batch, self.live.program):
                return False
            specs = self.live.program.tensors
            self.live.load({n: _laid_as(t, specs[n]) for n, t in batch.items() if t is not None})
        self.loaded = row.inputs
        return True

    def _load_rows(self, step: int, rule: RowsOf) -> bool:
        targets = [self.live.tensor(name) for name in self.batch]
        count = rule.shape(step)
        if self.batch == ["x", "y"] and all(t.is_contiguous() and len(t) == count for t in targets):
            rule.into(step, *targets)
            return True
        batch = {n: tensor for n, tensor in zip("xy", rule(step), strict=True) if n in self.batch}
        fits = _fit(batch, self.live.program)
        if fits:
            self.live.load(batch)
        return fits

    @cached_property
    def _reading(self) -> list[int]:
        """The operations that read a number."""
        return [n for n, each in enumerate(self.live.program.operations) if each.operator == READ]

    def different_read(self) -> str | None:
        """Return the first number that the step read and that differs from the recording, in words."""
        for place, index in zip(self.live.reads, self._reading, strict=True):
            found, known = self.live.numbers[place], self.recorded[place]
            if found != known and (found == found or known == known):
                reason = f"returns {found} to Python, but the recording has {known}"
                return f"operation #{index}, {READ}, {reason}"
        return None


class BoundSteps:
    """The bound programs of a run, by their numbers.

    Args:
        state: the tensors that they run on, by name; the dictionary is shared with whoever replays.
    """

    def __init__(self, state: dict[str, Tensor]) -> None:
        self._state = state
        self._bound: dict[int, BoundStep] = {}
        self._interpreted: Counter[int] = Counter()
        #: Programs that the interpreter runs.
        self._left: set[int] = set()
        self._era = 0
        self._latest: BoundStep | None = None

    def touched(self, interpreted: int | None = None) -> None:
        """Note that the interpreter or other code has changed the state."""
        if interpreted is not None:
            self._interpreted[interpreted] += 1
        self._era += 1
        self._latest = None

    def begin(self, row: Repeat, last: int, steps: RecordedSteps) -> BoundStep | None:
        """Prepare a step; return the program that runs it, None if the interpreter must.

        Args:
            row: of the step.
            last: the last step that is about to run.
            steps: what repeats them.
        """
        interpreter, number = steps.program_of(row), row.program
        assert number is not None
        bound = self._bound.get(number)
        if bound is None or row.inputs != bound.loaded:
            steps.read_ahead(row.step, last)
            given = steps.given(row)
            rule = None if f"{BATCH}x" in given.given else steps.rule
            if bound is None and self._is_worth(number, steps.ahead(row.step, last)):
                bound = self._bind(row, interpreter, steps, rule)
            if bound is None:
                return None
            if not bound.is_for(given, rule):
                if self._bound.pop(number).count < WORTH:
                    self._left.add(number)
                return None
        if bound.era != self._era and not self._bring(bound, interpreter):
            return None
        return bound if bound.begin(row) else None

    def end(self, bound: BoundStep) -> None:
        """Let the state be as a step that just ran leaves it."""
        bound.count += 1
        if bound is self._latest:
            return
        for name in bound.live.program.gone:
            self._state.pop(name, None)
        self._state.update(bound.live.ends)
        # The tensors that this program itself reads are where they were.
        self._era += 1
        bound.era = self._era
        self._latest = bound

    def _is_worth(self, program: int, ahead: Sequence[Repeat]) -> bool:
        count = sum(each.program == program for each in ahead)
        return program not in self._left and count + self._interpreted[program] >= WORTH

    def _bind(
        self, row: Repeat, interpreter: Interpreter, steps: RecordedSteps, rule: RowsOf | None
    ) -> BoundStep | None:
        """Bind the program of a step to the state; return None if the interpreter must run it."""
        assert row.program is not None
        program, device = interpreter.program, steps.device
        given, tensors = steps.given(row), steps.inputs(row).tensors
        names = set("xy") if rule is not None else {n.removeprefix(BATCH) for n in tensors}
        batch = [name for name in interpreter.inputs if name in names]
        contents = {
            name: tensors[f"{INPUT}{name}"].to("cpu" if storage.host else device, copy=True)
            for name, storage in program.storages.items()
            if f"{INPUT}{name}" in tensors
        }
        try:
            interpreter.lay_state(self._state)
            self.touched()
            if not _can_be_bound(program, batch, contents):
                raise ProgramError("it cannot run many steps on the same memory")
            rows = {} if rule is None else dict(zip("xy", rule(row.step), strict=True))
            rows = {name: rows[name] for name in batch if name in rows}
            if not _fit(rows, program):
                raise ProgramError("it is of another batch")
            fixed = rows if rule is not None and rule.is_fixed else {}
            live = BoundProgram(program, self._state, contents, batch, device, fixed=fixed)
        except ProgramError:
            self._left.add(row.program)
            return None
        own = {name: self._state[name] for name in interpreter.state}
        known = _outside(given), contents, rule, self._era
        bound = self._bound[row.program] = BoundStep(live, steps, own, batch, *known)
        while len(self._bound) > 1 and self._bytes() > MOST_BYTES:
            del self._bound[next(iter(self._bound))]
        return bound

    def _bytes(self) -> int:
        return sum(each.live.temporary_bytes for each in self._bound.values())

    def _bring(self, bound: BoundStep, interpreter: Interpreter) -> bool:
        """Bring the state to the memory that a program is bound to; return whether it fits."""
        try:
            interpreter.lay_state(self._state)
        except ProgramError:
            return False
        moved = {name: mine for name, mine in bound.own.items() if self._state[name] is not mine}
        if moved:
            values = {name: self._state[name].clone() for name in moved}
            held = {_place(tensor) for name, tensor in self._state.items() if name not in moved}
            if not (held - {0}).isdisjoint(map(_place, moved.values())):
                del self._bound[next(n for n, each in self._bound.items() if each is bound)]
                return False  # the state has another tensor there now
            for name, mine in moved.items():
                copy_into(mine, values[name])
            self._state.update(moved)
            self.touched()
        bound.era = self._era
        return True


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _can_be_bound(program: Program, batch: Sequence[str], outside: Collection[str]) -> bool:
    """Return whether a program can run many steps in a row on the same memory.

    Not if it has shapes that depend on numbers, writes into its inputs, or reads leftovers of an earlier
    step in memory that it writes into again.
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


def _laid_as(tensor: Tensor, spec: TensorSpec) -> Tensor:
    """Return a tensor with the strides that a program expects, zeros between its numbers."""
    if tensor.stride() == spec.stride:
        return tensor
    laid = torch.empty_strided(spec.shape, spec.stride, dtype=tensor.dtype, device=tensor.device)
    torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(laid.untyped_storage()).zero_()
    copy_into(laid, tensor)
    return laid


def _fit(batch: Mapping[str, Tensor | None], program: Program) -> bool:
    """Return whether the tensors of a batch have the shapes and dtypes that a program expects."""
    specs = ((each, program.tensors[name]) for name, each in batch.items())
    return all(
        each is not None and (tuple(each.shape), each.dtype) == (spec.shape, spec.torch_dtype)
        for each, spec in specs
    )
