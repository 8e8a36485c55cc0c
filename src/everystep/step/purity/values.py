"""Values: what a reader may do with the values of a step, as Python does it, or not at all.

A value comes from outside (it existed before the step), or the step made it. Whatever is read from an
outside object becomes a guard; only what the step made may be changed.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict, _tuplegetter  # type: ignore[attr-defined]
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from everystep.step.purity.attributes import (
    NotProvenError,
    attribute_of,
    check_class,
    class_attribute,
    class_of,
    name_of,
    own_attribute,
)
from everystep.step.purity.callables import (
    ATTRIBUTES,
    BINARY,
    COMPARE,
    METHODS,
    TENSOR_TYPES,
    UNARY,
    is_allowed_method,
)
from everystep.step.purity.guards import (
    ABSENT,
    Guards,
    class_dict,
    held,
    is_a,
    is_plain,
    kind_of,
    mro_of,
)
from everystep.step.purity.structures import is_structure
from everystep.step.purity.torchs_own import guard_module, is_torchs_function

__all__ = [
    "DICTS",
    "SEQUENCES",
    "WRAPPERS",
    "Bound",
    "Interpreted",
    "Method",
    "Read",
    "SuperOf",
    "Values",
]

SEQUENCES = (list, tuple, str, range, torch.Size)
DICTS = (dict, OrderedDict)
_VIEWS = tuple(map(type, ({}.keys(), {}.values(), {}.items())))
_ODICT_VIEWS = tuple(map(type, (OrderedDict().keys(), OrderedDict().values(), OrderedDict().items())))


class Bound(NamedTuple):
    """A function of Python with what it is called on."""

    function: types.FunctionType
    owner: Any


class SuperOf(NamedTuple):
    """The result of `super()`."""

    cls: type
    owner: Any


class Method(NamedTuple):
    """A method of a tensor, a text or a container with what it is called on."""

    name: str
    owner: Any


class Interpreted:
    """A function that the step itself has defined. call: of arguments and keywords."""

    def __init__(self, call: Callable[[list[Any], dict[str, Any]], Any]) -> None:
        self.call = call


class Read:
    """A number that Python read from a tensor: a step may return it, but not use it otherwise.

    value: the number; place: among the numbers of the step.
    """

    def __init__(self, value: Any, place: int) -> None:
        self.value = value
        self.place = place


class Values:
    """What may be done with values.

    Args:
        guards: collects what was read.
        is_state: tells whether a tensor belongs to the state of the training.
        interpret: calls a function of Python by reading it.
    """

    def __init__(
        self,
        guards: Guards,
        is_state: Callable[[Tensor], bool],
        interpret: Callable[[types.FunctionType, list[Any], dict[str, Any]], Any],
    ) -> None:
        self.guards = guards
        self._is_state = is_state
        self._interpret = interpret
        self._made: dict[int, Any] = {}
        self._of_batch: dict[int, Any] = {}
        self._known: dict[int, nn.Module] = {}

    # Where values come from.

    def made(self, value: Any) -> Any:
        """Note that the step made a container or an iterator; its content may be older."""
        self._made[id(value)] = value
        return value

    def outside(self, value: Any) -> Any:
        """Note a value from before the step."""
        if type(value) is np.ndarray:
            if value.dtype.hasobject:
                raise NotProvenError("reads an object array")
            self.guards.array(value, "an array")
        if not is_a(value, Tensor):
            return value
        if kind_of(value) not in TENSOR_TYPES:
            raise NotProvenError(f"reads a {type(value).__name__}, a tensor subclass")
        if value.layout != torch.strided:
            raise NotProvenError("reads a sparse tensor")
        if value.grad_fn is not None:
            raise NotProvenError("reads a tensor that was computed before the step, with its graph")
        if value._backward_hooks or getattr(value, "_post_accumulate_grad_hooks", None):
            raise NotProvenError("reads a tensor with a hook on its gradient")
        self.guards.tensor(value, "a tensor", is_state=self._is_state(value))
        return value

    def _look_into(self, container: Any) -> None:
        """Note the content of a container from outside, unless the step made it."""
        if id(container) in self._made or id(container) in self._of_batch:
            return
        if kind_of(container) in (str, range, torch.Size):
            return
        if kind_of(container) in (list, *DICTS):
            self.guards.contents(container, f"a {type(container).__name__}")
        items = container.values() if is_a(container, dict) else container
        for item in items:
            self.outside(item)

    def check_passed(self, value: Any) -> None:
        """Check that a value may be passed to a torch function, and note its content."""
        kind = kind_of(value)
        if is_plain(value) or kind in TENSOR_TYPES:
            return
        if kind is slice:
            for part in (value.start, value.stop, value.step):
                self.check_passed(part)
            return
        if kind not in (list, tuple, dict) and not is_structure(value):
            raise NotProvenError(f"passes {name_of(value)} to a function of torch")
        self._look_into(value)
        for item in value.values() if kind is dict else value:
            self.check_passed(item)

    # Attributes.

    def attribute(self, value: Any, name: str, default: Any = NotProvenError) -> Any:
        """Return an attribute; if there is none, the default."""
        found = self._attribute(value, name)
        if found is not ABSENT:
            return found
        if default is NotProvenError:
            raise NotProvenError(f"reads {name} of {name_of(value)}, which does not exist")
        return default

    def _attribute(self, value: Any, name: str) -> Any:
        kind = kind_of(value)
        if name == "__class__" and not is_a(value, *WRAPPERS):
            return class_of(value, self.guards) if not self._is_builtin(value) else kind
        if kind is types.FunctionType and name in ("__name__", "__module__"):
            return self.guards.read((id(value), name), f"{name} of a function", getattr, value, name)
        if name.startswith("__") and not (kind is type and name in ("__name__", "__qualname__")):
            raise NotProvenError(f"reads {name}")
        if kind in TENSOR_TYPES:
            return self._of_tensor(value, name)
        if name in ATTRIBUTES.get(kind, ()):
            return getattr(value, name)
        if name in METHODS.get(kind, ()):
            return Method(name, value)
        if kind is OrderedDict and name in METHODS[dict]:
            return Method(name, value)
        if is_structure(value) and is_a(class_dict(kind).get(name), *_FIELDS):
            found = getattr(value, name)
            return found if id(value) in self._made else self.outside(found)
        if kind is types.ModuleType:
            found = self.guards.read((id(value), name), f"{name} of {value.__name__}", held, value, name)
            if found is ABSENT:
                raise NotProvenError(f"reads {name} of a module that creates it on demand")
            return self.outside(found)
        if kind is SuperOf:
            cls = class_of(value.owner, self.guards)
            found = class_attribute(cls, name, self.guards, after=value.cls)
            return self._bound(found, value.owner, cls)
        if is_a(value, type):
            return self._of_class(value, name)
        if kind is types.FunctionType:
            where = f"{name} of the function {value.__name__}"
            return self.outside(self.guards.read((id(value), name), where, held, value, name))
        if self._is_builtin(value) or is_a(value, *WRAPPERS, *_NOT_LOOKED_INTO):
            raise NotProvenError(f"reads {name} of {name_of(value)}")
        own, of_class = attribute_of(value, name, self.guards)
        if own is not ABSENT:
            return self.outside(own)
        return self._bound(of_class, value, kind)

    def _of_tensor(self, tensor: Tensor, name: str) -> Any:
        if name in ATTRIBUTES[Tensor]:
            return getattr(tensor, name)
        if vars(tensor) or self.guards.knows(tensor):
            where = f"{name} of a tensor"
            own = self.guards.read((id(tensor), name), where, held, tensor, name)
            if own is not ABSENT:
                return self.outside(own)
        if not is_allowed_method(name):
            raise NotProvenError(f"calls Tensor.{name}, which is more than one operation")
        found: Any = ABSENT
        for base in type(tensor).__mro__[:-1]:
            found = self.guards.read((id(base), name), f"Tensor.{name}", held, base, name)
            if found is not ABSENT:
                break
        if not is_a(found, types.MethodDescriptorType) and not is_torchs_function(found):
            raise NotProvenError(f"calls Tensor.{name}, which was replaced")
        return Method(name, tensor)

    def _of_class(self, cls: type, name: str) -> Any:
        check_class(cls, self.guards)
        if name in ("__name__", "__qualname__"):
            return getattr(cls, name)
        found = class_attribute(cls, name, self.guards)
        if type(found) is classmethod:
            return self._function(found.__func__, cls)
        if type(found) is staticmethod:
            return self.outside(found.__func__)
        if found is not ABSENT and type(found) is not types.FunctionType and _has(found, "__get__"):
            raise NotProvenError(f"reads {name} of {name_of(cls)}, a descriptor")
        return self.outside(found)

    def _bound(self, found: Any, owner: Any, cls: type) -> Any:
        """Return an attribute of a class, bound to an object."""
        kind = kind_of(found)
        if kind is types.FunctionType:
            return Bound(found, owner)
        if kind is staticmethod:
            return self.outside(found.__func__)
        if kind is classmethod:
            return self._function(found.__func__, cls)
        if kind is property and type(found.fget) is types.FunctionType:
            return self.call(found.fget, [owner], {})
        if kind is types.MemberDescriptorType:
            where = f"{found.__name__} of {name_of(owner)}"
            return self.outside(
                self.guards.read((id(owner), found.__name__), where, _slot, found, owner)
            )
        if found is not ABSENT and _has(found, "__get__"):
            raise NotProvenError(f"reads a {kind.__name__} of {name_of(owner)}, a descriptor")
        return self.outside(found)

    def _function(self, function: Any, owner: Any) -> Bound:
        if type(function) is not types.FunctionType:
            raise NotProvenError(f"calls a {type(function).__name__}")
        return Bound(function, owner)

    def _special(self, value: Any, name: str) -> Any:
        """Return the method that Python itself looks up on an object's class, bound, or ABSENT."""
        if self._is_builtin(value) or is_a(value, *WRAPPERS, type):
            return ABSENT
        cls = class_of(value, self.guards)
        return self._bound(class_attribute(cls, name, self.guards), value, cls)

    def _is_builtin(self, value: Any) -> bool:
        kind = kind_of(value)
        return (
            is_plain(value)
            or kind in (list, tuple, set, frozenset, slice, *DICTS, *_VIEWS, *_ODICT_VIEWS)
            or kind in TENSOR_TYPES
            or kind is np.ndarray
            or is_structure(value)
            or kind in _NOT_LOOKED_INTO
        )

    def is_buffer(self, owner: Any, name: str) -> bool:
        """Tell whether an attribute is a buffer of a module: to set it to itself has no effect."""
        if not is_a(owner, nn.Module):
            return False
        cls = class_of(owner, self.guards)
        usual = class_attribute(cls, "__setattr__", self.guards) is nn.Module.__setattr__
        buffers = own_attribute(owner, "_buffers", self.guards)
        is_own = own_attribute(owner, name, self.guards) is not ABSENT
        of_class = class_attribute(cls, name, self.guards) is not ABSENT
        return usual and not is_own and not of_class and name in buffers

    def set_attribute(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute."""
        raise NotProvenError("sets an attribute, which outlives the step")

    # Truth, order, arithmetic.

    def truth(self, value: Any) -> bool:
        """Tell whether a value is true."""
        if is_a(value, Tensor):
            raise NotProvenError("branches on a number in a tensor")
        if is_plain(value):
            return bool(value)
        if kind_of(value) in (list, tuple, *DICTS):
            self._look_into(value)
            return len(value) > 0
        if is_a(value, *WRAPPERS, type, types.FunctionType, types.BuiltinFunctionType):
            return True
        for name in ("__bool__", "__len__"):
            method = self._special(value, name)
            if method is not ABSENT:
                return self.truth(self.call(method, [], {}))
        if self._is_builtin(value):
            raise NotProvenError(f"checks whether {name_of(value)} is true")
        return True

    def unary(self, operator: str, value: Any) -> Any:
        """Apply an operator of one operand."""
        if operator == "Not":
            return not self.truth(value)
        if not is_plain(value) and kind_of(value) not in TENSOR_TYPES:
            raise NotProvenError(f"computes with {name_of(value)}")
        return UNARY[operator](value)

    def binary(self, operator: str, one: Any, two: Any) -> Any:
        """Apply an operator of two operands."""
        kinds = {kind_of(one), kind_of(two)}
        if kinds <= {list} or (operator == "Mult" and kinds <= {list, int}):
            for each in (one, two):
                if type(each) is list:
                    self._look_into(each)
            return self.made(BINARY[operator](one, two))
        if kinds == {tuple} and operator == "Add":
            self._look_into(one)
            self._look_into(two)
            return self.made(one + two)
        if operator == "BitOr" and all(is_a(each, type, types.UnionType) for each in (one, two)):
            return one | two
        numbers = all(kind_of(each) in TENSOR_TYPES or is_plain(each) for each in (one, two))
        if not numbers or (kinds & TENSOR_TYPES and not kinds <= _WITH_TENSORS):
            raise NotProvenError(f"computes with {name_of(one)} and {name_of(two)}")
        return BINARY[operator](one, two)

    def in_place(self, operator: str, one: Any, two: Any) -> Any:
        """Apply an operator that may change its first operand."""
        if type(one) is list:
            if operator != "Add" or id(one) not in self._made:
                raise NotProvenError("changes a list from before the step")
            one.extend(self.iterate(two))
            return one
        if kind_of(one) in TENSOR_TYPES:
            method = f"__i{_IN_PLACE[operator]}__" if operator in _IN_PLACE else ""
            if method and hasattr(Tensor, method) and kind_of(two) in _WITH_TENSORS:
                return getattr(one, method)(two)
        return self.binary(operator, one, two)

    def compare(self, operator: str, one: Any, two: Any) -> Any:
        """Compare two values."""
        if operator in ("Is", "IsNot"):
            return self._is_same(one, two) == (operator == "Is")
        if operator in ("In", "NotIn"):
            return self._is_in(one, two) == (operator == "In")
        if is_plain(one) and is_plain(two):
            return COMPARE[operator](one, two)
        kinds = {kind_of(one), kind_of(two)}
        if kinds & TENSOR_TYPES and kinds <= _WITH_TENSORS:
            return COMPARE[operator](one, two)
        if all(kind_of(each) in (list, tuple) for each in (one, two)):
            self._look_into(one)
            self._look_into(two)
            if is_plain(tuple(one)) and is_plain(tuple(two)):
                return COMPARE[operator](one, two)
        if is_a(one, type) and is_a(two, type) and operator in ("Eq", "NotEq"):
            return (one is two) == (operator == "Eq")
        raise NotProvenError(f"compares {name_of(one)} with {name_of(two)}")

    def _is_same(self, one: Any, two: Any) -> bool:
        single = (type(None), bool, type(Ellipsis), torch.dtype)
        if kind_of(one) in single or kind_of(two) in single:
            return one is two
        if is_plain(one) or is_plain(two) or is_a(one, *WRAPPERS) or is_a(two, *WRAPPERS):
            raise NotProvenError("checks whether two values are the same object")
        return one is two

    def _is_in(self, one: Any, container: Any) -> bool:
        if is_plain(one) and kind_of(container) in (str, range, torch.Size):
            return one in container
        if is_plain(one) and kind_of(container) in (list, tuple, *DICTS):
            self._look_into(container)
            if is_plain(tuple(container)):
                return one in container
        method = self._special(container, "__contains__")
        if method is ABSENT:
            raise NotProvenError(f"checks what is in {name_of(container)}")
        return self.truth(self.call(method, [one], {}))

    # Containers.

    def iterate(self, value: Any) -> Iterator[Any]:
        """Return an iterator of the items, as Python's own."""
        kind = kind_of(value)
        if kind in (*SEQUENCES, *DICTS) or is_structure(value):
            self._look_into(value)
            return iter(value)
        if id(value) in self._made and (kind in (*_VIEWS, *_ODICT_VIEWS) or hasattr(kind, "__next__")):
            return map(self.made, value) if kind in (_VIEWS[-1], _ODICT_VIEWS[-1]) else iter(value)
        if kind in TENSOR_TYPES:
            return iter(value.unbind(0))
        method = self._special(value, "__iter__")
        if method is ABSENT:
            raise NotProvenError(f"iterates over {name_of(value)}")
        return self.iterate(self.call(method, [], {}))

    def item(self, value: Any, index: Any) -> Any:
        """Return an item, a slice or a part of a tensor."""
        kind = kind_of(value)
        if kind in TENSOR_TYPES:
            self.check_passed(index)
            return value[index]
        if kind is np.ndarray and is_plain(index):
            return value[index]
        if (kind in SEQUENCES or is_structure(value)) and kind_of(index) in (int, bool, slice):
            self._look_into(value)
            found = value[index]
            return self.made(found) if type(index) is slice else found
        if kind in DICTS and is_plain(index):
            self._look_into(value)
            return value[index]
        if kind in (nn.ModuleList, nn.Sequential) and type(index) is slice and is_plain(index):
            guard_module(value, self.guards)
            return value[index]
        method = self._special(value, "__getitem__")
        if method is ABSENT:
            raise NotProvenError(f"indexes {name_of(value)}")
        return self.call(method, [index], {})

    def set_item(self, value: Any, index: Any, item: Any) -> None:
        """Set an item of a container that the step made, or a part of a tensor."""
        if kind_of(value) in TENSOR_TYPES:
            self.check_passed(index)
            self.check_passed(item)
            value[index] = item
        elif kind_of(value) in (list, dict) and id(value) in self._made and is_plain(index):
            if type(index) is slice or (type(value) is list and type(index) is not int):
                raise NotProvenError("assigns to a slice of a list")
            value[index] = item
        else:
            raise NotProvenError(f"changes {name_of(value)} from before the step")

    def call(self, function: Any, args: list[Any], keywords: dict[str, Any]) -> Any:
        """Call something; see `Calls`."""
        raise NotImplementedError


#: What tensors may be computed with.
_WITH_TENSORS = TENSOR_TYPES | {int, float, bool, complex}
WRAPPERS = (Bound, SuperOf, Method, Interpreted, Read)
_NOT_LOOKED_INTO = (
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.GeneratorType),
    *(types.ModuleType, functools.partial, property, staticmethod, classmethod),
)
_FIELDS = (types.MemberDescriptorType, _tuplegetter)
_IN_PLACE = {"Add": "add", "Sub": "sub", "Mult": "mul", "Div": "truediv", "Pow": "pow", "Mod": "mod"}
_IN_PLACE |= {"FloorDiv": "floordiv", "BitAnd": "and", "BitOr": "or", "BitXor": "xor"}


def _has(value: Any, name: str) -> bool:
    return any(name in class_dict(base) for base in mro_of(type(value)))


def _slot(descriptor: Any, owner: Any) -> Any:
    try:
        return descriptor.__get__(owner, type(owner))
    except AttributeError:
        return ABSENT
