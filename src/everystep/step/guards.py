"""Guards: values that a step depends on, to compare after other code has run."""

from __future__ import annotations

import hashlib
from abc import ABCMeta
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from everystep.step.check import as_integers, same_bits

__all__ = [
    "ABSENT",
    "PLAIN_TYPES",
    "Guards",
    "class_dict",
    "class_name",
    "has_comparable_numbers",
    "held",
    "is_a",
    "is_plain",
    "kind_of",
    "same_value",
]

#: Types with values that never change, and with a comparison that runs no user code.
PLAIN_TYPES: frozenset[type] = frozenset(
    {bool, int, float, complex, str, bytes, type(None), type(Ellipsis), range}
    | {torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format}
    | {np.bool_, np.uint8, np.int8, np.int16, np.int32, np.int64, np.float16, np.float32, np.float64}
)
#: Bytes up to which the numbers of a tensor are copied to be compared; of larger ones, a digest.
COPIED_BYTES = 1_000_000


#: Classes of classes that are known to look nothing up and to compare by identity.
_METACLASSES = (type, ABCMeta, type(Tensor), type(torch.nn.Parameter))


class Unknown:
    """Represents a class with a custom metaclass."""


class _Absent:
    """Represents a name that does not exist."""


ABSENT = _Absent()


class _Read(NamedTuple):
    """A value that was read. where: its name in messages; again: reads it once more."""

    where: str
    again: Callable[[], Any]
    value: Any


class _Contents(NamedTuple):
    """What a dict or a list held."""

    where: str
    container: Any
    keys: list[Any]
    values: list[Any]


class _Geometry(NamedTuple):
    """All of a tensor but its numbers. hooks: whether it has any."""

    kind: type
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    device: torch.device
    requires_grad: bool
    hooks: bool
    has_graph: bool

    @classmethod
    def of(cls, tensor: Tensor) -> _Geometry:
        """Return the current geometry of a tensor."""
        hooks = tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None)
        return cls(
            type(tensor),
            tensor.dtype,
            tensor.shape,
            tensor.stride() if tensor.layout == torch.strided else (),
            int(tensor.storage_offset()) if tensor.layout == torch.strided else 0,
            tensor.device,
            tensor.requires_grad,
            bool(hooks),
            tensor.grad_fn is not None,
        )


class Guards:
    """What must still hold for a program to stand in for the Python that it was captured from."""

    def __init__(self) -> None:
        self._reads: dict[Any, _Read] = {}
        self._contents: dict[int, _Contents] = {}
        self._tensors: dict[int, tuple[str, Tensor, _Geometry, Tensor | bytes | None]] = {}
        self._versions: dict[int, int] = {}
        self._flat: tuple[list[Any], list[Any], list[int]] | None = None

    def read(self, key: Any, where: str, again: Callable[..., Any], *given: Any) -> Any:
        """Read a value by `again(*given)`, and note it under a key for its place."""
        if key not in self._reads:
            self._reads[key] = _Read(where, partial(again, *given), again(*given))
        return self._reads[key].value

    def contents(self, container: Any, where: str) -> None:
        """Note what a dict or a list holds: which objects, in which order."""
        if id(container) not in self._contents:
            self._contents[id(container)] = _Contents(where, container, *_keys_and_values(container))
            self._flat = None

    def tensor(self, tensor: Tensor, where: str, *, is_state: bool) -> None:
        """Note a tensor: its geometry, and its numbers unless they are state, which may change."""
        if id(tensor) not in self._tensors:
            numbers = None if is_state else _numbers_of(tensor)
            self._tensors[id(tensor)] = where, tensor, _Geometry.of(tensor), numbers
            self._versions[id(tensor)] = tensor._version

    def difference(self, *, is_thorough: bool = True) -> str | None:
        """Return in words what changed, or None.

        is_thorough: compare the values of tensors that are not state, and not only their versions.
        """
        return next(self._differences(is_thorough), None)

    def _differences(self, is_thorough: bool) -> Iterator[str]:
        if not self._same_contents():
            for each in self._contents.values():
                yield from _changes(each)
            self._renew()
        for read in self._reads.values():
            now = read.again()
            if now is not read.value and not same_value(now, read.value):
                yield f"{read.where} changes"
        for where, tensor, geometry, numbers in self._tensors.values():
            if _Geometry.of(tensor) != geometry:
                yield f"shape, dtype, requires_grad or hooks of {where} change"
            elif numbers is None:
                continue
            elif tensor._version != self._versions[id(tensor)] or (
                is_thorough and not _same_numbers(tensor, numbers)
            ):
                yield f"the values of {where} change"

    def _same_contents(self) -> bool:
        """Compare all contents at once, by identity: that is fast, and runs no user code."""
        if self._flat is None:
            each = self._contents.values()
            self._flat = (
                list(chain.from_iterable(contents.keys for contents in each)),
                list(chain.from_iterable(contents.values for contents in each)),
                [len(contents.values) for contents in each],
            )
        keys, values, lengths = self._flat
        containers = [contents.container for contents in self._contents.values()]
        if list(map(len, containers)) != lengths:
            return False
        now = chain.from_iterable(c.values() if isinstance(c, dict) else c for c in containers)
        names = chain.from_iterable(c for c in containers if isinstance(c, dict))
        return all(map(is_, now, values)) and all(map(is_, names, keys))

    def _renew(self) -> None:
        """Replace noted values by equal current ones, so that the next comparison is fast again."""
        for place, old in self._contents.items():
            keys, values = _keys_and_values(old.container)
            self._contents[place] = old._replace(keys=keys, values=values)
        self._flat = None


