"""The replay's stepper: takes the recorded steps of a stretch again, with programs alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from everystep.device import set_drawing_state
from everystep.errors import ProgramError, RunError, named
from everystep.ops.operators import REFUSALS, without_autograd
from everystep.program.interpreter import Interpreter, Looks
from everystep.program.memory import copied_together
from everystep.program.optimizer_operator import OPTIMIZERS
from everystep.program.step_program import Program
from everystep.recording.contents import digest_of
from everystep.recording.database import Repeat
from everystep.replay.bound_steps import GENERATOR, BoundStep, BoundSteps, Hook
from everystep.replay.opened_step import Batch, Step, observed_step, of_kind
from everystep.replay.recorded_batches import batches_of
from everystep.replay.recorded_columns import changed_settings
from everystep.replay.recorded_steps import NotReplayedError, RecordedSteps
from everystep.step.build import NotCapturableError
from everystep.step.expanded import Expanded, Expander
from everystep.step.generators import Generators
from everystep.step.hyperparameters import hyperparameters, set_hyperparameter
from everystep.step.observe import Observation, StepObserver
from everystep.step.parts import is_of_module
from everystep.step.state import OWN, State, copy_of, same_bits
from everystep.training.batch import nested_again

__all__ = ["NOWHERE", "ReplayStepper"]

#: The state of a stepper that must load one.
NOWHERE = -1
#: Tensors that a message names.
MOST_NAMED = 3
_NO_NUMBERS = torch.empty(0)


# One step, from the state of the step before it:
#   settle     what code changed between the two steps is put into the state
#   row        program, numbers and inputs of the step, from the run
#   take       by a program bound to the state, if many steps have it, else by the interpreter
#   compare    numbers that Python read, and digests of the state, with the recording
# The caller compares the losses.
class ReplayStepper:
    """Repeats steps; states can be loaded and steps run in any order.

    steps: the data that repeats each step; diverged: called with a step that differs from the recording,
    and a description; state: the number of the current state, `NOWHERE` before one is loaded;
    computed_losses: how many of the losses that `run` returned were computed by operations; others,
    hooks: of other ranks, by number, which a `RankStepper` repeats, too.
    """

    others: Mapping[int, ReplayStepper] = MappingProxyType({})
    hooks: Mapping[int, Hook] = MappingProxyType({})

    def __init__(self, steps: RecordedSteps, diverged: Callable[[int, str], object]) -> None:
        self.state = NOWHERE
        self.computed_losses = 0
        self.steps = steps
        self._run = steps.run
        self._is_own_loop = steps.facts.loop is not None
        self._diverged = diverged
        self._expanders: dict[Interpreter, Expander] = {}
        self._tensors: dict[str, Tensor] = {}
        # Shared: a program that is bound writes into the very tensors of the state.
        self._bound = BoundSteps(self._tensors)
        #: The last state from disk, without its numbers.
        self._loaded: State | None = None
        self._loaded_at: int | None = None
        self._between = steps.change_files()
        self._settled: int | None = None
        self._has_diverged = False
        #: Whether an operation returned the loss of the last step.
        self._is_computed = False
        self._settings = changed_settings(self._run, steps.facts, steps.first, steps.last)

    # The state.

    def load(self, state: State, *others: State) -> None:
        """Restore a state, from disk or from `capture`; others: as of `capture_ranks`."""
        named = state.named() | {n: t for n, t in state.rest.items() if n.startswith(OWN)}
        # An error on the way leaves no state, not a part of one.
        self.state = NOWHERE
        self._tensors.clear()  # those of a large model take much memory
        self._begin(state.step, self._here({n: named[n] for n in state.settings["names"] if n in named}))
        # Of a large model, the tensors take much memory, and here they have been copied.
        known, rest = (dict.fromkeys(each, _NO_NUMBERS) for each in (state.parameters, state.rest))
        self._loaded = replace(state, parameters=known, rest=rest)
        self._loaded_at = state.step
        self._has_diverged = False
        state.generators.restore(self.steps.device)

    def _begin(self, step: int, tensors: dict[str, Tensor]) -> None:
        self._tensors.clear()
        self._tensors |= tensors
        self.state, self._settled, self._loaded_at = step, None, None

    def _here(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return copies of tensors of the state, in the precision of the steps."""
        convert, device = self.steps.conversion, self.steps.device
        if convert is not None:
            tensors = {name: convert.tensor(name, tensor) for name, tensor in tensors.items()}
        return {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}

    def settle(self) -> None:
        """Apply what code changed after the last step, outside of any step."""
        if self.state == self._settled or self.state not in self._between:
            return
        self._settled = self.state
        tensors, gone = self._run.change(self._between[self.state])
        for name in gone:
            self._tensors.pop(name, None)
        # Generators are not of the state here: a step that draws has theirs among its inputs.
        self._tensors |= self._here({n: t for n, t in tensors.items() if not n.startswith("generator/")})

    def capture(self, *, is_live: bool = False) -> State:
        """Return the current state in the form that is written to disk.

        is_live: with the tensors themselves where they are on the CPU, which the next step changes.
        """
        assert self._loaded is not None
        dropped: set[str] = set()
        if not self._is_own_loop:  # its snapshots have what changed after the step
            self.settle()
            # Snapshots of the training have only the gradients that a later step reads.
            dropped = {n for n in self._tensors if n.startswith("gradient/")}
            for number in self.steps.facts.programs:
                with suppress(RunError):  # as far as they can be read
                    dropped -= self.steps.program(number).state.keys()
        copied: Callable[[Tensor], Tensor] = Tensor.cpu if is_live else copy_of
        copies = {name: copied(t) for name, t in self._tensors.items() if name not in dropped}
        known, others = self._loaded.parameters, self._loaded.rest

        def is_of_model(name: str) -> bool:
            kind, _, path = name.partition("/")
            # Layers may have been added during the training; those of `others` are in no state_dict.
            return kind in ("parameter", "buffer") and is_of_module(path) and name not in others

        found = {name.partition("/")[2]: copy for name, copy in copies.items() if is_of_model(name)}
        parameters = {path: found[path] for path in dict.fromkeys((*known, *found)) if path in found}
        rest = {name: copy for name, copy in copies.items() if not is_of_model(name)}
        generators = Generators.capture(self.steps.device).tensors()
        rest |= {f"generator/{name}": tensor for name, tensor in generators.items()}
        if not self._is_own_loop and self.state in self._between:  # what code has drawn since the step
            changed = self._run.change(self._between[self.state]).tensors
            rest |= {name: each for name, each in changed.items() if name.startswith("generator/")}
        settings = self._loaded.settings | {"step": self.state, "names": [*copies]}
        if self._is_own_loop:  # what else it held, and its place in the batches, only snapshots know
            settings = {key: each for key, each in settings.items() if key not in ("held", "place")}
        state = State(self.state, parameters, rest, settings)
        return state if self._is_own_loop else state.with_optimizer("optimizer", self._groups())

    def capture_ranks(self, *, is_live: bool = False) -> list[State]:
        """Return the current state, and those of `others`, in the same form."""
        return [self.capture(is_live=is_live)]

    def ranks_differ(self) -> bool:
        """Return whether a parameter is not the same on all ranks."""
        return not all(
            same_bits(tensor, other.named_state()[name])
            for other in self.others.values()
            for name, tensor in self.named_state().items()
            if name.startswith("parameter/") and name in other.named_state()
        )

    def named_state(self) -> dict[str, Tensor]:
        """Return the live tensors of the state by name."""
        return self._tensors

    @property
    def size(self) -> int:
        """The memory of the tensors of the current state, in bytes."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    @property
    def has_gradients(self) -> bool:
        """Whether the gradients of the last step are available."""
        # States of everystep's own steps lack the gradients that the next step drops.
        return self._is_own_loop or self._loaded_at != self.state

    def hyperparameters(self) -> dict[str, float]:
        """Return the learning rates of the last step, and other settings that ever changed."""
        known = self._settings(self.state)
        if self._is_own_loop:
            return known
        rates = {}
        for index, group in enumerate(self._groups()):
            # A rate that is a tensor is in the state, by this name.
            rate = group.get("lr", self._tensors.get(f"group/{index}/lr"))
            if isinstance(rate, int | float | Tensor):
                rates[f"lr[{index}]" if index else "lr"] = float(rate)
        # NaN ends a setting that is gone.
        return rates | {name: value for name, value in known.items() if value == value}

    def rates(self) -> list[str]:
        """Return the names of the learning rates."""
        names = dict.fromkeys((*self.hyperparameters(), *self._run.measurement_names))
        return [name for name in names if self.steps.facts.is_learning_rate(name)]

    def _groups(self) -> list[dict[str, Any]]:
        """Return the param groups of everystep's own steps with the numbers that the last one used."""
        assert self._loaded is not None
        groups = [dict(group) for group in self._loaded.optimizer("optimizer").get("groups", [])]
        for name, value in self._settings(self.state).items():
            set_hyperparameter(groups, name, value)
        changed = {} if self.steps.lr is None else {"lr": self.steps.lr}
        return [group | changed for group in groups]

    # The inputs of a step.

    def generators(self, number: int) -> dict[str, Tensor]:
        """Return the states of the random generators that the next step draws from, by name."""
        given = self.steps.inputs(self.steps.row(number))
        drawn = {name: tensor for name, tensor in given.items() if name.startswith(GENERATOR)}
        return Generators.capture(self.steps.device).tensors() | drawn

    def batch(self, number: int) -> Batch:
        """Return the batch of a step in its original nesting, on the CPU."""
        row = self.steps.row(number)
        tensors = of_kind(self.steps.inputs(row), "batch")
        nested = nested_again(self.steps.given(row).nesting, tensors)
        if self._is_own_loop:
            return Batch(tensors, None, nested)
        batches = batches_of(self.steps.facts)
        return Batch(tensors, batches.numbers_of(number), nested, batches.source)

    def given(self, number: int) -> bytes:
        """Return a fingerprint of the next step's numbers and inputs, without its state."""
        self.settle()
        row = self.steps.row(number)
        given = repr(sorted(self.steps.given(row).given.items())).encode()
        if self.steps.rule is not None:
            tensors = self.steps.inputs(row)
            # By a rule, the row in the database has no batch: its content is compared instead.
            given += b"".join(digest_of(tensors[f"batch/{name}"]).encode() for name in "xy")
        return (row.numbers or b"") + given

    def programs(self) -> list[Program]:
        """Return the programs of the steps, without those that are among the inputs of a step."""
        return [self.steps.program(number).program for number in self.steps.facts.programs]

    # Steps.

    def run(self, last: int, hook: Hook | None = None) -> list[float]:
        """Run the steps up to `last`; return their losses.

        If a step logged no loss, or a loss that no operation returned, this is the recorded one. If a
        step cannot be taken, the losses of those before it; the next call raises. It ends before `last`
        if a hook asks for it.

        Raises:
            NotReplayedError: nothing repeats the next step, or its inputs were dropped.
        """
        losses: list[float] = []
        self.steps.until = last
        with without_autograd():
            while self.state < last:
                try:
                    losses.append(self._take(hook))
                    self.computed_losses += self._is_computed
                except REFUSALS as error:
                    if not losses:
                        raise self._not_replayed(error) from None
                    break
                if hook is not None and not hook.after(self.state, losses[-1]):
                    break
        return losses

    def _take(self, hook: Hook | None) -> float:
        self.settle()
        row = self.steps.row(self.state + 1)
        bound = self._bound.begin(row, self.steps)
        if bound is not None:
            return self._run_bound(row.step, bound, hook)
        program = self.steps.program_of(row).program
        return self._interpret(row, hook.looks(program) if hook else {})

    def open(self) -> Step:
        """Run the next step, and return everything in it; its loss is not compared."""
        number = self.state + 1
        try:
            batch = self.batch(number)
            with without_autograd():
                step = observed_step(number, self.observe(), batch)
        except (NotCapturableError, *REFUSALS) as error:
            raise self._not_replayed(error) from None
        epoch = None if self._is_own_loop else batches_of(self.steps.facts).epoch(number)
        known = self.hyperparameters()
        others = {n: v for n, v in self._settings_used(number).items() if n not in known}
        return replace(step, hyperparameters=known | others, epoch=epoch)

    def _settings_used(self, number: int) -> dict[str, float]:
        """Return the settings of torch's optimizers in a step that are not those of the beginning."""
        row, optimizers = self.steps.row(number), self.steps.facts.optimizers
        interpreter = self.steps.program_of(row)
        given = interpreter.numbers_of(self.steps.numbers(row))
        found: dict[str, float] = {}
        for place, each in enumerate(interpreter.program.operations):
            facts = optimizers.get(each.module) if each.module else next(iter(optimizers.values()), None)
            if each.operator not in OPTIMIZERS or facts is None:
                continue
            # Each of its keywords has a value for each param group.
            keywords = interpreter.operation_with(place, given[place]).keywords
            groups = [
                dict(zip(keywords, each, strict=True)) for each in zip(*keywords.values(), strict=True)
            ]
            first, prefix = hyperparameters(facts.groups), f"{each.module}." if each.module else ""
            now = hyperparameters(groups).items()
            found |= {f"{prefix}{n}": v for n, v in now if n in first and first[n] != v}
        return found

    def observe(self) -> Observation:
        """Run the next step, and return everything in it."""
        self.settle()
        self.steps.until = self.state + 1
        row = self.steps.row(self.state + 1)
        interpreter = self.steps.program_of(row)
        if interpreter not in self._expanders:
            self._expanders[interpreter] = Expander(interpreter, self.steps.device)
        given = self.steps.numbers(row), self._tensors, partial(self._before, row)
        expansion = self._expanders[interpreter].expanded(*given)
        observer = StepObserver(expansion.interpreter, expansion.numbers, self._tensors)
        loss = self._interpret(row, observer.looks, expansion)
        found = observer.observation(torch.tensor(loss, dtype=torch.float64))
        has_unseen = bool(self.steps.facts.unseen)
        return found._replace(places=found.places._replace(has_unseen=has_unseen))

    def _before(self, row: Repeat, index: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Return copies of tensors of a step's program, by name, before an operation."""
        found: dict[str, Tensor] = {}

        def look(tensor_of: Callable[[str], Tensor]) -> None:
            found.update((name, tensor_of(name).clone()) for name in names)

        # This run of the step must not move the generators on for the one that counts.
        drawn = Generators.capture(self.steps.device)
        given = self.steps.inputs(row), self.steps.numbers(row), {index - 1: [look]}
        self.steps.program_of(row).run(copied_together(self._tensors), *given)
        drawn.restore(self.steps.device)
        return found

    def _run_bound(self, number: int, bound: BoundStep, hook: Hook | None) -> float:
        live = bound.live
        calls = bound.calls(hook)
        if live.draws and bound.generator is not None:
            set_drawing_state(self.steps.device, bound.generator)
        for call in calls:
            call()
        self._bound.end(bound)
        self.state = number
        self._is_computed = live.program.loss is not None
        if not self._is_computed:
            # No operation returns the loss, so the recorded one stands for it.
            live.loss.fill_(self.steps.loss(number))
        self._compare(number, bound.different_read() if live.reads else None, bound.digests)
        return live.loss.item()

    def _interpret(self, row: Repeat, looks: Looks, expansion: Expanded | None = None) -> float:
        """Run a step, or its expansion, by the interpreter; return its loss."""
        inputs = self.steps.inputs(row)
        known = Expanded(self.steps.program_of(row), self.steps.numbers(row), {})
        interpreter, numbers, more = expansion or known
        loss, differs = interpreter.run(self._tensors, inputs | more, numbers, looks)
        self.state = row.step
        self._compare(row.step, differs, self.steps.given(row).digests)
        self._is_computed = loss is not None
        return self.steps.loss(row.step) if loss is None else float(loss)

    def _not_replayed(self, error: Exception) -> NotReplayedError:
        """Return the error of the next step; those of a run explain themselves."""
        if isinstance(error, RunError) and not isinstance(error, ProgramError):
            return NotReplayedError(str(error))
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        # With a change, a mask may pick more numbers than recorded.
        replayed = "repeated with the change" if self.steps.is_changed else "replayed"
        return NotReplayedError(
            f"step {self.state + 1} of {self._run.name} cannot be {replayed}: {reason}"
        )

    def _compare(self, number: int, differs: str | None, digests: Mapping[str, str]) -> None:
        """Report how a step differs from the recording; of the state after it, the first time."""
        if differs is not None:
            self._diverged(number, f"step {number} differs from the recording: {differs}")
        elif (unknown := self.steps.unknown_in(number)) is not None:
            self._diverged(number, f"step {number} may differ from the recording: {unknown}")
        # With a change, or in another precision, no digest can be that of the recording.
        is_other = self.steps.is_changed or self.steps.conversion is not None
        if not digests or self._has_diverged or is_other:
            return
        present = ((name, digest) for name, digest in digests.items() if name in self._tensors)
        other = [n.partition("/")[2] for n, digest in present if digest_of(self._tensors[n]) != digest]
        if not other:
            return
        # Once: the digests of all later states differ, too.
        self._has_diverged, before = True, self.steps.digested_before(number)
        self._diverged(
            number,
            f"after step {number}, the state differs from the recording: {named(other, MOST_NAMED)}. "
            f"Either the numerics differ, or something wrote after step {before} where torch does not "
            "see it (NumPy, a thread, a compiled graph)",
        )
