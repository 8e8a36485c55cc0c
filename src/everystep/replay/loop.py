"""Loop: replays steps that Python took and everystep watched, with programs alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from everystep.device import select
from everystep.errors import ProgramError, RunError
from everystep.experiment.batches import RowsOf
from everystep.program.calls import without_autograd
from everystep.program.interpreter import Environment, Interpreted, Interpreter
from everystep.program.memory import copy_on_cpu
from everystep.program.operators import REFUSALS
from everystep.program.precision import Precision
from everystep.program.program import Program
from everystep.recording.contents import digest_of, unpacked
from everystep.recording.database import Repeat, cut
from everystep.recording.run import RecordedRun, Stretch
from everystep.replay.batches import batches_of, settings_of
from everystep.replay.bound_steps import BoundStep, BoundSteps, replace_state
from everystep.replay.programs import read_program
from everystep.replay.step import Batch, Hook, NotReplayedError, reading
from everystep.replay.stored_inputs import StoredInputs
from everystep.step.build import NotCapturableError
from everystep.step.expanded import Expanded, Expander
from everystep.step.generators import Generators
from everystep.step.hyperparameters import is_hyperparameter, set_hyperparameter
from everystep.step.observe import Observation, StepObserver
from everystep.step.own_state import PREFIX
from everystep.step.state import State, copy_of
from everystep.training.batch import nested_again

__all__ = ["LoopCheckpoint", "LoopStepper"]

#: Rows of the database that are read at once.
BLOCK = 256
#: Steps that are looked at in advance: to bind their program, and to read their inputs at once.
LOOK_AHEAD = 64
#: Tensors that a message names.
MOST_NAMED = 3
_GENERATOR = re.compile(r"generator/([0-9]{1,9})")
_RATE = re.compile(r"(\w+\.)?lr(\[\d+\])?")


class _FoundError(Exception):
    """Ends a run of a program that has come far enough."""


class LoopCheckpoint(NamedTuple):
    """A copy of the tensors of a state, and of the random generators."""

    tensors: dict[str, Tensor]
    generators: Generators


class _Inputs(NamedTuple):
    """The inputs of a step: tensors by `batch/name` and `input/name`, and the nesting of the batch.

    digests: of the state after the step, by name, if it has any.
    """

    tensors: dict[str, Tensor]
    nesting: Any
    digests: dict[str, Any]


class LoopStepper:
    """Replays watched steps, in any order of loading and running.

    Args:
        run: the run.
        stretch: the steps, of a user's loop or of everystep's own.
        rule: returns the batches of everystep's own steps, None where each row holds its batch.
        diverged: called with a step that differs from the recording, and how, in words.
        conversion: of its programs and their inputs, None as recorded.

    state: the step after which the current state is, None before one is loaded.
    """

    def __init__(
        self,
        run: RecordedRun,
        stretch: Stretch,
        rule: RowsOf | None,
        diverged: Callable[[int, str], None],
        conversion: Precision | None = None,
    ) -> None:
        facts = stretch.facts
        self.state: int | None = None
        self._run = run
        self._facts = facts
        self._rule = rule
        self._is_own_loop = facts.loop is not None
        #: A snapshot of everystep's own steps lacks the gradients that the next step drops.
        self.has_gradients_in_state = self._is_own_loop
        self._loaded_at: int | None = None
        self._device = select(facts.device)
        self._diverged = diverged
        self._conversion = conversion
        self._programs: dict[int, Interpreter] = {}
        self._expanders: dict[Interpreter, Expander] = {}
        self._recorded: dict[int, Program] = {}
        self._rows: dict[int, Repeat] = {}
        self._losses: dict[int, float] = {}
        self._stored = StoredInputs(run)
        self._read_ahead = 0
        self._tensors: dict[str, Tensor] = {}
        self._bound = BoundSteps(self._tensors, self._device)
        #: A step that failed after others of the same call; the next call raises this.
        self._failed: tuple[int, NotReplayedError] | None = None
        self._loaded: State | None = None
        #: A snapshot of everystep's own steps has what changed after its step.
        self._between = {
            step: name
            for step, name in run.change_files().items()
            if self._is_own_loop or step >= stretch.first
        }
        self._settled: int | None = None
        self._has_diverged = False
        self._further: Callable[[int], Repeat] | None = None
        if conversion is not None:
            for number in self._facts.programs:
                self._program(Repeat(0, number, None, None))  # they say what else has it
        is_held = _RATE.fullmatch if self._is_own_loop else is_hyperparameter
        self._settings = settings_of(run, filter(is_held, run.measurement_names), stretch.first)

    def load(self, state: State) -> None:
        """Restore a state from disk.

        Raises:
            RunError: it is not a state of a loop.
        """
        names = state.settings.get("names")
        if not isinstance(names, list):
            raise RunError(f"state {state.step} of {self._run.name} is not a state of watched steps")
        named = state.named() | {n: t for n, t in state.rest.items() if n.startswith(PREFIX)}
        tensors = {n: named[n] for n in names if n in named}
        self._replace(tensors, self._here)
        self._loaded, self._loaded_at = state, state.step
        self._settled = None
        self._has_diverged = False
        self.state = state.step
        state.generators.restore(self._device)

    def save(self) -> LoopCheckpoint:
        """Return a copy of the current state."""
        return LoopCheckpoint(_copies(self._tensors), Generators.capture(self._device))

    def restore(self, step: int, saved: LoopCheckpoint) -> None:
        """Bring everything back to what `save` returned after `step`."""
        self._replace(saved.tensors, _copies)
        saved.generators.restore(self._device)
        self._settled = self._loaded_at = None
        self.state = step

    def _replace(
        self, tensors: dict[str, Tensor], copies: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    ) -> None:
        """Let these be the tensors of the state."""
        for name in self._tensors.keys() - tensors.keys():
            del self._tensors[name]
        replace_state(self._tensors, tensors, copies)
        self._bound.touched()
        self._failed, self._read_ahead = None, 0

    def _here(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self._device, copy=True) for name, tensor in tensors.items()}

    def capture(self) -> State:
        """Return the current state in the form that is written to disk."""
        assert self.state is not None and self._loaded is not None
        if not self._is_own_loop:  # its snapshots have what changed after the step
            self.settle()
        copies = {name: copy_of(t) for name, t in self._tensors.items() if self._is_kept(name)}
        known = self._loaded.parameters
        parameters = {
            path: copies[f"{kind}/{path}"]
            for path in known
            for kind in ("buffer", "parameter")
            if f"{kind}/{path}" in copies
        }
        # Layers may have come on the way.
        new = (name.partition("/") for name in copies if name.startswith("parameter/"))
        parameters |= {
            path: copies[f"parameter/{path}"]
            for _, _, path in new
            if path not in known and "#" not in path and f"parameter/{path}" not in self._loaded.rest
        }
        rest = {
            name: tensor
            for name, tensor in copies.items()
            if name.partition("/")[2] not in parameters or not name.startswith(("parameter/", "buffer/"))
        }
        generators = Generators.capture(self._device).tensors()
        rest |= {f"generator/{name}": tensor for name, tensor in generators.items()}
        if not self._is_own_loop and self.state in self._between:  # what code has drawn since the step
            changed = self._run.change(self._between[self.state]).tensors
            rest |= {name: each for name, each in changed.items() if name.startswith("generator/")}
        settings = self._loaded.settings | {"step": self.state, "names": [*copies]}
        state = State(self.state, parameters, rest, settings)
        return state if self._is_own_loop else state.with_optimizer("optimizer", self._groups())

    def go_on(self, further: Callable[[int], Repeat]) -> None:
        """Run steps that the run does not have, with nothing between them.

        further: returns what repeats each.
        """
        self._further = further
        self._rows, self._between = {}, {}

    def _is_kept(self, name: str) -> bool:
        """Tell whether a state has a tensor: not a gradient that everystep's own step drops."""
        if self._is_own_loop or not name.startswith("gradient/"):
            return True
        for number in self._facts.programs:  # one that was not needed yet may read the gradient
            with suppress(NotReplayedError):
                self._program(Repeat(0, number, None, None))
        return any(name in interpreter.state for interpreter in self._programs.values())

    def settle(self) -> None:
        """Apply what the loop changed after the last step, outside of any step."""
        if self.state is None or self.state == self._settled or self.state not in self._between:
            return
        self._settled = self.state
        tensors, gone = self._run.change(self._between[self.state])
        for name in gone:
            self._tensors.pop(name, None)
        tensors = {n: each for n, each in tensors.items() if not n.startswith("generator/")}
        if self._conversion is not None:
            tensors = {name: self._conversion.tensor(name, each) for name, each in tensors.items()}
        replace_state(self._tensors, tensors, self._here)
        self._bound.touched()

    def run(self, last: int) -> Tensor:
        """Run the steps up to `last`; return their losses (steps), on the CPU.

        If a step logged no loss, or a loss that no operation returned, this is the recorded one.

        Raises:
            RunError: nothing repeats a step, or its inputs were dropped.
        """
        return self._advance(last)

    def watch(self, last: int, hook: Hook) -> Tensor:
        """Run the steps up to `last`, observed by a hook; return their losses (steps), on the CPU.

        A bound program must run the next step, see `can_watch`. `watch` ends at the first step that none
        runs, or when the hook returns so.

        Raises:
            RunError: as `run`.
        """
        return self._advance(last, hook)

    def can_watch(self, number: int) -> bool:
        """Tell whether a hook can observe the next step: a program that is bound runs it."""
        try:
            return self._begin(number, number + BLOCK) is not None
        except NotReplayedError:  # which running the step reports
            return False

    def _advance(self, last: int, hook: Hook | None = None) -> Tensor:
        """Run steps; if one fails after others, return the losses of these: the next call raises."""
        losses: list[float] = []
        assert self.state is not None
        goes_on = True
        try:
            while goes_on and self.state < last:
                self._raise_failed(self.state + 1)
                goes_on = self._run_bound(last, hook, losses)
                if hook is None and self.state < last:
                    self._read_inputs(self.state + 1, last)
                    losses.append(self._take(self.state + 1))
        except NotReplayedError as error:
            self._failed = self.state + 1, error
            if not losses:
                raise
        return torch.tensor(losses, dtype=torch.float64)

    def _raise_failed(self, number: int) -> None:
        if self._failed is not None and self._failed[0] == number:
            raise self._failed[1]

    def _run_bound(self, last: int, hook: Hook | None, losses: list[float]) -> bool:
        """Run steps by bound programs, up to one that none can run; return whether a hook continues.

        losses: to add theirs to.
        """
        assert self.state is not None
        with without_autograd():
            while self.state < last:
                number = self.state + 1
                bound = self._begin(number, last)
                if bound is None:
                    return hook is None
                live = bound.live
                calls = live.calls if hook is None else hook.calls(live)
                if live.draws and bound.generator is not None:
                    torch.set_rng_state(bound.generator)
                try:
                    for call in calls:
                        call()
                except REFUSALS as error:
                    reason = str(error).strip().partition("\n")[0] or type(error).__name__
                    raise self._not_replayed(number, reason) from None
                self._end(number, bound)
                losses.append(live.loss.item())
                if hook is not None and not hook.after(number, live):
                    return False
        return True

    def _begin(self, number: int, last: int) -> BoundStep | None:
        """Prepare a step; return the program that runs it, None if the interpreter must.

        last: the last step that is about to run.
        """
        self.settle()
        row = self._row(number)
        if row.program is None:
            return None
        interpreter = self._program(row)
        bound = self._bound.find(row, interpreter)
        if bound is None or row.inputs != bound.inputs:
            self._read_inputs(number, last)
            given = self._stored.given(row)
            rule = None if "batch/x" in given.given else self._rule
            if bound is None and self._bound.is_worth(row, self._rows_of(number, last)):
                bound = self._bound.bind(row, interpreter, given, self._inputs(row).tensors, rule)
            if bound is None:
                return None
            if not bound.is_for(given, is_by_rule=rule is not None):
                self._bound.drop(row.program)
                return None
            if not bound.load(row, given, lambda row: self._inputs(row).tensors):
                return None
        if not bound.put(row, self._numbers):
            return None
        if bound.is_by_rule and self._rule is not None and not bound.load_rows(number, self._rule):
            return None
        return bound

    def _end(self, number: int, bound: BoundStep) -> None:
        """Compare a step that a bound program has run with its row."""
        self._bound.end(bound)
        self.state = number
        if bound.live.program.loss is None:
            bound.live.loss.fill_(self._recorded_loss(number))
        if bound.reads and (differs := bound.different_read()) is not None:
            self._differ(number, differs)
        if bound.digests:
            self._compare_digests(number, bound.digests)

    def _read_inputs(self, number: int, last: int) -> None:
        """Read the inputs of the next steps at once, unless that was done."""
        if number > self._read_ahead:
            self._row(number)
            rows = self._rows_of(number, last)
            if len(rows) > 1:
                self._stored.read_ahead(rows)
            self._read_ahead = number + len(rows) - 1

    def _rows_of(self, first: int, last: int) -> list[Repeat]:
        """Return the rows of the next steps, as far as they have been read."""
        steps = range(first, min(last, first + LOOK_AHEAD) + 1)
        return [self._rows[step] for step in steps if step in self._rows]

    def observe(self) -> Observation:
        """Run the next step, and return everything in it.

        Raises:
            RunError: as `run`.
        """
        assert self.state is not None
        number = self.state + 1
        self.settle()
        row = self._row(number)
        interpreter = self._program(row)
        if interpreter not in self._expanders:
            self._expanders[interpreter] = Expander(interpreter, self._device)
        given = self._numbers(row), self._tensors, partial(self._before, row)
        try:
            with without_autograd():
                expansion = self._expanders[interpreter].expanded(*given)
        except (ProgramError, NotCapturableError, *REFUSALS) as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise self._not_replayed(number, reason) from None
        observer = StepObserver(expansion.interpreter, expansion.numbers)
        loss = self._take(number, observer.look, expansion)
        found = observer.observation(torch.tensor(loss, dtype=torch.float64))
        has_unseen = bool(self._facts.unseen)
        return found._replace(places=found.places._replace(has_unseen=has_unseen))

    def _before(self, row: Repeat, index: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Return copies of tensors of a step's program, by name, as they are before an operation."""
        found: dict[str, Tensor] = {}

        def look(place: int, environment: Environment) -> None:
            if place == index:
                found.update((name, environment.tensor(name).clone()) for name in names)
                raise _FoundError

        drawn, interpreter = Generators.capture(self._device), self._program(row)
        with suppress(_FoundError):
            _run(
                interpreter, _copies(self._tensors), self._inputs(row).tensors, self._numbers(row), look
            )
        drawn.restore(self._device)
        return found

    def named_state(self) -> dict[str, Tensor]:
        """Return the live tensors of the state by name."""
        return self._tensors

    def gradients(self) -> dict[str, Tensor]:
        """Return copies of the gradients that are pending, by parameter."""
        prefix = "gradient/"
        return {
            name.removeprefix(prefix): copy_on_cpu(tensor)
            for name, tensor in self._tensors.items()
            if name.startswith(prefix)
        }

    def hyperparameters(self) -> dict[str, float]:
        """Return the learning rates of the last step, and other settings that ever changed."""
        assert self.state is not None
        found = {name: each.at(self.state) for name, each in self._settings.items()}
        known = {name: value for name, value in found.items() if value is not None}
        return known if self._is_own_loop else self._rates_of_state() | known

    def _groups(self) -> list[dict[str, Any]]:
        """Return the param groups of everystep's own steps with the numbers that the last one used."""
        known = self._loaded.optimizer("optimizer").get("groups", []) if self._loaded else []
        groups = [dict(group) for group in known]
        for name, setting in self._settings.items():
            value = setting.at(self.state or 0)
            if value is not None:
                set_hyperparameter(SimpleNamespace(param_groups=groups), name, value)
        return groups

    def _rates_of_state(self) -> dict[str, float]:
        """Return the learning rates in the state that was loaded."""
        known = self._loaded.optimizer("optimizer").get("groups", []) if self._loaded else []
        found = {}
        for index, group in enumerate(known):
            rate = group.get("lr", self._tensors.get(f"group/{index}/lr"))
            if isinstance(rate, int | float | Tensor):
                found[f"lr[{index}]" if index else "lr"] = float(rate)
        return found

    @property
    def has_gradients(self) -> bool:
        """Whether the gradients of the last step are available."""
        return self.has_gradients_in_state or self._loaded_at != self.state

    def epoch(self, number: int) -> int:
        """Return the epoch of a step, from 0; a user's loop has no epochs."""
        return 0 if self._is_own_loop else batches_of(self._facts).epoch(number)

    def generators(self, number: int) -> dict[str, Tensor]:
        """Return the states of the random generators that the next step draws from, by name."""
        given = self._inputs(self._row(number)).tensors
        drawn = {name: tensor for name, tensor in given.items() if _GENERATOR.fullmatch(name)}
        return Generators.capture(self._device).tensors() | drawn

    def batch(self, number: int) -> Batch:
        """Return the batch of a step in its original nesting, on the CPU.

        Raises:
            RunError: it was dropped.
        """
        inputs = self._inputs(self._row(number))
        prefix = "batch/"
        tensors = {n.removeprefix(prefix): t for n, t in inputs.tensors.items() if n.startswith(prefix)}
        nested = nested_again(inputs.nesting, tensors)
        if self._is_own_loop:
            return Batch(tensors, None, nested)
        batches = batches_of(self._facts)
        return Batch(tensors, batches.numbers_of(number), nested, batches.source)

    def given(self, number: int) -> bytes:
        """Return a fingerprint of the next step's inputs besides its state: numbers and inputs."""
        self.settle()
        row = self._row(number)
        given = repr(sorted(self._stored.given(row).given.items())).encode()
        if self._rule is not None:
            tensors = self._inputs(row).tensors
            given += b"".join(digest_of(tensors[f"batch/{name}"]).encode() for name in "xy")
        return (row.numbers or b"") + given

    def module_paths(self) -> list[str]:
        """Return the paths of modules, of which not each need run at each step."""
        numbers = self._facts.programs
        programs = [self._program(Repeat(0, n, None, None)).program for n in numbers]
        return list(dict.fromkeys(path for program in programs for path in program.activations))

    def _take(
        self,
        number: int,
        look: Callable[[int, Environment], None] | None = None,
        expansion: Expanded | None = None,
    ) -> float:
        """Run a step, or its expansion."""
        self._raise_failed(number)
        self.settle()
        row = self._row(number)
        inputs = self._inputs(row)
        self._bound.interpreted(row)
        if expansion is None:
            expansion = Expanded(self._program(row), self._numbers(row), {})
        interpreter, numbers, more = expansion
        try:
            with without_autograd():
                taken = _run(interpreter, self._tensors, inputs.tensors | more, numbers, look)
        except (ProgramError, ValueError) as error:
            raise self._not_replayed(number, str(error)) from None
        self.state = number
        if taken.differs is not None:
            self._differ(number, taken.differs)
        self._compare_digests(number, inputs.digests)
        return self._recorded_loss(number) if taken.loss is None else float(taken.loss)

    def _not_replayed(self, number: int, reason: str) -> NotReplayedError:
        return NotReplayedError(f"step {number} of {self._run.name} cannot be replayed: {reason}")

    def _differ(self, number: int, how: str) -> None:
        self._diverged(number, f"step {number} differs from the recording: {how}")

    def _recorded_loss(self, number: int) -> float:
        if number not in self._losses:
            recorded = self._run.losses_between(number, number + BLOCK - 1)
            self._losses = dict(enumerate(recorded, start=number))
        return self._losses.get(number, math.nan)

    def _compare_digests(self, number: int, digests: dict[str, Any]) -> None:
        """Compare the state after a step with its recorded digests, until one differs."""
        if self._has_diverged or self._conversion is not None:
            return
        present = ((name, digest) for name, digest in digests.items() if name in self._tensors)
        other = [name for name, digest in present if digest_of(self._tensors[name]) != digest]
        if not other:
            return
        self._has_diverged = True
        names = ", ".join(name.partition("/")[2] for name in other[:MOST_NAMED])
        more = f" and {len(other) - MOST_NAMED} more" if len(other) > MOST_NAMED else ""
        self._diverged(
            number,
            f"after step {number}, the state differs from the recording: {names}{more}. Either the "
            f"numerics differ, or something wrote after step {self._digested_before(number)} where "
            "torch does not see it (NumPy, a thread, a compiled graph)",
        )

    def _digested_before(self, number: int) -> int:
        """Return the last step before one with digests of the state, 0 if there is none."""
        earlier = [2**power for power in range(number.bit_length()) if 2**power < number]
        rows = ((step, row) for step in reversed(earlier) for row in self._run.repeats(step, step))
        return next((step for step, row in rows if self._inputs(row).digests), 0)

    def _row(self, number: int) -> Repeat:
        """Return what repeats a step, as a row of this step alone."""
        if number not in self._rows:
            last = number + BLOCK - 1
            if self._further is not None:
                self._rows = {step: self._further(step) for step in range(number, last + 1)}
            else:
                with reading():
                    rows = cut(self._run.repeats(number, last), number, last)
                steps = ((row, row.step + place) for row in rows for place in range(row.count))
                self._rows = {step: row._replace(step=step, count=1) for row, step in steps}
        row = self._rows.get(number)
        if row is None:
            raise NotReplayedError(
                f"{self._run.name} has no record of step {number}: the database was changed"
            )
        return row

    def _numbers(self, row: Repeat) -> list[int | float]:
        with reading():
            found = unpacked(row.numbers, f"step {row.step} of {self._run.name}") or []
        if not isinstance(found, list) or not all(type(each) in (int, float, bool) for each in found):
            raise NotReplayedError(
                f"step {row.step} of {self._run.name} has invalid numbers: the database was changed"
            )
        return found

    def _program(self, row: Repeat) -> Interpreter:
        if row.program is None:
            raise NotReplayedError(
                f"step {row.step} of {self._run.name} cannot be replayed: it did something that a "
                "program cannot hold, as a notice reported when it was recorded"
            )
        if row.program not in self._programs:
            with _as_not_replayed():
                program = self._recorded[row.program] = read_program(self._run, row.program)
            if self._conversion is not None:
                program = self._conversion.program(program)
            self._programs[row.program] = Interpreter(program, self._device)
        return self._programs[row.program]

    def _inputs(self, row: Repeat) -> _Inputs:
        with _as_not_replayed():
            inputs = self._stored.given(row)
            tensors = self._stored.tensors(row)
        if self._rule is not None and "batch/x" not in tensors:
            rows = zip("xy", self._rule(row.step), strict=True)
            tensors |= {f"batch/{name}": copy_on_cpu(part) for name, part in rows}
        if self._conversion is not None and row.program is not None:
            self._program(row)
            tensors = self._converted(self._conversion, row.program, tensors)
        return _Inputs(tensors, inputs.nesting, inputs.digests)

    def _converted(
        self, conversion: Precision, program: int, inputs: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the inputs of a step, tensors of the batch and bytes of others, converted."""
        prefix = "input/"
        others = {name.removeprefix(prefix): t for name, t in inputs.items() if name.startswith(prefix)}
        cast = conversion.contents(self._recorded[program], others)
        tensors = {name: conversion.tensor(name, tensor) for name, tensor in inputs.items()}
        return tensors | {prefix + name: content for name, content in cast.items()}


@contextmanager
def _as_not_replayed() -> Iterator[None]:
    """Report that something of the run cannot be read as what keeps a step from being replayed."""
    try:
        yield
    except RunError as error:
        raise NotReplayedError(str(error)) from None


def _run(
    interpreter: Interpreter,
    state: dict[str, Tensor],
    inputs: dict[str, Tensor],
    numbers: list[int | float],
    look: Callable[[int, Environment], None] | None,
) -> Interpreted:
    """Run a step on a state, with its inputs by the names that a row has."""
    drawn = ((_GENERATOR.fullmatch(name), tensor) for name, tensor in inputs.items())
    generators = {int(found[1]): tensor for found, tensor in drawn if found}
    return interpreter.run(state, interpreter.lay_inputs(inputs), numbers, generators, look)


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of tensors that share memory as these do."""
    memory: dict[int, torch.UntypedStorage] = {}
    found = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        copy = memory.get(storage._cdata)
        if copy is None:
            copy = memory[storage._cdata] = storage.clone()  # type: ignore[no-untyped-call]
        empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        found[name] = empty.set_(copy, tensor.storage_offset(), tensor.shape, tensor.stride())
    return found
