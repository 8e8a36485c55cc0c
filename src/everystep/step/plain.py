"""Plain programs from paths: an observed step of a loop, as data with names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from everystep.program.arguments import encode
from everystep.program.plain import READ
from everystep.program.program import Operation, Program
from everystep.step.build import Builder, checked
from everystep.step.capture import Capture
from everystep.step.path import FLOAT, INT, Path
from everystep.step.recorder import CapturedOperation, CapturedStorage

__all__ = ["BuiltPath", "build_path"]

Number = int | float


class BuiltPath(NamedTuple):
    """A program for all steps with a path.

    kept: which of the numbers of a step belong to operations that the program has; inputs: the number of
    each input's storage, by the storage's name in the program.
    """

    program: Program
    kept: tuple[int, ...]
    inputs: dict[str, int]

    def numbers(self, seen: Sequence[Number]) -> list[Number]:
        """Return the numbers of a step that its program needs."""
        return [seen[place] for place in self.kept]


def build_path(path: Path, numbers: Sequence[Number]) -> BuiltPath:
    """Return the program of a path; it contains the numbers of the first step with this path.

    Raises:
        NotCapturableError: a program cannot hold it; gives the reason.
    """
    left = iter(numbers)
    unused = path.unused_gradients()
    named = {name: number for name, number in path.named if name not in unused}
    operations = [
        CapturedOperation(
            phase=seen.phase,
            module=seen.module,
            operator=seen.operator,
            arguments=tuple(_argument(value, left) for value in seen.arguments),
            keywords={key: _argument(value, left) for key, value in seen.keywords},
            results=seen.results,
            reads=frozenset(),
            writes=frozenset(seen.writes),
        )
        for seen in _with_reads_skipped(path, left)
    ]
    captured = Capture(
        loss=torch.empty(0),
        tensors=list(path.tensors),
        storages=[CapturedStorage(s.kind, s.bytes, s.host, None) for s in path.storages],  # type: ignore[arg-type]
        operations=operations,
        refusals=[],
        update_from=len(operations),
        named=named,
        loss_tensor=path.loss,
        gradients={n: number for n, number in path.gradients if f"gradient/{n}" not in named},
        activations=dict(path.activations),
    )
    return _PlainBuilder(captured, path).built()


def _with_reads_skipped(path: Path, numbers: Iterator[Number]) -> Iterator[Any]:
    """Yield the operations; what Python read stands among the numbers, but in no argument."""
    for seen in path.operations:
        yield seen
        if str(seen.operator) == READ:
            next(numbers)


def _argument(value: Any, numbers: Iterator[Number]) -> Any:
    """Return an argument as a program holds it, tensors still as `%3`."""
    if value is INT or value is FLOAT:
        return encode(next(numbers), _no_tensor)
    if isinstance(value, tuple) and len(value) == 2 and value[0] == "text":
        return {"text": value[1]}
    if isinstance(value, tuple):
        return [_argument(item, numbers) for item in value]
    return value if isinstance(value, str) else encode(value, _no_tensor)


def _no_tensor(tensor: torch.Tensor) -> str:
    raise AssertionError("tensors are numbered already")


class _PlainBuilder(Builder):
    """Builds a plain program: exactly the observed operations."""

    def __init__(self, captured: Capture, path: Path) -> None:
        self._path = path
        super().__init__(captured, captured.operations)

    def _name_storages(self, operations: list[CapturedOperation]) -> None:
        """Name storages; one that becomes state in the step has the name that it gets there."""
        for name, number in self._path.ends:
            if name not in self._state and not name.startswith("gradient/"):
                self._names.setdefault(self._captured.tensors[number].storage, name)
        super()._name_storages(operations)

    def built(self) -> BuiltPath:
        """Return the program."""
        path = self._path
        for name, number in self._state.items():
            self._add_tensor(name, number)
        loss = None if path.loss is None else self._named(path.loss, self._unused("loss"))
        gradients = {
            name: self._named(number, self._unused(f"gradient/{name}"))
            for name, number in path.gradients
        }
        operations = [*map(self._operation, self._recorded)]
        ends = {name: self._tensor(number) for name, number in path.ends}
        activations = {name: tuple(map(self._tensor, numbers)) for name, numbers in path.activations}
        shown = {name for names in activations.values() for name in names}
        logged = {name: self._tensor(number) for name, number in path.logged}
        shown |= {*gradients.values(), *ends.values(), *logged.values()} | ({loss} if loss else set())
        kept = {id(operation) for operation in self._with_effect(operations, shown)}
        kept |= self._checkable_reads(operations, kept)
        used = {n for o in operations if id(o) in kept for n in (*o.reads(), *o.results) if n}
        used |= shown | set(self._state)
        tensors = {name: spec for name, spec in self._tensors.items() if name in used}
        storages = self._used_storages(tensors)
        program = checked(
            torch=torch.__version__,
            storages=storages,
            tensors=tensors,
            operations=tuple(o for o in operations if id(o) in kept),
            loss=loss,
            gradients=gradients,
            activations=activations,
            is_plain=True,
            logged=logged,
            ends=ends,
            gone=path.gone,
        )
        places = {name: number for number, name in self._names.items()}
        inputs = {n: places[n] for n, storage in storages.items() if storage.kind == "input"}
        return BuiltPath(program, tuple(self._kept_numbers(operations, kept)), inputs)

    def _unused(self, name: str) -> str:
        return f"{name} (new)" if name in self._tensors else name

    def _checkable_reads(self, operations: list[Operation], kept: set[int]) -> set[int]:
        """Return the reads of numbers that are computed anyway: they check a replay.

        What Python did with a number that no operation needs shows in the operations after it.
        """
        left_out: set[str] = set()
        found: set[int] = set()
        for operation in operations:
            if operation.operator == READ:
                if left_out.isdisjoint(self._tensors[name].storage for name in operation.reads()):
                    found.add(id(operation))
            elif id(operation) not in kept:
                left_out.update(self._effect(operation).writes)
        return found

    def _kept_numbers(self, operations: list[Operation], kept: set[int]) -> Iterator[int]:
        place = 0
        for operation, seen in zip(operations, self._path.operations, strict=True):
            if id(operation) in kept:
                yield from range(place, place + seen.numbers)
            place += seen.numbers
