"""Paths: what the steps of a loop did, without their numbers and the content of their inputs.

A path is one observed step. An entry is one call of the dispatcher, or something else that a step does,
in the tree of all of them. Arguments stand in it as tokens, tensors by the order in which the step met
them:

    ("r", k)                       the tensor k, the same object on the same memory
    ("a", k, place, geometry)      another tensor on memory that the step knows; it becomes k
    ("x", k, about, geometry)      the first tensor on memory from outside; it becomes k
    ("p", k, place, geometry)      a part of data from outside, at any place in it; it becomes k
    ("c", value, type, text)       a constant; the text distinguishes -0.0 from 0.0, and finds NaN equal
    ("n", type)                    a slot: the number belongs to the step
    ("i",)                         any integer: where a view begins, which its offset shows
    ("l", tokens)                  a list
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from hashlib import blake2b
from typing import Any, NamedTuple

import torch

from everystep.ops.arguments import references
from everystep.program.number_slots import READ
from everystep.program.operation import Phase, Storage, extent_of
from everystep.step.calling_code import Calls

__all__ = [
    "READ_UNSEEN",
    "Ending",
    "Entry",
    "Mark",
    "MetTensor",
    "Path",
    "PathWriter",
    "SeenOperation",
    "SeenTensor",
    "places_of_reads",
    "sizeless",
]

# A loop that adds to its result in every second step, as a tree of entries:
#
#   root - batch - mul -+- (ending)             steps 1, 3, 5, ...
#                       +- add - (ending)       steps 2, 4, 6, ...
#
# The key of `mul(w, x)`, with w the state and x the batch, which makes the tensor 2:
#   ("call", aten.mul.Tensor, (("r", 0), ("r", 1)), (), ((0, 2),))
# The last of it are the new tensors among the results, by place and number.

#: How the key of an entry begins where Python has got numbers, from an operation that no program can
#: hold, or from the memory of a tensor, which follows.
READ_UNSEEN = ("unseen", "read")


class SeenTensor(NamedTuple):
    """An observed tensor: its storage, and its geometry in elements.

    moves: the place of its offset among the numbers of the step, if it is one of those; None if it is
    fixed.
    """

    storage: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    moves: int | None = None

    @property
    def geometry(self) -> tuple[Any, ...]:
        """Its dtype, shape, stride and offset."""
        return self[1:5]


class SeenOperation(NamedTuple):
    """An observed operation.

    arguments, keywords: tensors are `%3`, the number of a SeenTensor; a number of the step is its type;
    results: numbers of tensors; writes: storages; numbers: the places of its own among the step's;
    has_gradients: whether autograd was on.
    """

    phase: Phase
    module: str | None
    operator: Any
    arguments: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]
    results: tuple[str | None, ...]
    writes: tuple[int, ...]
    numbers: range
    has_gradients: bool = True

    def tensors_read(self) -> list[int]:
        """Return the numbers of the tensors among its arguments."""
        given = *self.arguments, *(value for _, value in self.keywords)
        return [int(name[1:]) for name in references(given) if name.startswith("%")]


@dataclass(frozen=True, eq=False)
class Path:
    """What one step did, without its numbers and the content of its inputs.

    Two are equal if their digests are: unlike the values, these distinguish 1 from True, and -0.0 from
    0.0.

    named: the tensors of the state and of the batch, by name; ends: the tensor of each state name after
    the step, if it is another; gone: names that no longer exist; gradients: as an optimizer found them,
    or the last backward pass left them; loss: the tensor logged as the loss; activations: the output of
    each module, and how many operations came before it was there; logged: other logged tensors with one
    element; read_unseen: how often Python has got numbers that no program computes;
    read_batch: the memory of the batch from which it has got numbers.
    """

    operations: tuple[SeenOperation, ...]
    tensors: tuple[SeenTensor, ...]
    storages: tuple[Storage, ...]
    named: tuple[tuple[str, int], ...]
    ends: tuple[tuple[str, int], ...]
    gone: tuple[str, ...]
    gradients: tuple[tuple[str, int], ...]
    loss: int | None
    activations: tuple[tuple[str, tuple[int, ...], int], ...]
    logged: tuple[tuple[str, int], ...] = ()
    read_unseen: int = 0
    read_batch: tuple[int, ...] = ()
    #: The code that called each operation when a step had this path first.
    lines: tuple[Calls, ...] = ()

    @property
    def digest(self) -> bytes:
        """Stands for all but the lines of code (BLAKE2, 128 bits)."""
        return self._digests[1]

    @property
    def form(self) -> bytes:
        """Stands for all but the sizes of tensors and memory, and the lines (BLAKE2, 128 bits)."""
        return self._digests[0]

    @cached_property
    def _digests(self) -> tuple[bytes, bytes]:
        sizes: list[int] = []
        operations = []
        for each in self.operations:
            arguments, keywords = sizeless(each.arguments, sizes), sizeless(each.keywords, sizes)
            operations.append((*each[:3], arguments, keywords, *each[5:]))
        tensors = []
        for storage, dtype, shape, stride, offset, moves in self.tensors:
            sizes += (*shape, *stride, offset)
            # The name of a tensor in a program depends on whether it is at the beginning.
            tensors.append((storage, dtype, len(shape), offset == 0, moves))
        sizes += [storage.bytes for storage in self.storages]
        storages = [(storage.kind, storage.host) for storage in self.storages]
        # Steps that do the same from different lines of code share a program.
        left_out = ("operations", "tensors", "storages", "lines")
        parts = [getattr(self, each.name) for each in fields(self) if each.name not in left_out]
        text = repr((operations, tensors, storages, parts))
        form = blake2b(text.encode(), digest_size=16).digest()
        # The sizes themselves would take some ten kB for each path that is remembered.
        return form, blake2b(repr(sizes).encode(), key=form, digest_size=16).digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Path) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def unused_gradients(self) -> set[str]:
        """Return the names of gradients from before the step that it neither reads nor writes.

        A loop that begins with zero_grad only drops them.
        """
        used: set[int] = set()
        for operation in self.operations:
            used.update(operation.writes)
            used.update(self.tensors[number].storage for number in operation.tensors_read())
        used.update(self.tensors[number].storage for _, number in self.ends)
        return {
            name
            for name, number in self.named
            if name.startswith("gradient/") and self.tensors[number].storage not in used
        }


def sizeless(value: Any, sizes: list[int]) -> Any:
    """Return an argument with a mark in place of whole numbers, which are added to `sizes`."""
    kind = type(value)
    if kind is int:
        sizes.append(value)
        return "#"  # references to tensors begin with `%`
    if kind is tuple and value[:1] != ("text",):
        return tuple([sizeless(item, sizes) for item in value])
    return value


def places_of_reads(operations: Iterable[SeenOperation]) -> Iterator[int]:
    """Yield the places, among the numbers of a step, of those that Python has read."""
    for operation in operations:
        if str(operation.operator) == READ:
            yield operation.numbers[0]


class MetTensor(NamedTuple):
    """A tensor when a step met it.

    origin: the number of the first tensor on its memory; kind: where that memory comes from: `state`,
    `batch`, `input` (from outside), `part` (a part of data from outside, as memory of its own),
    `scratch` (from outside, and overwritten before anything is read there), `allocated` (by a call that
    only does that) or `temporary`; bytes,
    on_cpu: of that memory; is_named: whether it is a tensor of the state or the batch itself, or was
    overwritten when it was met; geometry: dtype, shape, stride and offset; of a batch, the offset
    counts from the first tensor there; moves: as of a SeenTensor.
    """

    origin: int
    kind: str
    bytes: int
    on_cpu: bool
    is_named: bool
    geometry: tuple[Any, ...]
    moves: int | None = None


class Mark(NamedTuple):
    """A tensor that has a name: `state`, `batch`, `gradient`, `logged`, or an output of a module.

    kind: an `output` counts as the activation; a `last output` only if the module has none yet.
    """

    kind: str
    name: str
    numbers: tuple[int, ...]


class Ending(NamedTuple):
    """How a step ended.

    origins: of each storage of the path, the number of the first tensor that the step met there; names,
    bound: of the state afterwards, and the token of each tensor; changes: how often each was changed;
    loss: the token of the logged tensor, or the place of the number that was read, or None; reads: the
    places of the numbers that were read; is_met: whether each token is the number of a tensor.
    """

    path: Path
    origins: tuple[int, ...]
    names: tuple[str, ...] = ()
    bound: tuple[Any, ...] = ()
    changes: tuple[int | None, ...] = ()
    loss: Any = None
    reads: tuple[int, ...] = ()
    is_met: bool = False


@dataclass(slots=True, eq=False, repr=False)
class Entry:
    """What a step does at one point.

    key: the kind, and what is compared; new: the tensors that the step meets here; operation: what a
    program does here, with the numbers of met tensors; marks: what has a name here; met, draws: how many
    tensors the step has met, and how often it has drawn random numbers, after it.

    Of a call: func, where: the operator, and the modules in which it runs; check: makes the call if it
    is this one, else returns MISS; brings: whether memory from outside is met here; contents:
    arguments that read such memory first, by their place, and the number of the first tensor there;
    shaped: whether the call does not determine the shapes or dtypes of its results, which are those of
    the entry after it; kept: results with memory that is met again without them, by their place and
    number; in_graph: whether views that move, and that it returns, may be in graphs of backward passes.

    Of an operation: lines: the code that called it; nodes: how many nodes autograd's graph has after it.

    jump: of a backward pass that can run unwatched, the entry after it, and in which cases.
    """

    key: Any
    parent: Entry | None
    new: tuple[MetTensor, ...]
    operation: SeenOperation | None = None
    marks: tuple[Mark, ...] = ()
    met: int = field(init=False)
    draws: int = field(init=False)
    func: Any = None
    where: Any = None
    check: Callable[..., Any] | None = None
    next: Entry | None = None
    children: dict[Any, Entry] = field(default_factory=dict)
    contents: tuple[tuple[int, int], ...] = ()
    brings: bool = False
    shaped: bool = False
    kept: tuple[tuple[int, int], ...] = ()
    in_graph: bool = False
    lines: Calls = ()
    nodes: int = 0
    ending: Ending | None = None
    jump: Any = None

    def __post_init__(self) -> None:
        self.met = len(self.new) + (self.parent.met if self.parent is not None else 0)
        self.draws = self.parent.draws if self.parent is not None else 0

    def from_root(self) -> list[Entry]:
        """Return the entries from the beginning of the step to this one."""
        found, entry = [self], self.parent
        while entry is not None:
            found.append(entry)
            entry = entry.parent
        return found[::-1]

    def operations(self) -> Iterator[SeenOperation]:
        """Yield the operations from the beginning of the step to this entry."""
        for entry in self.from_root():
            # The entry after a shaped one has the operation again, with its results.
            if entry.operation is not None and not entry.shaped:
                yield entry.operation


class PathWriter:
    """Writes the path of a step: its tensors and storages have numbers of their own, in order of use.

    Args:
        met: the tensors that the step has met, by number.
        brought: the first tensors on memory that the step keeps by content.
        has_host: whether memory of the CPU is apart from that of the training.
    """

    def __init__(self, met: Sequence[MetTensor], brought: Container[int], *, has_host: bool) -> None:
        self.origins: list[int] = []
        self._met = met
        self._brought = brought
        self._has_host = has_host
        self._tensors: list[SeenTensor] = []
        self._storages: list[Storage] = []
        self._number_of: dict[SeenTensor, int] = {}
        self._place_of: dict[int, int] = {}

    def path(self, end: Entry, state: Mapping[str, int], loss: int | None) -> Path:
        """Return the path that ends with an entry.

        Args:
            end: the entry.
            state: the tensors of the state afterwards, by name.
            loss: the tensor logged as the loss.
        """
        named: dict[str, int] = {}
        before: dict[str, int] = {}
        gradients: dict[str, int] = {}
        activations: dict[str, tuple[tuple[int, ...], int]] = {}
        logged: dict[str, tuple[int, int]] = {}
        operations: list[SeenOperation] = []
        lines: list[Calls] = []
        written: set[int] = set()
        read_unseen = 0
        read_batch: set[int] = set()
        for entry in end.from_root():
            if entry.key[:2] == READ_UNSEEN:
                # Data from outside is in the run, so a replay has what Python read of it.
                origin = self._given(entry, written)
                read_unseen += origin is None
                if origin is not None and self._met[origin].kind == "batch":
                    read_batch.add(self._place(origin))
            if entry.operation is not None and not entry.shaped:
                lines.append(entry.lines)
                operations.append(self._renumbered(entry.operation))
                written.update(operations[-1].writes)
            if entry.key[0] == "logged":  # the last of that name counts
                logged.pop(entry.key[1], None)
            for mark in entry.marks:
                numbers = tuple(map(self._number, mark.numbers))
                storage = self._storages[self._tensors[numbers[0]].storage]
                if mark.kind == "state":
                    named[mark.name] = before[mark.name] = numbers[0]
                # A batch on memory of the state has its name there.
                elif mark.kind == "batch" and storage.kind == "input":
                    named.setdefault(mark.name, numbers[0])
                # A gradient that no operation has written remains from the step before.
                elif mark.kind == "gradient" and self._tensors[numbers[0]].storage in written:
                    if mark.name not in gradients or entry.key[0] == "backward ends":
                        gradients[mark.name] = numbers[0]
                elif mark.kind == "logged":
                    logged[mark.name] = numbers[0], len(operations)
                elif mark.kind == "output" or (
                    mark.kind == "last output" and mark.name not in activations
                ):
                    # The order is that in which the modules ran last.
                    activations.pop(mark.name, None)
                    activations[mark.name] = numbers, len(operations)
        after = {name: self._number(met) for name, met in state.items()}
        loss_number = None if loss is None else self._number(loss)
        # A program has them at the end of a step, when the tensor may have another value.
        kept = {
            name: number
            for name, (number, place) in logged.items()
            if not any(self._tensors[number].storage in each.writes for each in operations[place:])
        }
        self._cut_batch(named.values())
        return Path(
            operations=tuple(operations),
            tensors=tuple(self._tensors),
            storages=tuple(self._storages),
            named=tuple(named.items()),
            ends=tuple((n, number) for n, number in after.items() if before.get(n) != number),
            gone=tuple(name for name in before if name not in after),
            gradients=tuple(gradients.items()),
            loss=loss_number,
            activations=tuple((name, *given) for name, given in activations.items()),
            logged=tuple(kept.items()),
            read_unseen=read_unseen,
            read_batch=tuple(sorted(read_batch)),
            lines=tuple(lines),
        )

    def _given(self, read: Entry, written: Container[int]) -> int | None:
        """Return the tensor on data from outside from which Python got numbers, None if not of data.

        written: storages that the step has written so far.
        """
        numbers = read.key[2] if len(read.key) > 2 else (None,)
        if numbers[0] is None:
            return None
        origin = self._met[numbers[0]].origin
        is_data = self._met[origin].kind in ("batch", "input", "part")
        return origin if is_data and self._place_of.get(origin) not in written else None

    # Two tensors on one place in one layout are one tensor of a path: no operation tells them apart.
    def _number(self, met: int) -> int:
        tensor = self._met[met]
        seen = SeenTensor(self._place(tensor.origin), *tensor.geometry)
        if tensor.moves is not None:
            # The offset is the step's: in the path, it would make a program for each place.
            seen = seen._replace(offset=0, moves=tensor.moves)
        if seen not in self._number_of:
            self._number_of[seen] = len(self._tensors)
            self._tensors.append(seen)
        return self._number_of[seen]

    def _place(self, origin: int) -> int:
        if origin not in self._place_of:
            self._place_of[origin] = len(self._storages)
            first = self._met[origin]
            kind: Any = _KINDS.get(first.kind, first.kind)
            # What is in it no operation has written: NumPy, or other code that torch does not show, has.
            if first.kind == "allocated" and origin in self._brought:
                kind = "input"
            host = self._has_host and first.on_cpu
            self._storages.append(_storage(kind, first.bytes, host))
            self.origins.append(origin)
        return self._place_of[origin]

    def _renumbered(self, operation: SeenOperation) -> SeenOperation:
        return operation._replace(
            arguments=self._named(operation.arguments),
            keywords=tuple([(key, self._named(value)) for key, value in operation.keywords]),
            results=self._named(operation.results),
            writes=tuple(map(self._place, operation.writes)),
        )

    def _named(self, value: Any) -> Any:
        if isinstance(value, str) and value.startswith("%"):
            return f"%{self._number(int(value[1:]))}"
        # A text of the user's code may begin with `%`, too.
        if isinstance(value, tuple) and value[:1] != ("text",):
            return tuple(map(self._named, value))
        return value

    def _cut_batch(self, named: Iterable[int]) -> None:
        """Let the memory of a batch end with its tensors: it may be any part of more data."""
        tensors, storages = self._tensors, self._storages
        places = {tensors[number].storage for number in named}
        for storage in (place for place in places if storages[place].kind == "input"):
            ends = (extent_of(each.geometry)[1] for each in tensors if each.storage == storage)
            # A copy, since many paths share one storage object.
            storages[storage] = storages[storage].model_copy(update={"bytes": max(ends)})


@lru_cache(10_000)
def _storage(kind: Any, size: int, host: bool) -> Storage:
    """Return a storage, the same object again: paths have many alike."""
    return Storage(kind=kind, bytes=size, host=host)


#: Of memory, by where it comes from, if that has another name in a path.
_KINDS = {"batch": "input", "part": "input", "scratch": "temporary", "allocated": "temporary"}
