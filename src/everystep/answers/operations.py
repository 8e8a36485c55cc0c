"""Compares two replays of a step operation by operation, down to the numbers that differ."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from everystep.ops.arguments import references
from everystep.ops.operators import parameters
from everystep.program.observed import Observed, unread_inputs
from everystep.program.operation import Operation
from everystep.recording.files import bytes_of
from everystep.recording.settings_diff import same_value
from everystep.replay.opened_step import Step
from everystep.step.state import Size, as_integers, same_bits, size_of_difference

__all__ = [
    "Argument",
    "OperationDifference",
    "OperationPair",
    "Source",
    "StepPair",
    "TensorDifference",
    "memory_of",
    "name_in_words",
    "rows_that_differ",
    "tensor_difference",
]

#: Positions of differing numbers that are named.
NAMED = 10
#: Numbers among which they are looked for at a time.
BLOCK = 1 << 20


class TensorDifference(NamedTuple):
    """How two tensors of the same name differ.

    elements: the number of differing elements, of how many; positions: of the first of them; values:
    there, in both; largest, absolute, relative: how far they are apart at most, as in `Size`.
    """

    name: str
    elements: int
    of: int
    positions: list[tuple[int, ...]]
    values: list[tuple[float, float]]
    largest: int | None = None
    absolute: float | None = None
    relative: float | None = None

    @property
    def size(self) -> Size:
        """How far they are apart."""
        return Size(self.largest, self.absolute, self.relative)


@dataclass(frozen=True)
class OperationDifference:
    """The first operation with a different result, and why.

    step, index: its position; one, other: the operation in each run (None if one run has no such
    operation); results: those that differ, and other memory that it wrote; inputs: those that already
    differ; rows: of the batch, as (position, row in the first run, row in the second); rows_of: what
    their numbers are of; causes: as text, which inputs differ, and where they were set; others: as text,
    inputs from different sources in the two runs.
    """

    step: int
    index: int
    one: Observed | None
    other: Observed | None
    results: list[TensorDifference] = field(default_factory=list)
    inputs: list[TensorDifference] = field(default_factory=list)
    rows: list[tuple[int, int, int]] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)
    others: tuple[list[str], ...] = ()
    rows_of: str = "the batch"

    @property
    def sides(self) -> list[Observed]:
        """The operation in each run that has one."""
        return [each for each in (self.one, self.other) if each is not None]

    @property
    def is_one_operation(self) -> bool:
        """Whether both runs have the same operator there, for the same purpose."""
        operations = [side.operation for side in self.sides]
        return len(operations) == 2 and len({(o.phase, o.module, o.operator) for o in operations}) == 1


# Names differ between programs, sources do not: e.g. the first argument of operation 7 is `mm_3` in one
# run and `mm_4` in the other, and both are the first result of operation 5: Source("mm_3", (5, 0), ((8,
# 4), (4, 1), 0)).
class Source(NamedTuple):
    """The source of an input of an operation.

    name: of its memory; made_by: the number of the operation of this step that made it, and the place
    among its results; None if it was there before the step; view: the shape, the strides and the offset
    of the tensor in that memory.
    """

    name: str
    made_by: tuple[int, int] | None
    view: tuple[Any, ...]


class _Sources:
    """Where the tensors of a step come from.

    known: the tensors of the batch, and of the state before the step, by name.
    """

    def __init__(self, step: Step) -> None:
        self.known = step.state | step.batch.tensors
        self._step = step
        self._made: dict[str, tuple[int, int]] = {}
        read: set[str] = set()
        for index, seen in enumerate(step.operations):
            read |= {*map(memory_of, seen.inputs)}
            for place, name in enumerate(map(memory_of, seen.results)):
                if name not in read:  # else it was there before, and is only changed in place
                    # The first that made it: later ones write in place.
                    self._made.setdefault(name, (index, place))

    def of(self, name: str) -> Source:
        """Return where a tensor comes from, by its name among the arguments of an operation."""
        memory, spec = memory_of(name), self._step.places.tensors[name]
        return Source(memory, self._made.get(memory), (spec.shape, spec.stride, spec.offset))

    def text(self, source: Source) -> str:
        """Describe where a tensor comes from."""
        shape, stride, _ = source.view
        is_transposed = len(shape) > 1 and stride[-2] == 1 < stride[-1]
        return self._memory_text(source) + " transposed" * is_transposed

    def _memory_text(self, source: Source) -> str:
        if source.made_by is not None and not source.name.startswith("gradient/"):
            operation = self._step.operations[source.made_by[0]].operation
            module = f" of {operation.module}" if operation.module else ""
            return f"#{source.made_by[0]} {operation.operator.split('.')[1]}{module}"
        if source.name in self._step.batch.tensors:
            return f"batch.{source.name}"
        is_named = source.name in self.known or source.made_by is not None
        return name_in_words(source.name) if is_named else "a tensor from outside of the step"


class StepPair:
    """A step of two replays, side by side.

    has_rows: whether batches are rows of data that the runs know by their numbers.
    """

    has_rows = False

    def __init__(self, one: Step, other: Step) -> None:
        self.steps = one, other

    @cached_property
    def sources(self) -> tuple[_Sources, _Sources]:
        """Where the tensors of the step come from, in both."""
        return _Sources(self.steps[0]), _Sources(self.steps[1])

    def operation(self, index: int) -> OperationPair:
        """Return an operation that both have."""
        one, other = self.steps
        return OperationPair(one.operations[index], other.operations[index], self.sources)

    def first_difference(self) -> OperationDifference | None:
        """Return the first operation with a different result, or that only one has, without causes."""
        one, other = self.steps
        for index in range(max(len(one.operations), len(other.operations))):
            x, y = (s.operations[index] if index < len(s.operations) else None for s in (one, other))
            found = OperationDifference(one.number, index, x, y)
            if not found.is_one_operation:
                return found
            a, b = found.sides
            results = _different(_in_order(a.made, b.made))
            if results:
                given = self.operation(index)
                inputs = _different(given.inputs)
                others = given.others
                is_of_batch = any(memory_of(each.name) in one.batch.tensors for each in inputs)
                if len(a.results) != len(b.results):  # of lists of tensors, which do not belong together
                    results = []
                rows = _different_rows(one, other, self.has_rows) if is_of_batch else []
                rows_of = " | ".join(dict.fromkeys(step.batch.whole for step in (one, other)))
                shown = others if any(others) else ()
                return OperationDifference(
                    one.number, index, a, b, results, inputs, rows, others=shown, rows_of=rows_of
                )
        return None


class Argument(NamedTuple):
    """An argument of an operation that differs between two runs.

    name: of its parameter; values: in both, or the default.
    """

    name: str
    values: tuple[Any, Any]


class OperationPair:
    """An operation that two steps have for the same purpose, with its inputs in both."""

    def __init__(self, one: Observed, other: Observed, sources: tuple[_Sources, _Sources]) -> None:
        self._pair = one, other
        self._sources = sources
        given = _all_given(one.operation), _all_given(other.operation)
        self._arguments = [(name, given[0][name], given[1][name]) for name in given[0]]
        self._unread = unread_inputs(one.operation)

    @property
    def arguments(self) -> list[Argument]:
        """The arguments that differ, except for the content of tensors."""
        plain = (Argument(name, (_plain(a), _plain(b))) for name, a, b in self._arguments)
        return [
            each
            for each in plain
            if not all(map(_is_tensors, each.values)) and not same_value(*each.values)
        ]

    @property
    def inputs(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """The tensors at the same place among the arguments: the first one's name, and both.

        Tensors from different sources are left out, and those of the same shape without numbers that the
        operation reads.
        """
        one, other = (each.inputs for each in self._pair)
        pairs = (zip(references(a), references(b), strict=False) for _, a, b in self._arguments)
        for names in dict.fromkeys(pair for each in pairs for pair in each):
            x, y = one.get(names[0]), other.get(names[1])
            if x is None or y is None:
                continue
            is_read = names[0] not in self._unread or (x.shape, x.dtype) != (y.shape, y.dtype)
            if is_read and not self._is_other(names):
                yield names[0], x, y

    @property
    def others(self) -> tuple[list[str], list[str]]:
        """The tensors from different sources in the two runs, for both, as text."""
        found: tuple[list[Source], list[Source]] = ([], [])
        for _, a, b in self._arguments:
            names = [*references(a)], [*references(b)]
            one, other = ([*map(side.of, each)] for side, each in zip(self._sources, names, strict=True))
            if len(one) == len(other):
                places = [
                    place
                    for place, pair in enumerate(zip(*names, strict=True))
                    if self._is_other(pair)
                    and not (pair[0] in self._unread and one[place].view[0] == other[place].view[0])
                ]
                one, other = ([each[place] for place in places] for each in (one, other))
            # Of lists of different lengths, these are the tensors that only one of them has.
            elif isinstance(a, list | tuple) and isinstance(b, list | tuple):
                one, other = (
                    [x for x in one if not any(self._is_one_memory(x, y) for y in other)],
                    [y for y in other if not any(self._is_one_memory(x, y) for x in one)],
                )
            else:  # a tensor in one run only: an argument that differs
                continue
            found[0].extend(one)
            found[1].extend(other)
        return self._texts(*found)

    def _texts(self, one: list[Source], other: list[Source]) -> tuple[list[str], list[str]]:
        """Describe where tensors come from, with their shapes if only these differ."""
        texts = [*map(self._sources[0].text, one)], [*map(self._sources[1].text, other)]
        for place, (x, y) in enumerate(zip(one, other, strict=False)):
            if texts[0][place] == texts[1][place] and x.view[0] != y.view[0]:
                texts[0][place] += f" {x.view[0]}"
                texts[1][place] += f" {y.view[0]}"
        return texts

    def _is_other(self, names: tuple[str, str]) -> bool:
        """Return whether two inputs come from another source, or are another view of the same one."""
        x, y = (side.of(name) for side, name in zip(self._sources, names, strict=True))
        if not self._is_one_memory(x, y):
            return True
        given = [each.inputs.get(name) for each, name in zip(self._pair, names, strict=True)]
        if x.view == y.view or _are_same(*given, if_unknown=True):
            return False
        # Results of earlier operations are the same in both, so different numbers are another part of
        # them.
        known = [side.known.get(each.name) for side, each in zip(self._sources, (x, y), strict=True)]
        return x.made_by is not None or _are_same(*known, if_unknown=False)

    def _is_one_memory(self, x: Source, y: Source) -> bool:
        if x.made_by or y.made_by:
            return x.made_by == y.made_by
        # From before the step, each under a name that the other run does not have: it may be the same.
        return x.name == y.name or not (
            x.name in self._sources[1].known or y.name in self._sources[0].known
        )


def _are_same(one: Tensor | None, other: Tensor | None, *, if_unknown: bool) -> bool:
    return if_unknown if one is None or other is None else same_bits(one, other)


def memory_of(name: str) -> str:
    """Return the name of the memory of a tensor: `x~1` is a view of `x`."""
    return name.partition("~")[0]


def name_in_words(name: str) -> str:
    """Return the readable name of a tensor of the state."""
    kind, _, rest = name.partition("/")
    if kind == "optimizer":
        parameter, _, key = rest.rpartition("/")
        return f"{key} of {parameter}"
    if kind == "gradient":
        return f"gradient of {rest}"
    if kind == "loss" and rest:
        return f"loss.{rest}"
    return rest if kind in ("parameter", "buffer") else name


class _ATensor:
    """Replaces a tensor among arguments."""

    def __repr__(self) -> str:
        return "a tensor"


_A_TENSOR = _ATensor()


def _all_given(operation: Operation) -> dict[str, Any]:
    """Return all arguments as programs have them, by the name of their parameter, with defaults."""
    given = operation.given()
    found = {}
    for parameter in parameters(operation.resolved):
        default = parameter.default
        value = given.get(parameter.name, {"text": default} if isinstance(default, str) else default)
        # torch takes one number for a list of a fixed length: stride=1 is stride=[1, 1].
        if parameter.size and isinstance(value, int) and not isinstance(value, bool):
            value = [value] * parameter.size
        found[parameter.name] = value
    return found


def _plain(value: Any) -> Any:
    """Return an argument of a program as a plain value; what names a kind, by its name."""
    if isinstance(value, str):
        return _A_TENSOR
    if isinstance(value, list | tuple):
        return [*map(_plain, value)]
    if isinstance(value, dict) and len(value) == 1:
        ((kind, name),) = value.items()
        return float(name) if kind == "float" else name
    return value


def _is_tensors(value: Any) -> bool:
    """Return whether an argument is a tensor or a list of tensors."""
    return value is _A_TENSOR or (isinstance(value, list) and {*map(id, value)} == {id(_A_TENSOR)})


def _different_rows(one: Step, other: Step, has_rows: bool) -> list[tuple[int, int, int]]:
    """Return the positions of a batch that differ, with their row numbers in the data."""
    tensors = one.batch.tensors, other.batch.tensors
    if not tensors[0] or tensors[0].keys() != tensors[1].keys():
        return []
    pairs = [(tensor, tensors[1][name]) for name, tensor in tensors[0].items()]
    if any(a.shape != b.shape or not a.ndim for a, b in pairs):
        return []
    count = len(pairs[0][0])
    differing = [(pair, rows_that_differ(*pair).cpu()) for pair in pairs if len(pair[0]) == count]
    moved = [(pair, rows) for pair, rows in differing if rows.any()]
    places = sorted({place for _, rows in moved for place in torch.nonzero(rows).flatten().tolist()})
    # Where the runs do not know these numbers, and the second batch has the same rows in another order,
    # a row's number is its position in the first one.
    if not has_rows:
        # By content: the same bytes are the same row, whatever its place.
        contents = [
            [tuple(bytes_of(pair[side][place]).tobytes() for pair, _ in moved) for place in places]
            for side in (0, 1)
        ]
        if sorted(contents[0]) == sorted(contents[1]):
            known = dict(zip(contents[0], places, strict=True))
            return [(place, place, known[each]) for place, each in zip(places, contents[1], strict=True)]
    return [(place, one.batch.number(place), other.batch.number(place)) for place in places]


def rows_that_differ(one: Tensor, other: Tensor) -> Tensor:
    """Return which rows of two tensors of the same shape and dtype differ (N)."""
    differs = as_integers(one) != as_integers(other.to(one.device))
    return differs.reshape(len(one), -1).any(1)


def _in_order(
    one: dict[str, Tensor], other: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Yield results at the same place, under any names."""
    # By place, since names are those of one program.
    for x, y in zip_longest(one.items(), other.items()):
        name, tensor = x or y
        yield name, tensor, y[1] if x and y else None


