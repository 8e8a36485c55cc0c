"""Batches as loops have them: tensors in dicts, lists, tuples and dataclasses, in any nesting."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Container, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from everystep.program.memory import ALIGNMENT
from everystep.step.guards import PLAIN_TYPES
from everystep.step.state import same_bits

__all__ = ["BatchCopies", "key_of", "nested_again", "tensors_of", "unnested"]

#: Dtypes that travel between processes, too.
_HELD = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex128, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}
#: Copies that are kept to be compared; a loader that makes new tensors has no use for them.
MOST_COPIES = 64
_PLAIN = (bool, int, float, str, type(None))


class BatchCopies:
    """Copies of the tensors of batches, on the CPU; a tensor that stays as it is is copied once."""

    def __init__(self) -> None:
        self._copies: dict[int, _Copy] = {}

    def of(self, tensors: Mapping[str, Tensor], era: int | None = None) -> dict[str, Tensor]:
        """Return copies of tensors, by name; they must not be changed.

        era: within the same era, nothing writes into copied tensors; None: something may.
        """
        if len(self._copies) > MOST_COPIES:
            alive = (item for item in self._copies.items() if item[1].of() is not None)
            self._copies = dict([*alive][-MOST_COPIES // 2 :])
        return {name: self._copy(tensor, era) for name, tensor in tensors.items()}

    def _copy(self, tensor: Tensor, era: int | None) -> Tensor:
        known = self._copies.get(id(tensor))
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


def tensors_of(batch: Any) -> dict[str, Tensor]:
    """Return the tensors in a batch by their path; those of a pair are `x` and `y`, a lone one is `x`.

    NumPy's arrays count as tensors, on the same memory. Other objects are left out.
    """
    return unnested(batch)[0]


def unnested(batch: Any, path: str = "") -> tuple[dict[str, Tensor], Any]:
    """Return the tensors in a batch, as `tensors_of` does, and how it is nested.

    The nesting is as JSON can hold it, with `{"tensor": path}` for each tensor. path: the prefix of all
    paths.
    """
    if type(batch) in (list, tuple) and len(batch) in (1, 2) and all(map(_is_dense, batch)):
        tensors = {_join(path, n): _as_tensor(part) for n, part in zip("xy", batch, strict=False)}
        return tensors, {type(batch).__name__: [{"tensor": name} for name in tensors]}
    tensors = {}
    return tensors, _text(batch, path, tensors)


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
        if kind is not Tensor or value.layout is not torch.strided or vars(value):
            return (kind, repr(value)) if kind in PLAIN_TYPES else object()
        if value.untyped_storage()._cdata in taken or value.is_conj() or value.is_neg():
            return object()
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
    return isinstance(part, np.ndarray) and part.dtype.kind in "biufc"


def _as_tensor(part: Tensor | np.ndarray[Any, Any]) -> Tensor:
    return part if isinstance(part, Tensor) else torch.from_numpy(np.ascontiguousarray(part))


def _items(value: Any) -> Iterator[tuple[str, Any]] | None:
    """Return the items of a container with their names; None for other objects."""
    if isinstance(value, Mapping):
        return ((str(key), item) for key, item in value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return iter(zip(value._fields, value, strict=True))
    if isinstance(value, list | tuple):
        return ((str(place), item) for place, item in enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    data = getattr(value, "__dict__", {}).get("data")  # Hugging Face's BatchEncoding is a UserDict
    return _items(data) if isinstance(data, Mapping) else None


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _text(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return how a value is nested; add its tensors to `tensors`."""
    if isinstance(value, Tensor | np.ndarray):
        if not _is_dense(value):
            return {"left": f"{type(value).__name__} of {value.dtype}"}
        name = path or "x"
        while name in tensors:  # {"a.b": x, "a": {"b": y}}
            name += "_"
        tensors[name] = _as_tensor(value)
        return {"tensor": name}
    if isinstance(value, _PLAIN):
        return value
    items = _items(value)
    if items is None:
        return {"left": type(value).__name__}
    inner: dict[str, Any] = {}
    for name, item in items:
        while name in inner:  # {1: x, "1": y}
            name += "_"
        inner[name] = _text(item, _join(path, name), tensors)
    if type(value) in (list, tuple):
        return {type(value).__name__: [*inner.values()]}
    return {"dict": inner}
