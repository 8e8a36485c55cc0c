"""Further steps: those that the programs of a run can take, without the objects that trained it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from everystep.program.interpreter import Interpreter
from everystep.program.number_slots import is_number
from everystep.program.operators import draws_random_numbers
from everystep.program.optimizers import OptimizerOperator
from everystep.program.program import Program
from everystep.recording.contents import Taken, inputs_of, packed, unpacked
from everystep.recording.database import Repeat
from everystep.recording.run import RecordedRun
from everystep.replay.batches import batches_of
from everystep.replay.programs import read_program

__all__ = ["FurtherSteps"]

Number = int | float
#: A step, as a replay reads it and as a recorder writes it.
Further = tuple[Repeat, Taken]


class FurtherSteps:
    """What each step of a run would be, by its rules, whether the run has it or not.

    Args:
        run: its batches follow from a rule, and no schedule changes its settings.
        lr: another learning rate than the run's, None for that.
    """

    def __init__(self, run: RecordedRun, lr: float | None = None) -> None:
        self._run = run
        self._lr = lr
        self._batches = batches_of(run.facts.training)
        self._newest: dict[int, Repeat | None] = {}
        self._program = cache(lambda number: read_program(run, number))
        self._known: dict[tuple[int, bytes | None, bytes | None], Further] = {}

    def reason_against(self) -> str | None:
        """Return why there are no such steps after the run's last, None if there are.

        What code between the steps drew matters only to steps that draw, too.
        """
        run = self._run
        newest = run.newest_step()
        for number in range(newest + 1, newest + 1 + self._batches.steps_per_epoch):
            row = self._like(number)
            if row is None or row.program is None or _makes_state(self._program(row.program)):
                return "it has too few steps: no program takes later ones"
        changes = run.change_files()
        for step, file in sorted(changes.items()):
            change = run.change(file)
            own = sorted(n for n in {*change.tensors, *change.gone} if not n.startswith("generator/"))
            if own:
                return f"code after step {step} changed {own[0].partition('/')[2]}"
        if changes and any(_draws(self._program(each)) for each in run.facts.training.programs):
            return "code between the steps drew random numbers, and the steps draw, too"
        return None

    def row(self, number: int) -> Repeat:
        """Return what repeats a step, for a replay."""
        return self._step(number)[0]._replace(step=number)

    def taken(self, number: int) -> Taken:
        """Return a step as it is written."""
        return self._step(number)[1]._replace(step=number)

    def _step(self, number: int) -> Further:
        """Return a step: its operations are those of a recorded one."""
        row = self._like(number)
        assert row is not None and row.program is not None
        key = row.program, row.numbers, row.inputs
        if key not in self._known:
            self._known[key] = self._further(row, row.program)
        return self._known[key]

    def _like(self, number: int) -> Repeat | None:
        """Return the step itself if the run has it, else the newest one with as many rows."""
        newest, rows = self._run.newest_step(), self._batches.rows_of(number)
        if number > newest:
            if rows in self._newest:
                return self._newest[rows]
            epoch = range(newest, max(0, newest - self._batches.steps_per_epoch), -1)
            number = next((n for n in epoch if self._batches.rows_of(n) == rows), 0)
        found = next(iter(self._run.repeats(number, number)), None)
        if number and self._batches.rows_of(number) == rows:
            self._newest[rows] = found
        return found

    def _further(self, row: Repeat, program: int) -> Further:
        what = f"step {row.step} of {self._run.name}"
        inputs = inputs_of(row.inputs, what)
        # Where the recorded step found its generator, this one finds it as the step before has left it.
        given = {name: each for name, each in inputs.given.items() if not name.startswith("generator/")}
        numbers = unpacked(row.numbers, what) or []
        if self._lr is not None:
            numbers = _with_rate(self._program(program), numbers, self._lr)
        listed = {name: each.to_json() for name, each in given.items()}
        text = packed({"nesting": inputs.nesting, "given": listed})
        contents = self._run.contents(given)
        tensors = {name: tensor for name, tensor in contents.items() if tensor is not None}
        return (
            Repeat(row.step, program, packed(numbers) if numbers else None, text),
            Taken(row.step, program, numbers, tensors, inputs.nesting, 0, {}),
        )


def _makes_state(program: Program) -> bool:
    """Tell whether steps with a program make tensors that later ones find, as the first does."""
    return any(not name.startswith("gradient/") for name in program.ends)


def _draws(program: Program) -> bool:
    return any(draws_random_numbers(each.resolved) for each in program.operations)


def _with_rate(program: Program, numbers: list[Number], lr: float) -> list[Number]:
    """Return the numbers of a step with another learning rate."""
    found: list[Number] = []
    owned = Interpreter(program, torch.device("cpu")).numbers_of(numbers)
    for operation, own in zip(program.operations, owned, strict=True):
        place = 0
        for key, value in operation.keywords.items():
            if isinstance(operation.resolved, OptimizerOperator):
                count = _count(value)
                if key == "lr":
                    own[place : place + count] = [lr] * count
                place += count
        found += own
    return found


def _count(value: Any) -> int:
    """Return how many numbers an argument has."""
    return sum(map(_count, value)) if isinstance(value, list | tuple) else int(is_number(value))
