"""Conditions on a recorded loop, asked after each step: to end the loop, or to mark the step.

Each holds at the steps that `Run.when` finds in the recording: a tensor is copied when a replay copies
it. Nothing is copied or computed that no condition names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from everystep.errors import Fault, UsageError, kind_text
from everystep.expression import Expression, Reference, parse
from everystep.step.build import BuiltPath
from everystep.step.gradient_copies import GradientCopies
from everystep.step.parts import Parts
from everystep.training.agreement import check_stops_together

__all__ = ["LoopConditions"]

#: How the names begin that a state has for what conditions read, by kind.
_IN_STATE = {"parameters": "parameter/", "updates": "parameter/", "buffers": "buffer/"}
_READABLE = "loss, step, logged numbers, parameters, buffers, gradients, updates and previous.loss"
_LOSS, _PREVIOUS_LOSS = Reference("loss", "", False), Reference("loss", "", True)


class LoopConditions:
    """The conditions of a loop.

    Args:
        stop: the texts of those that end the loop.
        mark: the texts of those that mark a step, which are the names of their measurements.

    gradient_copies: of the gradients that they read, None if they read none.

    Raises:
        UsageError: a text is not a condition that can be asked while a loop runs.
    """

    def __init__(self, stop: str | Iterable[str], mark: str | Iterable[str]) -> None:
        self._stop, self._mark = _read(stop, "stop_when"), _read(mark, "mark_when")
        self.mark = [condition.text for condition in self._mark]
        read = (condition.references for condition in (*self._stop, *self._mark))
        self._references = frozenset[Reference]().union(*read)
        gradients = self._names("gradients")
        self.gradient_copies = GradientCopies(gradients) if gradients else None
        #: What there is of the last step.
        self._values: dict[Reference, Any] = {}
        self._logged: set[str] = set()
        self._device = "cpu"

    def __bool__(self) -> bool:
        return bool(self._stop or self._mark)

    def check(self, parts: Parts) -> None:
        """Check the names in the conditions.

        Raises:
            UsageError: some do not exist, or cannot be read in this loop; or one would end it, and
                several processes train.
        """
        if self._stop:
            check_stops_together("stop_when", "use mark_when, or let the loop end on all of them")
        self._device, state = parts.device.type, parts.state()
        known = {
            kind: [name.removeprefix(prefix) for name in state if name.startswith(prefix)]
            for kind, prefix in (_IN_STATE | {"gradients": "parameter/"}).items()
        }
        for condition in (*self._stop, *self._mark):
            condition.check(known)
        if self.gradient_copies is not None:
            self.gradient_copies.check(parts)

    def begin(self, state: Mapping[str, Tensor]) -> None:
        """Copy what the next step may change. state: the live tensors of the parts."""
        if self.gradient_copies is not None:
            self.gradient_copies.begin(state)
        # A step that was abandoned has no loss.
        before = [self._values[each] for each in (_LOSS, _PREVIOUS_LOSS) if each in self._values]
        self._values = {_PREVIOUS_LOSS: before[0]} if before else {}
        # A step has the parameters that it begins with; an update is the difference to those after it.
        for each in self._references:
            tensor = state.get(_IN_STATE[each.kind] + each.name) if each.kind in _IN_STATE else None
            if tensor is not None:
                self._values[each] = tensor.detach().clone()

    def note_loss(self, loss: float) -> None:
        """Note the loss of the step before the next one."""
        self._values[_LOSS] = loss

    def end(
        self,
        number: int,
        logged: Mapping[str, Any],
        state: Mapping[str, Tensor],
        last_program: Callable[[], BuiltPath | str],
    ) -> None:
        """Note what there is of a step that is over.

        logged: its numbers by name, the loss among them; state: the live tensors of the parts;
        last_program: returns the program of the step, or why it has none.

        Raises:
            UsageError: gradients cannot be read in this loop.
        """
        loss = logged.get("loss")
        self.note_loss(math.nan if loss is None else float(loss))
        self._values |= {Reference("step", "", before): number - before for before in (False, True)}
        self.note(logged)
        if self.gradient_copies is not None:
            built = last_program()
            program = None if isinstance(built, str) else built.program
            for name, copy in self.gradient_copies.end(program).items():
                self._values[Reference("gradients", name, False)] = copy
        for each in self._references & self._values.keys():
            if each.kind == "updates" and each.part != "before":
                after = state[f"parameter/{each.name}"].detach()
                self._values[each] = after.clone() if each.part else after - self._values[each]

    def note(self, logged: Mapping[str, Any]) -> Collection[str]:
        """Note numbers that are logged; return the names of those that conditions read."""
        names = self._names("measurements") & {*logged}
        self._logged |= names
        for name in names:
            self._values[Reference("measurements", name, False)] = float(logged[name])
        return names

    def holding(self, names: Collection[str] = ()) -> tuple[list[str], list[str]]:
        """Return the conditions that hold at the last step: those that end the loop, and the others.

        names: if any, only those that read one of these logged numbers.

        Raises:
            ExpressionError: the values do not fit a condition.
        """
        # As a replay computes it, whatever the loop has in force here.
        with torch.no_grad(), torch.autocast(self._device, enabled=False):
            ends, marks = (
                [each.text for each in conditions if self._holds(each, names)]
                for conditions in (self._stop, self._mark)
            )
        return ends, marks

    def _holds(self, condition: Expression, names: Collection[str]) -> bool:
        if names and not any(reference.name in names for reference in condition.references):
            return False
        try:
            return condition.truth(self._values.__getitem__)
        except KeyError:  # a value does not exist at this step, such as a number that was not logged
            return False

    @property
    def never_logged(self) -> list[str]:
        """The numbers that conditions read, and that were never logged."""
        return sorted(self._names("measurements") - self._logged)

    def _names(self, kind: str) -> set[str]:
        return {reference.name for reference in self._references if reference.kind == kind}


def _read(texts: str | Iterable[str], argument: str) -> list[Expression]:
    """Read conditions. What a loop will log is unknown: a bare name may be that of a logged number."""
    found = []
    for text in texts if isinstance(texts, Iterable) and not isinstance(texts, str) else [texts]:
        if not isinstance(text, str):
            raise UsageError(f"{argument} takes conditions as texts, not {kind_text(text)}")
        # The names of measurements are unknown here: each word of the text may be one.
        condition = parse(text, re.findall(r"[^\W\d]\w*", text))
        for each in sorted(condition.references):
            kinds = {"loss", "step"} if each.is_previous else {"gradients", "measurements", *_IN_STATE}
            if each.kind not in kinds | {"loss", "step"}:
                problem = (
                    f"cannot be read while the loop runs, but {_READABLE} can; log the number that you "
                    "need, recording.log(name=...), and write the condition with its name"
                )
                raise UsageError([Fault(str(each), problem)], f"{argument}={text!r}")
        found.append(condition)
    return found
