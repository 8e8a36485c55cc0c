"""The program of a step: its operations as data, read from and written to JSON.

A program lists its tensors (`tensors`, each on a `storage`, so that a view is free), and the operators
applied to them in order. It contains no code: operators are looked up in an allow-list of torch's. It
may come from an untrusted source, so reading it checks everything.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from everystep.bounded import StrictModel, parse_json
from everystep.errors import ProgramError
from everystep.ops.arguments import json_floats
from everystep.program.operation import (
    DIMENSIONS,
    LIMIT,
    CodeLine,
    Name,
    Operation,
    SourceLine,
    Storage,
    TensorSpec,
    usual_geometry,
)
from everystep.program.soundness import check_soundness

__all__ = ["MOST_BYTES", "MOST_ENTRIES", "Program"]

FORMAT_VERSION = 1
#: Bytes of a program, and entries of each of its tables, that are read.
MOST_BYTES, MOST_ENTRIES = 100_000_000, 200_000


# A program as JSON, e.g. of `((model(x) - y) ** 2).mean().backward()`, in parts:
#   storages     "parameter/0.weight": {"kind": "state", "bytes": 48}, "addmm": {"kind": "temporary"...}
#   tensors      "parameter/0.weight": {"dtype": "float32", "shape": [3, 4]}        on its own storage
#                "parameter/0.weight~1": {"storage": "parameter/0.weight", ..., "stride": [1, 4]}  a view
#   operations   {"phase": "forward", "module": "0", "operator": "aten.addmm.default",
#                 "arguments": ["parameter/0.bias", "x", "parameter/0.weight~1"], "results": ["addmm"]}
#   ends         {"gradient/0.weight": "gradient/0.weight"}       the state has it after the step
# The numbers of a step are in the run: of `aten.pow.Tensor_Scalar` 2, of `optim.SGD.step` lr, momentum.
class Program(StrictModel):
    """The operations of a step, in order, and their tensors.

    loss: the name of the loss, None if the step has none; gradients: of each parameter's gradient;
    activations: of each module's output, by the module's path; done: how many operations came before its
    output was there; logged: of other logged numbers; ends:
    the tensor of a state name after the step, if it differs from before; gone: names of the state that
    the step removed; moves: the tensors that lie at other places in each step; left_out: how many
    operations gave Python something, and are left out since no result of the step needs them;
    read_batch: the storages of the batch from which Python got numbers (numpy, tolist); lines: of the
    code that called the operations, when a step did so first; sources: the SHA-256 of their files.

    It repeats one observed step, and has its numbers: the offsets of `moves`, then `Scalar` and `float`
    arguments. It may read numbers, and the shapes of its results may depend on values: their use in
    Python shows in the operations that follow.
    """

    format: Literal["everystep program"] = "everystep program"
    version: Literal[1] = 1
    torch: str
    storages: dict[Name, Storage]
    tensors: dict[Name, TensorSpec]
    operations: tuple[Operation, ...]
    loss: Name | None = None
    gradients: dict[str, Name] = Field(default_factory=dict)
    activations: dict[str, tuple[Name, ...]] = Field(default_factory=dict)
    done: dict[str, int] = Field(default_factory=dict)
    logged: dict[str, Name] = Field(default_factory=dict)
    ends: dict[Name, Name] = Field(default_factory=dict)
    gone: tuple[Name, ...] = ()
    moves: tuple[Name, ...] = ()
    left_out: int = Field(default=0, ge=0)
    read_batch: tuple[Name, ...] = ()
    lines: tuple[SourceLine, ...] = ()
    sources: dict[str, str] = Field(default_factory=dict)

    def line_of(self, operation: Operation) -> CodeLine | None:
        """Return the line of code that called an operation, None if it is unknown."""
        calls: list[CodeLine] = []
        place = operation.line
        while place is not None:
            each = self.lines[place]
            calls.append(CodeLine(each.file, each.line, each.function, each.text))
            place = each.above
        return calls[0]._replace(callers=tuple(calls[1:])) if calls else None

    def placed(self, offsets: Sequence[Any]) -> Program:
        """Return the program with the tensors that move where they lie in a step.

        offsets: of each, in elements.

        Raises:
            ProgramError: there are more or fewer, or one lies outside of its memory.
        """
        tensors = dict(self.tensors)
        try:
            for name, offset in zip(self.moves, offsets, strict=True):
                if type(offset) is not int or offset < 0:
                    raise ValueError(f"{name} cannot lie at {offset}")
                tensors[name] = tensors[name].model_copy(update={"offset": offset})
                tensors[name].check(name, self.storages)
        except ValueError as error:
            raise ProgramError(f"the views of the step do not fit its program: {error}") from None
        return self.model_copy(update={"tensors": tensors})

    def storage_of(self, tensor: str) -> Storage:
        """Return the storage of a tensor."""
        return self.storages[self.tensors[tensor].storage]

    def storages_of(self, tensors: Iterable[str]) -> set[str]:
        """Return the names of the storages of tensors."""
        return {self.tensors[name].storage for name in tensors}

    @property
    def state_names(self) -> set[str]:
        """The names of the state that there must be before the step."""
        return {n for n in self.tensors if self.storage_of(n).kind == "state" and "~" not in n}

    def of_kind(self, kind: str) -> list[str]:
        """Return the names of the storages of a kind."""
        return [name for name, storage in self.storages.items() if storage.kind == kind]

    def to_json(self) -> str:
        """Return the program as JSON: a line for each storage, tensor and operation."""
        always = {"format": self.format, "version": self.version, "torch": self.torch}
        dumped = self.model_dump(exclude_defaults=True)
        for name, tensor in dumped["tensors"].items():
            for key, value in usual_geometry(name, tensor["shape"]).items():
                if tensor[key] == value:
                    del tensor[key]
        # Nothing else has floats.
        dumped["operations"] = json_floats(dumped["operations"])
        return _readable(always | dumped)

    @classmethod
    def from_json(cls, text: str | bytes) -> Program:
        """Read a program.

        Raises:
            ProgramError: it is not a program, needs a newer everystep, uses an operator that is not
                allowed, or its operators do not fit its tensors; names the problem.
        """
        if len(text) > MOST_BYTES:
            raise ProgramError(f"the program has more than {MOST_BYTES:,} bytes, too many to read")
        try:
            data = parse_json(text, parse_constant=_refuse_constant)
        except ValueError as error:
            raise ProgramError(f"not a program: invalid JSON ({error!s:.200})") from None
        if not isinstance(data, dict):
            raise ProgramError("not a program: its JSON is not an object")
        for key in ("operations", "tensors", "storages", "lines", "sources"):
            entries = data.get(key)
            if isinstance(entries, list | dict) and len(entries) > MOST_ENTRIES:
                raise ProgramError(f"the program has more than {MOST_ENTRIES:,} {key}, too many to read")
        version = data.get("version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise ProgramError(
                f"the program has format {version}, but this everystep reads format {FORMAT_VERSION}; "
                "upgrade everystep"
            )
        try:
            # As JSON again: exact types accept a list for a tuple only from there.
            program = cls.model_validate_json(json.dumps(_completed(data)))
            content = text.encode() if isinstance(text, str) else text
            check_soundness(program.operations, program.tensors, program.storages, content)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            message = first["msg"].removeprefix("Value error, ")
            problem = f"{place:.200}: {message:.400}" if place else f"{message:.400}"
        except (ValueError, RecursionError) as error:
            problem = f"{error!s:.400}"
        else:
            return program
        raise ProgramError(f"not a valid program: {problem}")

    @model_validator(mode="after")
    def _check(self) -> Program:
        if sum(storage.bytes for storage in self.storages.values()) > LIMIT:
            raise ValueError("the storages are too large for any machine")
        for name, tensor in self.tensors.items():
            tensor.check(name, self.storages)
        for place, line in enumerate(self.lines):
            # So `line_of` ends: no line is above itself.
            if line.above is not None and line.above >= place:
                raise ValueError(f"lines.{place}: a line of code is called by a later one")
        for index, operation in enumerate(self.operations):
            if operation.line is not None and operation.line >= len(self.lines):
                raise ValueError(f"operations.{index}: unknown line of code {operation.line}")
            try:
                operation.check(self.tensors)
            except ValueError as error:  # NotAllowedError is one
                raise ValueError(f"operations.{index}: {error}") from None
        shown = [name for names in self.activations.values() for name in names]
        logged = [*self.logged.values(), *([] if self.loss is None else [self.loss])]
        named = *self.gradients.values(), *shown, *self.ends.values(), *self.moves
        for name in (*logged, *named):
            if name not in self.tensors:
                raise ValueError(f"unknown tensor {name!r}")
        made: dict[str, int] = {}
        for index, operation in enumerate(self.operations):
            for storage in self.storages_of(operation.changed()):
                made.setdefault(storage, index if self.storages[storage].kind == "temporary" else -1)
        for path, names in self.activations.items():
            count = self.done.get(path, -1)
            is_there = all(made.get(storage, -1) < count for storage in self.storages_of(names))
            if not (0 <= count <= len(self.operations) and is_there):
                raise ValueError(f"done: the output of {path!r} is not there after {count} operations")
        for parameter, name in self.gradients.items():
            own = self.tensors.get(f"parameter/{parameter}")
            if own is not None and own.shape != self.tensors[name].shape:
                raise ValueError(f"the gradient of {parameter!r} does not have its shape: {name!r}")
        for name in logged:
            if math.prod(self.tensors[name].shape) != 1:
                raise ValueError(f"{name!r} is logged, but is not a single number")
        return self


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _completed(data: dict[str, Any]) -> dict[str, Any]:
    """Return JSON data with what `to_json` leaves out of tensors."""
    tensors = data.get("tensors")
    if not isinstance(tensors, dict):
        return data
    completed = {}
    for name, tensor in tensors.items():
        shape = tensor.get("shape") if isinstance(tensor, dict) else None
        if isinstance(shape, list) and len(shape) <= DIMENSIONS and all(type(n) is int for n in shape):
            tensor = usual_geometry(name, shape) | tensor
        completed[name] = tensor
    return data | {"tensors": completed}


def _readable(data: dict[str, Any]) -> str:
    """Return JSON with a line for each entry of the large tables."""
    lines = []
    for key, value in data.items():
        if value and isinstance(value, dict):
            entries = [f"{json.dumps(name)}: {json.dumps(item)}" for name, item in value.items()]
            text = "{\n  " + ",\n  ".join(entries) + "\n }"
        elif value and isinstance(value, list | tuple):
            text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        else:
            text = json.dumps(value)
        lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
