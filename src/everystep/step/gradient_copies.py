"""Gradient copies: gradients of a step in progress, as `gradient_places` finds them in its program.

That is as the last backward pass leaves them before an optimizer reads them, and not clipped yet.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from everystep.errors import UsageError
from everystep.program.step_program import Program
from everystep.step.observe import UNSCALES, gradient_places
from everystep.step.parts import Parts

__all__ = ["GradientCopies"]

#: How many programs of steps are known at a time.
MOST_PROGRAMS = 64
_SCALED = "a GradScaler changes them after the backward pass"
_IN_TURN = "an optimizer with a closure makes and reads them in turn"


class GradientCopies:
    """Copies some gradients in each step.

    names: of their parameters. No gradient itself is held: autograd would not add to it in place.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._copies: dict[str, Tensor] = {}
        self._parameters: dict[str, Tensor] = {}
        #: Those that an optimizer has read; those that no backward pass made as they are.
        self._read: set[str] = set()
        self._unsure: set[str] = set()
        self._has_other_passes = False
        self._updating: set[str] = set()
        #: Of a program, whether it divides gradients by a scale, and which gradients it has.
        self._known: dict[int, tuple[Program, bool, Collection[str]]] = {}

    def check(self, parts: Parts) -> None:
        """Check before the first step what is known then.

        Raises:
            UsageError: gradients cannot be read in this loop.
        """
        for part in parts.named.values():
            if isinstance(part, torch.amp.GradScaler) and part.is_enabled():
                raise _unreadable(self._names, _SCALED)
            if isinstance(part, torch.optim.LBFGS):
                raise _unreadable(self._names, _IN_TURN)

    def begin(self, state: Mapping[str, Tensor]) -> None:
        """Begin a step. state: the live tensors of the parts."""
        named = ((name, state.get(f"parameter/{name}")) for name in self._names)
        self._parameters = {name: tensor for name, tensor in named if tensor is not None}
        self._copies, self._read, self._unsure, self._updating = {}, set(), set(), set()
        self._has_other_passes = False

    @contextmanager
    def around_backward(self, accumulates: bool) -> Iterator[None]:
        """Copy the gradients that a backward pass makes. accumulates: it is not `torch.autograd.grad`.

        Raises:
            UsageError: it runs within the step of an optimizer that has one of the gradients.
        """
        if self._updating:
            raise _unreadable(self._updating, _IN_TURN)
        # Versions, not tensors: autograd adds in place only to a gradient that nobody else holds.
        before = {name: _version(tensor.grad) for name, tensor in self._parameters.items()}
        yield
        self._has_other_passes |= not accumulates
        for name, version in before.items():
            if name not in self._read and _version(self._parameters[name].grad) != version:
                self._copy(name)

    def optimizer_begins(self, names: Collection[str]) -> None:
        """Note that an optimizer reads the gradients of some parameters."""
        self._updating = {*self._parameters} & {*names}
        self._copy_rest(self._updating - self._read)
        self._read |= self._updating

    def optimizer_ends(self) -> None:
        """Note that an optimizer is done."""
        self._updating = set()

    def end(self, program: Program | None) -> dict[str, Tensor]:
        """Return the copies of a step that is over. program: of the step, None if it has none.

        Raises:
            UsageError: the program has a gradient as it was where no copy was made.
        """
        self._copy_rest(self._parameters.keys() - self._read)
        if program is None:
            return self._copies
        if id(program) not in self._known:
            if len(self._known) >= MOST_PROGRAMS:
                self._known.clear()
            is_scaled = any(operation.name.rstrip("_") == UNSCALES for operation in program.operations)
            self._known[id(program)] = program, is_scaled, {*gradient_places(program)}
        _, is_scaled, has = self._known[id(program)]
        if is_scaled:
            raise _unreadable(self._copies, _SCALED)
        if unsure := self._unsure & {*has}:
            raise _unreadable(unsure, "torch.autograd.grad has made them, and something changes them")
        return {name: copy for name, copy in self._copies.items() if name in has}

    def _copy_rest(self, names: Collection[str]) -> None:
        """Copy what no backward pass has made in this step."""
        for name in names:
            gradient = self._parameters[name].grad
            if name not in self._copies and gradient is not None:
                self._copy(name)
                if self._has_other_passes and gradient._version:
                    self._unsure.add(name)

    def _copy(self, name: str) -> None:
        gradient = self._parameters[name].grad
        if gradient is not None:
            with torch._C._DisableTorchDispatch(), torch.no_grad():
                self._copies[name] = gradient.clone()


def _version(gradient: Tensor | None) -> tuple[int, int] | None:
    # A pass adds in place, or exchanges the gradient.
    return None if gradient is None else (id(gradient), gradient._version)


def _unreadable(names: Collection[str], reason: str) -> UsageError:
    found = ", ".join(f"gradients[{name!r}]" for name in sorted(names))
    return UsageError(
        f"stop_when and mark_when cannot read {found} in this loop: {reason}; log the number that the "
        "condition needs, recording.log(norm=...), and write the condition with it: 'norm > 100'"
    )
