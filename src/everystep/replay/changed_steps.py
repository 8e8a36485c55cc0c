"""Recorded steps with something changed: the programs run again, at another rate or on other batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from everystep.errors import ExperimentError, Fault, RunError, named
from everystep.experiment.batches import RowsOf
from everystep.ops.operators import draws_random_numbers
from everystep.program.number_slots import slots_of
from everystep.program.optimizer_operator import OptimizerOperator
from everystep.program.step_program import Program
from everystep.recording.contents import Inputs
from everystep.recording.database import Repeat
from everystep.recording.input_writer import Taken
from everystep.recording.recorded_run import RecordedRun, Stretch
from everystep.replay.opened_step import of_kind
from everystep.replay.recorded_batches import batches_of
from everystep.replay.recorded_steps import INPUT, NotReplayedError, ProgramKey, RecordedSteps
from everystep.training.job import relabelled_rows

__all__ = ["ChangedSteps", "FurtherSteps"]

#: The target of a batch with several tensors of one number per row.
_TARGETS = ("y", "label", "labels", "target", "targets")
_BATCH = "batch/"
_WHAT = "the other targets"
#: With a number, they scale or move a parameter, or make what moves it: code may compute the number of a
#: decay, noise or a shrinkage from the rate. A bound, or a number that replaces others, is not one.
_SCALING = {
    *("mul", "div", "add", "sub", "lerp", "addcmul", "addcdiv", "pow"),
    *("softshrink", "hardshrink", "threshold"),
}
#: They make tensors of a number, or masks.
_MAKING = {
    *("full", "full_like", "fill", "scalar_tensor", "new_full"),
    *("lt", "le", "gt", "ge", "eq", "ne"),
}
#: How many random numbers they draw depends on what they are given.
_DRAWING_BY_NUMBERS = {"poisson", "binomial", "_standard_gamma", "_sample_dirichlet"}


# What changes what, e.g. with other targets of rows 3 and 8:
#   batches by a rule      the rule hands out other targets; the rows have their numbers in the data
#   batches by content     the bytes of rows 3 and 8 of the first batch are looked for in each batch
#   a number Python reads  where it differs, or may: from that step on, user code could act differently
class ChangedSteps(RecordedSteps):
    """Recorded steps with something changed: their losses and states are not those of the recording.

    With batches by rule, rows have their numbers in the data. With batches by content, they are named by
    their places in the batch of the first step; a later batch has such a row where all its tensors with
    as many rows have the same bytes in it.

    steps: those to take, None for steps that read nothing besides their batches; lr: the learning rate
    of all param groups of torch's own optimizers; None: the recorded ones; relabelled: other targets, by
    row; targets: the recorded and the other target, by row.

    Raises:
        ExperimentError: lists rows that do not exist, and targets that do not fit.
        RunError: the batches have no targets of one number per row, no operation reads them, other code
            than torch's optimizers updates parameters at a rate, or code outside of torch may depend on
            the change.
    """

    is_changed = True

    def __init__(
        self,
        run: RecordedRun,
        stretch: Stretch,
        rule: RowsOf | None,
        steps: range | None = None,
        lr: float | None = None,
        relabelled: Mapping[int, float] = MappingProxyType({}),
    ) -> None:
        super().__init__(run, stretch, rule)
        self.lr = lr
        #: Steps in their stored form, by their programs, numbers and inputs.
        self._taken: dict[tuple[Any, ...], Taken] = {}
        #: The tensors of a batch with its rows; the bytes of a row in all of these, and its target.
        self._with_rows: list[str] = []
        self._changed: list[tuple[Tensor, float]] = []
        #: The tensor of a batch with its targets.
        self._name = "y"
        #: Whether a batch has one of the rows, by the inputs of its step.
        self._has: dict[bytes | None, bool] = {}
        self.targets: dict[int, tuple[float, float]] = {}
        programs = self._first_of(steps)
        drawing = (step for key, step in programs.items() if step and self._draws_by_numbers(key))
        #: The first step that may draw more or fewer random numbers than recorded.
        self._draws_other_from = min(drawing, default=math.inf)
        if lr is not None:
            self._check_rates(programs, steps)
        if steps is None:
            return
        if relabelled:
            self._check_not_from_targets(steps)
        self._check_not_from_parameters(steps)
        if not relabelled:
            return
        if rule is not None:
            self.rule = relabelled_rows(rule, relabelled, _WHAT)
            y, places = rule.y, {row: int(rule.batches.places([row])[0]) for row in relabelled}
        else:
            y, places = self._follow(steps[0], relabelled), {row: row for row in relabelled}
        self.targets = {row: (float(y[places[row]]), target) for row, target in relabelled.items()}

    def change_files(self) -> dict[int, str]:
        """Return {}: nothing happens between these steps."""
        return {}

    def loss(self, number: int) -> float:
        """Return NaN: the recorded loss is not that of the step."""
        return math.nan

    def unknown_in(self, number: int) -> str | None:
        """Return what Python may have read that the recording does not have, and no program computes."""
        row = self.row(number)
        program = self.program_of(row).program
        if program.left_out:
            return f"Python read {program.left_out:,} of its values that no program computes"
        is_drawn = any(name.startswith("generator/") for name in self.given(row).given)
        if is_drawn and number > self._draws_other_from:
            return (
                "your code draws random numbers between steps, and how many these draw depends on their "
                f"numbers since step {self._draws_other_from}"
            )
        spec = program.tensors.get(self._name)
        is_relabelled = bool(self.targets) and (self.rule is not None or self._has.get(row.inputs))
        if is_relabelled and spec is not None and spec.storage in program.read_batch:
            return f"Python read {self._name}, which has another target"
        return None

    def taken(self, number: int) -> Taken:
        """Return a step in its stored form."""
        row = self.row(number)
        # By program, numbers and inputs: of batches by a rule, all steps have the same.
        if (known := self._taken.get(row[1:4])) is not None:
            return known._replace(step=number)
        given, tensors = self.given(row), self.stored(row, with_program=True)
        size = sum(tensor.nbytes for tensor in tensors.values())
        recorded, own = self.all_numbers(row), self.numbers(row)
        # Before the numbers of operations come the places of what moves, which stay.
        numbers = [*recorded[: len(recorded) - len(own)], *own]
        found = Taken(number, row.program, numbers, tensors, given.nesting, size, {})
        if not tensors:
            self._taken[row[1:4]] = found
        return found

    def numbers(self, row: Repeat) -> list[int | float]:
        """Return the numbers of a step, with the learning rate in them."""
        numbers = super().numbers(row)
        if self.lr is None:
            return numbers
        interpreter, found = self.program_of(row), list[int | float]()
        operations = interpreter.program.operations
        for operation, own in zip(operations, interpreter.numbers_of(numbers), strict=True):
            if isinstance(operation.resolved, OptimizerOperator):
                names = [slot.name for slot in slots_of(operation)]
                # One rate for all param groups, so each slot of `lr` gets it.
                own = [self.lr if name == "lr" else n for name, n in zip(names, own, strict=True)]
            found += own
        return found

    def steps_with(self, steps: Iterable[int]) -> tuple[int, ...]:
        """Return those of some steps that have run and have a relabelled row in their batch."""
        return tuple(step for step in steps if self._has.get(self.row(step).inputs))

    def stored(self, row: Repeat, *, with_program: bool = False) -> dict[str, Tensor]:
        """Return the inputs of a step that the run holds by content, with the other targets.

        Raises:
            NotReplayedError: also if a batch has a row twice.
        """
        tensors = super().stored(row, with_program=with_program)
        if not self._changed:
            return tensors
        batch = of_kind(tensors, "batch")
        known = _rows_in(batch, self._with_rows)
        self._has[row.inputs] = False
        for own, target in self._changed:
            places: list[int] = []
            if known is not None and known.shape[1:] == own.shape:
                places = torch.eq(known, own).all(1).nonzero()[:, 0].tolist()
            if len(places) > 1:
                raise NotReplayedError(
                    f"the batch of step {row.step} has the same row {len(places)} times (places "
                    f"{', '.join(map(str, places))}), so it cannot be known which one to relabel"
                )
            batch[self._name][places] = target
            self._has[row.inputs] |= bool(places)
        return tensors

    def _follow(self, first: int, relabelled: Mapping[int, float]) -> Tensor:
        """Note the bytes of rows of a batch, which later batches may have; return its targets."""
        row, what = self.row(first), f"the batch of step {first}"
        batch = of_kind(self.stored(row), "batch")
        self._name = _target(batch, f"{what} of {self.run.name}")
        program = self.program_of(row).program
        read = program.storages_of(each for one in program.operations for each in one.reads())
        if self._name not in program.tensors or program.tensors[self._name].storage not in read:
            raise RunError(f"no operation of step {first} of {self.run.name} reads {self._name}")
        y = batch[self._name]
        missing = f"{what} has rows 0 to {len(y) - 1:,}"
        faults = [
            Fault(f"relabel {place}", reason)
            for place, target in relabelled.items()
            if (reason := _why_not(y, target) if 0 <= place < len(y) else missing)
        ]
        if faults:
            raise ExperimentError(faults, _WHAT)
        self._with_rows = [name for name, t in batch.items() if t.dim() and len(t) == len(y)]
        rows = _rows_in(batch, self._with_rows)
        assert rows is not None
        self._changed = [(rows[place], target) for place, target in relabelled.items()]
        return y

    def _first_of(self, steps: range | None) -> dict[ProgramKey, int | None]:
        """Return the first step of each program of the steps; None: of any steps by rules."""
        if steps is None:
            return dict.fromkeys(map(ProgramKey, self.facts.programs))
        first: dict[ProgramKey, int | None] = {}
        for row in map(self.row, steps):
            if row.program is not None:
                # Which operations there are does not depend on the sizes.
                first.setdefault(self.key_of(row)._replace(sizes=None), row.step)
        return first

    def _draws_by_numbers(self, key: ProgramKey) -> bool:
        return any(each.name in _DRAWING_BY_NUMBERS for each in self.program(*key).program.operations)

    def _check_rates(self, programs: Mapping[ProgramKey, int | None], steps: range | None) -> None:
        """Check that programs know the learning rate of all that the steps train."""
        has_rate, where, end, of = False, self.run.name, "", ""
        for key, step in programs.items():
            by_optimizers, by_others = _updated(self.program(*key).program)
            has_rate |= bool(by_optimizers)
            if by_others:
                of = f" for {named(sorted(name.partition('/')[2] for name in by_others))}"
                if steps is not None and step is not None:
                    where = f"step {step} of {where}"
                    end = f"end at step {step - 1}, or " if step > steps[0] else ""
                break
        if of or not has_rate:
            raise RunError(
                f"{where} has no learning rate that its programs know as a number{of}: only optimizers "
                "of torch's own that are parts and take no closure have one, where it is not a tensor; "
                f"{end}change the rate in a fork that your code makes"
            )

    def _check_not_from_parameters(self, steps: range) -> None:
        """Check that the steps read nothing that code may have computed from the parameters."""
        if (name := self.brought_later(steps)) is not None:
            raise RunError(
                f"the steps of {self.run.name} after step {steps[0]} read a tensor that is in no part "
                f"and no batch, and that no step before has read ({name}): your code may compute it "
                "from the parameters; make the change in a fork that your code makes, or pass the "
                "object that holds it to everystep.record(...)"
            )

    def _check_not_from_targets(self, steps: range) -> None:
        """Check that the steps read nothing that code may have made from the targets."""
        batches: dict[Any, tuple[str, set[Any]]] = {}
        known = set[Any]()
        for row in map(self.row, (max(1, steps[0] - 1), *steps)):
            given = self.given(row).given.items()
            of = tuple(each.content for name, each in given if name.startswith(_BATCH))
            # By a rule, the row in the database has no batch; one batch for all steps is the same one.
            batch = of if self.rule is None or self.rule.is_fixed else row.step
            for name, each in given:
                if name.startswith(INPUT):
                    batches.setdefault(each.content, (name, set()))[1].add(batch)
            if row.step < steps[0]:  # what was there before is not made from other targets
                known = {*batches}
        # What several batches come with was not made from one of them; NumPy is not seen.
        unsure = [name for key, (name, of) in batches.items() if len(of) == 1 and key not in known]
        if unsure:
            raise RunError(
                f"the steps of {self.run.name} read a tensor that is in no batch "
                f"({unsure[0].removeprefix(INPUT)}): your code may make it from the targets, as with "
                "NumPy, or in the step before; change the targets in a fork instead"
            )


class FurtherSteps(ChangedSteps):
    """Each step of a stretch of a run by its rules, recorded or not.

    stretch: its batches follow from a rule, and no scheduler changes its settings; rule: returns its
    batches, None if no step will run; lr: a different learning rate, None for that of the run.
    """

    def __init__(
        self,
        run: RecordedRun,
        stretch: Stretch,
        rule: RowsOf | None = None,
        lr: float | None = None,
    ) -> None:
        super().__init__(run, stretch, rule, lr=lr)
        self._batches = batches_of(self.facts)
        #: The newest step by its number of rows.
        self._alike: dict[int, Repeat] = {}

    def row(self, number: int) -> Repeat:
        """Return what repeats a step: its operations are those of a recorded one."""
        return self._like(number)._replace(step=number)

    def given(self, row: Repeat) -> Inputs:
        """Return the inputs of a step, which draws from where the step before left the generator."""
        found = super().given(row)
        # The row is that of an earlier step, which drew from another state of the generator.
        given = {name: each for name, each in found.given.items() if not name.startswith("generator/")}
        return found._replace(given=given)

    def reason_against(self) -> str | None:
        """Return why no steps can follow the run's last, None if they can."""
        # A later epoch has batches of the same sizes, so one is enough to know.
        epoch = range(self.last + 1, self.last + 1 + self._batches.steps_per_epoch)
        if not all(map(self._can_take, epoch)):
            return "it has too few steps: no program takes later ones"
        changes = sorted(self.run.change_files().items())
        for step, file in changes:
            change = self.run.change(file)
            for name in sorted({*change.tensors, *change.gone}):
                if not name.startswith("generator/"):
                    return f"code after step {step} changed {name.partition('/')[2]}"
        programs = map(self.program, self.facts.programs)
        operations = (each for program in programs for each in program.program.operations)
        # What code between the steps draws matters only if steps draw, too.
        if changes and any(draws_random_numbers(each.resolved) for each in operations):
            return "code between the steps drew random numbers, and the steps draw, too"
        return None

    def _can_take(self, number: int) -> bool:
        """Return whether there is a program, other than that of a first step, which creates state."""
        try:
            ends = self.program_of(self._like(number)).program.ends
        except RunError:
            return False
        # The first step of an optimizer creates its state, which all later ones change in place.
        return all(name.startswith("gradient/") for name in ends)

    def _like(self, number: int) -> Repeat:
        """Return the step itself if the run has it, else the newest one with as many rows."""
        if number <= self.last:
            return super().row(number)
        rows = self._batches.rows_of(number)
        if rows not in self._alike:
            epoch = range(self.last, max(self.first - 1, self.last - self._batches.steps_per_epoch), -1)
            alike = next((n for n in epoch if self._batches.rows_of(n) == rows), 0)
            self._alike[rows] = super().row(alike)
        return self._alike[rows]


