"""Guards: values that a step depends on, to compare after other code has run."""

from __future__ import annotations

import hashlib
from abc import ABCMeta
from collections.abc import Callable
from functools import partial
from operator import is_
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from everystep.step.kept_values import has_graph, is_dense
from everystep.step.state import as_integers

__all__ = [
    "PLAIN_TYPES",
    "Guards",
    "is_a",
    "is_plain",
    "kind_of",
    "same_value",
]

#: Types with immutable values, and a comparison that runs no user code.
PLAIN_TYPES: frozenset[type] = frozenset(
    {bool, int, float, complex, str, bytes, type(None), type(Ellipsis), range}
    | {torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format}
    | {np.bool_, np.uint8, np.int8, np.int16, np.int32, np.int64, np.float16, np.float32, np.float64}
)
#: Metaclasses with default attribute access and comparison by identity.
_METACLASSES = (type, ABCMeta, type(Tensor), type(torch.nn.Parameter))


class _Guard(NamedTuple):
    """A value that must not change. where: its name in messages; read: reads it; value: as noted."""

    where: str
    read: Callable[[], Any]
    value: Any


class Guards:
    """Conditions for a program to replace the Python that it was captured from."""

    def __init__(self) -> None:
        #: By what describes a change, and by their place, in the order in which they are compared.
        self._known: dict[Any, dict[Any, _Guard]] = {
            changes: {} for changes in (_contents_change, _value_changes, _geometry_changes)
        }
        self._tensors: list[tuple[str, Tensor, int, bytes]] = []

    def read(self, key: Any, where: str, again: Callable[..., Any], *given: Any) -> None:
        """Note a value, or a list of values, that `again(*given)` reads; key: of its place."""
        self._note(key, where, partial(again, *given), _value_changes)

    def contents(self, container: Any, where: str) -> None:
        """Note the contents of a dict or a list, or of one that `container` returns each time."""
        self._note(
            (id(container), "*contents"), where, partial(_contents_of, container), _contents_change
        )

    def tensor(self, tensor: Tensor, where: str, *, is_state: bool) -> None:
        """Note a tensor: its geometry, and its numbers unless they are state, which may change."""
        if not is_state:
            # Others have no numbers that can be read, or torch does not count their changes.
            if not is_dense(tensor) or tensor.is_quantized or tensor.is_inference():
                return
            self._tensors.append((where, tensor, tensor._version, _digest_of(tensor)))
        self._note(id(tensor), where, partial(_geometry_of, tensor), _geometry_changes)

    def _note(self, key: Any, where: str, read: Callable[[], Any], changes: Any) -> None:
        known = self._known[changes]
        if key not in known:
            known[key] = _Guard(where, read, read())

    def difference(self, *, is_thorough: bool = True) -> str | None:
        """Describe what changed, or return None.

        is_thorough: compare the values of tensors that are not state, and not only their versions.
        """
        for changes, known in self._known.items():
            for guard in known.values():
                # Most reads return the same object again, which needs no look at its content.
                now = guard.read()
                found = None if now is guard.value else changes(guard, now)
                if found is not None:
                    return str(found)
        for where, tensor, version, digest in self._tensors:
            if tensor._version != version or (is_thorough and _digest_of(tensor) != digest):
                return f"the values of {where} change"
        return None


def _value_changes(guard: _Guard, now: Any) -> str | None:
    before = guard.value
    if type(now) is list and len(now) == len(before) and all(map(same_value, now, before)):
        return None
    return None if same_value(now, before) else f"{guard.where} changes"


def _contents_of(container: Any) -> tuple[list[Any], list[Any]]:
    """Return the keys and the values of a dict, or the items of a list."""
    container = container() if callable(container) else container
    if isinstance(container, dict):
        return [*container], [*container.values()]
    return [], [*container]


def _contents_change(guard: _Guard, now: Any) -> str | None:
    (old_keys, old), (keys, values) = guard.value, now
    # By identity: that is fast, and runs no user code.
    if len(values) == len(old) and all(map(is_, keys, old_keys)) and all(map(is_, values, old)):
        return None
    if len(values) != len(old) or not all(map(same_value, keys, old_keys)):
        return f"the content of {guard.where} changes"
    for place, (value, before) in enumerate(zip(values, old, strict=True)):
        if not same_value(value, before):
            return f"{keys[place]} of {guard.where} changes" if keys else f"{guard.where} changes"
    return None


def _geometry_of(tensor: Tensor) -> tuple[Any, ...]:
    """Return all of a tensor but its numbers."""
    # A sparse tensor raises where it is asked for its strides.
    is_strided = tensor.layout == torch.strided
    hooks = tensor._backward_hooks or tensor._post_accumulate_grad_hooks
    lies = (tensor.stride(), int(tensor.storage_offset())) if is_strided else ()
    of_autograd = tensor.requires_grad, bool(hooks), has_graph(tensor)
    return type(tensor), tensor.dtype, tensor.shape, tensor.device, lies, of_autograd


def _geometry_changes(guard: _Guard, now: Any) -> str | None:
    if now == guard.value:
        return None
    return f"shape, dtype, requires_grad or hooks of {guard.where} change"


def _digest_of(tensor: Tensor) -> bytes:
    with _disable_current_modes():  # a recorder in force must see operations of the step alone
        array = np.ascontiguousarray(as_integers(tensor).cpu().numpy())
        return hashlib.blake2b(array.view(np.uint8).data, digest_size=16).digest()


def is_plain(value: Any) -> bool:
    """Return whether a value is a number, a string or similar, or a tuple or slice of these."""
    kind = kind_of(value)
    if kind is tuple:
        return all(map(is_plain, value))
    if kind is slice:
        return is_plain(value.start) and is_plain(value.stop) and is_plain(value.step)
    return kind in PLAIN_TYPES


def kind_of(value: Any) -> type:
    """Return the class of a value, or `object` if hashing the class may run user code."""
    # `value in PLAIN_TYPES` hashes the class, by a method of its metaclass.
    cls = type(value)
    own = type(cls)
    return cls if own is type or any(own is known for known in _METACLASSES) else object


def is_a(value: Any, *kinds: type) -> bool:
    """Return whether a value is of a class; `isinstance` would also ask the value itself."""
    return issubclass(kind_of(value), kinds)


def same_value(one: Any, two: Any) -> bool:
    """Return whether two values are one object, or equal plain values (0.0 is not -0.0, nor 1 True)."""
    if one is two:
        return True
    if type(one) is str and type(two) is str:
        return one == two
    # As texts, -0.0 differs from 0.0, and NaN equals NaN.
    return type(one) is type(two) and is_plain(one) and is_plain(two) and repr(one) == repr(two)
