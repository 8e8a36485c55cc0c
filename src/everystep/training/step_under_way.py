"""A step in progress: what watches it, its batch, and what it has logged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from everystep import clock
from everystep.step.cursor import Cursor
from everystep.step.path import Path
from everystep.step.stand_in import TakenByProgram
from everystep.step.versions import Versions

__all__ = ["AnyWatch", "StepUnderWay"]

#: An object that knows a step's operations.
AnyWatch = Cursor | TakenByProgram
W = TypeVar("W", bound=AnyWatch, covariant=True)


class StepUnderWay(Generic[W]):
    """A step in progress: its watch, its batch, and logged values.

    rates: the learning rates that it uses: as it began, or as an optimizer found them; batches: as the
    loop has them, each with the prefix of its paths, and its tensors as the step began, by path.
    """

    def __init__(self, watch: W, rates: dict[str, float]) -> None:
        self.watch = watch
        self.rates = rates
        self.batch: dict[str, Tensor] = {}
        self.nesting: list[Any] = []
        self.batches: list[tuple[Any, str, dict[str, Tensor]]] = []
        self.logged: dict[str, Any] = {}
        self.loss: Any = None
        self.started = clock.now()
        self._loss_version = _changes_of(None)

    @property
    def nested(self) -> Any:
        """How the batch was nested; of several, a list."""
        if len(self.nesting) > 1:
            return {"list": self.nesting}
        return self.nesting[0] if self.nesting else None

    @property
    def is_untouched(self) -> bool:
        """Whether the loop has done nothing with it yet."""
        return self.watch.is_empty and not self.logged

    def has_loss(self, loss: Any) -> None:
        """Note the loss of the step."""
        self.loss, self._loss_version = loss, _changes_of(loss)
        if isinstance(self.watch, Cursor):
            self.watch.loss_at = self.watch.at

    def end(self, after: Mapping[str, Tensor], versions: Versions) -> Path:
        """Return what the step did. after: the live tensors of the parts; versions: of these."""
        # Of a tensor that was changed since it was logged, no operation made the loss.
        is_as_logged = _changes_of(self.loss) == self._loss_version
        return self.watch.end(after, versions, self.loss if is_as_logged else None)


def _changes_of(value: Any) -> tuple[int, int]:
    """Return how often a tensor was changed in place, if torch counts that, and where it lies."""
    if not isinstance(value, Tensor) or value.is_inference():
        return 0, 0
    # The address, too: `loss.data = other` counts nothing.
    has_place = type(value) is Tensor and value.layout is torch.strided
    return value._version, value.data_ptr() if has_place else 0
