"""Guards: values that a step depends on, to compare after other code has run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
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
    "is_plain",
    "of_constant",
    "same_value",
]

#: Types with immutable values, and a comparison that runs no user code.
PLAIN_TYPES: frozenset[type] = frozenset(
    {bool, int, float, complex, str, bytes, type(None), type(Ellipsis), range}
    | {torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format}
    | {np.bool_, np.uint8, np.int8, np.int16, np.int32, np.int64, np.float16, np.float32, np.float64}
)


class _NumbersOf(NamedTuple):
    """Stands for the numbers of a tensor; the tensor itself, for all else of it."""

    tensor: Tensor


class _Contents(NamedTuple):
    """The contents of a dict at one time."""

    keys: list[Any]
    values: list[Any]


class Guards:
    """Conditions for a program to replace the Python that it was captured from.

    Args:
        parts: all that they depend on: its name in messages, and where it is found: a dict, a list, a
            tensor, its numbers, or a `partial` that returns a value, or a list or dict of values.
    """

    def __init__(self, parts: Iterable[tuple[str, Any]]) -> None:
        self._known = [(where, place, _found_in(place)) for where, place in parts]

    def difference(self, *, is_thorough: bool = True) -> str | None:
        """Describe what changed, or return None.

        is_thorough: compare the values of tensors that are not state, and not only their versions.
        """
        for where, place, before in self._known:
            now = _found_in(place, is_thorough)
            # Most are the same object again, which needs no look at its content.
            if now is not before and (change := _change(where, place, before, now)) is not None:
                return change
        return None


def _found_in(place: Any, is_thorough: bool = True) -> Any:
    """Return what is in a place now, comparable."""
    is_read = type(place) is partial
    found = place() if is_read else place
    if isinstance(found, dict):
        return _Contents([*found], [*found.values()])
    if is_read:
        return found
    if isinstance(place, Tensor):
        return _geometry_of(place)
    if isinstance(place, _NumbersOf):
        return place.tensor._version, _digest_of(place.tensor) if is_thorough else None
    return [*place]


def _change(where: str, place: Any, before: Any, now: Any) -> str | None:
    if isinstance(place, Tensor):
        change = f"shape, dtype, requires_grad or hooks of {where} change"
        return None if now == before else change
    if isinstance(place, _NumbersOf):
        is_same = now[0] == before[0] and now[1] in (None, before[1])
        return None if is_same else f"the values of {where} change"
    if isinstance(before, _Contents):
        if not _are_same(now.keys, before.keys):
            return f"the content of {where} changes"
        if _are_same(now.values, before.values):
            return None
        pairs = zip(now.keys, now.values, before.values, strict=True)
        key = next(key for key, *pair in pairs if not same_value(*pair))
        return f"{key} of {where} changes"
    is_same = _are_same(now, before) if type(now) is list else same_value(now, before)
    return None if is_same else f"{where} changes"


def _are_same(now: list[Any], before: list[Any]) -> bool:
    # By identity first: that is fast, and there are some thousand functions of torch.
    is_alike = len(now) == len(before)
    return is_alike and (all(map(is_, now, before)) or all(map(same_value, now, before)))


def of_constant(tensor: Tensor, where: str) -> Iterator[tuple[str, Any]]:
    """Yield what guards compare of a tensor with numbers that stay."""
    # Others have no numbers that can be read, or torch does not count their changes.
    if is_dense(tensor) and not tensor.is_quantized and not tensor.is_inference():
        yield from ((where, tensor), (where, _NumbersOf(tensor)))


def _geometry_of(tensor: Tensor) -> tuple[Any, ...]:
    """Return all of a tensor but its numbers."""
    # A sparse tensor raises where it is asked for its strides.
    is_strided = tensor.layout == torch.strided
    hooks = tensor._backward_hooks or tensor._post_accumulate_grad_hooks
    lies = (tensor.stride(), int(tensor.storage_offset())) if is_strided else ()
    of_autograd = tensor.requires_grad, bool(hooks), has_graph(tensor)
    return type(tensor), tensor.dtype, tensor.shape, tensor.device, lies, of_autograd


def _digest_of(tensor: Tensor) -> bytes:
    with _disable_current_modes():  # a recorder in force must see operations of the step alone
        array = np.ascontiguousarray(as_integers(tensor).cpu().numpy())
        return hashlib.blake2b(array.view(np.uint8).data, digest_size=16).digest()


def is_plain(value: Any) -> bool:
    """Return whether a value is a number, a string or similar, or a tuple or slice of these."""
    kind = type(value)
    if kind is tuple:
        return all(map(is_plain, value))
    if kind is slice:
        return is_plain(value.start) and is_plain(value.stop) and is_plain(value.step)
    return kind in PLAIN_TYPES


def same_value(one: Any, two: Any) -> bool:
    """Return whether two values are one object, or equal plain values (0.0 is not -0.0, nor 1 True)."""
    if one is two:
        return True
    if type(one) is str and type(two) is str:
        return one == two
    # As texts, -0.0 differs from 0.0, and NaN equals NaN.
    return type(one) is type(two) and is_plain(one) and is_plain(two) and repr(one) == repr(two)
