"""Build: a program from a captured step, with readable names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from everystep.program.operators import draws_random_numbers
from everystep.program.program import (
    MOST_ENTRIES,
    Operation,
    OptimizerStep,
    Program,
    Storage,
    TensorSpec,
)
from everystep.step.capture import Capture
from everystep.step.eager import Training
from everystep.step.recorder import CapturedOperation
from everystep.step.unchanging import Effect, unchanging, unchanging_in
from everystep.step.update import Update

__all__ = ["Builder", "Built", "Named", "NotCapturableError", "build", "checked", "named_operations"]


class NotCapturableError(Exception):
    """A step that is not a program; the message gives the reason."""


class Built(NamedTuple):
    """A program, and the content of its constants: the bytes of each storage, by name."""

    program: Program
    constants: dict[str, Tensor]


class Named(NamedTuple):
    """What was seen of a step, with names, and nothing left out.

    names: of tensors, by number; tensors, storages: by name; ends: the tensor that a state name has
    after the step, if it is another.
    """

    operations: list[Operation]
    names: dict[int, str]
    tensors: dict[str, TensorSpec]
    storages: dict[str, Storage]
    ends: dict[str, str]


def build(captured: Capture, training: Training) -> Built:
    """Return the program of a captured step.

    Raises:
        NotCapturableError: a part of it is not an operation on tensors; names the part.
    """
    fixed = unchanging_in(captured)
    for where, reason, reads in captured.refusals:
        if where != "optimizer" and (reads is None or not reads <= fixed):
            raise NotCapturableError(f"in the {where} phase, {reason}")
    update = Update(captured, training)
    if update.problem is not None:
        raise NotCapturableError(update.problem)
    left_out = ("optimizer/",) if update.is_optimizer_step else ()
    builder = Builder(captured, update.operations(), left_out)
    return builder.program(update.optimizer_step() if update.is_optimizer_step else None)


def named_operations(captured: Capture) -> Named:
    """Return all observed operations, and their tensors, with names.

    They may differ at the next step, and may be incomplete.
    """
    builder = Builder(captured, captured.operations)
    return builder.named_operations()


class Builder:
    """Gives everything a name, and leaves out what has no effect."""

    def __init__(
        self, captured: Capture, operations: list[CapturedOperation], left_out: tuple[str, ...] = ()
    ) -> None:
        self._captured = captured

        # If the optimizer step is one operation, what it creates and replaces is not in the program.
        def ours(tensors: dict[str, int]) -> dict[str, int]:
            return {n: number for n, number in tensors.items() if not n.startswith(left_out)}

        self._state = ours(captured.named | captured.appeared)
        self._appeared = ours(captured.appeared)
        self._replaced = ours(captured.replaced)
        self._names: dict[int, str] = {}
        self._taken = Counter([*captured.named])  # a part of the batch may have the name of an operator
        self._views: dict[str, int] = {}
        self._storages: dict[str, Storage] = {}
        self._tensors: dict[str, TensorSpec] = {}
        self._constants: dict[str, Tensor] = {}
        self._tensor_names: dict[int, str] = {}
        self._name_storages(operations)
        self._recorded = operations

    def program(self, optimizer_step: OptimizerStep | None) -> Built:
        """Return the program."""
        captured = self._captured
        for name, number in self._state.items():
            self._add_tensor(name, number)
        gradients = {name: self._named(n, f"gradient/{name}") for name, n in captured.gradients.items()}
        assert captured.loss_tensor is not None
        loss = self._named(captured.loss_tensor, "loss")
        operations = [*self._first_values(), *map(self._operation, self._recorded), *self._exchanges()]
        activations = {
            path: tuple(map(self._tensor, numbers)) for path, numbers in captured.activations.items()
        }
        shown = {name for names in activations.values() for name in names}
        kept = self._with_effect(operations, {loss, *gradients.values(), *shown})
        once, every = self._split(kept, set(gradients.values()) | {loss})
        used = {n for o in kept for n in (*o.reads(), *o.results) if n} | shown | {loss}
        used |= set(gradients.values()) | set(self._state)
        tensors = {name: spec for name, spec in self._tensors.items() if name in used}
        storages = self._used_storages(tensors)
        program = checked(
            torch=torch.__version__,
            storages=storages,
            tensors=tensors,
            once=tuple(once),
            operations=tuple(every),
            optimizer_step=optimizer_step,
            loss=loss,
            gradients=gradients,
            activations=activations,
        )
        return Built(program, {n: c for n, c in self._constants.items() if n in storages})

    def named_operations(self) -> Named:
        """Return the operations and the tensors with names, nothing left out."""
        for name, number in self._state.items():
            self._add_tensor(name, number)
        for name, number in self._captured.gradients.items():
            self._named(number, f"gradient/{name}")
        assert self._captured.loss_tensor is not None
        self._named(self._captured.loss_tensor, "loss")
        operations = [self._operation(recorded) for recorded in self._recorded]
        shown = [n for numbers in self._captured.activations.values() for n in numbers]
        for number in (*shown, *self._captured.replaced.values()):
            self._tensor(number)
        ends = {name: self._tensor_names[n] for name, n in self._captured.replaced.items()}
        return Named(operations, self._tensor_names, self._tensors, self._storages, ends)

    def _used_storages(self, tensors: Mapping[str, TensorSpec]) -> dict[str, Storage]:
        """Return the storages of tensors; for a batch that is a slice of more data, that slice."""
        ends: dict[str, int] = {}
        for spec in tensors.values():
            ends[spec.storage] = max(ends.get(spec.storage, 0), spec.end)
        return {
            name: storage.model_copy(update={"bytes": ends[name]})
            if storage.kind == "input"
            else storage
            for name, storage in self._storages.items()
            if name in ends
        }

    def _name_storages(self, operations: list[CapturedOperation]) -> None:
        """Name storages after state, gradients and the loss; others after their operator."""
        captured = self._captured
        known = self._state | {f"gradient/{name}": n for name, n in captured.gradients.items()}
        if captured.loss_tensor is not None:
            known = {"loss": captured.loss_tensor} | known
        for name, number in known.items():
            self._names.setdefault(captured.tensors[number].storage, name)
        for recorded in operations:
            for reference in filter(None, recorded.results):
                storage = captured.tensors[int(reference[1:])].storage
                if storage not in self._names:
                    self._names[storage] = self._free(recorded.operator.overloadpacket.__name__)
        for number, seen in enumerate(captured.storages):
            if number not in self._names:
                self._names[number] = self._free(seen.kind)

    def _free(self, base: str) -> str:
        self._taken[base] += 1
        count = self._taken[base]
        return base if count == 1 else f"{base}_{count}"

    def _named(self, number: int, name: str) -> str:
        """Return the name of a tensor; name it `name` unless it already has one."""
        if number not in self._tensor_names:
            self._add_tensor(name, number)
        return self._tensor_names[number]

    def _tensor(self, number: int) -> str:
        if number not in self._tensor_names:
            captured = self._captured
            base = self._names[captured.tensors[number].storage]
            whole = base not in self._tensors and captured.tensors[number].offset == 0
            self._views[base] = self._views.get(base, 0) + (not whole)
            self._add_tensor(base if whole else f"{base}~{self._views[base]}", number)
        return self._tensor_names[number]

    def _add_tensor(self, name: str, number: int) -> None:
        captured = self._captured
        seen = captured.tensors[number]
        storage = captured.storages[seen.storage]
        place = self._names[seen.storage]
        kind = "state" if place in self._appeared else storage.kind
        if place not in self._storages:
            self._storages[place] = Storage(kind=kind, bytes=storage.bytes, host=storage.host)  # type: ignore[arg-type]
            if kind == "constant" and storage.content is not None:
                self._constants[place] = storage.content
        dtype = str(seen.dtype).removeprefix("torch.")
        self._tensors[name] = TensorSpec(
            storage=place, dtype=dtype, shape=seen.shape, stride=seen.stride, offset=seen.offset
        )
        self._tensor_names.setdefault(number, name)

    def _reference(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._tensor(int(value[1:])) if value.startswith("%") else self._hyperparameter(value)
        if isinstance(value, list | tuple):
            return [self._reference(item) for item in value]
        return value

    def _hyperparameter(self, name: str) -> str:
        dtype = name.rpartition("/")[2]
        size = getattr(torch, dtype).itemsize
        self._storages.setdefault(name, Storage(kind="hyperparameter", bytes=size))
        self._tensors.setdefault(name, TensorSpec(storage=name, dtype=dtype, shape=(), stride=()))
        return name

    def _operation(self, recorded: CapturedOperation) -> Operation:
        return Operation(
            phase=recorded.phase,
            module=recorded.module,
            operator=str(recorded.operator),
            arguments=tuple(map(self._reference, recorded.arguments)),
            keywords={key: self._reference(value) for key, value in recorded.keywords.items()},
            results=tuple(None if r is None else self._tensor(int(r[1:])) for r in recorded.results),
        )

    def _first_values(self) -> list[Operation]:
        """Return the operations that initialize state which the step creates from nothing."""
        found = []
        for name, number in self._appeared.items():
            storage = self._captured.storages[self._captured.tensors[number].storage]
            if storage.content is not None:
                constant = self._free("constant")
                self._constants[constant] = storage.content
                self._storages[constant] = Storage(
                    kind="constant", bytes=storage.bytes, host=storage.host
                )
                self._tensors[constant] = self._tensors[name].model_copy(update={"storage": constant})
                found.append(_copy_operation(name, constant))
        return found

    def _exchanges(self) -> list[Operation]:
        """Return copies into the state for tensors that the step replaced."""
        return [_copy_operation(name, self._tensor(number)) for name, number in self._replaced.items()]

    def _with_effect(self, operations: list[Operation], wanted: set[str]) -> list[Operation]:
        """Drop operations with unused results, except those that draw random numbers."""
        needed = {self._tensors[name].storage for name in wanted}
        needed |= {name for name, storage in self._storages.items() if storage.kind == "state"}
        kept = []
        for operation in reversed(operations):
            effect = self._effect(operation)
            if effect.is_random or not needed.isdisjoint(effect.writes):
                kept.append(operation)
                needed |= {self._tensors[name].storage for name in operation.reads()}
        return kept[::-1]

    def _split(
        self, operations: list[Operation], every_step: set[str]
    ) -> tuple[list[Operation], list[Operation]]:
        """Separate the operations with the same results at every step from the others."""
        effects = [self._effect(operation) for operation in operations]
        own = ("constant", "temporary")
        candidates = {name for name, storage in self._storages.items() if storage.kind in own}
        candidates -= {self._tensors[name].storage for name in every_step}
        fixed = unchanging(effects, candidates)
        is_once = [bool(effect.writes) and fixed.issuperset(effect.writes) for effect in effects]
        once = [operation for operation, once in zip(operations, is_once, strict=True) if once]
        every = [operation for operation, once in zip(operations, is_once, strict=True) if not once]
        return once, every

    def _effect(self, operation: Operation) -> Effect:
        only_shape = operation.operator.split(".")[1].endswith("_like")
        reads = [] if only_shape else operation.reads()
        writes = filter(None, (*operation.results, *operation.written()))
        return Effect(
            {self._tensors[name].storage for name in reads},
            {self._tensors[name].storage for name in writes},
            draws_random_numbers(operation.resolved),
        )


def checked(**parts: Any) -> Program:
    """Return a program of these parts.

    Raises:
        NotCapturableError: they are not a valid program, or one that is too long to be read.
    """
    for key in ("operations", "tensors", "storages"):  # those that a reader refuses
        if len(parts[key]) > MOST_ENTRIES:
            raise NotCapturableError(f"it has {len(parts[key]):,} {key}, more than {MOST_ENTRIES:,}")
    try:
        return Program(**parts)
    except ValidationError as error:
        raise NotCapturableError(f"a program cannot hold it: {error.errors()[0]['msg']}") from None


def _copy_operation(target: str, source: str) -> Operation:
    return Operation(
        phase="update", operator="aten.copy_.default", arguments=(target, source), results=(target,)
    )