def _updated(program: Program) -> tuple[set[str], set[str]]:
    """Return what torch's optimizers train at a rate that is a number, and what may have another rate.

    Both are names of the state. Each optimizer has a rate, and so may code that moves parameters.
    """
    gradients = {name for name in program.tensors if name.startswith("gradient/")}
    paths = {name.partition("/")[2] for name in gradients} | program.gradients.keys()
    trained = {
        name: program.storages_of({name, program.ends.get(name, name)})
        for name in program.state_names - gradients
        if name.startswith("parameter/") or name.partition("/")[2] in paths
    }
    own = program.storages_of(trained)
    # What follows gradients in another way may have a rate that is unknown. A target network, or an
    # average, follows the parameters only: a parameter that is changed passes nothing on (`- own`).
    following = program.storages_of(gradients | {*program.gradients.values()})
    by_optimizers, by_updates, by_gradients, by_numbers = set[str](), set[str](), set[str](), set[str]()
    state = own | program.storages_of({*program.state_names, *program.ends.values()})
    inputs = {n for n in program.tensors if program.storage_of(n).kind == "input"}
    for operation in program.operations:
        changed = program.storages_of(operation.changed())
        is_whole = isinstance(operation.resolved, OptimizerOperator)
        # A rate that is a tensor is not a number of the step: it is part of the state.
        rates = sum(slot.name == "lr" for slot in slots_of(operation)) if is_whole else 0
        if rates and rates == len(operation.keywords["lr"]):
            by_optimizers |= changed
        elif operation.phase == "update":
            by_updates |= changed
        elif operation.phase == "backward" or following & program.storages_of(operation.reads()):
            by_gradients |= changed
            following |= changed - own
        else:
            kind = operation.name.removeprefix("_foreach_").rstrip("_")  # in place or on a list, too
            read = [*operation.reads()]
            # `weight -= decay * weight` has its number in a product that the step makes for that.
            made = not (by_numbers - state).isdisjoint(program.storages_of(read))
            # A number may be a tensor: `weight *= torch.tensor(1 - decay)`.
            numbers = [n for n in read if n in inputs and not math.prod(program.tensors[n].shape) > 1]
            if made or (kind in _SCALING and (numbers or slots_of(operation))):
                by_numbers |= changed
            elif numbers or (kind in _MAKING and slots_of(operation)):
                by_numbers |= changed - own

    def of(changed: set[str]) -> set[str]:
        return {name for name, storages in trained.items() if storages & changed}

    # A sharpness-aware step moves what an optimizer trains along the gradient, too, and back again.
    known = of(by_optimizers)
    return known, of(by_gradients) - known | of(by_updates) | of(by_numbers) & known


