"""Advance: runs steps by their programs. Nothing else does; a hook can observe them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from everystep.program.calls import Call
from everystep.program.execute import BoundProgram, without_autograd
from everystep.step.programs import Programs

__all__ = ["ROOM", "Hook", "Losses", "advance", "take"]

#: Losses kept on the device until they are collected.
ROOM = 1024


class Hook(Protocol):
    """Observes steps while programs run them. The bits of a step are the same with and without it."""

    def calls(self, bound: BoundProgram) -> list[Call]:
        """Return the calls of a step, with observing calls in between."""

    def after(self, number: int, bound: BoundProgram) -> bool:
        """Observe a step that just ran; return whether to continue."""


def advance(
    first: int,
    last: int,
    begin: Callable[[int], BoundProgram | None],
    keep: Callable[[int, BoundProgram], None],
    *,
    is_steady: bool = False,
    hook: Hook | None = None,
    failed: Callable[[int, Exception], Exception] | None = None,
) -> None:
    """Run the steps `first` to `last` by their programs, up to one that has none.

    Args:
        first: the first step.
        last: the last step.
        begin: puts everything in place for a step and returns its program, None if it has none.
        keep: called with each step that ran, and its program.
        is_steady: the program of the first step runs all of them, with everything in place.
        hook: looks at the steps, and may end them early.
        failed: returns what to raise in place of a kernel's error in a step.

    Raises:
        RuntimeError: a kernel refuses its arguments (or IndexError, ValueError, TypeError).
    """
    bound = begin(first)
    if bound is None:
        return
    calls = bound.calls if hook is None else hook.calls(bound)
    with without_autograd():
        for number in range(first, last + 1):
            if number > first and not is_steady:
                bound = begin(number)
                if bound is None:
                    return
                calls = bound.calls if hook is None else hook.calls(bound)
            try:
                for call in calls:
                    call()
            except (RuntimeError, IndexError, ValueError, TypeError) as error:
                if failed is None:
                    raise
                raise failed(number, error) from None
            keep(number, bound)
            if hook is not None and not hook.after(number, bound):
                return


def take(programs: Programs, number: int) -> BoundProgram:
    """Run one step by its program, with the learning rates as they are; return the program."""
    bound = programs.bound(number)
    programs.load_batch(number, bound)
    programs.load_rates()
    with without_autograd():
        bound.run()
    return bound


class Losses:
    """Losses of consecutive steps, kept on the device until they are collected."""

    def __init__(self) -> None:
        self._losses = torch.empty(0)
        self._slots: tuple[Tensor, ...] = ()
        self._collected = 0
        self.count = 0

    @property
    def room(self) -> int:
        """How many more can be kept."""
        return ROOM - self.count

    def last(self) -> float:
        """Return the newest."""
        return float(self._losses[(self.count or self._collected) - 1])

    def make_room(self, loss: Tensor) -> None:
        """Make room for losses of the dtype of this one, or of an earlier wider one."""
        if self._slots and loss.dtype == self._losses.dtype:
            return
        dtype = torch.promote_types(loss.dtype, self._losses.dtype) if self._slots else loss.dtype
        if not self._slots or dtype != self._losses.dtype:
            known = self._losses
            self._losses = torch.empty(ROOM, dtype=dtype, device=loss.device)
            self._losses[: len(known)] = known
            self._slots = tuple(self._losses.unbind())

    def keep(self, loss: Tensor) -> None:
        """Keep a copy of a loss that there is room for."""
        self._slots[self.count].copy_(loss if loss.ndim == 0 else loss.reshape(()))
        self.count += 1

    def drop(self, count: int) -> None:
        """Drop the newest losses, unless already collected."""
        self.count = max(0, self.count - count)

    def collect(self) -> Tensor:
        """Return a copy of those not collected before."""
        count, self.count = self.count, 0
        self._collected = count or self._collected
        return self._losses[:count].clone()
