"""Met tensors: those that a step has met, by number, and their tokens in the entries of a path.

A tensor is known by identity, through a weak reference: with a strong one, autograd clones gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from everystep.program.memory import ALIGNMENT
from everystep.step.path import geometry
from everystep.step.seen_tensors import is_plain

__all__ = ["MetTensors", "StrangeError"]


def _gone() -> None:
    return None


def _looks(tensor: Tensor) -> Any:
    return tensor.dtype, tensor.shape, tensor.stride()


class StrangeError(Exception):
    """Something that cannot be compared at a later step."""


class MetTensors:
    """The tensors of one step after another of a recording.

    met, lies: a weak reference to each tensor, and the address at which it lies; numbers: those of the
    step, in the order of its operations; count: how many tensors the step has met.
    """

    def __init__(self) -> None:
        self.met: list[Any] = [_gone] * 1024
        self.lies: list[int] = [0] * 1024
        self.numbers: list[int | float] = []
        self.count = 0
        self._indexed = 0
        self._number_of: dict[int, int] = {}
        self._places: dict[int, tuple[Any, int]] = {}
        #: These, of as many tensors of the state as have stayed the same.
        self._lasting: tuple[int, dict[int, int], dict[int, tuple[Any, int]]] = (0, {}, {})
        self._looks: list[Any] = []
        self._brought: list[int] = []

    def same(self, state: Mapping[str, Tensor]) -> int:
        """Return how many tensors of a state, the first ones, are as they were at the last `begin`."""
        known = zip(state.values(), self.met, self.lies, self._looks, strict=False)
        for number, (tensor, reference, lies, looks) in enumerate(known):
            if reference() is not tensor or lies != tensor.data_ptr() or looks != _looks(tensor):
                return number
        return min(len(state), len(self._looks))

    def begin(self, state: Mapping[str, Tensor], same: int) -> None:
        """Begin a step, which knows the tensors of the state. same: as `same` has returned it."""
        del self.numbers[:]
        self._brought.clear()
        tensors = [*state.values()]
        known, number_of, places = self._lasting
        if known > same:
            known, number_of, places = 0, {}, {}
        self._number_of, self._places = number_of.copy(), places.copy()
        for number in range(known, len(tensors)):
            if known < number == same:
                self._lasting = same, self._number_of.copy(), self._places.copy()
            self.meet(tensors[number], number)
        if known < same == len(tensors):
            self._lasting = same, self._number_of.copy(), self._places.copy()
        self._looks[same:] = map(_looks, tensors[same:])
        self.count = self._indexed = len(tensors)

    def meet(self, tensor: Tensor, number: int, origin: int | None = None) -> None:
        """Note a tensor by a number. origin: the one by which its memory is known, None if it is new."""
        if number >= len(self.met):
            self.met.extend([_gone] * len(self.met))
            self.lies.extend([0] * len(self.lies))
        self.met[number], self.lies[number] = ref(tensor), tensor.data_ptr()
        self._number_of[id(tensor)] = number
        if origin is None:
            storage = tensor.untyped_storage()
            self._places.setdefault(storage._cdata, (ref(storage), number))

    def new(self, tensor: Tensor, origin: int | None) -> int:
        """Give a tensor the next number, and return it."""
        number = self.count
        self.meet(tensor, number, origin)
        self.count = self._indexed = number + 1
        return number

    def known(self, tensor: Tensor) -> int | None:
        """Return the number of a tensor that the step has met, None if it has not."""
        self._index()
        number = self._number_of.get(id(tensor))
        if number is None or self.met[number]() is not tensor:
            return None
        return number if self.lies[number] == tensor.data_ptr() else None

    def _index(self) -> None:
        """Index the tensors that checks have noted."""
        for number in range(self._indexed, self.count):
            tensor = self.met[number]()
            if tensor is not None:
                self._number_of[id(tensor)] = number
        self._indexed = max(self._indexed, self.count)

    def drop(self, tensor: Tensor) -> None:
        """Forget a tensor that got other memory, although it is the same object."""
        self._index()
        number = self._number_of.get(id(tensor))
        if number is not None and self.met[number]() is tensor:
            self.met[number] = _gone

    def drop_between(self, begin: int, end: int) -> None:
        """Forget tensors that steps before this one have met."""
        self.met[begin:end] = [_gone] * (end - begin)

    def alive(self, begin: int, end: int) -> dict[int, Tensor]:
        """Return the tensors with numbers from `begin` to `end` that still exist."""
        found = {number: self.met[number]() for number in range(begin, end)}
        return {number: tensor for number, tensor in found.items() if tensor is not None}

    def place(self, storage: torch.UntypedStorage) -> int | None:
        """Return the tensor by which the step knows some memory, None if it does not."""
        known = self._places.get(storage._cdata)
        return known[1] if known is not None and known[0]() is storage else None

    def keep_place(self, tensor: Tensor, number: int) -> None:
        """Note the memory of a tensor, which is met again without it."""
        storage = tensor.untyped_storage()
        self._places[storage._cdata] = ref(storage), number

    def forget_brought(self) -> None:
        """Forget memory that a call brought which was another one after all."""
        while self._brought:
            self._places.pop(self._brought.pop(), None)

    def keep_brought(self) -> None:
        """Keep the memory that a call brought."""
        if self._brought:
            self._brought.clear()

    def lies_as(self, tensor: Tensor, token: Any) -> bool:
        """Tell whether a tensor after the step is the one that a number, or a place, stands for."""
        if type(token) is tuple:
            known = self.place(tensor.untyped_storage())
            return known == token[0] and bool(geometry(tensor) == token[1])
        return bool(self.met[token]() is tensor and self.lies[token] == tensor.data_ptr())

    # Tokens.

    def token(self, value: Any, is_slot: bool) -> Any:
        """Return the token of an argument, and note a tensor that the step meets here.

        Raises:
            StrangeError: no token can stand for it.
        """
        if isinstance(value, Tensor):
            if not is_plain(value):
                raise StrangeError
            number = self.known(value)
            if number is not None:
                return "r", number
            storage = value.untyped_storage()
            place = self.place(storage)
            if place is not None:
                return "a", self.new(value, place), place, geometry(value)
            return "x", self.new(value, None), storage.nbytes(), geometry(value)
        kind = type(value)
        if isinstance(value, list | tuple):
            return "l", tuple([self.token(item, is_slot) for item in value])
        if is_slot and (kind is int or kind is float):
            return "n", kind
        if isinstance(value, torch.Generator | torch.SymInt | torch.SymFloat | torch.SymBool):
            raise StrangeError
        return "c", value

    def fits(self, token: Any, value: Any) -> bool:
        """Tell whether an argument is the one of a token; note it if the step meets it here."""
        kind = token[0]
        if kind == "r":
            return value is not None and self.lies_as(value, token[1])
        if kind == "l":
            items = token[1]
            if not isinstance(value, list | tuple) or len(value) != len(items):
                return False
            return all([self.fits(t, v) for t, v in zip(items, value, strict=True)])  # noqa: C419
        if kind == "c":  # repr tells -0.0 from 0.0, and finds NaN equal
            return type(value) is type(token[1]) and repr(value) == repr(token[1])
        if kind == "n":
            if type(value) is not token[1]:
                return False
            self.numbers.append(value)
            return True
        if not isinstance(value, Tensor) or not is_plain(value):
            return False
        return self._fits_new(token, value)

    def _fits_new(self, token: Any, value: Tensor) -> bool:
        kind, number, known, expected = token
        storage = value.untyped_storage()
        if geometry(value) != expected:
            return False
        if kind == "a":
            origin = self.met[known]()
            is_there = origin is not None and origin.untyped_storage() is storage
            if not is_there and self.place(storage) != known:
                return False
            self.meet(value, number, known)
            return True
        if storage.nbytes() != known or self.place(storage) is not None:
            return False
        self._brought.append(storage._cdata)
        self.meet(value, number)
        return True

    def batch(self, tensors: Mapping[str, Tensor]) -> tuple[Any, list[Tensor]]:
        """Return what the operations depend on of a batch, and the tensors that it brings.

        Raises:
            StrangeError: one of them is sparse, nested or of a class of its own.
        """
        found: list[Any] = ["batch"]
        new: list[Tensor] = []
        first: dict[int, tuple[int, int]] = {}
        for name, tensor in tensors.items():
            if not is_plain(tensor):
                raise StrangeError
            known = self.known(tensor)
            if known is not None or any(tensor is other for other in new):
                found.append((name, known, next((n for n, t in enumerate(new) if t is tensor), None)))
                continue
            offset, storage = int(tensor.storage_offset()), tensor.untyped_storage()
            place = self.place(storage)
            begin, order = first.setdefault(storage._cdata, (offset, len(first)))
            # Not of the state: it may be any part of more data.
            lies = (offset - begin, offset * tensor.itemsize % ALIGNMENT) if place is None else offset
            found.append((name, tensor.dtype, tuple(tensor.shape), tensor.stride(), place, order, lies))
            new.append(tensor)
        return tuple(found), new