def has_comparable_numbers(tensor: Tensor) -> bool:
    """Tell whether the numbers of a tensor can be noted: it is dense, and has memory that is counted."""
    is_dense = tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_quantized
    return is_dense and tensor.device.type != "meta" and not tensor.is_inference()


def _numbers_of(tensor: Tensor) -> Tensor | bytes:
    """Return a copy of a tensor's numbers, or a digest of them."""
    # A recorder in force must see operations of the step alone.
    with _disable_current_modes():
        if tensor.nbytes <= COPIED_BYTES or tensor.device.type != "cpu":
            return tensor.detach().clone()
        return _digest(as_integers(tensor).numpy())


def _same_numbers(tensor: Tensor, numbers: Tensor | bytes) -> bool:
    if isinstance(numbers, Tensor):
        return same_bits(tensor, numbers)
    return _numbers_of(tensor) == numbers


def _digest(array: np.ndarray[Any, Any]) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(array).view(np.uint8).data, digest_size=16).digest()


def _keys_and_values(container: Any) -> tuple[list[Any], list[Any]]:
    if isinstance(container, dict):
        return list(container), list(container.values())
    return [], list(container)


def _changes(old: _Contents) -> Iterator[str]:
    keys, values = _keys_and_values(old.container)
    if len(values) != len(old.values) or not all(map(same_value, keys, old.keys)):
        yield f"the content of {old.where} changes"
        return
    names = [f"{key} of {old.where}" for key in keys] or [old.where] * len(values)
    for name, value, before in zip(names, values, old.values, strict=True):
        if not same_value(value, before):
            yield f"{name} changes"


def is_plain(value: Any) -> bool:
    """Tell whether a value is a number, a string or the like, or a tuple or slice of such."""
    kind = kind_of(value)
    if kind is tuple:
        return all(map(is_plain, value))
    if kind is slice:
        return is_plain(value.start) and is_plain(value.stop) and is_plain(value.step)
    return kind in PLAIN_TYPES


def kind_of(value: Any) -> type:
    """Return the class of a value, or `Unknown` if hashing the class may run user code."""
    cls = type(value)
    return cls if any(type(cls) is known for known in _METACLASSES) else Unknown


def is_a(value: Any, *kinds: type) -> bool:
    """Tell whether a value is of a class; `isinstance` would also ask the value itself."""
    return issubclass(kind_of(value), kinds)


def class_dict(cls: type) -> Any:
    """Return what a class holds, without asking its metaclass."""
    return type.__dict__["__dict__"].__get__(cls)


def class_name(cls: type) -> str:
    """Return the name of a class, without asking its metaclass."""
    return str(type.__dict__["__name__"].__get__(cls))


def held(holder: Any, name: str) -> Any:
    """Return what an object itself holds under a name, or ABSENT."""
    return vars(holder).get(name, ABSENT)


def same_value(one: Any, two: Any) -> bool:
    """Tell whether two values are one object, or equal plain values (0.0 is not -0.0, nor 1 True)."""
    if one is two:
        return True
    if type(one) is str and type(two) is str:
        return one == two
    # As texts, -0.0 differs from 0.0, and NaN equals NaN.
    return type(one) is type(two) and is_plain(one) and is_plain(two) and repr(one) == repr(two)
