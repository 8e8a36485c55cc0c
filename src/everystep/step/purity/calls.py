"""Calls: what a reader may call, and how: it runs torch functions, and reads user functions."""

from __future__ import annotations

import collections.abc
import functools
import itertools
import types
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from everystep.step.purity.attributes import (
    NotProvenError,
    class_attribute,
    class_of,
    name_of,
    own_attribute,
)
from everystep.step.purity.callables import (
    BUILTINS,
    CHANGING,
    FROM_ARRAYS,
    TENSOR_TYPES,
    is_allowed_function,
)
from everystep.step.purity.guards import (
    ABSENT,
    class_name,
    held,
    is_a,
    is_plain,
    kind_of,
    mro_of,
)
from everystep.step.purity.structures import is_named_tuple, is_structure
from everystep.step.purity.torchs_own import (
    HOOKS,
    guard_module,
    hook_on,
    own_modules,
    reason_against_module,
)
from everystep.step.purity.values import (
    DICTS,
    SEQUENCES,
    WRAPPERS,
    Bound,
    Interpreted,
    Method,
    Values,
)

__all__ = ["Calls"]

_CALLED = ("__call__", "_wrapped_call_impl", "_call_impl", "_slow_forward")
#: Methods of modules that iterate over the content of a module, and the methods that they call.
_WALKS = ("parameters", "buffers", "children", "modules")
_WALKED = (*(f"named_{name}" for name in _WALKS), "_named_members")


