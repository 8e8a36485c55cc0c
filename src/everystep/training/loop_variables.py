"""The variables of a loop that are in no part, which begin again in a loop that is resumed.

A sum over the epoch, a counter or the best loss knows nothing of the steps before. Nothing is wrong
while the loop only prints it; if a rate or a checkpoint depends on it, the training takes another
course. So the variables that a step, or an epoch, of the resumed loop changes are named, wherever its
code keeps them: in the function of the loop, in global variables, in its functions, classes and objects.
"""

from __future__ import annotations

import itertools
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from types import CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from everystep.step.calling_code import is_users_own
from everystep.step.gradient_layouts import is_of_reducer
from everystep.step.kept_values import is_aside
from everystep.step.parts import Parts

__all__ = ["LoopVariables"]

_NUMBERS = (bool, int, float, complex, str, bytes, np.generic)
_COLLECTIONS = (dict, list, tuple, deque, set)
#: Functions that return a function's variables.
_ASKING = {"locals", "vars", "eval", "exec"}
#: What may be large is not looked into, but for its first items and its length.
_MOST_ITEMS = 64
_MOST_BYTES = 1 << 20
#: Functions, classes and objects that are looked into.
_MOST_REACHED = 5000


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
        #: A resume restores what parts hold, but not the variables of their functions.
        self._functions = [*parts.functions()]
        self._known = parts.objects() | {id(each) for each in pytree.tree_leaves(item)}
        self._memory = {tensor.untyped_storage().data_ptr() for tensor in parts.state().values()}
        #: What stays alive, so that no other object gets its id.
        self._alive: list[Any] = [item]
        # By convention, nothing reads `_`.
        self._before = {name: each for name, each in self._contents(frame) if name != "_"}

    def changed(self, frame: FrameType, sources: set[int]) -> list[str]:
        """Return the names of those that differ now; of an object, with the attribute.

        sources: ids of what batches are drawn from, which a resume restores, too.
        """
        self._known |= sources
        now = dict(self._contents(frame))
        return [name for name, before in self._before.items() if _differs(before, now.get(name))]

    def _contents(self, frame: FrameType) -> Iterator[tuple[str, Any]]:
        """Yield names, and what can be compared of their values."""
        reached, todo = set[int](), deque([*_variables(frame), *self._functions])
        while todo and len(reached) < _MOST_REACHED:
            name, value = todo.popleft()
            if id(value) in self._known or id(value) in reached:
                continue
            with suppress(Exception):  # a class of the user's may raise anywhere
                if (content := self._content(value)) is not None:
                    yield name, content
                if not isinstance(value, _NUMBERS):
                    reached.add(id(value))
                    todo.extendleft(reversed([*_within(name, value)]))

    def _content(self, value: Any, depth: int = 2) -> Any:
        """Return what can be compared of a value; None: of this kind, nothing."""
        if isinstance(value, _NUMBERS):
            return type(value), repr(value)
        if isinstance(value, Tensor):
            is_plain = value.layout == torch.strided and not value.is_nested and not value.is_inference()
            if not is_plain or value.untyped_storage().data_ptr() in self._memory:
                return None
            # Its numbers may be on a device, or be many; torch counts their changes.
            self._alive.append(value)
            return _Identity(id(value), value._version, value.shape)
        if isinstance(value, np.ndarray):
            return None if value.nbytes > _MOST_BYTES or value.dtype.hasobject else value.tobytes()
        if id(value) in self._known or not depth:
            return None
        if isinstance(value, _COLLECTIONS):
            items = itertools.islice(value.values() if isinstance(value, dict) else value, _MOST_ITEMS)
            return len(value), [self._content(each, depth - 1) for each in items]
        return None


def _variables(frame: FrameType) -> Iterator[tuple[str, Any]]:
    """Yield the variables that the code of a frame names, and their values."""
    code = frame.f_code
    if _ASKING.isdisjoint(code.co_names):  # to look changes what `locals()` returned, before Python 3.13
        yield from [*frame.f_locals.items()]
    yield from _global(code, frame.f_globals)


def _global(code: CodeType, variables: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the global variables that code names; of a module of the user's, those in it."""
    names = {*code.co_names}
    for inner in code.co_consts:  # functions within it, and comprehensions
        if isinstance(inner, CodeType):
            yield from _global(inner, variables)
    for name in sorted(names & variables.keys()):
        value = variables[name]
        if isinstance(value, ModuleType):
            of_users = vars(value) if is_users_own(getattr(value, "__file__", None)) else {}
            yield from [(f"{name}.{each}", of_users[each]) for each in sorted(names & of_users.keys())]
        else:
            yield name, value


def _within(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a value has by name: a function of the user's, its variables; an object, attributes."""
    if isinstance(value, MethodType):
        value = value.__func__
    if isinstance(value, FunctionType):
        yield from _of_function(name, value)
    elif isinstance(value, type):
        if _is_users_class(value):
            yield from [(f"{name}.{n}", each) for n, each in vars(value).items() if n[:2] != "__"]
    elif isinstance(value, _COLLECTIONS):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        first = [(f"{name}[{n!r}]", each) for n, each in itertools.islice(items, _MOST_ITEMS)]
        yield from [(n, each) for n, each in first if _is_users_class(type(each))]
    elif not isinstance(value, ModuleType | Tensor) and not is_aside(value):
        kind, contents = type(value), (*_COLLECTIONS, *_NUMBERS, Tensor, np.ndarray)
        for own, each in [*getattr(value, "__dict__", {}).items()]:
            # What other packages keep leads to anything.
            is_own = isinstance(each, contents) or _is_users_class(kind) or _is_users_class(type(each))
            if is_own and not is_of_reducer(value, own):
                yield f"{name}.{own}", each
        yield kind.__name__, kind


def _of_function(name: str, function: Any) -> Iterator[tuple[str, Any]]:
    """Yield the variables of a function of the user's that outlive a call, and global ones."""
    code, given = function.__code__, function.__defaults__ or ()
    yield from [(name if n == "__wrapped__" else f"{name}.{n}", e) for n, e in vars(function).items()]
    if not is_users_own(code.co_filename):
        return
    found = [*(function.__kwdefaults__ or {}).items()]
    found += zip(code.co_varnames[code.co_argcount - len(given) :], given, strict=False)
    for own, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # not set yet
            found.append((own, cell.cell_contents))
    yield from [(f"{name}.{own}", each) for own, each in found]
    yield from _global(code, function.__globals__)


def _is_users_class(kind: type) -> bool:
    module = kind.__module__
    return module == "__main__" or is_users_own(getattr(sys.modules.get(module), "__file__", None))


def _differs(before: Any, now: Any) -> bool:
    if isinstance(before, _Identity) and isinstance(now, _Identity) and before.shape != now.shape:
        return False  # a batch may have the name of the data
    return now is not None and bool(now != before)
