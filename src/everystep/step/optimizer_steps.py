"""Optimizer steps: that of one of torch's own optimizers runs unwatched, as one operation.

torch computes it as it would without everystep. The result depends on the class, the settings and the
tensors, which are noted. Other optimizers are watched operation by operation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode, _pop_mode, _push_mode

from everystep.step.met_tensors import UnseenError, held, is_plain
from everystep.step.optimizer_call import OptimizerCall
from everystep.step.path import SeenOperation
from everystep.step.under_way import UnderWay, as_gradients

__all__ = ["OptimizerStep", "OptimizerSteps"]

#: Returns the gradients of an optimizer's parameters, by name.
Gradients = Callable[[], Mapping[str, Tensor]]


class OptimizerStep(NamedTuple):
    """A step of an optimizer that was one operation.

    begin, end: the range of its settings among the numbers of the step; layout: all but these.
    """

    optimizer: torch.optim.Optimizer
    begin: int
    end: int
    layout: Any


class OptimizerSteps:
    """Notes the steps of optimizers while a step is watched; those of torch's own run unwatched.

    Args:
        step: the step in progress, and the mode that watches it.

    seen: those that are one operation.
    """

    def __init__(self, step: UnderWay) -> None:
        self.seen: list[OptimizerStep] = []
        self._step = step
        #: An optimizer with a step that runs unwatched, the step, and the versions of the state before.
        self._running: tuple[torch.optim.Optimizer, OptimizerCall, list[int | None]] | None = None

    def close(self) -> None:
        """Note no further steps."""
        del self._step

    def begins(
        self,
        optimizer: torch.optim.Optimizer,
        name: str | None,
        gradients: Gradients,
        *,
        may_be_one: bool,
    ) -> None:
        """Note that an optimizer starts a step.

        Args:
            optimizer: the optimizer.
            name: of the optimizer.
            gradients: returns those of its parameters, by name.
            may_be_one: whether it is a part, and gets no closure or another argument.
        """
        step = self._step
        self.recover()
        # `_pop_mode` below takes the innermost mode, which must be this step.
        is_ours = _get_current_dispatch_mode() is step
        call = step.paths.calls.of(optimizer) if may_be_one and is_ours else None
        if call is None or not self._may_be_one(call):
            step.uses("optimizer begins", name, gradients())
            return
        if step.exposed:
            step.check_exposed(call.tensors)
        what = "optimizer", call.operator, name, call.keys, call.layout
        step.happens(*what, tensors=call.tensors, marked=lambda: as_gradients(gradients()))
        # A followed step uses the same tensors as one that was checked.
        if not step.is_followed and not self._can_hold(call):
            step.leave()
            return
        self._running = optimizer, call, step.state_versions()
        _pop_mode()

    def _may_be_one(self, call: OptimizerCall) -> bool:
        """Return whether the path knows what an optimizer uses."""
        step, expected = self._step, self._step.at.next
        if not step.is_remembered or (expected is not None and expected.key[0] == "optimizer"):
            return True
        step.tensors.catch_up(step.at)
        return all(step.tensors.number(tensor) is not None for tensor in call.tensors)

    def _can_hold(self, call: OptimizerCall) -> bool:
        """Return whether a program can hold the step: it knows all memory that the step uses."""
        step, tensors = self._step, self._step.tensors
        with torch._C._DisableTorchDispatch():
            given = call.tensors
            if not all(is_plain(tensor) and step.is_on_known(tensor) for tensor in given):
                return False
            parameters = [p for group in call.parameters for p in group]
            # A program gives gradients to stand-ins of the parameters, and torch refuses another dtype.
            if any(p.grad is None or p.grad.dtype != p.dtype for p in parameters):
                return False
            tensors.catch_up(step.at)
            try:
                for tensor in given:
                    number = tensors.token(tensor, False)[1]
                    step.check_readable(number)
                    if step.is_unread(number):
                        return False
            except UnseenError:
                return False
        return True

    def ends(self, name: str | None, gradients: Gradients) -> None:
        """Note that an optimizer ended a step."""
        running, self._running = self._running, None
        step = self._step
        # A watched optimizer may have made gradients in its step, as one with a closure does.
        if running is None:
            step.uses("optimizer ends", name, gradients())
            return
        optimizer, call, versions = running
        _push_mode(step)
        begin = len(step.numbers)
        with torch._C._DisableTorchDispatch():
            self._note(call, optimizer.state, name, gradients)
            # The operation has these writes; they must not count as changes that no call showed.
            step.allow_changes(versions)
        self.seen.append(OptimizerStep(optimizer, begin, len(step.numbers), call.layout))

    def _note(
        self, call: OptimizerCall, state: Mapping[Any, Any], name: str | None, gradients: Gradients
    ) -> None:
        """Note a step, which has run unwatched, as one operation. state: of the optimizer, now."""
        step, tensors, made = self._step, self._step.tensors, call.made(state)
        new, where = [each[3] for each in made], [each[:3] for each in made]
        key = "optimizer ends", *where
        if step.goes_on(key, new):
            step.numbers += call.numbers
            return
        tensors.catch_up(step.at)
        begin, own = len(step.numbers), iter(call.kept)
        # By group and parameter, e.g. [[["step", tensor, "exp_avg", tensor], ...]]
        keeps = [[[x for pair in next(own).items() for x in pair] for _ in g] for g in call.parameters]
        own_gradients = [[parameter.grad for parameter in group] for group in call.parameters]
        given = call.parameters, own_gradients, keeps, where
        arguments = tuple([held(tensors.token(value, False)) for value in given])
        settings = [(key, held(tensors.token(v, True))) for key, v in call.settings.items()]
        results = [tensors.meet(tensor, "temporary") for tensor in new]
        written = [p for group in call.parameters for p in group]
        written += [tensor for each in call.kept for tensor in each.values()]
        numbers = [*map(step.number, written)]
        step.note_written(numbers)
        operation = SeenOperation(
            phase="update",
            module=name,
            operator=call.operator,
            arguments=arguments,
            keywords=tuple(settings),
            results=tuple(f"%{number}" for number in results),
            writes=tensors.origins_of(numbers),
            numbers=range(begin, len(step.numbers)),
        )
        step.add(key, operation, step.marks(as_gradients(gradients())))

    def recover(self) -> None:
        """Watch again after an optimizer's step that raised; unseen results are kept by content.

        torch has no hook there. A torch optimizer runs no module, no backward pass and no other
        optimizer: if one of these follows, it has raised.
        """
        running, self._running = self._running, None
        if running is not None:
            _push_mode(self._step)
            self._step.note_unwatched("the step of an optimizer raises", [], [], running[2])
