"""Watch: sees every operation of one step of a loop that is not everystep's, and changes nothing of it.

What was seen is a *path*: operators, their arguments but for the step's own numbers, and for each tensor
on which memory it lies, and how. Steps with equal paths share a program. What no program can hold (an
operator of somebody else's, a sparse tensor, an explicit generator) runs unseen, and the tensors that it
gives or changes are *inputs* of the step, kept by content. So are all tensors that the loop brings from
elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from everystep.program.arguments import DTYPES
from everystep.program.memory import ALIGNMENT
from everystep.program.operators import (
    NotAllowedError,
    computes,
    draws_random_numbers,
    leaves,
    parameters,
    resolve,
    writes,
)
from everystep.program.plain import READ, is_number_slot
from everystep.step.elsewhere import Elsewhere, version_of
from everystep.step.follow import Follower
from everystep.step.path import FLOAT, INT, Path, SeenOperation, StorageKind
from everystep.step.recorder import CapturedTensor

__all__ = ["Marks", "Tables", "Watch", "known_operator"]

_PLAIN_TENSORS = (Tensor, nn.Parameter, nn.Buffer)
_DTYPES = frozenset(DTYPES.values())
_REAL = frozenset(dtype for dtype in _DTYPES if not dtype.is_complex)
#: They give a tensor another geometry, or other memory, which its next use shows.
_OTHER_GEOMETRY = {
    *("as_strided_", "detach_", "squeeze_", "swapaxes_", "swapdims_", "t_", "transpose_"),
    *("unsqueeze_", "set_"),
}
_ZEROING = {"zero_", "_foreach_zero_"}
#: Memory from elsewhere of more bytes than this is not kept: what is computed of it is.
MOST_BYTES = 100_000_000


class _Known(NamedTuple):
    """What is known of an operator, looked up once.

    how: `pass` (it computes nothing), `make` (it only makes memory), `see`, `decompose` (what it is made
    of is seen), or why it is not seen.
    """

    how: str
    writes: tuple[str, ...] = ()
    places: tuple[tuple[str, bool], ...] = ()
    slots: frozenset[str] = frozenset()
    gives: bool = True
    draws: bool = False
    makes_dtype: bool = False
    has_out: bool = False
    is_read: bool = False
    is_zeroing: bool = False
    writes_list: bool = False


class Marks(NamedTuple):
    """How far a watch has come: how many operations, tensors, ... it has noted."""

    operations: int
    tensors: int
    storages: int
    numbers: int
    draws: int
    unseen: int
    marked: int


class Tables(NamedTuple):
    """All that a watch has noted of a step, so that another watch can go on from any place in it.

    marked: gradients, activations and what was logged, by kind and name, in the order in which they
    were noted.
    """

    operations: tuple[SeenOperation, ...]
    tensors: tuple[CapturedTensor, ...]
    storages: tuple[StorageKind, ...]
    named: tuple[tuple[str, int], ...]
    marked: tuple[tuple[str, str, tuple[int, ...]], ...]


class _UnseenError(Exception):
    """An operation that no program can hold; the message says why."""


@dataclass(slots=True)
class _Storage:
    kind: str
    bytes: int
    host: bool
    reference: Any
    content: Tensor | None = None


_known: dict[int, _Known] = {}
_kept_alive: list[Any] = []


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches one step, from `begin` to `end`; in force while it is entered.

    Args:
        device: of the training.
        follower: knows which module and which optimizer runs.
        elsewhere: copies of what steps before brought from elsewhere.

    numbers: of the step; generators: states of torch's generator before draws, by their number from 0,
    where they are not as the draw before left them; unseen: what was not seen, in words, and how often;
    changed_elsewhere: a tensor that the step has changed and that is in no part, in words, or None.
    """

    def __init__(self, device: torch.device, follower: Follower, elsewhere: Elsewhere) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numbers: list[int | float] = []
        self.unseen: dict[str, int] = {}
        self.changed_elsewhere: str | None = None
        self.generators: dict[int, Tensor] = {}
        self.is_paused = False
        self._is_elsewhere = device.type != "cpu"
        self._follower = follower
        self._elsewhere = elsewhere
        self._operations: list[SeenOperation] = []
        self._tensors: list[CapturedTensor] = []
        self._number_of: dict[tuple[Any, ...], int] = {}
        self._names: list[str] = []
        self._has_complex = False
        self._extents: dict[int, list[tuple[int, int]]] = {}
        self._within: dict[int, bool] = {}
        self._written_elsewhere: dict[int, str] = {}
        self._drawn: Tensor | None = None
        self._draws = 0
        self._storages: list[_Storage] = []
        self._storage_of: dict[int, int] = {}
        self._named: dict[str, int] = {}
        self._gradients: dict[str, int] = {}
        self._activations: dict[str, tuple[int, ...]] = {}
        self._logged: dict[str, int] = {}
        self._marked: list[tuple[str, str, tuple[int, ...]]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch's compiler would be imported to be told to keep away: most of a second.
        return False

    def begin(self, state: Mapping[str, Tensor]) -> None:
        """Note the tensors of the state as they are before the step."""
        for name, tensor in state.items():
            if _is_plain(tensor):
                number = self._named[name] = self._number(tensor, "state")
                seen = self._tensors[number]
                self._extents.setdefault(seen.storage, []).append(_extent(seen))

    def add_batch(self, tensors: Mapping[str, Tensor]) -> None:
        """Note the tensors of the batch, which nothing has used yet; they are copied elsewhere."""
        for name, tensor in tensors.items():
            if not _is_plain(tensor):
                continue
            number = self._number(tensor, "batch")
            place = self._tensors[number].storage
            if self._storages[place].kind == "input":  # and not of the state, which has it already
                self._named.setdefault(name, number)
                self._extents.setdefault(place, []).append(_extent(self._tensors[number]))

    def marks(self) -> Marks:
        """Return how far the watch has come."""
        return Marks(
            len(self._operations),
            len(self._tensors),
            len(self._storages),
            len(self.numbers),
            self._draws,
            sum(self.unseen.values()),
            len(self._marked),
        )

    def tables(self) -> Tables:
        """Return all that was noted so far."""
        return Tables(
            tuple(self._operations),
            tuple(self._tensors),
            tuple(StorageKind(s.kind, s.bytes, s.host) for s in self._storages),
            tuple(self._named.items()),
            tuple(self._marked),
        )

    def place_of(self, tensor: Tensor) -> int | None:
        """Return the number of the storage that a tensor lies on, None where it was not seen yet."""
        if tensor.layout is not torch.strided:
            return None
        return self._storage_of.get(tensor.untyped_storage()._cdata)

    def is_made(self, place: int) -> bool:
        """Tell whether the step has made a storage."""
        return self._storages[place].kind == "temporary"

    def kept_places(self, begin: int, end: int) -> list[int]:
        """Return which storages, of those with numbers from `begin` to `end`, are kept by content."""
        return [p for p in range(begin, end) if self._storages[p].content is not None]

    def operators(self, begin: int, end: int) -> list[tuple[Any, tuple[int | float, ...]]]:
        """Return the operators from one place to another, each with the step's numbers that it has."""
        found, place = [], sum(each.numbers for each in self._operations[:begin])
        for seen in self._operations[begin:end]:
            found.append((seen.operator, tuple(self.numbers[place : place + seen.numbers])))
            place += seen.numbers
        return found

    def resume(
        self,
        tables: Tables,
        marks: Marks,
        lying: Mapping[int, Tensor],
        contents: Mapping[int, Tensor],
        batch_offsets: Mapping[str, int],
        drawn: Tensor | None,
    ) -> None:
        """Go on from a place in a step that another watch has seen whole, instead of `begin`.

        Args:
            tables, marks: what it noted, and up to where.
            lying: a tensor that is alive on each storage by number, as far as there are any; of the
                others it is not known what they were, so that what lies on them is from elsewhere.
            contents: the bytes of inputs, by number of the storage.
            batch_offsets: the storage offsets of the tensors of this step's batch, in elements.
            drawn: the state of torch's generator after the last draw.
        """
        self._operations = list(tables.operations[: marks.operations])
        self._tensors = _with_batch_at(tables, batch_offsets, marks.tensors)
        self._names = [f"%{number}" for number in range(marks.tensors)]
        self._number_of = {
            (t.storage, t.dtype, t.shape, t.stride, t.offset): n for n, t in enumerate(self._tensors)
        }
        self._draws, self._drawn = marks.draws, drawn
        for place, kind in enumerate(tables.storages[: marks.storages]):
            reference = None
            if place in lying:
                storage = lying[place].untyped_storage()
                reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                self._storage_of[storage._cdata] = place
            self._storages.append(_Storage(*kind, reference, contents.get(place)))
        self._named = {name: number for name, number in tables.named if number < marks.tensors}
        for number in self._named.values():
            seen = self._tensors[number]
            self._extents.setdefault(seen.storage, []).append(_extent(seen))
        for mark in tables.marked[: marks.marked]:
            self._mark(*mark)

    def end(self, state: Mapping[str, Tensor], loss: Any) -> Path:
        """Note what is there after the step, and return its path.

        loss: what was logged as the loss: a tensor, or a number that Python has read from one.
        """
        with torch._C._DisableTorchDispatch():
            after = {name: self._number(t) for name, t in state.items() if _is_plain(t)}
            loss_number = self._loss(loss)
        before = {n: number for n, number in self._named.items() if not self._is_input(number)}
        of_state = {self._tensors[number].storage for number in after.values()}
        elsewhere = (what for place, what in self._written_elsewhere.items() if place not in of_state)
        self.changed_elsewhere = next(elsewhere, None)
        tensors, storages = self._with_batch_moved()
        return Path(
            operations=tuple(self._operations),
            tensors=tensors,
            storages=storages,
            named=tuple(self._named.items()),
            ends=tuple((n, number) for n, number in after.items() if before.get(n) != number),
            gone=tuple(name for name in before if name not in after),
            gradients=tuple(self._gradients.items()),
            loss=loss_number,
            activations=tuple(self._activations.items()),
            logged=tuple(self._logged.items()),
        )

    def _with_batch_moved(self) -> tuple[tuple[CapturedTensor, ...], tuple[StorageKind, ...]]:
        """Return the tensors and storages, those of the batch as if they lay at the beginning of memory.

        A batch may be any part of more data. What remains of its place is its alignment.
        """
        storages = [StorageKind(s.kind, s.bytes, s.host) for s in self._storages]
        tensors = list(self._tensors)
        leaves = {tensors[n].storage for n in self._named.values() if self._is_input(n)}
        for storage in leaves:
            own = [n for n, tensor in enumerate(tensors) if tensor.storage == storage]
            begin = min(tensors[n].offset * tensors[n].dtype.itemsize for n in own)
            begin -= begin % ALIGNMENT
            moved = [tensors[n].offset - begin // tensors[n].dtype.itemsize for n in own]
            for number, offset in zip(own, moved, strict=True):
                tensors[number] = tensors[number]._replace(offset=offset)
            ends = (_end_of(tensors[number]) for number in own)
            storages[storage] = storages[storage]._replace(bytes=max(ends))
        return tuple(tensors), tuple(storages)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was computed."""
        return not self._operations and not self.unseen

    def _loss(self, loss: Any) -> int | None:
        if isinstance(loss, Tensor):
            return self._number(loss) if loss.numel() == 1 and _is_plain(loss) else None
        place = len(self.numbers)
        for operation in reversed(self._operations):
            place -= operation.numbers
            if str(operation.operator) == READ and self.numbers[place] == loss:
                return int(operation.arguments[0][1:])
        return None

    def content(self, storage: int) -> Tensor | None:
        """Return the bytes of an input that is not in the batch, as it was first seen."""
        return self._storages[storage].content

    def optimizer_uses(self, gradients: Mapping[str, Tensor]) -> None:
        """An optimizer takes a step, or has just taken one, with these gradients, by parameter.

        What is still there from the step before is not what this one made.
        """
        made = {storage for operation in self._operations for storage in operation.writes}
        for name, gradient in gradients.items():
            if name not in self._gradients and _is_plain(gradient):
                number = self._number(gradient)
                if self._tensors[number].storage in made:
                    self._mark("gradient", name, (number,))

    def logged(self, name: str, tensor: Tensor) -> None:
        """A number of the step besides its loss was logged."""
        if tensor.numel() == 1 and _is_plain(tensor) and self.place_of(tensor) is not None:
            self._mark("logged", name, (self._number(tensor),))

    def module_done(self, path: str, outputs: list[Tensor]) -> None:
        """Note what a module has given; of several calls, the last that gradients flow through."""
        dense = [each for each in outputs if _is_plain(each)]
        if dense and (torch.is_grad_enabled() or path not in self._activations):
            self._mark("activation", path, tuple(map(self._number, dense)))

    def _mark(self, kind: str, name: str, numbers: tuple[int, ...]) -> None:
        self._marked.append((kind, name, numbers))
        if kind == "gradient":
            self._gradients[name] = numbers[0]
        elif kind == "logged":
            self._logged[name] = numbers[0]
        else:
            self._activations.pop(name, None)
            self._activations[name] = numbers

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        keywords = kwargs or {}
        known = known_operator(func)
        if self.is_paused or known.how == "pass":
            return func(*args, **keywords)
        if known.how == "decompose":
            with self:
                return func.decompose(*args, **keywords)
        if known.how == "make":
            result = func(*args, **keywords)
            for tensor in leaves(result):
                self._number(tensor, "temporary")
            return result
        count = len(self.numbers)
        try:
            if known.how != "see":
                raise _UnseenError(known.how)
            arguments, named = self._encoded(known, args, keywords)
            written = self._written(known, args, keywords)
            if known.has_out and any(not self._storages[place].bytes for place in written):
                raise _UnseenError("gives memory to an empty tensor")
        except _UnseenError as error:
            del self.numbers[count:]
            return self._run_unseen(func, known, args, keywords, str(error))
        if known.draws:
            self._note_generator()
        result = _run_counted(func, args, keywords) if known.writes_list else func(*args, **keywords)
        if known.draws:
            self._drawn = torch.get_rng_state()
        if known.is_read:
            self.numbers.append(result)
        results: tuple[str | None, ...] = ()
        if known.gives:
            results, made = self._results(result)
            writes = tuple(dict.fromkeys((*written, *made))) if written else made
        else:
            writes = written
        if known.makes_dtype and not any(name == "dtype" for name, _ in named):
            named = (*named, ("dtype", result.dtype))  # not that of the process, which may be another
        is_zeroing = known.is_zeroing and self._are_gradients(written)
        phase, module = self._follower.place(is_zeroing)
        self._operations.append(
            SeenOperation(
                phase, module, func, arguments, named, results, writes, len(self.numbers) - count
            )
        )
        return result

    def _encoded(
        self, known: _Known, args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], tuple[tuple[str, Any], ...]]:
        encode = self._argument
        pairs = zip(args, known.places, strict=False)
        positional = tuple([encode(value, is_slot) for value, (_, is_slot) in pairs])
        if not keywords:
            return positional, ()
        return positional, tuple([(k, encode(v, k in known.slots)) for k, v in keywords.items()])

    def _argument(self, value: Any, is_slot: bool) -> Any:
        if isinstance(value, Tensor):
            if not self._is_plain(value):
                raise _UnseenError(_what_is_special(value))
            number = self._number(value, "argument")
            place = self._tensors[number].storage
            if place in self._extents and not self._is_within(number, place):
                raise _UnseenError("takes memory beside a tensor of the batch or the state")
            return self._names[number]
        kind = type(value)
        if kind is list or kind is tuple or isinstance(value, list | tuple):
            return tuple([self._argument(item, is_slot) for item in value])
        if is_slot and (kind is int or kind is float):
            self.numbers.append(value)
            return INT if kind is int else FLOAT
        if kind is str:
            return ("text", value)
        if value is None or kind in _CONSTANTS:
            return value
        raise _UnseenError(f"takes a {kind.__name__}")

    def _note_generator(self) -> None:
        """Note the state of torch's generator before a draw, if the last draw left it otherwise."""
        now = torch.get_rng_state()
        if self._drawn is None or not torch.equal(now, self._drawn):
            self.generators[self._draws] = now
        self._draws += 1

    @property
    def drawn(self) -> Tensor | None:
        """The state of torch's generator after the last draw, None where there was none."""
        return self._drawn

    def _written(
        self, known: _Known, args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[int, ...]:
        if not known.writes:
            return ()
        given = {name: v for (name, _), v in zip(known.places, args, strict=False)} | keywords
        tensors = (t for name in known.writes for t in leaves(given.get(name)))
        found = tuple(dict.fromkeys([self._tensors[self._number(t)].storage for t in tensors]))
        for storage in found:
            if self._storages[storage].content is not None:
                self._elsewhere.forget(self._storages[storage].reference.cdata)
                tensor = next(t for name in known.writes for t in leaves(given.get(name)))
                self._written_elsewhere[storage] = f"a tensor {tuple(tensor.shape)} of {tensor.dtype}"
        return found

    def _results(self, result: Any) -> tuple[tuple[str | None, ...], tuple[int, ...]]:
        """Return the results by name, and the storages that they lie on."""
        if isinstance(result, Tensor):
            flat: list[Any] = [result]
        else:
            flat = []
            for item in result if isinstance(result, list | tuple) else [result]:
                flat += item if isinstance(item, list | tuple) else [item]
        names: list[str | None] = []
        storages: dict[int, None] = {}
        for part in flat:
            if isinstance(part, Tensor) and self._is_plain(part):
                number = self._number(part, "temporary")
                names.append(self._names[number])
                storages[self._tensors[number].storage] = None
            else:
                names.append(None)
        return tuple(names), tuple(storages)

    def _is_plain(self, tensor: Tensor) -> bool:
        """Tell what `_is_plain` does, in less time: only of complex numbers are there negated views."""
        if type(tensor) not in _PLAIN_TENSORS or tensor.layout is not torch.strided:
            return False
        if tensor.dtype in _REAL and not self._has_complex:
            return not tensor.is_nested and not tensor._is_zerotensor()
        self._has_complex = True
        return _is_plain(tensor)

    def _run_unseen(
        self,
        func: Any,
        known: _Known,
        args: tuple[Any, ...],
        keywords: dict[str, Any],
        reason: str,
    ) -> Any:
        """Run an operation that no program can hold; what it gives or changes is an input then."""
        self.unseen[f"{func} {reason}"] = self.unseen.get(f"{func} {reason}", 0) + 1
        # What is read for the first time, and changed at once, is noted as it was.
        before = [tensor for tensor in leaves([*args, *keywords.values()]) if _is_plain(tensor)]
        versions = [(tensor, version_of(tensor)) for tensor in before]
        result = func(*args, **keywords)
        names = {p.name for p in parameters(func)} & set(known.writes or writes(func))
        given = {p.name: v for p, v in zip(parameters(func), args, strict=False)} | keywords
        changed = [t for name in names for t in leaves(given.get(name)) if _is_plain(t)]
        changed += [tensor for tensor, version in versions if version_of(tensor) != version]
        for tensor in changed:
            place = tensor.untyped_storage()._cdata
            self._storage_of.pop(place, None)
            self._elsewhere.forget(place)  # a kernel need not count what it changes
        for tensor in (*changed, *leaves(result)):
            if _is_plain(tensor):
                self._number(tensor)
        return result

    def _number(self, tensor: Tensor, kind: str = "input") -> int:
        """Return the number of a tensor; on memory not seen before, it is of that kind.

        Raises:
            _UnseenError: it is an argument, and memory from elsewhere that is too large to be kept.
        """
        storage = tensor.untyped_storage()
        place = self._storage_of.get(storage._cdata)
        if place is None:
            if kind == "argument":
                if storage.nbytes() > MOST_BYTES:
                    raise _UnseenError(
                        f"takes a part of {storage.nbytes() / 1e6:,.0f} MB from elsewhere"
                    )
                kind = "input"
            place = self._meet(tensor, storage, kind)
        seen = (place, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())
        number = self._number_of.get(seen)
        if number is None:
            number = self._number_of[seen] = len(self._tensors)
            self._names.append(f"%{number}")
            self._tensors.append(CapturedTensor(place, seen[1], tuple(seen[2]), seen[3], int(seen[4])))
        return number

    def _is_within(self, number: int, place: int) -> bool:
        """Tell whether a tensor lies within one that is kept with the batch or the state."""
        known = self._within.get(number)
        if known is None:
            begin, end = _extent(self._tensors[number])
            known = any(one <= begin and end <= two for one, two in self._extents[place])
            self._within[number] = known
        return known

    def _meet(self, tensor: Tensor, storage: torch.UntypedStorage, kind: str) -> int:
        """Note memory that was not seen before; return its number."""
        place = self._storage_of[storage._cdata] = len(self._storages)
        host = self._is_elsewhere and tensor.device.type == "cpu"
        # As long as there is a reference, no other storage can have its place.
        reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        content = self._elsewhere.of(tensor) if kind == "input" else None
        # A batch is copied elsewhere, and so it is an input without content here.
        kind = "input" if kind == "batch" else kind
        self._storages.append(_Storage(kind, storage.nbytes(), host, reference, content))
        return place

    def _is_input(self, number: int) -> bool:
        return self._storages[self._tensors[number].storage].kind == "input"

    def _are_gradients(self, storages: tuple[int, ...]) -> bool:
        return set(storages) <= {
            self._tensors[number].storage
            for name, number in self._named.items()
            if name.startswith("gradient/")
        }


_CONSTANTS = {bool, int, float, torch.dtype, torch.layout, torch.memory_format, torch.device}


def known_operator(func: Any) -> _Known:
    """Return what is known of an operator."""
    return _known.get(id(func)) or _learn(func)


def _run_counted(func: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """Run an operator on lists; torch counts what it writes as it does where nothing is watched.

    Its kernel may write each tensor by an operator of its own, which torch does not count below a mode.
    """
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return func(*args, **keywords)


def _learn(func: Any) -> _Known:
    name = func.overloadpacket.__name__
    how, text = "see", str(func)
    if func.namespace in ("prim", "profiler") or name in _OTHER_GEOMETRY:
        how = "pass"
    else:
        try:
            resolve(text, is_plain=True)
        except NotAllowedError as error:
            how = str(error).removeprefix(f"{text} ")
            if _is_composite(func):  # it arrives whole in inference mode alone
                how = "decompose"
        else:
            if not computes(func):
                is_view = any(r.alias_info for r in func._schema.returns) or "unsafe" in name
                how = "pass" if is_view else "make"
    try:
        known = _Known(
            how,
            tuple(writes(func)),
            tuple((p.name, is_number_slot(func, p.name)) for p in parameters(func)),
            frozenset(p.name for p in parameters(func) if is_number_slot(func, p.name)),
            bool(func._schema.returns) and text != READ,
            draws_random_numbers(func),
            _makes_dtype(func),
            any(argument.is_out for argument in func._schema.arguments),
            text == READ,
            name in _ZEROING,
            "foreach" in name and bool(writes(func)),
        )
    except (AttributeError, RuntimeError):  # an operator without a schema that can be read
        known = _Known("has no schema" if how == "see" else how)
    _known[id(func)] = known
    _kept_alive.append(func)  # its id is a key
    return known


def _with_batch_at(tables: Tables, offsets: Mapping[str, int], count: int) -> list[CapturedTensor]:
    """Return the first tensors of a step, as they lie where the batch begins elsewhere in its memory."""
    moved: dict[int, int] = {}
    for name, number in tables.named:
        if number >= count:
            continue
        if name in offsets and tables.storages[tables.tensors[number].storage].kind == "input":
            seen = tables.tensors[number]
            moved[seen.storage] = (offsets[name] - seen.offset) * seen.dtype.itemsize
    return [
        t._replace(offset=t.offset + moved[t.storage] // t.dtype.itemsize) if t.storage in moved else t
        for t in tables.tensors[:count]
    ]


def _extent(tensor: CapturedTensor) -> tuple[int, int]:
    """Return from which byte of its storage to which a tensor lies."""
    return tensor.offset * tensor.dtype.itemsize, _end_of(tensor)


def _end_of(tensor: CapturedTensor) -> int:
    """Return how many bytes of its storage a tensor needs."""
    if 0 in tensor.shape:
        return tensor.offset * tensor.dtype.itemsize
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride, strict=True))
    return (tensor.offset + last + 1) * tensor.dtype.itemsize


def _makes_dtype(func: Any) -> bool:
    """Tell whether an operator makes a tensor of none, of the process's dtype where none is given."""
    kinds = {p.name: p.kind for p in parameters(func)}
    return "dtype" in kinds and not any("Tensor" in kind for kind in kinds.values())


def _is_composite(func: Any) -> bool:
    """Tell whether torch makes other operators of one before it runs."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return bool(has_kernel(func.name(), "CompositeImplicitAutograd"))


def _is_plain(tensor: Tensor) -> bool:
    """Tell whether a program can hold a tensor: dense, of torch's own kind, with numbers as they are."""
    return (
        type(tensor) in _PLAIN_TENSORS
        and tensor.layout == torch.strided
        and tensor.dtype in _DTYPES
        and tensor.device.type != "meta"
        and not tensor.is_nested
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and not tensor._is_zerotensor()
        and not tensor.is_neg()
        and not tensor.is_conj()
    )


def _what_is_special(tensor: Tensor) -> str:
    if tensor.layout != torch.strided:
        return "takes a sparse tensor"
    if type(tensor) not in _PLAIN_TENSORS:
        return f"takes a {type(tensor).__name__}, a tensor of its own kind"
    return f"takes a {tensor.dtype} tensor that is nested, conjugated or without numbers of its own"
