"""Taken: a step that a program ran in place of Python, in the form in which a watch sees steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from everystep.step.outside_tensors import Brought
from everystep.step.path import Path

__all__ = ["TakenByProgram"]


class TakenByProgram:
    """A step that a program ran, as a watch would have observed it.

    numbers, generators, drawn: as in `UnderWay`; is_still: no tensor of the parts was exchanged, or has
    another version than before, although it may have other values.
    """

    changed_elsewhere = None
    offsets: tuple[int, ...] = ()
    is_paused = is_empty = is_compiled = False

    def __init__(
        self, path: Path, numbers: Sequence[int | float], contents: Mapping[int, Tensor]
    ) -> None:
        self.is_still = False
        self.numbers = numbers
        self.generators: dict[int, Tensor] = {}
        self.drawn: Tensor | None = None
        self.unseen: dict[str, int] = {}
        self.changed_unseen: list[str] = []
        self._path = path
        self._contents = contents

    def from_outside(self, storage: int) -> Brought | None:
        """Return an input that is not in the batch; its content does not change from step to step."""
        content = self._contents.get(storage)
        return None if content is None else Brought(content)

    def end(self, state: Mapping[str, Tensor], versions: Any, loss: Any) -> Path:
        """Return the path of the step."""
        return self._path
