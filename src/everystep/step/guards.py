"""Guards: values that a step depends on, to compare after other code has run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
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
    "of_tensor",
    "same_value",
]

#: Types with immutable values, and a comparison that runs no user code.
PLAIN_TYPES: frozenset[type] = frozenset(
    {bool, int, float, complex, str, bytes, type(None), type(Ellipsis), range}
    | {torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format}
    | {np.bool_, np.uint8, np.int8, np.int16, np.int32, np.int64, np.float16, np.float32, np.float64}
)


class _Geometry(NamedTuple):
    """All of a tensor but its numbers."""

    kind: type
    dtype: torch.dtype
    shape: torch.Size
    device: torch.device
    lies: tuple[Any, ...]
    of_autograd: tuple[bool, ...]


class _Numbers(NamedTuple):
    """The numbers of a tensor. digest: None where only the count of their changes was read."""

    version: int
    digest: bytes | None


class Guards:
    """Conditions for a program to replace the Python that it was captured from.

    Args:
        read: yields all that they depend on, each time as it is now: the name in messages, and the
            value, or a dict or a list of values. Its argument: whether to read numbers of tensors.
    """

    def __init__(self, read: Callable[[bool], Iterator[tuple[str, Any]]]) -> None:
        self._read = read
        # They are held, so that no other object gets the id of one.
        self._known = [*read(True)]

    def difference(self, *, is_thorough: bool = True) -> str | None:
        """Describe what changed, or return None.

        is_thorough: compare the values of tensors that are not state, and not only their versions.
        """
        now = [*self._read(is_thorough)]
        for (where, before), (other, value) in zip(self._known, now, strict=False):
            change = f"{where} changes" if where != other else _change(where, before, value)
            if change is not None:
                return change
        return None if len(now) == len(self._known) else "what the training consists of changes"


def _change(where: str, before: Any, now: Any) -> str | None:
    if isinstance(before, _Geometry):
        is_same = now == before
        return None if is_same else f"shape, dtype, requires_grad or hooks of {where} change"
    if isinstance(before, _Numbers):
        is_same = now.version == before.version and now.digest in (None, before.digest)
        return None if is_same else f"the values of {where} change"
    if type(before) is dict:
        if len(now) == len(before) and all(map(same_value, now, before)):
            values = zip(before, before.values(), now.values(), strict=True)
            other = (key for key, one, two in values if not same_value(one, two))
            return next((f"{key} of {where} changes" for key in other), None)
        return f"the content of {where} changes"
    if type(before) is list:
        is_same = len(now) == len(before) and all(map(same_value, now, before))
    else:
        is_same = same_value(now, before)
    return None if is_same else f"{where} changes"


def of_tensor(tensor: Tensor, where: str, reads_numbers: bool | None = None) -> Iterator[Any]:
    """Yield what guards compare of a tensor. reads_numbers: None of state, which may change."""
    # A sparse tensor raises where it is asked for its strides.
    is_strided = tensor.layout == torch.strided
    hooks = tensor._backward_hooks or tensor._post_accumulate_grad_hooks
    lies = (tensor.stride(), int(tensor.storage_offset())) if is_strided else ()
    of_autograd = tensor.requires_grad, bool(hooks), has_graph(tensor)
    about = tensor.dtype, tensor.shape, tensor.device
    yield where, _Geometry(type(tensor), *about, lies, of_autograd)
    # Others have no numbers that can be read, or torch does not count their changes.
    is_known = is_dense(tensor) and not tensor.is_quantized and not tensor.is_inference()
    if reads_numbers is not None and is_known:
        yield where, _Numbers(tensor._version, _digest_of(tensor) if reads_numbers else None)


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
