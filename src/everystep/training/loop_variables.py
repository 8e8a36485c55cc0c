"""Variables of a resumed loop that are in no part, so that they begin again with the process.

A loop that continues in the middle has what its parts held, but a sum over the epoch, a counter or the
best loss in a variable of its own knows nothing of the steps before. Nothing is wrong while the loop
only prints it; if a rate or a checkpoint depends on it, the training takes another course. So the
variables that a step, or an epoch, of the resumed loop changes are named.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from types import FrameType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from everystep.step.kept_values import is_aside
from everystep.step.parts import Parts

__all__ = ["LoopVariables"]

_NUMBERS = (bool, int, float, complex, str, bytes, np.generic)
#: Functions that return a function's variables.
_ASKING = {"locals", "vars", "eval", "exec"}
#: What may be large is not looked into, but for its first items and its length.
_MOST_ITEMS = 64
_MOST_BYTES = 1 << 20


class _Identity(NamedTuple):
    """What can be compared of a tensor without reading it."""

    id: int
    version: int
    shape: torch.Size


class LoopVariables:
    """The contents of a loop's variables at one moment.

    Args:
        frame: of the function, or the script, that has the loop.
        parts: what the loop carries, which a resume restores.
        item: what the loop is about to get.
    """

    def __init__(self, frame: FrameType, parts: Parts, item: Any) -> None:
        self._known = parts.objects() | {id(each) for each in pytree.tree_leaves(item)}
        self._memory = {tensor.untyped_storage().data_ptr() for tensor in parts.state().values()}
        #: What stays alive, so that no other object gets its id.
        self._alive: list[Any] = [item]
        self._before = dict(self._contents(frame))

    def changed(self, frame: FrameType, sources: set[int]) -> list[str]:
        """Return the names of those that differ now; of an object, with the attribute.

        sources: ids of what batches are drawn from, which a resume restores, too.
        """
        self._known |= sources
        now = dict(self._contents(frame))
        return [name for name, before in self._before.items() if _differs(before, now.get(name))]

    def _contents(self, frame: FrameType) -> Iterator[tuple[str, Any]]:
        """Yield names, and what can be compared of their values."""
        if not _ASKING.isdisjoint(frame.f_code.co_names):
            return  # to look at them changes what `locals()` returned, before Python 3.13
        for name, value in list(frame.f_locals.items()):
            if id(value) in self._known or isinstance(value, ModuleType | type):
                continue
            with suppress(Exception):  # a class of the user's may raise anywhere
                yield from self._of_variable(name, value).items()

    def _of_variable(self, name: str, value: Any) -> dict[str, Any]:
        content = self._content(value)
        if content is not None:
            return {name: content}
        of_object = {} if is_aside(value) else getattr(value, "__dict__", {})
        contents = {key: self._content(each) for key, each in list(of_object.items())}
        return {f"{name}.{key}": each for key, each in contents.items() if each is not None}

    def _content(self, value: Any, depth: int = 2) -> Any:
        """Return what can be compared of a value; None: of this kind, nothing."""
        if isinstance(value, _NUMBERS):
            return type(value), repr(value)
        if isinstance(value, Tensor):
            is_plain = value.layout == torch.strided and not value.is_nested and not value.is_inference()
            if not is_plain or value.untyped_storage().data_ptr() in self._memory:
                return None
            self._alive.append(value)
            return _Identity(id(value), value._version, value.shape)
        if isinstance(value, np.ndarray):
            return None if value.nbytes > _MOST_BYTES or value.dtype.hasobject else value.tobytes()
        if id(value) in self._known or not depth:
            return None
        if isinstance(value, dict | list | tuple | deque | set):
            items = islice(value.values() if isinstance(value, dict) else value, _MOST_ITEMS)
            return len(value), [self._content(each, depth - 1) for each in items]
        return None


def _differs(before: Any, now: Any) -> bool:
    if isinstance(before, _Identity) and isinstance(now, _Identity) and before.shape != now.shape:
        return False  # a batch may have the name of the data
    return now is not None and bool(now != before)
