"""Replayable: what a replay needs of a training brought back, of everystep or of a user's loop."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from everystep.replay.step import Batch
from everystep.step.advance import Hook
from everystep.step.observe import Observation
from everystep.step.state import State

__all__ = ["Replayable"]


class Replayable(Protocol):
    """A training that takes its steps again, in any order of loading and going on.

    state: the number of the step after which the state is, None before one is loaded.
    """

    state: int | None
    #: Whether a state holds the gradients that the next step needs: otherwise they are made once more.
    has_gradients_in_state: bool

    @property
    def has_gradients(self) -> bool:
        """Whether the gradients that the last step left are there."""

    def load(self, state: State) -> None:
        """Bring everything to a state from disk."""

    def save(self) -> Any:
        """Return a copy of the state as it is now, which has `tensors`."""

    def restore(self, step: int, saved: Any) -> None:
        """Bring everything back to what `save` returned after `step`."""

    def capture(self) -> State:
        """Return the state as it is now, as it is written to disk."""

    def settle(self) -> None:
        """Let what happened after the last step be so, before anything else is done."""

    def run(self, last: int) -> Tensor:
        """Take the steps up to `last`; return their losses (steps), on the CPU."""

    def watch(self, last: int, hook: Hook) -> Tensor:
        """Take the steps up to `last` while a hook looks; return their losses (steps), on the CPU.

        The next step is by program; the first that is not ends the way, and so may the hook.
        """

    def observe(self) -> Observation:
        """Take the next step, and return all that is in it."""

    def named_state(self) -> dict[str, Tensor]:
        """Return the live tensors of the state by name."""

    def gradients(self) -> dict[str, Tensor]:
        """Return copies of the gradients that the last step has left, by parameter."""

    def hyperparameters(self) -> dict[str, float]:
        """Return the learning rates, and what else is worth a word."""

    def module_paths(self) -> list[str]:
        """Return the paths of modules, of which not each need run at each step."""

    def given(self, number: int) -> bytes:
        """Return what tells apart what the next step is given besides its state: settings and batch."""

    def batch(self, number: int) -> Batch:
        """Return the batch of a step."""

    def epoch(self, number: int) -> int:
        """Return the epoch of a step, from 0."""

    def is_by_program(self, number: int) -> bool:
        """Tell whether a program takes a step in the place of Python."""