def _target(batch: Mapping[str, Tensor], what: str) -> str:
    """Return the name of the tensor that has the target of each row; what: names the batch."""
    found = [n for n, t in batch.items() if t.dim() and t.numel() == len(t) > 0 and not t.is_complex()]
    # Two such columns, e.g. the index of a row and its label: the usual names decide.
    if len(found) > 1:
        found = [name for name in found if name.rpartition(".")[2] in _TARGETS] or found
    if len(found) == 1 and any(
        t.dim() and len(t) == len(batch[found[0]]) for name, t in batch.items() if name != found[0]
    ):
        return found[0]
    shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in batch.items()) or "no tensor"
    raise RunError(
        f"{what} has {shapes}: not rows with one target each, by which to relabel them; change the "
        "targets in a fork of your loop"
    )


def _rows_in(batch: Mapping[str, Tensor], names: Sequence[str]) -> Tensor | None:
    """Return the bytes of each row in some tensors (N, bytes), None if they are not of the same rows."""
    found = [batch[name] for name in names if name in batch and batch[name].dim()]
    if len(found) < len(names) or len({len(each) for each in found}) > 1:
        return None
    rows = (each.reshape(len(each), -1).contiguous().view(torch.uint8) for each in found)
    return torch.cat([*rows], 1)


def _why_not(y: Tensor, target: float) -> str | None:
    held = float(torch.tensor(target, dtype=torch.float64).to(y.dtype))
    kind = str(y.dtype).removeprefix("torch.")
    if y.is_floating_point():
        return None if math.isfinite(held) else f"{target:g} is not finite in {kind}"
    return None if held == target else f"{target:g} does not fit into {kind}"
