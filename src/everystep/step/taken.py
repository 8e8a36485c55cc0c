"""Taken: a step that a program ran in place of Python, in the form in which a watch sees steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

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

    def content(self, storage: int) -> Tensor | None:
        """Return the bytes of an input that is not in the batch."""
        return self._contents.get(storage)

    def cut(self, storage: int) -> None:
        """Return where an input was cut out of data: nowhere, since its content does not change."""

    def rows(self, storage: int) -> int:
        """Return of how many rows an input was joined."""
        return 1

    def end(self, state: Mapping[str, Tensor], versions: Any, loss: Any) -> Path:
        """Return the path of the step."""
        return self._path