def _different(pairs: Iterable[tuple[str, Tensor, Tensor | None]]) -> list[TensorDifference]:
    return [tensor_difference(n, a, b) for n, a, b in pairs if b is None or not same_bits(a, b)]


def tensor_difference(name: str, one: Tensor, other: Tensor | None) -> TensorDifference:
    """Return how two tensors differ. other: None if only one run has it."""
    if other is None or one.shape != other.shape or one.dtype != other.dtype:
        return TensorDifference(name, one.numel(), one.numel(), [], [])
    other = other.to(one.device)
    differs = as_integers(one) != as_integers(other)
    # As integers, a complex number is two.
    differs = differs.any(-1) if one.is_complex() else differs
    positions = _first_places(differs)
    values = [(one[p].item(), other[p].item()) for p in positions]
    size = size_of_difference(one, other)
    return TensorDifference(name, int(differs.sum()), one.numel(), positions, values, *size)


def _first_places(differs: Tensor) -> list[tuple[int, ...]]:
    """Return the first places that are true; a list of all of them may be larger than the tensor."""
    found: list[int] = []
    for first, part in enumerate(torch.split(differs.flatten(), BLOCK)):
        found += (torch.nonzero(part).flatten()[: NAMED - len(found)] + first * BLOCK).tolist()
        if len(found) == NAMED:
            break
    if not differs.ndim:
        return [()] * len(found)
    places = np.unravel_index(np.asarray(found, dtype=np.int64), differs.shape)
    return list(zip(*(axis.tolist() for axis in places), strict=True))
