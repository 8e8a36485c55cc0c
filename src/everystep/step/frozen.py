"""What an object of the user holds, to be compared: equal as long as nothing in it has changed."""

from __future__ import annotations

import functools
import itertools
import types
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["frozen", "frozen_class", "is_torchs_class"]

#: How deep containers and objects within each other are looked into, and how long they may be.
DEPTH = 8
LENGTH = 10_000

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_CODE = (types.ModuleType, type, types.BuiltinFunctionType, staticmethod, classmethod, property)


def frozen(value: Any) -> Any:
    """Return what a value holds: numbers and texts, and of a tensor, which it is and its version."""
    return _frozen(value, DEPTH, set())


def frozen_class(cls: type) -> Any:
    """Return what the user's classes among a class and its bases hold, and what their methods read."""
    return [
        (name, _of_function(value, DEPTH, set()) if callable(value) else frozen(value))
        for base in cls.__mro__
        if not is_torchs_class(base) and base is not object
        for name, value in vars(base).items()
        if not (name.startswith("__") and name != "__call__") and not isinstance(value, _CODE)
    ]


def is_torchs_class(cls: type) -> bool:
    """Tell whether a class is torch's own."""
    return cls.__module__.partition(".")[0] == "torch"


def _frozen(value: Any, depth: int, seen: set[int]) -> Any:
    if isinstance(value, _PLAIN):
        return repr(value)  # nan is not equal to itself
    if isinstance(value, Tensor):
        return id(value), value._version
    if depth == 0 or id(value) in seen or isinstance(value, _CODE):
        return id(value)
    seen = seen | {id(value)}
    if isinstance(value, np.ndarray):
        return id(value), value.tobytes()
    if isinstance(value, Mapping):
        items = itertools.islice(value.items(), LENGTH)
        return len(value), [(repr(key), _frozen(item, depth - 1, seen)) for key, item in items]
    if isinstance(value, list | tuple | set | frozenset | deque):
        return len(value), [_frozen(each, depth - 1, seen) for each in itertools.islice(value, LENGTH)]
    if isinstance(value, Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, functools.partial):
        inside = [value.func, value.args, value.keywords]
        return [_frozen(each, depth - 1, seen) for each in inside]
    if isinstance(value, types.MethodType):
        return _frozen(value.__func__, depth, seen), _frozen(value.__self__, depth - 1, seen)
    if isinstance(value, types.FunctionType):
        return _of_function(value, depth, seen)
    if isinstance(value, types.GeneratorType):
        frame = value.gi_frame
        return id(value), frame and (frame.f_lasti, _frozen(frame.f_locals, depth - 1, seen))
    if isinstance(value, Iterator):
        return repr(value), _reduced(value, depth, seen)
    return id(value), [_frozen(each, depth - 1, seen) for each in _attributes(value)]


def _of_function(function: Any, depth: int, seen: set[int]) -> Any:
    """Return what a function of Python has closed over, its defaults, and the globals that it reads."""
    code = getattr(function, "__code__", None)
    if code is None or str(function.__module__).partition(".")[0] in ("torch", "numpy", "everystep"):
        return id(function)
    inside: list[Any] = [function.__defaults__, function.__kwdefaults__, vars(function)]
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # a variable that has no value yet
            inside.append(cell.cell_contents)
    known = function.__globals__
    inside += [known[name] for name in sorted(_names(code)) if name in known]
    return id(function), [_frozen(each, depth - 1, seen | {id(function)}) for each in inside]


def _names(code: types.CodeType) -> set[str]:
    """Return the names of globals that a function reads or writes, and those within it."""
    within = [each for each in code.co_consts if isinstance(each, types.CodeType)]
    return set(code.co_names).union(*map(_names, within))


def _attributes(value: Any) -> list[Any]:
    slots = [name for base in type(value).__mro__ for name in getattr(base, "__slots__", ())]
    of_slots = [getattr(value, name, None) for name in slots if not name.startswith("__")]
    own = getattr(value, "__dict__", {})
    if isinstance(value, nn.Module):
        hidden = {"_parameters", "_buffers"}
        return [*of_slots, {name: each for name, each in own.items() if name not in hidden}]
    return [*of_slots, dict(own)]


def _reduced(value: Any, depth: int, seen: set[int]) -> Any:
    """Return how far an iterator has come, where it can tell."""
    with suppress(Exception):
        return _frozen(value.__reduce__()[1:], depth - 1, seen)
    return None
