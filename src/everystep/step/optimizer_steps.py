"""Optimizer steps: that of one of torch's own optimizers runs unwatched, as one operation.

torch computes it as it would without everystep. What it computes depends on the class, the settings and
the tensors that it is given, and these are noted. Other optimizers are watched operation by operation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode, _pop_mode, _push_mode

from everystep.step.optimizer_call import OptimizerCall
from everystep.step.seen_tensors import UnseenError, is_plain
from everystep.step.watch import Kept

if TYPE_CHECKING:
    from everystep.step.cursor import Cursor

__all__ = ["OptimizerStep", "OptimizerSteps"]


class OptimizerStep(NamedTuple):
    """A step of an optimizer that was one operation.

    begin, end: the range of its settings among the numbers of the step; layout: all but these.
    """

    optimizer: torch.optim.Optimizer
    begin: int
    end: int
    layout: Any


class _UnderWay(NamedTuple):
    """A step of an optimizer that runs unwatched. before: what it kept; versions: of the state."""

    optimizer: torch.optim.Optimizer
    call: OptimizerCall
    before: Kept
    versions: list[tuple[Tensor, int | None]]


class OptimizerSteps:
    """Notes the steps of optimizers while a step is watched; those of torch's own run unwatched.

    Args:
        cursor: watches the step.

    seen: those that are one operation.
    """

    def __init__(self, cursor: Cursor) -> None:
        self.seen: list[OptimizerStep] = []
        self._cursor = cursor
        self._under_way: _UnderWay | None = None

    def begins(
        self,
        optimizer: torch.optim.Optimizer,
        name: str | None,
        has_arguments: bool,
        gradients: Callable[[], Mapping[str, Tensor]],
    ) -> None:
        """Note that an optimizer starts a step.

        Args:
            name: of the optimizer.
            has_arguments: whether it is given a closure, or something else.
            gradients: returns those of its parameters, by name.
        """
        cursor = self._cursor
        self.recover()
        is_ours = _get_current_dispatch_mode() is cursor and not has_arguments
        call = cursor.paths.calls.of(optimizer) if is_ours else None
        if call is None or not cursor.may_have_met(call):
            cursor.uses("optimizer begins", name, gradients())
            return

        def note() -> None:
            cursor.optimizer_uses(gradients())

        cursor.happens("optimizer", call.operator, name, call.layout, tensors=call.tensors(), note=note)
        if not cursor.is_followed and not self._can_hold(call):
            cursor.leave()
            return
        self._under_way = _UnderWay(optimizer, call, call.kept(), cursor.state_versions())
        _pop_mode()

    def _can_hold(self, call: OptimizerCall) -> bool:
        """Tell whether a program can hold the step: it knows all memory that the step uses."""
        cursor = self._cursor
        with torch._C._DisableTorchDispatch():
            tensors = call.tensors()
            if not all(is_plain(t) and cursor.place_of(t) is not None for t in tensors):
                return False
            parameters = [p for group in call.parameters for p in group]
            if any(p.grad is None or p.grad.dtype != p.dtype for p in parameters):
                return False
            try:
                cursor.encode(tensors)
            except UnseenError:
                return False
        return True

    def ends(self, name: str | None, gradients: Callable[[], Mapping[str, Tensor]]) -> None:
        """Note that an optimizer ended a step."""
        under_way, self._under_way = self._under_way, None
        if under_way is None:
            self._cursor.uses("optimizer ends", name, gradients())
            return
        cursor, call = self._cursor, under_way.call
        _push_mode(cursor)
        places = [(g, index) for g, group in enumerate(call.parameters) for index in range(len(group))]
        made = [
            (*place, key, tensor)
            for place, known, now in zip(places, under_way.before, call.kept(), strict=True)
            for key, tensor in now.items()
            if known.get(key) is not tensor
        ]
        begin, settings = len(cursor.numbers), call.settings
        with torch._C._DisableTorchDispatch():
            cursor.optimizer_stepped(call, under_way.before, made, name, gradients)
            cursor.allow_changes(under_way.versions)
        end = begin + len(settings.numbers)
        self.seen.append(OptimizerStep(under_way.optimizer, begin, end, settings.layout))

    def recover(self) -> None:
        """Watch again after an optimizer's step that raised: what was not seen is kept by content.

        torch has no hook there. An optimizer of its own runs no module, no backward pass and no other
        optimizer: if one of these follows, it has raised.
        """
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            _push_mode(self._cursor)
            self._cursor.note_unwatched([], [], under_way.versions, runs_python=True)
