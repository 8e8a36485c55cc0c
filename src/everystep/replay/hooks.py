"""Hooks: observe steps while programs run them.

A probe copies the tensors that an expression names as soon as they exist: activations when their module
ends, gradients when the backward phase ends. Everything else runs at full speed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from everystep.program.bound import BoundProgram
from everystep.program.memory import copy_on_cpu
from everystep.program.program import Program
from everystep.replay.expression import Reference
from everystep.replay.step import Batch, Step
from everystep.step.observe import Observation, Place, gradients_by_parameter, makes_gradients

__all__ = ["OpenedStep", "Probe"]

Values = dict[Reference, Tensor]


class Observed(Protocol):
    """What takes the steps of a training, one by one.

    state: the step after which its state is.
    """

    state: int | None

    def named_state(self) -> dict[str, Tensor]:
        """Return the live tensors of the state by name."""

    def batch(self, number: int) -> Batch:
        """Return the batch of a step."""

    def observe(self) -> Observation:
        """Run the next step, and return everything in it."""


class Probe:
    """Observes the steps of a training, and provides the values of some references after each.

    Args:
        stepper: the training, at any state.
        references: tensors of the step itself or of the one before.
        answer: called after each step with its number and its loss; returns whether to continue.
    """

    def __init__(
        self,
        stepper: Observed,
        references: Collection[Reference],
        answer: Callable[[int, float], bool],
    ) -> None:
        self._stepper = stepper
        self._answer = answer
        self._previous = [reference for reference in references if reference.is_previous]
        self._own = {reference._replace(is_previous=False) for reference in references}
        # An update is known by the parameter before it; after it, the parameter itself is there.
        self._copied = {r._replace(part="before") if r.kind == "updates" else r for r in self._own}
        self._plans: dict[BoundProgram, tuple[list[Any], Values]] = {}
        self._copies: Values = {}
        self._before: Values = {}
        self._live: dict[str, Tensor] = {}
        self._is_live = False

    def calls(self, bound: BoundProgram) -> list[Any]:
        """Return the calls of a step, with copies in between."""
        if not self._is_live:
            self._live, self._is_live = self._stepper.named_state(), True
        if bound not in self._plans:
            self._plans[bound] = self._plan(bound)
        calls, self._copies = self._plans[bound]
        return calls

    def after(self, number: int, bound: BoundProgram) -> bool:
        """Answer the question at a step; return whether to continue."""
        return self._finish(number, bound.loss.item())

    def observe(self) -> float:
        """Run a step that no bound program runs, and observe it; return its loss.

        Raises:
            RunError: there is neither a program nor a model to run it.
        """
        stepper = self._stepper
        assert stepper.state is not None
        number = stepper.state + 1
        self._live = stepper.named_state()
        of_state = {r for r in self._copied if r.kind in ("parameters", "buffers", "updates")}
        self._copies = {r: copy_on_cpu(self._state(_name_of_state(r))) for r in of_state}
        batch = stepper.batch(number).tensors
        observation = stepper.observe()
        self._live = {name: tensor.cpu() for name, tensor in stepper.named_state().items()}
        self._is_live = False
        seen: dict[str, dict[str, Tensor]] = {
            "batch": batch,
            "gradients": observation.gradients,
            "activations": {path: given[0] for path, given in observation.activations.items() if given},
        }
        for reference in self._copied - of_state:
            if reference.name in seen[reference.kind]:
                self._copies[reference] = seen[reference.kind][reference.name]
        loss: float = observation.loss.item()
        self._finish(number, loss)
        return loss

    def has(self, reference: Reference) -> bool:
        """Tell whether a value exists: not before the first step, nor for a module that did not run."""
        if reference.is_previous:
            return reference in self._before
        return reference.kind == "updates" or reference in self._copies

    def value_of(self, reference: Reference) -> Tensor:
        """Return the value of a reference in the last step; valid until the next step."""
        if reference.is_previous:
            return self._before[reference]
        if reference.kind != "updates":
            return self._copies[reference]
        before = self._copies[reference._replace(part="before")]
        if reference.part == "before":
            return before
        after = self._state(f"parameter/{reference.name}")
        return after if reference.part == "after" else after - before

    def _plan(self, bound: BoundProgram) -> tuple[list[Any], Values]:
        """Return the calls of a step with copies in between, and where the copies are."""
        program, given_after = bound.program, bound.program.given_after()
        gradients = _gradients_of(program)
        copies: Values = {}
        after: dict[int, list[Any]] = {}
        for reference in self._copied:
            kind, name = reference.kind, reference.name
            if kind == "activations":
                if not program.activations.get(name):
                    continue
                source, place = bound.tensor(program.activations[name][0]), given_after[name]
            elif kind == "gradients":
                if name not in gradients:
                    continue
                source, place = bound.tensor(gradients[name].names[0]), gradients[name].after - 1
            elif kind == "batch" and name in program.tensors:
                source, place = bound.tensor(name), -1
            else:
                after.setdefault(-1, []).append(partial(self._copy, reference, copies))
                continue
            copies[reference] = torch.empty_like(source)
            after.setdefault(place, []).append(partial(copies[reference].copy_, source))
        return bound.calls_with(after), copies

    def _copy(self, reference: Reference, copies: Values) -> None:
        """Copy a tensor of the state, or one of the batch that the step does not use."""
        if reference.kind != "batch":
            copies[reference] = self._state(_name_of_state(reference)).clone()
            return
        assert self._stepper.state is not None
        copies.pop(reference, None)
        batch = self._stepper.batch(self._stepper.state + 1).tensors
        if reference.name in batch:
            copies[reference] = batch[reference.name]

    def _finish(self, number: int, loss: float) -> bool:
        """Answer a step, and keep what the next one needs of it; return whether to continue."""
        goes_on = self._answer(number, loss)
        self._before = {
            reference: self.value_of(own).clone()
            for reference in self._previous
            if self.has(own := reference._replace(is_previous=False))
        }
        return goes_on

    def _state(self, name: str) -> Tensor:
        return self._live[name].detach()


class OpenedStep:
    """What an expression names of a step that was opened, as `Probe` has it of a step that runs."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def has(self, reference: Reference) -> bool:
        """Tell whether a value exists: not of the step before, nor of a module that did not run."""
        kind, name = reference.kind, reference.name
        return not reference.is_previous and (kind == "rows" or name in self._named(kind))

    def value_of(self, reference: Reference) -> Tensor:
        """Return the value of a reference.

        Raises:
            RunError: rows are unknown; gives the reason.
        """
        if reference.kind == "rows":
            rows = self.step.rows
            return rows.loss if reference.name == "loss" else rows.gradient
        value = self._named(reference.kind)[reference.name]
        if reference.kind == "updates":
            found: Tensor = getattr(value, reference.part or "change")
            return found
        first: Tensor = value[0] if isinstance(value, tuple) else value
        return first

    def _named(self, kind: str) -> Mapping[str, Any]:
        named: Mapping[str, Any] = (
            self.step.batch.tensors if kind == "batch" else getattr(self.step, kind)
        )
        return named


def _gradients_of(program: Program) -> dict[str, Place]:
    """Return where each gradient is read, by parameter: as backward leaves it, before an update uses it.

    See `StepObserver`, which reads them in an opened step.
    """
    found = {}
    for parameter, name in gradients_by_parameter(program).items():
        storage = program.tensors[name].storage
        is_there, left, place = program.storages[storage].kind != "temporary", 0, None
        for index, operation in enumerate(program.operations):
            makes = makes_gradients(operation)
            is_used = operation.phase == "update" and not makes
            if is_used and storage in _storages(operation.reads(), program):
                place = left or (index if is_there and parameter in program.gradients else None)
                if place is not None:
                    break
            if storage in _storages((*filter(None, operation.results), *operation.written()), program):
                is_there, left = True, index + 1 if makes else left
        if place is None and (left or (is_there and parameter in program.gradients)):
            place = left or len(program.operations)
        if place is not None:
            found[parameter] = Place((name,), place)
    return found


def _storages(names: Iterable[str], program: Program) -> set[str]:
    return {program.tensors[name].storage for name in names}


def _name_of_state(reference: Reference) -> str:
    return f"{'buffer' if reference.kind == 'buffers' else 'parameter'}/{reference.name}"
