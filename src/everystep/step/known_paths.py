"""Known paths: those of the steps of a recording, which later steps can follow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from everystep.step.entries import Entry, geometry
from everystep.step.hooks import handles, has_hooks_on_node
from everystep.step.met_tensors import MetTensors
from everystep.step.path import Marks

__all__ = ["KnownPaths"]

#: Steps that are remembered; a loop in which each step differs would fill the memory.
_MOST_LEARNED = 200
#: After so many new steps in a row, some are watched without being remembered, so many at most.
_PATIENCE, _LONGEST_REST = 4, 512
_BEGIN = Marks(0, 0, 0, 0, 0, 0, 0)


class KnownPaths:
    """The paths of a recording, as a tree.

    tensors: those of the step under way; given_up: why no step is followed any more, in words, or None.
    """

    def __init__(self) -> None:
        self.tensors = MetTensors()
        self.step: Any = None
        self.given_up: str | None = None
        self._roots: dict[Any, Entry] = {}
        self._learned = self._new = self._rest = 0
        self._next_rest = 1
        self._last: tuple[list[Any], Any] | None = None
        self._handles = -1
        self._without_hooks: dict[int, Any] = {}

    def may_follow(self) -> bool:
        """Tell whether the next step may be followed, or remembered if it is new."""
        if self.given_up is not None:
            return False
        if self._rest:
            self._rest -= 1
            return False
        return True

    def root(self, state: Mapping[str, Tensor]) -> Entry:
        """Return the point at which steps begin that have such a state."""
        tensors = [*state.values()]
        lies = [(id(t), t.data_ptr(), t.shape) for t in tensors]
        last = self._last
        if last is not None and last[0] == lies and last[1][0] == tuple(state):
            structure = last[1]
        else:
            places: dict[int, int] = {}
            shared = [places.setdefault(t.untyped_storage()._cdata, n) for n, t in enumerate(tensors)]
            sizes = [t.untyped_storage().nbytes() for t in tensors]
            structure = tuple(state), *map(geometry, tensors), *shared, *sizes
            self._last = lies, structure
        root = self._roots.get(structure)
        if root is None:
            root = self._roots[structure] = Entry("root", None, _BEGIN, len(tensors))
        return root

    def have_hooks(self, leaves: Iterable[Tensor]) -> bool:
        """Tell whether Python runs where autograd adds to the gradients of some tensors."""
        if self._handles != handles():
            self._without_hooks.clear()
        known = self._without_hooks
        unknown = [
            leaf for leaf in leaves if (known[id(leaf)]() if id(leaf) in known else None) is not leaf
        ]
        with torch._C._DisableTorchDispatch():
            if any(map(has_hooks_on_node, unknown)):
                return True
        known.update((id(leaf), ref(leaf)) for leaf in unknown)
        self._handles = handles()
        return False

    def followed(self) -> None:
        """A step was like one before."""
        self._new, self._next_rest = 0, 1

    def learned(self) -> None:
        """A step was new, and is remembered from here on."""
        self._learned += 1
        self._new += 1
        if self._learned > _MOST_LEARNED:
            self._learned, self._roots = 0, {}
        if self._new > _PATIENCE:
            self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, _LONGEST_REST)
