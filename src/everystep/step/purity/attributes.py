"""Looks up attributes as Python does, without running anything: no property, descriptor or hook."""

from __future__ import annotations

import functools
import types
from abc import ABCMeta
from collections import OrderedDict
from typing import Any

from torch import nn

from everystep.step.purity.guards import (
    ABSENT,
    Guards,
    class_dict,
    class_name,
    held,
    is_a,
    mro_of,
)

__all__ = [
    "NotProvenError",
    "attribute_of",
    "check_class",
    "class_attribute",
    "class_of",
    "instance_dict",
    "name_of",
    "own_attribute",
]

_METACLASSES = (type, ABCMeta)
_NO_INSTANCE_DICT = object()
#: A flag of classes that are written in Python; others may do anything.
_HEAP_TYPE = 1 << 9


class NotProvenError(Exception):
    """Python that a program may not stand in for; the message gives the reason."""


def class_of(value: Any, guards: Guards) -> type:
    """Return the class of an object; its attributes must be looked up in the usual way."""
    cls = type(value)
    guards.read((id(value), "*class"), f"the class of {name_of(value)}", type, value)
    check_class(cls, guards)
    return cls


def check_class(cls: type, guards: Guards) -> None:
    """Check that attributes of a class's objects are looked up in the usual way.

    Raises:
        NotProvenError: they are not.
    """
    if not any(type(cls) is known for known in _METACLASSES):
        raise NotProvenError(f"the class {class_name(cls)} has a custom metaclass")
    if not cls.__flags__ & _HEAP_TYPE and cls is not types.SimpleNamespace:
        raise NotProvenError(f"uses a {cls.__name__}")
    guards.read((id(cls), "*mro"), f"the bases of {cls.__name__}", getattr, cls, "__mro__")
    for name, usual in (("__getattribute__", object.__getattribute__), ("__class__", None)):
        for base in cls.__mro__[:-1]:
            if base is types.SimpleNamespace:
                continue
            if not any(type(base) is known for known in _METACLASSES):
                raise NotProvenError(f"the class {base.__name__} has a custom metaclass")
            found = _class_item(base, name, guards)
            if found is not ABSENT and found is not usual:
                raise NotProvenError(f"the class {base.__name__} has a custom {name}")


def class_attribute(cls: type, name: str, guards: Guards, after: type | None = None) -> Any:
    """Return what the classes of a class hold under a name, unbound, or ABSENT.

    after: only bases behind this one, as `super()` does.
    """
    bases = cls.__mro__
    for base in bases if after is None else bases[bases.index(after) + 1 :]:
        found = _class_item(base, name, guards)
        if found is not ABSENT:
            return found
    return ABSENT


def attribute_of(value: Any, name: str, guards: Guards) -> tuple[Any, Any]:
    """Look up an attribute of an object.

    Returns what the object itself holds, and what its classes hold, as `(own, of_class)`; either is
    ABSENT if the other takes precedence, or if there is nothing.
    """
    cls = class_of(value, guards)
    of_class = class_attribute(cls, name, guards)
    if of_class is not ABSENT and _is_data_descriptor(of_class):
        return ABSENT, of_class
    own = own_attribute(value, name, guards)
    if own is not ABSENT:
        return own, ABSENT
    if of_class is ABSENT and is_a(value, nn.Module):
        getter = class_attribute(cls, "__getattr__", guards)
        if getter is not nn.Module.__getattr__:
            raise NotProvenError(f"{name_of(value)} has a custom __getattr__")
        return _registered(value, name, guards), ABSENT
    if of_class is ABSENT and class_attribute(cls, "__getattr__", guards) is not ABSENT:
        raise NotProvenError(f"{name_of(value)} has a custom __getattr__")
    return ABSENT, of_class


def own_attribute(value: Any, name: str, guards: Guards) -> Any:
    """Return what an object itself holds under a name, or ABSENT."""
    if instance_dict(value) is None:
        return ABSENT
    return guards.read((id(value), name), f"{name} of {name_of(value)}", _own, value, name)


def _own(value: Any, name: str) -> Any:
    # The dict may be exchanged for another, so it is looked up again, too.
    return (instance_dict(value) or {}).get(name, ABSENT)


def instance_dict(value: Any) -> dict[str, Any] | None:
    """Return an object's dict without asking the object, or None if it has none.

    Raises:
        NotProvenError: its class has a custom `__dict__`.
    """
    for base in mro_of(type(value)):
        descriptor = class_dict(base).get("__dict__", _NO_INSTANCE_DICT)
        if descriptor is _NO_INSTANCE_DICT:
            continue
        kind = type(descriptor)
        if kind is not types.GetSetDescriptorType and kind is not types.MemberDescriptorType:
            raise NotProvenError(f"the class {base.__name__} has a custom __dict__")
        found = descriptor.__get__(value, type(value))
        if type(found) is not dict:
            raise NotProvenError(f"the __dict__ of {name_of(value)} is not a plain dict")
        return found
    return None


def name_of(value: Any) -> str:
    """Return an object's name for people; asks nothing of the object."""
    if issubclass(type(value), type):
        return f"the class {class_name(value)}"
    return f"a {class_name(type(value))}"


def _class_item(base: type, name: str, guards: Guards) -> Any:
    where = f"{name} of the class {base.__name__}"
    return guards.read((id(base), name), where, held, base, name)


def _registered(module: nn.Module, name: str, guards: Guards) -> Any:
    """Return a parameter, buffer or submodule, as `nn.Module.__getattr__` does."""
    for kind in ("_parameters", "_buffers", "_modules"):
        held = own_attribute(module, kind, guards)
        if type(held) is not dict and type(held) is not OrderedDict:
            raise NotProvenError(f"{kind} of {name_of(module)} is not a plain dict")
        guards.contents(held, f"{kind} of {name_of(module)}")
        if name in held:
            return held[name]
    return ABSENT


def _is_data_descriptor(value: Any) -> bool:
    cls = type(value)
    if cls is types.FunctionType or cls is functools.cached_property:
        return False
    dicts = map(class_dict, mro_of(cls))
    return any("__set__" in each or "__delete__" in each for each in dicts)
