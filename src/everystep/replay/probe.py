"""Probe: looks at steps while programs run them.

A probe copies the tensors that an expression names as soon as they exist: activations when their module
ends, gradients when the backward phase ends. Everything else runs at full speed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, cast

from torch import Tensor

from everystep.errors import ExpressionError
from everystep.expression import Expression, Reference
from everystep.program.interpreter import Look
from everystep.program.step_program import Program
from everystep.replay.opened_step import Step
from everystep.replay.processes import Opener
from everystep.replay.replay_stepper import ReplayStepper
from everystep.step.observe import gradient_places

__all__ = ["Probe", "check_question", "opened_value"]

Values = dict[Reference, Tensor]


def check_question(expression: Expression, opener: Opener) -> None:
    """Check the names in an expression against the first step that a run keeps, and all programs.

    Raises:
        ExpressionError: a name does not exist, or rows and tensors of the step before are asked for.
        RunError: the run has no step, or it cannot be opened.
    """
    has_rows = any(reference.kind == "rows" for reference in expression.references)
    before = [r for r in expression.references if r.is_previous and not r.is_recorded]
    if has_rows and before:
        raise ExpressionError(f"{before[0]} cannot be asked for together with rows")
    replay = opener.replay_here()
    step = replay.step(next((first for first, _ in replay.run.facts.kept(replay.run.newest_step())), 1))
    programs = replay.stepper.programs()
    # Later steps may have more: a layer that was added, a module that runs at times.
    names = dict.fromkeys([*step.state, *(n for p in programs for n in (*p.state_names, *p.ends))])
    kinds = [name.partition("/") for name in names]
    parameters, buffers = ([n for k, _, n in kinds if k == each] for each in ("parameter", "buffer"))
    activations = [*dict.fromkeys(path for each in programs for path in each.activations)]
    known = {"parameters": parameters, "updates": parameters, "buffers": buffers}
    expression.check(known | {"gradients": [*step.gradients, *parameters], "activations": activations})


class Probe:
    """Observes the steps of a stepper, and provides the values of some references after each.

    references: tensors of the step itself or of the one before; answer: called after each step with its
    number and its loss; returns whether to continue; before: of the step before, by reference.
    """

    def __init__(
        self,
        stepper: ReplayStepper,
        references: Collection[Reference],
        answer: Callable[[int, float], bool] = lambda number, loss: True,
        before: Values = {},  # noqa: B006  # nothing changes it
    ) -> None:
        self.stepper = stepper
        self._answer = answer
        self._previous = [reference for reference in references if reference.is_previous]
        #: Of an update, the parameter before it; after it, the parameter itself is there.
        self._copied = {_copied(reference._replace(is_previous=False)) for reference in references}
        self._copies: Values = {}
        self.before = before

    def looks(self, program: Program) -> dict[int, list[Look]]:
        """Return what copies the values of a step: see `Hook`."""
        gradients = gradient_places(program)
        # A copy of the step before must not answer for a module that does not run in this one.
        found: dict[int, list[Look]] = {-1: [lambda tensor_of: self._copies.clear()]}
        for reference in self._copied:
            kind, name = reference.kind, reference.name
            source, place = None, -1
            if kind == "activations":
                if not program.activations.get(name):
                    continue
                source, place = program.activations[name][0], program.done[name] - 1
            elif kind == "gradients":
                if name not in gradients:
                    continue
                source, place = gradients[name].names[0], gradients[name].after - 1
            elif kind == "batch" and name in program.tensors:
                source = name
            found.setdefault(place, []).append(partial(self._copy, reference, source))
        return found

    def after(self, number: int, loss: float) -> bool:
        """Answer the question at a step, and keep values for the next; return whether to continue."""
        goes_on = self._answer(number, loss)
        found = {each: self.value_of(each._replace(is_previous=False)) for each in self._previous}
        # Clones, since the next step writes into the same memory.
        self.before = {each: value.clone() for each, value in found.items() if value is not None}
        return goes_on

    def value_of(self, reference: Reference) -> Tensor | None:
        """Return the value of a reference in the last step; valid until the next step.

        None if there is none: before step 1, of a module that did not run, and of what is not in the
        model then.
        """
        if reference.is_previous:
            return self.before.get(reference)
        found = self._copies.get(_copied(reference))
        if found is None or reference.kind != "updates" or reference.part == "before":
            return found
        after = self._state(f"parameter/{reference.name}")
        if after is None or reference.part == "after":
            return after
        return after.to(found.device) - found

    def _copy(
        self, reference: Reference, source: str | None, tensor_of: Callable[[str], Tensor]
    ) -> None:
        """Copy a value. source: its name in the program; None: of the state, or of an unused batch."""
        if source is not None:
            value: Tensor | None = tensor_of(source)
        elif reference.kind == "batch":
            value = self.stepper.batch(self.stepper.state + 1).tensors.get(reference.name)
        else:
            kind = "buffer" if reference.kind == "buffers" else "parameter"
            value = self._state(f"{kind}/{reference.name}")
        if value is not None:
            self._copies[reference] = value.clone()

    def _state(self, name: str) -> Tensor | None:
        found = self.stepper.named_state().get(name)
        return None if found is None else found.detach()


def _copied(reference: Reference) -> Reference:
    return reference._replace(part="before") if reference.kind == "updates" else reference


def opened_value(step: Step, reference: Reference) -> Tensor | None:
    """Return what an expression names of an opened step, as `Probe` has it of a step that runs.

    None if there is none: of the step before, and of a module that did not run.

    Raises:
        RunError: rows are unknown; gives the reason.
    """
    kind, name = reference.kind, reference.name
    if reference.is_previous:
        return None
    if kind == "rows":
        return step.rows.loss if name == "loss" else step.rows.gradient
    named: Mapping[str, Any] = step.batch.tensors if kind == "batch" else getattr(step, kind)
    value: Any = named.get(name)
    if kind == "updates" and value is not None:
        value = getattr(value, reference.part or "change")
    if isinstance(value, tuple):  # the outputs of a module: the first, as `Probe` copies it
        value = value[0] if value else None
    return cast("Tensor | None", value)
