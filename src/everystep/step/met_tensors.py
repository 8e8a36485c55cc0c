"""Met tensors: those that a step has met, by number, and their tokens in the entries of a path.

A tensor is known by identity, through a weak reference: with a strong one, autograd clones gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from everystep.ops.arguments import DTYPES
from everystep.program.memory import ALIGNMENT, geometry
from everystep.program.operation import extent_of
from everystep.step.path import Entry, MetTensor

__all__ = ["MET", "NEW", "MetTensors", "UnseenError", "held", "is_plain", "leaf_tokens"]

# In a step of y = x @ w.T, with the state w and the batch x:
#
#   number   met          known.origin   known.kind
#   0        ref(w)       0              "state"
#   1        ref(x)       1              "batch"
#   2        ref(w.T)     0              "state": a view, on the memory of 0
#   3        ref(y)       3              "temporary"
#
# `_number_of` finds a number by the id of a tensor, and `_places` an origin by its memory.

_DTYPES = frozenset(DTYPES.values())
#: The kinds of tokens of tensors, and those that are met by the call.
MET, NEW = frozenset("rapx"), frozenset("apx")
#: Types of constants that a program can hold.
_CONSTANTS = {
    *(bool, int, float, str, type(None)),
    *(torch.dtype, torch.layout, torch.memory_format, torch.device),
}


class UnseenError(Exception):
    """An operation that a program cannot hold; the message gives the reason."""


def _gone() -> None:
    return None


class MetTensors:
    """The tensors of one step after another of a recording.

    met, lies: a weak reference to each tensor, and the address at which it lies; numbers: those of the
    step, in the order of its operations, and the offsets of tensors that lie at other places in each
    step, where it met them; known: what is known of each tensor. Checks note all but the last;
    `catch_up` adds that. looks: of the first tensors of the state, when the step began: their geometry,
    and the bytes, the device and the `_cdata` of their memory.
    """

    def __init__(self) -> None:
        # Checks write at a number, so there must be room; `put` makes more.
        self.met: list[Any] = [_gone] * 1024
        self.lies: list[int] = [0] * 1024
        self.numbers: list[int | float] = []
        self.known: list[MetTensor] = []
        self._number_of: dict[int, int] = {}
        self._places: dict[int, tuple[Any, int]] = {}
        #: The same of as many tensors of the state as have stayed the same.
        self._lasting: tuple[int, dict[int, int], dict[int, tuple[Any, int]]] = (0, {}, {})
        self.looks: list[tuple[Any, ...]] = []
        #: Memory that the call under way has brought.
        self._brought: list[int] = []
        #: The first part of data that the step has met, by the memory that the data is on.
        self.parts: dict[int, int] = {}
        #: Of a batch, and of a part: where its memory begins in that of the data, in bytes.
        self.bases: dict[int, int] = {}
        self._extents: dict[int, list[tuple[int, int]]] | None = None
        #: Arguments of the call under way that it overwrites without reading them.
        self.overwritten: Sequence[Tensor] = ()

    def same(self, state: Mapping[str, Tensor]) -> int:
        """Return how many tensors of a state, the first ones, are as they were at the last `begin`."""
        known = zip(state.values(), self.met, self.lies, self.looks, strict=False)
        for number, (tensor, reference, lies, looks) in enumerate(known):
            # A tensor that is turned in place (`t_`) is the same object at the same address.
            if reference() is not tensor or lies != tensor.data_ptr() or looks[0] != geometry(tensor):
                return number
            if looks[3] != tensor.untyped_storage()._cdata:  # other memory, at an address that was freed
                return number
        return min(len(state), len(self.looks))

    def begin(self, state: Mapping[str, Tensor], same: int, root: Entry) -> None:
        """Begin a step with the tensors of the state. same: as `same` has returned it."""
        # Checks hold these lists, so they are emptied and never replaced.
        self.numbers.clear()
        self._brought.clear()
        self.bases, self.parts, self._extents = {}, {}, None
        self.known = [*root.new]
        tensors = [*state.values()]
        lasting, numbers, places = self._lasting
        if lasting > same:  # another state: none of these may be found in a later step
            lasting, numbers, places = 0, {}, {}
        self._number_of, self._places = numbers, places
        # Tensors that stay the same have tables that serve later steps, too; the others begin empty.
        for number in range(lasting, len(tensors)):
            if number == same:
                self._number_of, self._places = {}, {}
            self.put(tensors[number], number, root.new[number].origin)
        if same == len(tensors):
            self._number_of, self._places = {}, {}
        self._lasting = same, numbers, places

    def put(self, tensor: Tensor, number: int, origin: int) -> None:
        """Note a tensor by a number. origin: the number of the first tensor on its memory."""
        if number >= len(self.met):
            self.met.extend([_gone] * len(self.met))
            self.lies.extend([0] * len(self.lies))
        self.met[number], self.lies[number] = ref(tensor), tensor.data_ptr()
        self._number_of[id(tensor)] = number
        if origin == number:
            self.keep_place(tensor, number)

    def meet_part(self, tensor: Tensor) -> int:
        """Give a part of data from outside the next number; its memory counts as its own."""
        number, own = len(self.known), self._put_part(tensor, len(self.known))
        self._add(MetTensor(number, "part", extent_of(own)[1], tensor.is_cpu, False, own))
        return number

    def _put_part(self, tensor: Tensor, number: int) -> tuple[Any, ...]:
        """Note a part by a number, and return where it lies in its own memory."""
        begin = int(tensor.storage_offset()) * tensor.itemsize
        is_aligned = not (tensor.is_floating_point() or tensor.is_complex())
        # Of floats, results of kernels may depend on the alignment, so it begins there as it does here.
        self.bases[number] = begin if is_aligned else begin - begin % ALIGNMENT
        # -1 stands for no tensor: the memory of the data must not be found as that of its part.
        self.put(tensor, number, -1)
        self.parts.setdefault(tensor.untyped_storage()._cdata, number)
        return self.geometry(tensor, number)

    def meet(self, tensor: Tensor, kind: str, *, is_named: bool = False) -> int:
        """Give a tensor the next number, and return it.

        Args:
            tensor: the tensor.
            kind: where its memory comes from, if the step does not know it.
            is_named: whether it is a tensor of the state or the batch itself.
        """
        number, storage = len(self.known), tensor.untyped_storage()
        origin = self.place(storage)
        if origin is None:
            origin = number
            self._brought.append(storage._cdata)
        else:
            kind = self.known[origin].kind
        self.put(tensor, number, origin)
        is_kept = is_named and kind in ("batch", "input", "scratch")
        own = self.geometry(tensor, origin)
        self._add(MetTensor(origin, kind, storage.nbytes(), tensor.is_cpu, is_kept, own))
        return number

    def note_moving(self, number: int) -> None:
        """Note that a tensor, the last that was met, lies at another place in each step."""
        known = self.known[number]
        self.known[number] = known._replace(moves=len(self.numbers))
        self.numbers.append(known.geometry[3])

    def _add(self, known: MetTensor) -> None:
        self.known.append(known)
        if self._extents is not None and known.is_named:
            self._extents.setdefault(known.origin, []).append(extent_of(known.geometry))

    def catch_up(self, at: Entry) -> None:
        """Note all that is known of the tensors met up to an entry, and forget what came after it."""
        if len(self.known) > at.met:  # of a call that has failed
            del self.known[at.met :]
            self._extents = None
            self.forget_brought(at.met)
        new: list[Entry] = []
        entry: Entry | None = at
        while entry is not None and entry.met > len(self.known):
            new.append(entry)
            entry = entry.parent
        for entry in reversed(new):
            for known in entry.new:
                number = len(self.known)
                if known.moves is not None:  # the entry has the offset of the step that made it
                    lies = *known.geometry[:3], self.numbers[known.moves]
                    known = known._replace(geometry=lies)
                self._add(known)
                tensor = self.met[number]()
                if tensor is None or not self._is_as_met(tensor, number):
                    continue
                self._number_of[id(tensor)] = number
                if known.kind != "part" and self.place(tensor.untyped_storage()) is None:
                    self.keep_place(tensor, known.origin)

    def number(self, tensor: Tensor) -> int | None:
        """Return the number of a tensor that the step has met and that lies as then, or None."""
        number = self._number_of.get(id(tensor))
        if number is None:
            number = self._lasting[1].get(id(tensor))
        # The id may be that of a tensor which is gone.
        if number is None or number >= len(self.known) or self.met[number]() is not tensor:
            return None
        return number if self._is_as_met(tensor, number) else None

    def _is_as_met(self, tensor: Tensor, number: int) -> bool:
        known = self.known[number]
        return (
            self.lies[number] == tensor.data_ptr()
            and self.geometry(tensor, known.origin) == known.geometry
        )

    def geometry(self, tensor: Tensor, origin: int) -> tuple[Any, ...]:
        """Return where a tensor lies in memory; in that of a batch or a part, from its beginning on."""
        own, base = geometry(tensor), self.bases.get(origin)
        return (*own[:3], own[3] - base // tensor.itemsize) if base else own

    def drop(self, tensor: Tensor) -> None:
        """Forget a tensor that got other memory, although it is the same object."""
        for number, other in self.alive(0, len(self.known)).items():
            if other is tensor:
                self.met[number] = _gone

    def forget(self, storages: Iterable[int]) -> None:
        """Treat memory as new, and so the tensors on it. storages: their `_cdata`."""
        left = {*storages}
        for storage in left:
            # An entry without a tensor hides the one that `_lasting` may have; removing would show it.
            self._places[storage] = None, 0
            self.parts.pop(storage, None)
        for number, tensor in self.alive(0, len(self.known)).items():
            if tensor.untyped_storage()._cdata in left:
                self.met[number] = _gone

    def alive_memory(self) -> list[tuple[int, int]]:
        """Return the `_cdata` of memory that still exists, and the number of the first tensor there."""
        known = self._places.items()
        return [(s, place) for s, (of, place) in known if of is not None and not of.expired()]

    def all_but_state(self) -> list[int]:
        """Return the `_cdata` of all memory but that of the state."""
        return [s for s, place in self.alive_memory() if self.known[place].kind != "state"]

    def drop_between(self, begin: int, end: int) -> None:
        """Forget tensors that steps before this one have met."""
        self.met[begin:end] = [_gone] * (end - begin)

    def alive(self, begin: int, end: int) -> dict[int, Tensor]:
        """Return the tensors with numbers from `begin` to `end` that still exist."""
        found = {number: self.met[number]() for number in range(begin, end)}
        return {number: tensor for number, tensor in found.items() if tensor is not None}

    def place(self, storage: torch.UntypedStorage) -> int | None:
        """Return the number of the first tensor on some memory, None if the step does not know it."""
        known = self._places.get(storage._cdata) or self._lasting[2].get(storage._cdata)
        if known is None or known[0] is None or known[0].expired():
            return None
        return known[1]

    def keep_place(self, tensor: Tensor, number: int) -> None:
        """Note the memory of a tensor, which is met again without it."""
        storage = tensor.untyped_storage()
        # As long as it exists, no other memory has the same `_cdata`. Python's own weak references are
        # not enough: torch 2.9 clears them where a storage was part of a cycle.
        reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        self._places[storage._cdata] = reference, number

    def forget_brought(self, met: int) -> None:
        """Forget memory that a call brought which was another one after all.

        met: how many tensors the step had met before.
        """
        while self._brought:
            self._places.pop(self._brought.pop(), None)
        self.parts = {place: part for place, part in self.parts.items() if part < met}
        self.bases = {number: base for number, base in self.bases.items() if number < met}

    def keep_brought(self) -> None:
        """Keep the memory that a call brought."""
        self._brought.clear()

    def lies_as(self, tensor: Tensor, token: Any) -> bool:
        """Return whether a tensor after the step is the one that a number, or a place, stands for."""
        if type(token) is tuple:
            known = self.place(tensor.untyped_storage())
            return known == token[0] and bool(self.geometry(tensor, token[0]) == token[1])
        return bool(self.met[token]() is tensor and self.lies[token] == tensor.data_ptr())

    def origins_of(self, numbers: Iterable[int]) -> tuple[int, ...]:
        """Return the first tensor on the memory of each tensor, each once."""
        return tuple(dict.fromkeys([self.known[number].origin for number in numbers]))

    def is_within(self, number: int) -> bool:
        """Return whether a tensor lies within those kept, if the batch or the state has its memory.

        Memory that the step has overwritten is kept as far as it did so.
        """
        if not (limits := self.limits(number)):
            return True
        begin, end = extent_of(self.known[number].geometry)
        for one, two in sorted(limits):
            if one <= begin:
                begin = max(begin, two)
        return begin >= end

    def limits(self, number: int) -> Sequence[tuple[int, int]]:
        """Return where tensors of the batch or the state lie on the memory of a tensor, if one does."""
        if self._extents is None:
            self._extents = {}
            for each in filter(lambda each: each.is_named, self.known):
                self._extents.setdefault(each.origin, []).append(extent_of(each.geometry))
        return self._extents.get(self.known[number].origin, ())

    # Tokens.

    def token(self, value: Any, is_slot: bool, is_part: Callable[[Tensor], bool] | None = None) -> Any:
        """Return the token of an argument, and note a tensor that the step meets here.

        is_part: returns whether a tensor is a part of data from outside, and only read here.

        Raises:
            UnseenError: no token can stand for it; gives the reason.
        """
        if isinstance(value, Tensor):
            number = self.number(value)
            if number is not None:
                return "r", number
            # From here on, the step meets it; each kind of token has what a later step must find alike.
            if not self.holds(value):
                raise UnseenError(_what_is_special(value))
            storage = value.untyped_storage()
            place = self.place(storage)
            if is_part is not None and not value.is_conj() and is_part(value):
                number = self.meet_part(value)
                return "p", number, place, self.known[number].geometry
            is_scratch = any(each is value for each in self.overwritten)
            is_scratch = is_scratch and (place is None or self.known[place].kind == "scratch")
            number = self.meet(value, "scratch" if is_scratch else "input", is_named=is_scratch)
            known = self.known[number]
            if place is None:
                about = known.bytes, self.parts.get(storage._cdata)
                return "x", number, about, known.geometry
            return "a", number, place, known.geometry
        kind = type(value)
        if isinstance(value, list | tuple):
            return "l", tuple([self.token(item, is_slot, is_part) for item in value])
        if is_slot and (kind is int or kind is float):
            self.numbers.append(value)
            return "n", kind
        if kind not in _CONSTANTS:
            raise UnseenError(f"takes a {kind.__name__}")
        return "c", value, kind, repr(value)

    def fits(self, token: Any, value: Any) -> bool:
        """Return whether an argument is the one of a token; note it if the step meets it here."""
        kind = token[0]
        if kind == "r":
            return value is not None and self.lies_as(value, token[1])
        if kind == "l":
            items = token[1]
            if not isinstance(value, list | tuple) or len(value) != len(items):
                return False
            # A list takes less time than a generator, and this runs at each call with lists.
            return all([self.fits(t, v) for t, v in zip(items, value, strict=True)])  # noqa: C419
        if kind == "c":  # as texts, NaN is equal, and -0.0 is not 0.0
            return type(value) is token[2] and repr(value) == token[3]
        if kind == "n":
            if type(value) is not token[1]:
                return False
            self.numbers.append(value)
            return True
        if kind == "i":
            return type(value) is int
        return isinstance(value, Tensor) and self.holds(value) and self._fits_new(token, value)

    def holds(self, tensor: Tensor) -> bool:
        """Return whether a program can hold a tensor: plain, or the conjugate of one that it has."""
        if is_plain(tensor):
            return True
        if not tensor.is_conj():
            return False
        place = self.place(tensor.untyped_storage())
        is_own = place is not None and self.known[place].kind not in ("input", "part", "scratch")
        # One from outside is kept by its bytes, which do not show the conjugation.
        return is_own and is_plain(tensor, may_be_conjugated=True)

    def _fits_new(self, token: Any, value: Tensor) -> bool:
        kind, number, known, expected = token
        storage = value.untyped_storage()
        if kind == "a":
            origin = self.met[known]()
            is_there = origin is not None and origin.untyped_storage() is storage
            if self.geometry(value, known) != expected:
                return False
            if not is_there and self.place(storage) != known:
                return False
            self.put(value, number, known)
            return True
        if kind == "p":
            return self.place(storage) == known and bool(self._put_part(value, number) == expected)
        # Memory that this step knows is not from outside, even where it was in an earlier step.
        if geometry(value) != expected or self.place(storage) is not None:
            return False
        if (storage.nbytes(), self.parts.get(storage._cdata)) != known:
            return False
        self._brought.append(storage._cdata)
        self.put(value, number, number)
        return True

    def batch(self, tensors: Mapping[str, Tensor]) -> tuple[Any, list[int], list[Tensor]]:
        """Return what the operations depend on of a batch, the number of each tensor, and new ones."""
        found: list[Any] = ["batch"]
        numbers: list[int] = []
        new: list[Tensor] = []
        first: dict[int, tuple[int, int, int]] = {}
        places: dict[int, int] = {}
        for name, tensor in tensors.items():
            # A tensor of the batch may be one of the state, too, or come twice.
            known, again = self.number(tensor), places.get(id(tensor))
            if known is not None or again is not None:
                found.append((name, known, again))
                numbers.append(known if again is None else len(self.known) + again)  # type: ignore
                continue
            places[id(tensor)] = len(new)
            offset, storage = int(tensor.storage_offset()), tensor.untyped_storage()
            place, number = self.place(storage), len(self.known) + len(new)
            # Tensors of one batch may share memory; their places count from the first of them there.
            begin, order, origin = first.setdefault(storage._cdata, (offset, len(first), number))
            if place is None:
                base = offset * tensor.itemsize
                base -= base % ALIGNMENT
                self.bases[origin] = min(base, self.bases.get(origin, base))
            # On memory of the state, the offset is compared; in more data, a batch may lie anywhere.
            lies = (offset - begin, offset * tensor.itemsize % ALIGNMENT) if place is None else offset
            shared = place, self.parts.get(storage._cdata)
            found.append((name, tensor.dtype, tensor.shape, tensor.stride(), shared, order, lies))
            numbers.append(number)
            new.append(tensor)
        return tuple(found), numbers, new


def held(token: Any) -> Any:
    """Return an argument as an observed operation holds it."""
    kind, value = token[:2]
    if kind == "l":
        return tuple(map(held, value))
    if kind == "n":
        return value
    if kind == "c":
        # A plain text would be read as a reference to a tensor.
        return ("text", value) if isinstance(value, str) else value
    return f"%{value}"


def leaf_tokens(tokens: Iterable[Any]) -> Iterator[Any]:
    """Yield tokens, and in place of a list those that it has."""
    for token in tokens:
        if token[0] == "l":
            yield from leaf_tokens(token[1])
        else:
            yield token


def is_plain(tensor: Tensor, *, may_be_conjugated: bool = False) -> bool:
    """Return whether a program can hold a tensor: dense, with stored values, of a passive class."""
    return (
        _is_passive(type(tensor))
        and tensor.layout == torch.strided
        and tensor.dtype in _DTYPES
        and not tensor.is_meta
        and not tensor.is_nested
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and not tensor._is_zerotensor()
        and not tensor.is_neg()
        and (may_be_conjugated or not tensor.is_conj())
    )


@cache
def _is_passive(kind: type[Tensor]) -> bool:
    """Return whether a class of tensors leaves torch's functions and operators as they are.

    A class derived from `Parameter` does, unless it defines more.
    """
    functions, operators = kind.__torch_function__, kind.__torch_dispatch__
    has_functions = functions is not torch._C._disabled_torch_function_impl and kind is not Tensor
    return not has_functions and operators is torch._C._disabled_torch_dispatch_impl


def _what_is_special(tensor: Tensor) -> str:
    if tensor.is_nested:
        return "takes a nested tensor"
    if tensor.layout != torch.strided:
        return "takes a sparse tensor"
    if not _is_passive(type(tensor)):
        return f"takes a {type(tensor).__name__}, a tensor subclass"
    return f"takes a {tensor.dtype} tensor that is conjugated or has no storage"
