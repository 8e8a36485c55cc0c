"""What an operation is given in two runs: tensors, where each comes from, and other arguments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from everystep.program.observed import Observed
from everystep.program.operation import Operation
from everystep.program.operators import draws_random_numbers, parameters, resolve
from everystep.program.unset import unread_inputs
from everystep.recording.asked import same_value
from everystep.replay.step import Step
from everystep.step.check import same_bits

__all__ = [
    "Argument",
    "Source",
    "Sources",
    "draws",
    "name_in_words",
    "other_arguments",
    "other_sources",
    "pairs_of_inputs",
    "source_texts",
]


class Argument(NamedTuple):
    """An argument that an operation has otherwise in two runs.

    name: of its parameter; values: in both, a default where none is given.
    """

    name: str
    values: tuple[Any, Any]


class Source(NamedTuple):
    """Where a tensor that an operation is given comes from.

    name: of the memory that it lies in; made_by: the number of the operation of this step that made it,
    and the place among its results; None if it was there before the step; view: the shape, the strides
    and the offset of the tensor in that memory.
    """

    name: str
    made_by: tuple[int, int] | None
    view: tuple[Any, ...]


class Sources:
    """Where the tensors of a step come from.

    Args:
        step: the step.
    """

    def __init__(self, step: Step) -> None:
        self._operations = step.operations
        self._tensors = step.places.tensors
        self._batch = step.batch.tensors
        self._state = step.state
        self._made: dict[str, tuple[int, int]] = {}
        read: set[str] = set()
        for index, seen in enumerate(step.operations):
            read |= {*map(_memory_of, seen.inputs)}
            for place, name in enumerate(map(_memory_of, seen.results)):
                if name not in read:
                    self._made.setdefault(name, (index, place))

    def of(self, name: str) -> Source:
        """Return where a tensor comes from, by its name among the arguments of an operation."""
        memory, spec = _memory_of(name), self._tensors[name]
        return Source(memory, self._made.get(memory), (spec.shape, spec.stride, spec.offset))

    def knows(self, source: Source) -> bool:
        """Tell whether a tensor of this name is in the batch, or in the state before the step."""
        return source.name in self._state or source.name in self._batch

    def content(self, source: Source) -> Tensor | None:
        """Return what the batch, or the state before the step, has under the name of a source."""
        found = self._batch.get(source.name)
        return self._state.get(source.name) if found is None else found

    def text(self, source: Source) -> str:
        """Return in words where a tensor comes from."""
        shape, stride, _ = source.view
        is_transposed = len(shape) > 1 and stride[-2] == 1 < stride[-1]
        return self._memory_text(source) + " transposed" * is_transposed

    def called(self, name: str) -> str:
        """Return in words where a tensor comes from, by its name among the arguments."""
        return self.text(self.of(name))

    def _memory_text(self, source: Source) -> str:
        if source.made_by is not None and not source.name.startswith("gradient/"):
            operation = self._operations[source.made_by[0]].operation
            module = f" of {operation.module}" if operation.module else ""
            return f"#{source.made_by[0]} {operation.operator.split('.')[1]}{module}"
        if source.name in self._batch:
            return f"batch.{source.name}"
        is_named = self.knows(source) or source.made_by is not None
        return name_in_words(source.name) if is_named else "a tensor from outside of the step"


def source_texts(
    given: tuple[list[Source], list[Source]], sources: tuple[Sources, Sources]
) -> tuple[list[str], list[str]]:
    """Return in words where tensors come from, with their shapes where only these differ."""
    texts = tuple([*map(side.text, each)] for side, each in zip(sources, given, strict=True))
    for place, (x, y) in enumerate(zip(*given, strict=False)):
        if texts[0][place] == texts[1][place] and x.view[0] != y.view[0]:
            texts[0][place] += f" {x.view[0]}"
            texts[1][place] += f" {y.view[0]}"
    return texts[0], texts[1]


def _memory_of(name: str) -> str:
    """Return the name of the memory of a tensor: `x~1` is a view of `x`."""
    return name.partition("~")[0]


def name_in_words(name: str) -> str:
    """Return what a person calls a tensor of the state."""
    kind, _, rest = name.partition("/")
    if kind == "optimizer":
        parameter, _, key = rest.rpartition("/")
        return f"{key} of {parameter}"
    if kind == "gradient":
        return f"gradient of {rest}"
    if kind == "loss":
        return f"loss.{rest}"
    return rest if kind in ("parameter", "buffer") else name


def other_sources(
    one: Observed, other: Observed, sources: tuple[Sources, Sources]
) -> tuple[list[Source], list[Source]]:
    """Return the tensors that an operator is given from another source in the other run, for both.

    Another view of what the step has made is another source, if its numbers differ. Of lists of
    different lengths, these are those that only one of them has. Tensors that were there before the
    step, each under a name that the other run does not know, may be the same.
    """
    found: tuple[list[Source], list[Source]] = ([], [])
    unread = unread_inputs(one.operation)
    for a, b in _pairs_of_arguments(one, other):
        names = _references(a), _references(b)
        first, second = ([*map(side.of, each)] for side, each in zip(sources, names, strict=True))
        if len(first) == len(second):
            differ = [
                (x, y)
                for x, y, *pair in zip(first, second, *names, strict=True)
                if _is_other(x, y, one, other, pair, sources)
                and not (pair[0] in unread and x.view[0] == y.view[0])
            ]
            first, second = [x for x, _ in differ], [y for _, y in differ]
        elif isinstance(a, list) and isinstance(b, list):
            first, second = (
                [x for x in first if not any(_is_one_memory(x, y, sources) for y in second)],
                [y for y in second if not any(_is_one_memory(x, y, sources) for x in first)],
            )
        else:  # a tensor or none at all: an argument that differs
            continue
        found[0].extend(first)
        found[1].extend(second)
    return found


def _is_other(
    x: Source,
    y: Source,
    one: Observed,
    other: Observed,
    names: list[_Reference],
    sources: tuple[Sources, Sources],
) -> bool:
    """Tell whether two inputs come from another source, or are another view of the same one."""
    if not _is_one_memory(x, y, sources):
        return True
    pair = one.inputs.get(names[0]), other.inputs.get(names[1])
    if x.view == y.view or pair[0] is None or pair[1] is None or same_bits(pair[0], pair[1]):
        return False
    # What earlier operations made is the same in both. Other numbers are then another part of it.
    contents = [side.content(each) for side, each in zip(sources, (x, y), strict=True)]
    is_same = contents[0] is not None and contents[1] is not None and same_bits(contents[0], contents[1])
    return x.made_by is not None or is_same


def _is_one_memory(x: Source, y: Source, sources: tuple[Sources, Sources]) -> bool:
    if x.made_by or y.made_by:
        return x.made_by == y.made_by
    return x.name == y.name or not (sources[1].knows(x) or sources[0].knows(y))


def other_arguments(one: Operation, other: Operation) -> list[Argument]:
    """Return the arguments of an operator that differ, except for the content of tensors."""
    if not one.operator.startswith("aten."):
        return []
    pair = _all_given(one), _all_given(other)
    return [
        Argument(name, (pair[0][name], pair[1][name]))
        for name in pair[0]
        if not _same(pair[0][name], pair[1][name])
    ]


def pairs_of_inputs(
    one: Observed, other: Observed, sources: tuple[Sources, Sources]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the tensors at the same place among the arguments: the first one's name, and both.

    Tensors from another source are left out: see `other_sources`. Those of the same shape are left out,
    too, if the operation does not read their numbers.
    """
    operation = one.operation
    if not operation.operator.startswith("aten."):
        yield from ((n, t, other.inputs[n]) for n, t in one.inputs.items() if n in other.inputs)
        return
    unread = unread_inputs(operation)
    seen = set()
    for first, second in _pairs_of_arguments(one, other):
        for a, b in zip(_references(first), _references(second), strict=False):
            if (a, b) in seen or a not in one.inputs or b not in other.inputs:
                continue
            seen.add((a, b))
            x, y = one.inputs[a], other.inputs[b]
            if a in unread and (x.shape, x.dtype) == (y.shape, y.dtype):
                continue
            if not _is_other(sources[0].of(a), sources[1].of(b), one, other, [a, b], sources):
                yield a, x, y


