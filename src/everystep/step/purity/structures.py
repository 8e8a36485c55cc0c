"""Named tuples of torch and of `namedtuple`: unpacking them runs no user code."""

from __future__ import annotations

import functools
import types
from collections import _tuplegetter, namedtuple  # type: ignore[attr-defined]
from typing import Any

import torch

from everystep.step.purity.guards import is_a, is_plain, kind_of

__all__ = ["is_named_tuple", "is_structure"]


def is_structure(value: Any) -> bool:
    """Tell whether a value is a tuple with names: of torch, or as `namedtuple` makes them."""
    kind = kind_of(value)
    if kind.__module__ == "torch.return_types":
        return getattr(torch.return_types, kind.__name__, None) is kind
    return is_a(value, tuple) and is_named_tuple(kind)


def is_named_tuple(kind: type) -> bool:
    """Tell whether `collections.namedtuple` made a class, without additions."""
    return type(kind) is type and kind.__mro__ == (kind, tuple, object) and _is_as_made(kind)


@functools.cache
def _is_as_made(kind: type) -> bool:
    fields, made = vars(kind).get("_fields"), vars(kind).get("__new__")
    new = made.__func__ if type(made) is staticmethod else None
    if type(fields) is not tuple or not is_plain(fields) or type(new) is not types.FunctionType:
        return False
    try:
        usual = namedtuple("Usual", fields).__new__.__code__
    except (ValueError, TypeError):
        return False
    code = new.__code__
    return (
        new.__globals__.get("_tuple_new") is tuple.__new__
        and (code.co_code, code.co_names, code.co_varnames)
        == (usual.co_code, usual.co_names, usual.co_varnames)
        and all(type(vars(kind).get(name)) is _tuplegetter for name in fields)
    )
