"""Batches as loops have them: tensors in dicts, lists, tuples and objects, in any nesting."""

from __future__ import annotations

import weakref
from collections.abc import Container, Mapping
from contextlib import suppress
from functools import lru_cache
from types import MemberDescriptorType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from everystep.program.memory import ALIGNMENT
from everystep.step.guards import PLAIN_TYPES
from everystep.step.kept_values import is_aside, is_code
from everystep.step.state import same_bits

__all__ = ["BatchCopies", "PutTensors", "key_of", "nested_again", "tensors_of", "unnested"]

#: Dtypes that travel between processes, too.
_HELD = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex128, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}
#: Copies that are kept to be compared; a loader that makes new tensors has no use for them.
MOST_COPIES = 64
_PLAIN = (bool, int, float, str, type(None))
#: Objects that are not part of a batch, even where it leads to them.
_WHOLE = (type, nn.Module, torch.optim.Optimizer, Dataset)
#: Objects within each other that are looked into, and all their values: a batch may lead to a trainer.
_DEEPEST, _MOST_VALUES = 6, 10_000


class BatchCopies:
    """Copies of the tensors of batches, on the CPU; a tensor that stays as it is is copied once."""

    def __init__(self) -> None:
        self._copies: dict[int, _Copy] = {}

    def of(self, tensors: Mapping[str, Tensor], era: int | None = None) -> dict[str, Tensor]:
        """Return copies of tensors, by name; they must not be changed.

        era: within the same era, nothing writes into copied tensors; None: something may.
        """
        # The newest half, also of a loader that keeps all its batches.
        if len(self._copies) > MOST_COPIES:
            alive = (item for item in self._copies.items() if item[1].of() is not None)
            self._copies = dict([*alive][-MOST_COPIES // 2 :])
        return {name: self._copy(tensor, era) for name, tensor in tensors.items()}

    def _copy(self, tensor: Tensor, era: int | None) -> Tensor:
        known = self._copies.get(id(tensor))
        # The id may be that of a tensor which is gone.
        if known is not None and known.of() is tensor and known.holds(tensor, era):
            if era == known.era:
                return known.copy
            copy = known.copy
        else:
            copy = tensor.detach().cpu().resolve_conj().resolve_neg().clone()
        self._copies[id(tensor)] = _Copy(weakref.ref(tensor), copy, era)
        return copy


class _Copy(NamedTuple):
    """A copy of a tensor. era: in which it last equalled the tensor."""

    of: weakref.ref[Tensor]
    copy: Tensor
    era: int | None

    def holds(self, tensor: Tensor, era: int | None) -> bool:
        """Return whether the tensor still has the bits of the copy."""
        if era is not None and era == self.era:
            return True
        is_plain = tensor.is_cpu and not tensor.is_conj() and not tensor.is_neg()
        return is_plain and same_bits(tensor, self.copy)


class PutTensors:
    """The tensors that a loop has put into its batches.

    A batch that comes again has them. They are not data: a loop may compute them from the parameters,
    and one that is resumed has not put them there yet.
    """

    def __init__(self) -> None:
        self._known: dict[int, weakref.ref[Tensor]] = {}

    def note(self, batch: Any, path: str, given: Mapping[str, Tensor]) -> None:
        """Note what a batch has at the end of a step. given: its tensors as the step began, by path."""
        before = [id(tensor) for tensor in given.values()]
        items = batch.values() if type(batch) is dict else batch
        is_flat = type(batch) in (dict, list, tuple)
        # Most batches are as they were, and need no walk through their nesting.
        if isinstance(batch, Tensor) or (is_flat and [*map(id, items)] == before):
            return
        for name, tensor in unnested(batch, path)[0].items():
            # One that was moved to another device is the same data.
            if id(tensor) not in before and given.get(name, tensor).device == tensor.device:
                self._known[id(tensor)] = weakref.ref(tensor)
        if len(self._known) > MOST_COPIES:
            self._known = {key: each for key, each in self._known.items() if each() is not None}

    def without(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors without those that the loop has put into its batches."""
        known = self._known
        if not known:
            return tensors
        return {n: t for n, t in tensors.items() if id(t) not in known or known[id(t)]() is not t}


def tensors_of(batch: Any) -> dict[str, Tensor]:
    """Return the tensors in a batch by their path; those of a pair are `x` and `y`, a lone one is `x`.

    NumPy's arrays count as tensors, on the same memory. Of an object, they are those in its attributes;
    nothing of its class runs, unless it is a `Mapping`.
    """
    return unnested(batch)[0]


def unnested(batch: Any, path: str = "") -> tuple[dict[str, Tensor], Any]:
    """Return the tensors in a batch, as `tensors_of` does, and how it is nested.

    The nesting is as JSON can hold it, with `{"tensor": path}` for each tensor. path: the prefix of all
    paths.
    """
    # e.g. (x, [y, 3]) -> {"0": x, "1.0": y},
    #                     {"tuple": [{"tensor": "0"}, {"list": [{"tensor": "1.0"}, 3]}]}
    if type(batch) in (list, tuple) and len(batch) in (1, 2) and all(map(_is_dense, batch)):
        tensors = {_join(path, n): _as_tensor(part) for n, part in zip("xy", batch, strict=False)}
        return tensors, {type(batch).__name__: [{"tensor": name} for name in tensors]}
    walk = _Walk()
    text = walk.text(batch, path)
    return walk.tensors, text


def key_of(batch: Any, taken: Container[int] = ()) -> Any:
    """Return a key that is equal for two batches that differ only in the values of their tensors.

    For memory, it has which tensors share it, their distance on it, and its alignment. A batch that
    holds anything but tensors and plain values, or uses memory in `taken`, equals no other.
    """
    places: dict[int, tuple[int, int]] = {}

    def key(value: Any) -> Any:
        kind = type(value)
        if kind in (list, tuple):
            return kind, *map(key, value)
        if kind is dict:
            return dict, *((type(name), repr(name), key(item)) for name, item in value.items())
        # A new object equals nothing. Python may do anything with attributes that a tensor has.
        if kind is not Tensor or value.layout is not torch.strided or vars(value):
            return (kind, repr(value)) if kind in PLAIN_TYPES else object()
        if value.untyped_storage()._cdata in taken or value.is_conj() or value.is_neg():
            return object()
        # Results of kernels may depend on the alignment, and writes on what shares the memory.
        begin = int(value.storage_offset()) * value.itemsize
        place = places.setdefault(value.untyped_storage()._cdata, (len(places), begin))
        lies = value.stride(), begin % ALIGNMENT, place[0], begin - place[1]
        about = value.device, value.requires_grad, value.is_inference()
        return kind, value.dtype, value.shape, lies, about

    return key(batch)


def nested_again(text: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return a batch in its original nesting. Named tuples and objects come back as dicts.

    tensors: by path, as `tensors_of` returned them.
    """
    if not isinstance(text, dict):
        return text
    (kind, content), *_ = text.items()
    if kind == "tensor":
        return tensors.get(content)
    if kind == "dict":
        return {key: nested_again(value, tensors) for key, value in content.items()}
    if kind in ("list", "tuple"):
        items = [nested_again(item, tensors) for item in content]
        return tuple(items) if kind == "tuple" else items
    return f"<{content}>"  # of a class that no run holds


def _is_dense(part: Any) -> bool:
    if isinstance(part, Tensor):
        is_held = part.layout == torch.strided and not part.is_nested and part.dtype in _HELD
        return is_held and part.device.type != "meta" and not part._is_zerotensor()
    if not isinstance(part, np.ndarray) or isinstance(part, np.ma.MaskedArray):
        return False
    # Not the long floats of C: torch has none.
    return part.dtype.kind in "biufc" and part.dtype.itemsize <= (16 if part.dtype.kind == "c" else 8)


def _as_tensor(part: Tensor | np.ndarray[Any, Any]) -> Tensor:
    if isinstance(part, Tensor):
        return part
    # In the machine's order of bytes, as torch has it; a single number would get a dimension.
    array = np.ascontiguousarray(part, part.dtype.newbyteorder("="))
    return torch.from_numpy(array.reshape(part.shape))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


class _Walk:
    """Finds the tensors in a batch. tensors: by path."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._left = _MOST_VALUES

    def text(self, value: Any, path: str, within: tuple[int, ...] = ()) -> Any:
        """Return how a value is nested; add its tensors. within: the ids of objects that lead to it."""
        if isinstance(value, Tensor | np.ndarray):
            if not _is_dense(value):
                return {"left": f"{type(value).__name__} of {value.dtype}"}
            name = path or "x"
            while name in self.tensors:  # {"a.b": x, "a": {"b": y}}
                name += "_"
            self.tensors[name] = _as_tensor(value)
            return {"tensor": name}
        if isinstance(value, _PLAIN):
            return value
        items, count = _items(value), None
        if items is None and id(value) not in within and len(within) < _DEEPEST:
            items, count = _attributes(value), len(self.tensors)
            within = *within, id(value)
        if within and items is not None:
            self._left -= len(items)
        if items is None or self._left < 0:
            return {"left": type(value).__name__}
        inner: dict[str, Any] = {}
        for name, item in items:
            while name in inner:  # {1: x, "1": y}
                name += "_"
            text = self.text(item, _join(path, name), within)
            # Of an object, only what holds tensors or plain values is shown.
            if count is None or text != {"left": type(item).__name__}:
                inner[name] = text
        if len(self.tensors) == count:  # an object that has nothing to do with tensors
            return {"left": type(value).__name__}
        if type(value) in (list, tuple):
            return {type(value).__name__: [*inner.values()]}
        return {"dict": inner}


def _items(value: Any) -> list[tuple[str, Any]] | None:
    """Return the items of a container with their names; None for other objects."""
    if isinstance(value, Mapping):
        with suppress(Exception):  # that of a file which is closed by now
            return [(_name(key), item) for key, item in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [*zip(value._fields, value, strict=True)]
    if isinstance(value, list | tuple):
        return [(str(place), item) for place, item in enumerate(value)]
    return None


def _name(key: Any) -> str:
    return ".".join(map(str, key)) if type(key) is tuple else str(key)


def _attributes(value: Any) -> list[tuple[str, Any]] | None:
    """Return the attributes of an object by name, without running code of its class; None of code.

    The items of a private dict are as attributes of the object: classes that wrap a dict show them so.
    `data` counts as private, as in a `UserDict`.
    """
    if isinstance(value, _WHOLE) or is_code(value) or is_aside(value):
        return None
    # From the descriptor of a slot, since `getattr` may run a method of the class.
    own: dict[str, Any] = {}
    kind: Any = type(value)
    for name, slot in _slots(kind):
        with suppress(AttributeError):  # it was not set
            own[name] = slot.__get__(value)
    own |= getattr(value, "__dict__", {})
    private = {name: item for name, item in own.items() if name.startswith("_") or name == "data"}
    found = {name: item for name, item in own.items() if name not in private}
    for name, item in private.items():
        inner = dict(_items(item) or ()) if isinstance(item, Mapping) else {name: item}
        found |= inner if found.keys().isdisjoint(inner) else {name: item}
    return [*found.items()]


@lru_cache(maxsize=256)
def _slots(kind: type) -> list[tuple[str, MemberDescriptorType]]:
    """Return the slots of a class and of those that it is derived from, in their order."""
    own = (item for base in reversed(kind.__mro__) for item in vars(base).items())
    slots = [(name, slot) for name, slot in own if isinstance(slot, MemberDescriptorType)]
    return [(name, slot) for name, slot in slots if not name.startswith("__")]