def draws(operator: str) -> bool:
    """Tell whether an operator draws random numbers, as far as it is one that programs may use."""
    try:
        return operator.startswith("aten.") and draws_random_numbers(resolve(operator))
    except ValueError:  # an eager step may contain any operator
        return False


class _Reference(str):
    """The name of a tensor among arguments."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "a tensor"


def _all_given(operation: Operation) -> dict[str, Any]:
    """Return all arguments by the name of their parameter, defaults included."""
    given = operation.given()
    found = {}
    for parameter in parameters(operation.resolved):
        is_given = parameter.name in given
        value = _decoded(given[parameter.name]) if is_given else parameter.default
        if parameter.size and isinstance(value, int) and not isinstance(value, bool):
            value = [value] * parameter.size
        found[parameter.name] = value
    return found


def _decoded(value: Any) -> Any:
    """Return an argument of a program as a plain value; what names a kind, by its name."""
    if isinstance(value, str):
        return _Reference(value)
    if isinstance(value, list | tuple):
        return [_decoded(item) for item in value]
    if isinstance(value, dict) and len(value) == 1:
        ((kind, name),) = value.items()
        return float(name) if kind == "float" else name
    return value


def _same(one: Any, other: Any) -> bool:
    """Tell whether two arguments are the same; of tensors, only whether both are there."""
    if _is_tensors(one) and _is_tensors(other):
        return True
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return not (_is_tensors(one) or _is_tensors(other)) and same_value(one, other)


def _is_tensors(value: Any) -> bool:
    """Tell whether an argument is a tensor, or a list of nothing else."""
    if isinstance(value, list) and value:
        return all(map(_is_tensors, value))
    return isinstance(value, _Reference)


def _pairs_of_arguments(one: Observed, other: Observed) -> list[tuple[Any, Any]]:
    """Return the arguments of an operator of ATen in two runs, as in its schema."""
    if not one.operation.operator.startswith("aten."):
        return []
    given = (_all_given(each.operation).values() for each in (one, other))
    return list(zip(*given, strict=True))


def _references(value: Any) -> list[_Reference]:
    """Return the names of the tensors in an argument."""
    if isinstance(value, list):
        return [name for item in value for name in _references(item)]
    return [value] if isinstance(value, _Reference) else []
