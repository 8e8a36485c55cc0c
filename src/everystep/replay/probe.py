"""Probe: looks at what an expression names while steps are taken, and at nothing else.

By program, the tensors that are named are copied when they are there: activations when their module is
done, gradients when the backward phase ends. All else runs as fast as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor

from everystep.program.execute import BoundProgram
from everystep.replay.expression import Reference
from everystep.replay.replayable import Replayable

__all__ = ["Probe"]

Values = dict[Reference, Tensor]


class Probe:
    """Looks at the steps of a training, and knows after each what some references stood for.

    Args:
        revived: the training, at any state.
        references: tensors of the step itself or of the one before.
        answer: called after each step with its number and its loss; returns whether to go on.
    """

    def __init__(
        self,
        revived: Replayable,
        references: Collection[Reference],
        answer: Callable[[int, float], bool],
    ) -> None:
        self._revived = revived
        self._answer = answer
        self._previous = [reference for reference in references if reference.is_previous]
        self._own = {reference._replace(is_previous=False) for reference in references}
        # An update is known by the parameter before it; after it, the parameter itself is there.
        self._copied = {r._replace(part="before") if r.kind == "updates" else r for r in self._own}
        self._plans: dict[BoundProgram, tuple[list[Any], Values]] = {}
        self._copies: Values = {}
        self._before: Values = {}
        self._live: dict[str, Tensor] = {}

    def calls(self, bound: BoundProgram) -> list[Any]:
        """Return the calls of a step, with copies made in between."""
        if bound not in self._plans:
            self._plans[bound] = self._plan(bound)
        calls, self._copies = self._plans[bound]
        return calls

    def after(self, number: int, bound: BoundProgram) -> bool:
        """Answer what is asked of a step; return whether to go on."""
        return self._finish(number, bound.loss.item())

    def observe(self) -> float:
        """Take a step that no program takes, and look at it; return its loss.

        Raises:
            RunError: neither a program nor a model takes it.
        """
        revived = self._revived
        assert revived.state is not None
        number = revived.state + 1
        self._live = revived.named_state()
        of_state = {r for r in self._copied if r.kind in ("parameters", "buffers", "updates")}
        self._copies = {r: self._state(_name_of_state(r)).clone() for r in of_state}
        batch = revived.batch(number).tensors
        observation = revived.observe()
        self._live = revived.named_state()
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
        """Tell whether something was there: not before the first step, nor of a module left out."""
        if reference.is_previous:
            return reference in self._before
        return reference.kind == "updates" or reference in self._copies

    def value_of(self, reference: Reference) -> Tensor:
        """Return what a reference stood for in the last step; valid until the next is taken."""
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
        """Return the calls of a step with copies made in between, and where the copies are."""
        program, given_after = bound.program, bound.program.given_after()
        self._live = self._revived.named_state()
        copies: Values = {}
        after: dict[int, list[Any]] = {}
        for reference in self._copied:
            kind, name = reference.kind, reference.name
            known = {"activations": set(program.activations), "gradients": set(program.gradients)}
            if name not in known.get(kind, {name}):
                continue
            if kind == "activations":
                source, place = bound.tensor(program.activations[name][0]), given_after[name]
            elif kind == "gradients":
                source, place = bound.tensor(program.gradients[name]), program.backward_until()
            elif kind == "batch":
                source, place = bound.tensor(name), -1
            else:
                source, place = self._state(_name_of_state(reference)), -1
            copies[reference] = torch.empty_like(source)
            after.setdefault(place, []).append(partial(copies[reference].copy_, source))
        return bound.calls_with(after), copies

    def _finish(self, number: int, loss: float) -> bool:
        """Let a step be answered, and keep what the next one asks of it; return whether to go on."""
        goes_on = self._answer(number, loss)
        self._before = {
            reference: self.value_of(own).clone()
            for reference in self._previous
            if self.has(own := reference._replace(is_previous=False))
        }
        return goes_on

    def _state(self, name: str) -> Tensor:
        return self._live[name].detach()


def _name_of_state(reference: Reference) -> str:
    return f"{'buffer' if reference.kind == 'buffers' else 'parameter'}/{reference.name}"
