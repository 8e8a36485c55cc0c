"""Build: the program of an observed step, as data with readable names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain, groupby
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from everystep.ops.arguments import DTYPES, encode
from everystep.ops.operators import has_shape_of_values
from everystep.program.allowed import has_effect
from everystep.program.number_slots import READ, Number
from everystep.program.operation import Operation, Storage, TensorSpec, extent_of
from everystep.program.step_program import MOST_ENTRIES, Program
from everystep.step.calling_code import LineTable
from everystep.step.path import Path, sizeless

__all__ = ["BuiltPath", "NotCapturableError", "Origins", "build_path"]


class NotCapturableError(Exception):
    """A step that is not a program; the message gives the reason."""


class Origins(NamedTuple):
    """From which parts of a path those of its program are, in its order.

    storages: the number of each, and of a batch that is a slice of more data, the tensors that it ends
    with; tensors, operations: their numbers.
    """

    storages: tuple[tuple[int, tuple[int, ...]], ...]
    tensors: tuple[int, ...]
    operations: tuple[int, ...]

    def sizes(self, path: Path) -> list[int]:
        """Return what `sizes_of` does of the program of a path with the same form."""
        found: list[int] = []
        for place, ends in self.storages:
            cut = [extent_of(path.tensors[number].geometry)[1] for number in ends]
            found.append(max(cut) if cut else path.storages[place].bytes)
        for number in self.tensors:
            tensor = path.tensors[number]
            found += (*tensor.shape, *tensor.stride, tensor.offset if tensor.moves is None else 0)
        for place in self.operations:
            operation = path.operations[place]
            sizeless((operation.arguments, operation.keywords), found)
        return found


class BuiltPath(NamedTuple):
    """A program for all steps with a path.

    numbers_kept: the places, among the numbers of a step, of those that the program has: offsets of its
    tensors, then those of its operations; inputs: the number of each input's storage, by the storage's
    name in the program; origins: of its parts; evaluation: operations that compute only what is logged,
    with a model that the step trains: how many, and the first.
    """

    program: Program
    numbers_kept: tuple[int, ...]
    inputs: dict[str, int]
    origins: Origins
    evaluation: tuple[int, Operation] | None = None

    def numbers(self, seen: Sequence[Number]) -> list[Number]:
        """Return the numbers of a step that its program needs."""
        return [seen[place] for place in self.numbers_kept]


def build_path(path: Path, numbers: Sequence[Any]) -> BuiltPath:
    """Return the program of a path; it contains the numbers of the first step with this path.

    numbers: of that step.

    Raises:
        NotCapturableError: a program cannot hold it; gives the reason.
    """
    return _Builder(path, numbers).built()


# Storages are named after the state, the gradients and the loss, others after the operator that made
# them; the tensor at the beginning of one has its name, and views have it with a number:
#   0.weight, gradient/0.weight, loss    known names
#   addmm, addmm_2                       results of two calls of one operator
#   addmm~1                              a view of the first


class _Builder:
    """Names all tensors, and omits operations without effect."""

    def __init__(self, path: Path, numbers: Sequence[Any]) -> None:
        self._path = path
        self._numbers = numbers
        #: Of each tensor that moves: which of the numbers is its offset.
        self._moves: dict[str, int] = {}
        unused = path.unused_gradients()
        self._state = {name: number for name, number in path.named if name not in unused}
        self._names: dict[int, str] = {}
        self._count = Counter[str]()
        self._views: dict[str, int] = {}
        self._storages: dict[str, Storage] = {}
        self._tensors: dict[str, TensorSpec] = {}
        self._number_of: dict[str, int] = {}
        self._tensor_names: dict[int, str] = {}
        self._lines = LineTable()
        self._name_storages()

    def built(self) -> BuiltPath:
        """Return the program."""
        path = self._path
        for name, number in self._state.items():
            self._add_tensor(name, number)
        # Before the operations, which name their results after the operator.
        loss = None if path.loss is None else self._named(path.loss, self._unused("loss"))
        gradients = {
            name: self._named(number, self._unused(f"gradient/{name}"))
            for name, number in path.gradients
        }
        operations = [*self._operations()]
        ends = {name: self._tensor(number) for name, number in path.ends}
        activations = {name: tuple(map(self._tensor, places)) for name, places, _ in path.activations}
        logged = {name: self._tensor(number) for name, number in path.logged}
        shown = {name for names in activations.values() for name in names}
        shown |= {*gradients.values(), *ends.values(), *logged.values()} | ({loss} if loss else set())
        kept = self._with_effect(operations, shown)
        kept |= self._checkable_reads(operations, kept)
        present = [each for place, each in enumerate(operations) if place in kept]
        left_out = [each for place, each in enumerate(operations) if place not in kept]
        used = {name for each in present for name in (*each.reads(), *each.results) if name}
        used |= shown | set(self._state)
        tensors = {name: spec for name, spec in self._tensors.items() if name in used}
        moves = {name: place for name, place in self._moves.items() if name in tensors}
        storages = self._used_storages(tensors)
        program = _checked(
            torch=torch.__version__,
            storages=storages,
            tensors=tensors,
            operations=tuple(present),
            loss=loss,
            gradients=gradients,
            activations=activations,
            done={
                name: sum(place in kept for place in range(count)) for name, _, count in path.activations
            },
            logged=logged,
            ends=ends,
            gone=path.gone,
            moves=tuple(moves),
            # Reads of numbers that a replay does not compute, and so cannot check.
            left_out=sum(map(self._is_read, left_out)) + path.read_unseen,
            read_batch=tuple(n for n in map(self._names.get, path.read_batch) if n in storages),
            lines=tuple(self._lines.lines),
            sources=self._lines.sources,
        )
        place_of = {name: place for place, name in self._names.items()}
        inputs = {n: place_of[n] for n, storage in storages.items() if storage.kind == "input"}
        evaluation = self._evaluation(
            operations, kept, {*gradients.values(), *ends.values(), loss or ""}
        )
        numbers = chain(*[path.operations[place].numbers for place in sorted(kept)])
        origins = self._origins(place_of, storages, tensors, sorted(kept))
        return BuiltPath(program, (*moves.values(), *numbers), inputs, origins, evaluation)

    def _origins(
        self,
        place_of: Mapping[str, int],
        storages: Mapping[str, Storage],
        tensors: Mapping[str, TensorSpec],
        kept: Sequence[int],
    ) -> Origins:
        on: dict[str, list[int]] = {name: [] for name in storages}
        moved = {spec.storage for name, spec in tensors.items() if name in self._moves}
        for name, spec in tensors.items():
            # An input ends with its tensors, so in another path its size follows from theirs.
            if storages[spec.storage].kind == "input" and spec.storage not in moved:
                on[spec.storage].append(self._number_of[name])
        return Origins(
            tuple([(place_of[name], tuple(on[name])) for name in storages]),
            tuple([self._number_of[name] for name in tensors]),
            tuple(kept),
        )

    # Names.

    def _name_storages(self) -> None:
        """Name storages after state, gradients and the loss; others after their operator.

        One that becomes state in the step has its name in the state.
        """
        path, storage_of = self._path, [tensor.storage for tensor in self._path.tensors]
        made = {n: k for n, k in path.ends if n not in self._state and not n.startswith("gradient/")}
        made |= {} if path.loss is None or "loss" in self._state else {"loss": path.loss}
        # A new name of memory that the state has already is a view of it.
        made = {n: k for n, k in made.items() if path.storages[storage_of[k]].kind != "state"}
        gradients = {f"gradient/{n}": k for n, k in path.gradients if f"gradient/{n}" not in self._state}
        # A part of the batch may have the name of an operator, with a number or without one.
        self._taken = {*made, *self._state, *gradients}
        for known in (made, self._state, gradients):
            for name, number in known.items():
                self._names.setdefault(storage_of[number], name)
        for seen in path.operations:
            for reference in filter(None, seen.results):
                storage = storage_of[int(reference[1:])]
                if storage not in self._names:
                    self._names[storage] = self._free(seen.operator.overloadpacket.__name__)
        for place, known_as in enumerate(path.storages):
            if place not in self._names:
                self._names[place] = self._free(known_as.kind)

    def _free(self, base: str) -> str:
        name = ""
        while not name or name in self._taken:
            self._count[base] += 1
            count = self._count[base]
            name = base if count == 1 else f"{base}_{count}"
        return name

    # A gradient that was pending before the step has this name already.
    def _unused(self, name: str) -> str:
        return f"{name} (new)" if name in self._tensors else name

    def _named(self, number: int, name: str) -> str:
        """Return the name of a tensor; name it `name` unless it has one, or is a view of the state."""
        if number not in self._tensor_names:
            if self._path.storages[self._path.tensors[number].storage].kind == "state":
                return self._tensor(number)
            self._add_tensor(name, number)
        return self._tensor_names[number]

    def _tensor(self, number: int) -> str:
        if number not in self._tensor_names:
            seen = self._path.tensors[number]
            base = self._names[seen.storage]
            name, is_named = base, seen.offset == 0 and seen.moves is None
            while name in self._tensors or not is_named:
                self._views[base] = self._views.get(base, 0) + 1
                name, is_named = f"{base}~{self._views[base]}", True
            self._add_tensor(name, number)
        return self._tensor_names[number]

    def _add_tensor(self, name: str, number: int) -> None:
        seen = self._path.tensors[number]
        storage, place = self._path.storages[seen.storage], self._names[seen.storage]
        if place not in self._storages:
            self._storages[place] = storage
        dtype, offset = str(seen.dtype).removeprefix("torch."), seen.offset
        if seen.moves is not None:
            self._moves[name] = seen.moves
            offset = self._numbers[seen.moves]
        self._number_of[name] = number
        self._tensors[name] = _tensor_spec(place, dtype, seen.shape, seen.stride, offset)
        # A tensor may have several names; operations use its first.
        self._tensor_names.setdefault(number, name)

    def _used_storages(self, tensors: Mapping[str, TensorSpec]) -> dict[str, Storage]:
        """Return the storages of tensors; for a batch that is a slice of more data, that slice."""
        # A view that moves may reach any place of its memory in another step.
        moved = {spec.storage for name, spec in tensors.items() if name in self._moves}
        ends: dict[str, int] = {}
        for spec in tensors.values():
            ends[spec.storage] = max(ends.get(spec.storage, 0), spec.end)
        return {
            name: storage.model_copy(update={"bytes": ends[name]})
            if storage.kind == "input" and name not in moved
            else storage
            for name, storage in self._storages.items()
            if name in ends
        }

    # Operations.

    def _operations(self) -> Iterator[Operation]:
        """Yield the operations with the numbers of a step; what Python read is in no argument."""
        for seen, calls in zip(self._path.operations, self._path.lines, strict=True):
            numbers = iter([self._numbers[place] for place in seen.numbers])
            arguments = tuple(self._argument(value, numbers) for value in seen.arguments)
            keywords = {key: self._argument(value, numbers) for key, value in seen.keywords}
            results = tuple(None if r is None else self._tensor(int(r[1:])) for r in seen.results)
            yield Operation(
                phase=seen.phase,
                module=seen.module,
                operator=str(seen.operator),
                arguments=arguments,
                keywords=keywords,
                results=results,
                line=self._lines.place(calls),
            )

    def _argument(self, value: Any, numbers: Iterator[Number]) -> Any:
        """Return an argument as a program holds it."""
        if isinstance(value, str):
            return self._tensor(int(value[1:]))
        if value is int or value is float:
            return encode(next(numbers), _no_tensor)
        if isinstance(value, tuple) and len(value) == 2 and value[0] == "text":
            return {"text": value[1]}
        if isinstance(value, tuple):
            return [self._argument(item, numbers) for item in value]
        return encode(value, _no_tensor)

    def _with_effect(
        self, operations: Sequence[Operation], wanted: set[str], undrawn: Container[int] = ()
    ) -> set[int]:
        """Return the places of operations with results that are used, or that draw random numbers.

        undrawn: the places of some for which only the results count.
        """
        needed = {self._tensors[name].storage for name in wanted if name}
        # Later steps read the state, so every write into it has an effect.
        needed |= {name for name, storage in self._storages.items() if storage.kind == "state"}
        kept = set()
        # From the end, since what an operation reads matters only if its results do.
        for place, operation in reversed([*enumerate(operations)]):
            is_used = not needed.isdisjoint(self._writes(operation))
            if is_used or (has_effect(operation.resolved) and place not in undrawn):
                kept.add(place)
                needed |= {self._tensors[name].storage for name in operation.reads()}
        return kept

    def _evaluation(
        self, operations: Sequence[Operation], kept: set[int], wanted: set[str]
    ) -> tuple[int, Operation] | None:
        """Return the operations of an evaluation among those kept, if there is one.

        Results that the step does not use are not kept, unless they are logged, or the model in training
        mode draws random numbers. wanted: what the step computes besides what it logs.
        """
        # A module that runs with gradients is trained; where it runs without them, it is evaluated.
        forward = [(n, o) for n, o in enumerate(self._path.operations) if o.phase == "forward"]
        trained = {each.module for _, each in forward if each.has_gradients}
        within = [n for n, each in forward if not each.has_gradients and each.module in trained]
        if kept.isdisjoint(within):
            return None
        used = self._with_effect(operations, wanted, within)
        idle = [n for n in sorted(kept - used) if not has_effect(operations[n].resolved)]
        for _, each in groupby(enumerate(within), key=lambda pair: pair[1] - pair[0]):
            one_pass = {place for _, place in each}  # they follow each other
            if used.isdisjoint(one_pass) and (first := [n for n in idle if n in one_pass]):
                return len(idle) - idle.index(first[0]), operations[first[0]]
        return None

    def _writes(self, operation: Operation) -> set[str]:
        """Return the storages that an operation writes."""
        return {self._tensors[name].storage for name in operation.changed()}

    def _is_read(self, operation: Operation) -> bool:
        """Return whether an operation gives Python numbers, or a shape that depends on them."""
        dtypes = (DTYPES[self._tensors[name].dtype] for name in [*operation.reads()][1:])
        is_shaped = has_shape_of_values(operation.resolved, dtypes)
        return is_shaped or (any(operation.reads()) and not self._writes(operation))

    def _checkable_reads(self, operations: Sequence[Operation], kept: set[int]) -> set[int]:
        """Return the reads of numbers that are computed anyway: they check a replay.

        What Python did with a number that no operation needs shows in the operations after it.
        """
        left_out: set[str] = set()
        found: set[int] = set()
        for place, operation in enumerate(operations):
            if operation.operator == READ:
                # Not where an operation before it was left out that has written what it reads.
                if left_out.isdisjoint(self._tensors[name].storage for name in operation.reads()):
                    found.add(place)
            elif place not in kept:
                left_out |= self._writes(operation)
        return found


@lru_cache(10_000)
def _tensor_spec(storage: str, dtype: str, shape: Any, stride: Any, offset: int) -> TensorSpec:
    """Return a tensor, the same object again: programs have many alike."""
    return TensorSpec(storage=storage, dtype=dtype, shape=shape, stride=stride, offset=offset)


def _no_tensor(tensor: Tensor) -> str:
    raise AssertionError("tensors are numbered already")


def _checked(**parts: Any) -> Program:
    """Return a program of these parts.

    Raises:
        NotCapturableError: they are not a valid program, or one that is too long to be read.
    """
    for key in ("operations", "tensors", "storages"):  # a reader refuses longer ones
        if len(parts[key]) > MOST_ENTRIES:
            raise NotCapturableError(f"it has {len(parts[key]):,} {key}, more than {MOST_ENTRIES:,}")
    try:
        return Program(**parts)
    except ValidationError as error:
        raise NotCapturableError(f"a program cannot hold it: {error.errors()[0]['msg']}") from None
