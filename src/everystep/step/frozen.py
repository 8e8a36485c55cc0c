"""What an object of the user holds, to be compared: equal as long as nothing in it has changed."""

from __future__ import annotations

import dis
import functools
import itertools
import sys
import types
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Freezer", "is_torchs_class", "plain_attributes"]

#: How deep containers and objects within each other are looked into, and how long they may be.
DEPTH = 8
LENGTH = 10_000

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_CONTAINERS = (Mapping, list, tuple, set, frozenset, deque)
_CODE = (types.ModuleType, type, types.BuiltinFunctionType, staticmethod, classmethod, property)


class Freezer:
    """Turns what the user's Python holds into something to compare.

    state: tensors that change at every step, as everybody knows; of others, a change is noticed.
    """

    def __init__(self, state: Collection[Tensor]) -> None:
        self._state = {id(tensor) for tensor in state}

    def freeze(self, value: Any) -> Any:
        """Return what a value holds: numbers and texts, and of a tensor, which it is and its version."""
        return self._frozen(value, DEPTH, frozenset())

    def freeze_class(self, cls: type) -> Any:
        """Return what the user's classes among a class and its bases hold, and their methods read."""
        return [
            (name, self.freeze(value))
            for base in cls.__mro__
            if not is_torchs_class(base) and base is not object
            for name, value in vars(base).items()
            if not (name.startswith("__") and name != "__call__") and not isinstance(value, _CODE)
        ]

    def _frozen(self, value: Any, depth: int, seen: frozenset[int]) -> Any:
        if isinstance(value, _PLAIN):
            return repr(value)  # nan is not equal to itself
        if isinstance(value, Tensor):
            return id(value), 0 if id(value) in self._state else value._version
        is_torchs = isinstance(value, torch.optim.Optimizer) and is_torchs_class(type(value))
        if depth == 0 or id(value) in seen or isinstance(value, _CODE) or is_torchs:
            return id(value)
        inside = [self._frozen(each, depth - 1, seen | {id(value)}) for each in self._inside(value)]
        # A container is what is in it; another object is itself, too.
        return inside if isinstance(value, _CONTAINERS) else (id(value), inside)

    def _inside(self, value: Any) -> list[Any]:
        """Return what a value consists of."""
        if isinstance(value, np.ndarray):
            return [hash(value.tobytes()) if value.dtype != object else value.tolist()]
        if isinstance(value, Mapping):
            items = itertools.islice(value.items(), LENGTH)
            return [len(value), *(each for key, item in items for each in (repr(key), item))]
        if isinstance(value, _CONTAINERS):
            return [len(value), *itertools.islice(value, LENGTH)]
        if isinstance(value, Random):
            return [repr(value.getstate())]
        if isinstance(value, np.random.Generator):
            return [repr(value.bit_generator.state)]
        if isinstance(value, torch.Generator):
            return [repr(value.get_state().tolist())]
        if isinstance(value, functools.partial):
            return [value.func, value.args, value.keywords]
        if isinstance(value, types.MethodType):
            return [value.__func__, value.__self__]
        if isinstance(value, types.FunctionType):
            return _of_function(value)
        if isinstance(value, types.GeneratorType):
            return [value.gi_frame and (value.gi_frame.f_lasti, dict(value.gi_frame.f_locals))]
        if isinstance(value, Iterator):
            with suppress(Exception):  # how far it has come, where it can tell
                return [value.__reduce__()[1:]]
            return [repr(value)]
        return _attributes(value)


def is_torchs_class(cls: type) -> bool:
    """Tell whether a class is torch's own."""
    return cls.__module__.partition(".")[0] == "torch"


def _of_function(function: types.FunctionType) -> list[Any]:
    """Return what a function of Python has closed over, its defaults, and the globals that it reads."""
    if str(function.__module__).partition(".")[0] in ("torch", "numpy", "everystep"):
        return []
    inside: list[Any] = [function.__defaults__, function.__kwdefaults__, vars(function)]
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # a variable that has no value yet
            inside.append(cell.cell_contents)
    known = function.__globals__
    return inside + [known[name] for name in _globals(function.__code__) if name in known]


@functools.cache
def _globals(code: types.CodeType) -> tuple[str, ...]:
    """Return the names of the globals that a function, or one within it, reads or writes."""
    own = {each.argval for each in dis.get_instructions(code) if each.opname.endswith("_GLOBAL")}
    within = (each for each in code.co_consts if isinstance(each, types.CodeType))
    return tuple(sorted(own.union(*map(_globals, within))))


def _attributes(value: Any) -> list[Any]:
    """Return what an object of any class holds, and what its class holds, if it is the user's."""
    if isinstance(value, nn.Module) and is_torchs_class(type(value)):
        return [plain_attributes(value)]
    slots = [name for base in type(value).__mro__ for name in getattr(base, "__slots__", ())]
    of_slots = [getattr(value, name, None) for name in slots if not name.startswith("__")]
    own = dict(getattr(value, "__dict__", {}))
    if isinstance(value, nn.Module):
        own = {name: each for name, each in own.items() if name not in ("_parameters", "_buffers")}
    of_class = {
        name: each
        for base in type(value).__mro__
        if base.__module__ in sys.modules and not _is_librarys(base)
        for name, each in vars(base).items()
        if isinstance(each, (*_PLAIN, *_CONTAINERS)) and not name.startswith("__")
    }
    return [*of_slots, own, of_class]


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the settings of a module that are numbers, texts or truth values."""
    own = vars(module).items()
    return {n: v for n, v in own if v is None or isinstance(v, bool | int | float | str)}


def _is_librarys(cls: type) -> bool:
    package = cls.__module__.partition(".")[0]
    return package in sys.stdlib_module_names - {"__main__"} or package in (
        "torch",
        "numpy",
        "everystep",
    )