class Calls(Values):
    """What may be done with values, calls among it.

    contexts: what may stand after `with`.
    """

    contexts: tuple[Any, ...] = (torch.no_grad, torch.enable_grad)

    def call(self, function: Any, args: list[Any], keywords: dict[str, Any]) -> Any:
        """Call something."""
        kind = kind_of(function)
        if kind is Bound:
            return self._call_bound(function, args, keywords)
        if kind is Interpreted:
            return function.call(args, keywords)
        if kind is Method:
            return self._call_method(function, args, keywords)
        if is_allowed_function(function):
            return self._run(function, args, keywords)
        if kind is types.FunctionType:
            return self._interpret(function, args, keywords)
        if kind is types.MethodType and type(function.__func__) is types.FunctionType:
            return self._call_bound(Bound(function.__func__, function.__self__), args, keywords)
        if kind is functools.partial:
            self._look_into(function.args)
            self._look_into(function.keywords)
            return self.call(function.func, [*function.args, *args], function.keywords | keywords)
        if _in(function, BUILTINS):
            return self._call_plain(function, args, keywords)
        if is_a(function, type) and is_named_tuple(function):
            return self._make_named_tuple(function, args, keywords)
        if is_a(function, type) or kind is types.BuiltinFunctionType:
            return self._call_builtin(function, args, keywords)
        if is_a(function, nn.Module):
            return self._call_module(function, args, keywords)
        method = self._special(function, "__call__")
        if method is ABSENT:
            raise NotProvenError(f"calls {name_of(function)}")
        return self.call(method, args, keywords)

    def _run(self, function: Any, args: list[Any], keywords: dict[str, Any]) -> Any:
        """Call a function of torch, module or method with tensors and plain values."""
        for value in (*args, *keywords.values()):
            if type(value) is not np.ndarray or not any(function is each for each in FROM_ARRAYS):
                self.check_passed(value)
        if "out" in keywords:
            raise NotProvenError("writes into a tensor passed as out")
        passed: set[int] = set()
        _collect((*args, *keywords.values(), getattr(function, "__self__", None)), passed)
        return self._given(function(*args, **keywords), passed)

    def _given(self, value: Any, passed: set[int]) -> Any:
        """Note the result of a torch function: it is new, unless it was passed in."""
        if id(value) in passed:
            return value
        if is_a(value, tuple, list):
            self._made[id(value)] = value
            for item in value:
                self._given(item, passed)
        elif not is_plain(value) and kind_of(value) not in TENSOR_TYPES:
            raise NotProvenError(f"gets {name_of(value)} from a function of torch")
        return value

    def _call_bound(self, bound: Bound, args: list[Any], keywords: dict[str, Any]) -> Any:
        name = bound.function.__name__.removeprefix("named_")
        if name in _WALKS and bound.function is vars(nn.Module).get(bound.function.__name__):
            return self._walk(bound, args, keywords)
        return self.call(bound.function, [bound.owner, *args], keywords)

    def _call_method(self, method: Method, args: list[Any], keywords: dict[str, Any]) -> Any:
        name, owner = method
        if kind_of(owner) in TENSOR_TYPES:
            return self._run(getattr(owner, name), args, keywords)
        if kind_of(owner) in (list, *DICTS):
            return self._call_on_container(owner, name, args, keywords)
        for value in (*args, *keywords.values()):
            self.check_passed(value)
            if not is_plain(value) and not (type(value) is list and is_plain(tuple(value))):
                raise NotProvenError(f"calls {name} with {name_of(value)}")
        found = getattr(owner, name)(*args, **keywords)
        return found if is_plain(found) else self.made(found)

    def _call_on_container(
        self, owner: Any, name: str, args: list[Any], keywords: dict[str, Any]
    ) -> Any:
        if name in CHANGING and id(owner) not in self._made:
            raise NotProvenError(f"changes a {type(owner).__name__} from before the step")
        self._look_into(owner)
        if name == "extend" and len(args) == 1:
            args = [self.iterate(args[0])]
        elif name == "update" and len(args) == 1 and type(args[0]) is dict:
            self._look_into(args[0])
        else:
            needs_plain = type(owner) is not list or name == "pop"
            is_plain_call = name != "update" and not keywords and all(map(is_plain, args[:1]))
            if needs_plain and not is_plain_call:
                raise NotProvenError(f"calls {name} with an argument that is not plain data")
        found = getattr(owner, name)(*args, **keywords)
        return self.made(found) if name in ("copy", "items", "keys", "values") else found

    def _call_plain(self, function: Any, args: list[Any], keywords: dict[str, Any]) -> Any:
        if function is abs and len(args) == 1 and kind_of(args[0]) in TENSOR_TYPES:
            return abs(args[0])
        if function in (min, max, sorted) and len(args) == 1:
            args = [tuple(self.iterate(args[0]))]
        if not all(map(is_plain, (*args, *keywords.values()))):
            raise NotProvenError(f"passes a tensor or an object to {function.__name__}")
        found = function(*args, **keywords)
        return found if is_plain(found) else self.made(found)

    def _call_builtin(self, function: Any, args: list[Any], keywords: dict[str, Any]) -> Any:
        name = class_name(function) if is_a(function, type) else function.__name__
        known = _KNOWN_BUILTINS.get(name)
        if known is None or known is not function:
            raise NotProvenError(f"calls {name}")
        return getattr(self, f"_call_{name}")(*args, **keywords)

    def _make_named_tuple(self, kind: type, args: list[Any], keywords: dict[str, Any]) -> Any:
        where, new = f"the constructor of {kind.__name__}", vars(kind)["__new__"].__func__
        self.guards.read((id(kind), "__new__"), where, held, kind, "__new__")
        self.guards.read((id(new), "*code"), where, getattr, new, "__code__")
        defaults = self.guards.read((id(new), "*defaults"), where, getattr, new, "__defaults__") or ()
        for value in defaults:
            self.outside(value)
        return self.made(kind(*args, **keywords))

    def _call_len(self, value: Any) -> int:
        if kind_of(value) in (*SEQUENCES, *DICTS) or is_structure(value):
            self._look_into(value)
            return len(value)
        if kind_of(value) in TENSOR_TYPES or type(value) is np.ndarray:
            return len(value)
        method = self._special(value, "__len__")
        if method is ABSENT:
            raise NotProvenError(f"reads the length of {name_of(value)}")
        found = self.call(method, [], {})
        if type(found) is not int:
            raise NotProvenError("has a length that is not an int")
        return found

    def _call_bool(self, value: Any = False) -> bool:
        return self.truth(value)

    def _call_isinstance(self, value: Any, kinds: Any) -> bool:
        if type(kinds) is types.UnionType:
            kinds = kinds.__args__
        return any(self._is_of(value, kind) for kind in (kinds if type(kinds) is tuple else (kinds,)))

    def _is_of(self, value: Any, kind: Any) -> bool:
        if is_a(value, *WRAPPERS) or not is_a(kind, type):
            raise NotProvenError("checks the type of a function")
        builtin = self._is_builtin(value)
        if not builtin:
            class_of(value, self.guards)
        if any(kind is base for base in mro_of(type(value))):
            return True
        if builtin and held(collections.abc, class_name(kind)) is kind:
            return isinstance(value, kind)
        if kind is nn.Parameter and "_is_param" not in getattr(value, "__dict__", {}):
            return False
        if type(kind) is not type and kind is not Tensor:
            raise NotProvenError(f"checks whether something is a {class_name(kind)}")
        return False

    def _call_getattr(self, value: Any, name: str, default: Any = NotProvenError) -> Any:
        if type(name) is not str:
            raise NotProvenError("reads an attribute with a name that is not a string")
        return self.attribute(value, name, default)

    def _call_hasattr(self, value: Any, name: str) -> bool:
        return self._call_getattr(value, name, ABSENT) is not ABSENT

    def _call_type(self, value: Any) -> type:
        if is_a(value, *WRAPPERS):
            raise NotProvenError("reads the type of a function")
        return type(value) if self._is_builtin(value) else class_of(value, self.guards)

    def _call_sum(self, values: Any, start: Any = 0) -> Any:
        return sum(map(self._number, self.iterate(values)), start)

    def _call_any(self, values: Any) -> bool:
        return any(map(self.truth, self.iterate(values)))

    def _call_all(self, values: Any) -> bool:
        return all(map(self.truth, self.iterate(values)))

    def _number(self, value: Any) -> Any:
        if not is_plain(value) and kind_of(value) not in TENSOR_TYPES:
            raise NotProvenError(f"adds {name_of(value)}")
        return value

    def _call_tuple(self, values: Any = ()) -> Any:
        return self.made(tuple(self.iterate(values)))

    def _call_list(self, values: Any = ()) -> Any:
        return self.made(list(self.iterate(values)))

    def _call_dict(self, **items: Any) -> Any:
        return self.made(items)

    def _call_iter(self, values: Any) -> Any:
        return self.made(self.iterate(values))

    def _call_enumerate(self, values: Any, start: int = 0) -> Any:
        return self.made(map(self.made, enumerate(self.iterate(values), start)))

    def _call_zip(self, *values: Any, strict: bool = False) -> Any:
        found = zip(*map(self.iterate, values), strict=strict)
        return self.made(map(self.made, found))

    def _call_map(self, function: Any, *values: Any) -> Any:
        found = map(lambda *args: self.call(function, list(args), {}), *map(self.iterate, values))
        return self.made(found)

    def _call_reversed(self, value: Any) -> Any:
        if kind_of(value) not in (list, tuple, range):
            method = self._special(value, "__reversed__")
            if method is not ABSENT:
                return self.call(method, [], {})
            if self._special(value, "__getitem__") is ABSENT:
                raise NotProvenError(f"iterates backward over {name_of(value)}")
            places = range(self._call_len(value) - 1, -1, -1)
            return self.made(self.item(value, place) for place in places)
        self._look_into(value)
        return self.made(reversed(value))

    def _call_islice(self, values: Any, *limits: Any) -> Any:
        if not all(map(is_plain, limits)):
            raise NotProvenError("slices with bounds that are not plain data")
        return self.made(itertools.islice(self.iterate(values), *limits))

    def _call_next(self, iterator: Any) -> Any:
        if id(iterator) not in self._made:
            raise NotProvenError("advances an iterator from before the step")
        return next(iterator)

    # Modules.

    def _call_module(self, module: nn.Module, args: list[Any], keywords: dict[str, Any]) -> Any:
        if id(module) in self._known or reason_against_module(module) is None:
            if id(module) not in self._known:
                self._known[id(module)] = module
                guard_module(module, self.guards)
                self._check_tensors(module)
            return self._run(module, args, keywords)
        kind = hook_on(module)
        if kind is not None:
            raise NotProvenError(f"calls {name_of(module)}, which has {kind}")
        cls = class_of(module, self.guards)
        for name in HOOKS:
            self._look_into(own_attribute(module, name, self.guards))
        for name in (*_CALLED, "forward"):
            if own_attribute(module, name, self.guards) is not ABSENT:
                raise NotProvenError(f"calls {name_of(module)}, where {name} was replaced")
        for name in _CALLED:
            if class_attribute(cls, name, self.guards) is not vars(nn.Module).get(name):
                raise NotProvenError(f"calls {name_of(module)}, which has a custom {name}")
        if own_attribute(module, "_compiled_call_impl", self.guards) not in (None, ABSENT):
            raise NotProvenError(f"calls {name_of(module)}, which is compiled (torch.compile)")
        return self._forward(module, args, keywords)

    def _forward(self, module: nn.Module, args: list[Any], keywords: dict[str, Any]) -> Any:
        return self.call(self.attribute(module, "forward"), args, keywords)

    def _check_tensors(self, module: nn.Module) -> None:
        for _, each in own_modules(module):
            for tensor in (*each._parameters.values(), *each._buffers.values()):
                self.outside(tensor)

    def _walk(self, bound: Bound, args: list[Any], keywords: dict[str, Any]) -> Any:
        """Go through the parameters or submodules of a module, as torch does."""
        if not all(map(is_plain, (*args, *keywords.values()))):
            raise NotProvenError("iterates over a module's parameters in a custom way")
        for _, each in own_modules(bound.owner):
            cls = class_of(each, self.guards)
            for name in (*_WALKS, *_WALKED):
                usual = class_attribute(cls, name, self.guards) is vars(nn.Module).get(name)
                if not usual or own_attribute(each, name, self.guards) is not ABSENT:
                    raise NotProvenError(f"iterates over {name_of(each)}, which has a custom {name}")
            for kind in ("_parameters", "_buffers", "_modules"):
                self._look_into(own_attribute(each, kind, self.guards))
        return self.made(iter(list(bound.function(bound.owner, *args, **keywords))))


_KNOWN_BUILTINS: dict[str, Any] = {
    each.__name__: each
    for each in (
        *(len, bool, isinstance, getattr, hasattr, type, sum, any, all, tuple, list, dict),
        *(iter, enumerate, zip, map, reversed, next, itertools.islice),
    )
}


def _in(value: Any, known: frozenset[Any]) -> bool:
    """Tell whether a value is one of a set, by identity: a user's object may compare as it likes."""
    return kind_of(value) in (types.BuiltinFunctionType, type) and value in known


def _collect(values: Any, found: set[int]) -> None:
    """Collect the ids of containers and of those within them."""
    for value in values.values() if is_a(values, dict) else values:
        if is_a(value, tuple, list, dict) and id(value) not in found:
            found.add(id(value))
            _collect(value, found)
