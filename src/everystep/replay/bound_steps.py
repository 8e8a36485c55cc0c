"""Bound steps: programs of a run that are bound to the state of a replay, for many steps in a row.

The interpreter runs any step. A program on fixed memory runs the same operations
faster, once it is bound, which takes some milliseconds.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Protocol

from torch import Tensor

from everystep.errors import ProgramError
from everystep.experiment.batches import RowsOf
from everystep.program.bound import BoundProgram, has_fixed_shapes
from everystep.program.calls import Call
from everystep.program.interpreter import Looks
from everystep.program.memory import copy_into
from everystep.program.number_slots import READ, read_difference
from everystep.program.step_program import Program
from everystep.recording.database import Repeat
from everystep.replay.recorded_steps import ProgramKey, RecordedSteps

__all__ = ["GENERATOR", "BoundStep", "BoundSteps", "Hook"]

#: The number of steps, past or planned, for which a program is bound.
WORTH = 8
#: Bytes that bound programs may allocate, together.
MOST_BYTES = 1_000_000_000
#: What no row of a run has as its numbers or its inputs.
_NOTHING = b"nothing"
#: Prefix of the names of the states to set in torch's generator before the draws of a step.
GENERATOR = "generator/"


class Hook(Protocol):
    """Looks at steps while programs run them. A step has the same bits with and without it."""

    def looks(self, program: Program) -> Looks:
        """Return what looks at the steps of a program."""

    def after(self, number: int, loss: float) -> bool:
        """Look at a step that just ran; return whether to continue."""


class BoundStep:
    """The program of a step, bound to the state of a replay, and its last inputs.

    steps: the source of its numbers and inputs; state: the tensors that it is bound to, laid out as it
    needs them; generator: the state to draw from, if any; digests: of the state after the step.

    Raises:
        ProgramError: the interpreter must run it.
    """

    def __init__(self, row: Repeat, steps: RecordedSteps, state: dict[str, Tensor]) -> None:
        self.interpreter = interpreter = steps.program_of(row)
        program = interpreter.program
        interpreter.lay_state(state)
        laid = interpreter.lay_inputs(steps.inputs(row))
        if not _can_be_bound(program):
            raise ProgramError("it cannot run many steps on the same memory")
        #: The bytes of its inputs, by storage.
        # Memory of its own: the calls read it in every step, whatever the next row has.
        self._contents = {
            name: laid[name].to(interpreter.place_of(name), copy=True)
            for name in program.of_kind("input")
            if name in laid
        }
        self.live = BoundProgram(program, state, self._contents, (), steps.device)
        self.own = {name: state[name] for name in interpreter.state}
        self.generator: Tensor | None = None
        self.digests: dict[str, str] = {}
        self._steps = steps
        #: Its tensors of the rows, x and y, as far as it reads them.
        # The rule writes rows straight to where the calls read them.
        self._rows = [self.live.tensor(name) for name in "xy" if name in interpreter.inputs]
        #: The source of its batch, None if it is among the recorded inputs.
        self._rule = steps.rule_for(row)
        #: The numbers and the inputs of the row in it, as in the database; these numbers.
        self._put: bytes | None = _NOTHING
        self._loaded: bytes | None = _NOTHING
        self._recorded: list[int | float] = []
        self._hooked: tuple[Hook, list[Call]] | None = None
        #: The operations that read a number.
        self._reading = [n for n, each in enumerate(program.operations) if each.operator == READ]

    def begin(self, row: Repeat) -> None:
        """Put the numbers and the inputs of a step where it reads them.

        Raises:
            ValueError, OverflowError: they do not fit, or cannot be read.
        """
        is_new = row.inputs != self._loaded
        if is_new or not (self._rule is None or self._rule.is_fixed):
            self._loaded = _NOTHING
            self._load(row, is_new=is_new)
            self._loaded = row.inputs
        # Steps with the same numbers have the same bytes in the database, so nothing is decoded for
        # these.
        if row.numbers != self._put:
            # Until all are in place: a `put` that fails leaves some numbers of each step.
            self._put, self._recorded = _NOTHING, self._steps.numbers(row)
            self.live.put(self._recorded)
            self._put = row.numbers

    def _load(self, row: Repeat, *, is_new: bool) -> None:
        given, rule = self._steps.given(row), self._rule
        if is_new:
            drawn = [name for name in given.given if name.startswith(GENERATOR)]
            # The calls draw in a row: only the interpreter can set a generator between two draws.
            if self._steps.rule_for(row) is not rule or drawn not in ([], [f"{GENERATOR}0"]):
                raise ProgramError("the inputs of the step are of another kind")
            self.digests, self.generator = given.digests, None
        if rule is not None and not (is_new and given.given) and self._has_rows_of(rule, row.step):
            rule.into(row.step, *self._rows)
        elif rule is not None or given.given:
            found = self._steps.inputs(row)
            laid = self.interpreter.lay_inputs(found)
            for name, content in self._contents.items():
                if name not in laid or len(laid[name]) != len(content):
                    raise ProgramError(f"{name} has another size in this step")
                content.copy_(laid[name])
            self.generator = found.get(f"{GENERATOR}0")

    def _has_rows_of(self, rule: RowsOf, step: int) -> bool:
        """Return whether the rows of a step can be put where it reads them without a copy."""
        count, rows = rule.batches.rows_of(step), self._rows
        return len(rows) == 2 and all(each.is_contiguous() and len(each) == count for each in rows)

    def calls(self, hook: Hook | None) -> list[Call]:
        """Return the calls of a step, with those of a hook in between."""
        if hook is None:
            return self.live.calls
        if self._hooked is None or self._hooked[0] is not hook:
            after = {
                place: [partial(look, self.live.tensor) for look in looks]
                for place, looks in hook.looks(self.live.program).items()
            }
            self._hooked = hook, self.live.calls_with(after)
        return self._hooked[1]

    def different_read(self) -> str | None:
        """Return the first number that the step read and that differs from the recording, in words."""
        for place, index in zip(self.live.reads, self._reading, strict=True):
            if differs := read_difference(self.live.numbers[place], self._recorded[place]):
                return f"operation #{index}, {READ}, {differs}"
        return None


class BoundSteps:
    """The bound programs of a run.

    state: the tensors that they run on, by name; the dictionary is shared with whoever replays.
    """

    def __init__(self, state: dict[str, Tensor]) -> None:
        self._state = state
        self._bound: dict[ProgramKey, BoundStep] = {}
        #: How many steps of each program the interpreter ran.
        self._interpreted: Counter[ProgramKey] = Counter()
        #: Programs that cannot be bound.
        self._left: set[ProgramKey] = set()

    def begin(self, row: Repeat, steps: RecordedSteps) -> BoundStep | None:
        """Prepare a step; return the program that runs it, None if the interpreter must."""
        key = steps.key_of(row)
        bound = self._bound.get(key)
        if bound is None and self._is_worth(key, row, steps):
            bound = self._bind(key, row, steps)
        if bound is not None:
            try:
                self._bring(bound)
                bound.begin(row)
            except (ValueError, OverflowError):  # the interpreter runs what does not fit
                bound = None
        if bound is None:
            self._interpreted[key] += 1
        return bound

    def end(self, bound: BoundStep) -> None:
        """Let the state be as a step that just ran leaves it."""
        for name in bound.live.program.gone:
            self._state.pop(name, None)
        self._state.update(bound.live.ends)

    def _is_worth(self, key: ProgramKey, row: Repeat, steps: RecordedSteps) -> bool:
        if key in self._left:
            return False
        ahead = (each for each in steps.ahead(row.step) if each.program is not None)
        return sum(steps.key_of(each) == key for each in ahead) + self._interpreted[key] >= WORTH

    def _bind(self, key: ProgramKey, row: Repeat, steps: RecordedSteps) -> BoundStep | None:
        try:
            bound = self._bound[key] = BoundStep(row, steps, self._state)
        except ProgramError:
            self._left.add(key)
            return None
        known = self._bound
        # The oldest go first; the newest is about to run.
        while len(known) > 1 and sum(each.live.temporary_bytes for each in known.values()) > MOST_BYTES:
            del known[next(iter(known))]
        return bound

    def _bring(self, bound: BoundStep) -> None:
        """Bring the state to the memory that a program is bound to, if it fits."""
        if all(self._state.get(name) is mine for name, mine in bound.own.items()):
            return
        bound.interpreter.lay_state(self._state)
        moved = {name: mine for name, mine in bound.own.items() if self._state[name] is not mine}
        # Copies first: one tensor may lie where another one belongs.
        values = {name: self._state[name].clone() for name in moved}
        # What stays must not lie where something else is about to be written; empty tensors lie at 0.
        held = {_place(tensor) for name, tensor in self._state.items() if name not in moved}
        if not (held - {0}).isdisjoint(map(_place, moved.values())):
            del self._bound[next(n for n, each in self._bound.items() if each is bound)]
            raise ProgramError("the state has another tensor there now")
        for name, mine in moved.items():
            copy_into(mine, values[name])
        self._state.update(moved)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _can_be_bound(program: Program) -> bool:
    """Return whether a program can run many steps in a row on the same memory."""
    written = {program.tensors[name].storage for each in program.operations for name in each.changed()}
    inputs = {*program.of_kind("input")}
    ends = {program.storage_of(name).kind for name in program.ends.values()}
    return (
        # Shapes and places are those of all steps.
        has_fixed_shapes(program)
        and not program.moves
        # An input is put in place once for all steps that have it.
        and written.isdisjoint(inputs)
        # What a step leaves in the program's own memory must not be read by the next one, which writes
        # there again.
        and ends <= {"temporary"}
        and program.state_names.isdisjoint(program.ends)
    )
