"""The parts of a program: storages, the tensors on them, and the operators applied to these by code."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field

from everystep.bounded import StrictModel
from everystep.errors import Fault
from everystep.ops.arguments import DTYPES, decode, references
from everystep.ops.operators import computes, parameters, writes
from everystep.program.allowed import resolve
from everystep.program.optimizer_operator import ARGUMENTS, OptimizerOperator

__all__ = [
    "DIMENSIONS",
    "LIMIT",
    "LONGEST_FILE",
    "LONGEST_LINE",
    "CodeLine",
    "Conjugated",
    "Name",
    "Operation",
    "Phase",
    "SourceLine",
    "Storage",
    "TensorSpec",
    "extent_of",
    "fills",
    "path_faults",
    "usual_geometry",
]

#: More bytes, or numbers, than any machine has.
LIMIT = 2**48
#: More dimensions than torch's operators take.
DIMENSIONS = 64

Phase = Literal["forward", "loss", "zero_grad", "backward", "update", "other"]
Natural = Annotated[int, Field(ge=0, le=LIMIT)]
Name = Annotated[str, Field(min_length=1, max_length=1000)]
#: Characters of the name of a file or a function, and of the text of a line.
LONGEST_FILE, LONGEST_LINE = 1000, 300
#: A line is shown in terminals, so it has no characters that control one.
_Text = Annotated[str, Field(max_length=LONGEST_LINE, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]
_Named = Annotated[str, Field(max_length=LONGEST_FILE, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]
#: Characters of the name of a part, a module, or a tensor in one; longer names are built from it.
LONGEST_PATH = 900


def path_faults(names: Iterable[str]) -> Iterator[Fault]:
    """Yield which names of parts, modules, or tensors of them or a batch are too long for a program."""
    for name in names:
        if len(name) > LONGEST_PATH:
            yield Fault(
                f"{name[:40]}...",
                f"its name has {len(name):,} characters; a run holds names of up to {LONGEST_PATH:,}",
            )


#: At the end of the dtype of a tensor that is read as the conjugate of what is in memory.
_CONJUGATED = ".conj"


class Conjugated(NamedTuple):
    """The dtype of a tensor that is read as the conjugate of what is in memory."""

    dtype: torch.dtype

    @property
    def itemsize(self) -> int:
        """The bytes of a number."""
        return self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype}{_CONJUGATED}"


class Storage(StrictModel):
    """A piece of memory.

    kind: the source of its content. `input`: the batch, and other tensors from outside; `state`:
    parameters, buffers, optimizer tensors; `temporary`: the step itself. host: in the CPU's memory
    although the step runs on another device.
    """

    kind: Literal["input", "state", "temporary"]
    bytes: Natural
    host: bool = False


class TensorSpec(StrictModel):
    """A tensor: shape, strides and offset (in elements) on a storage.

    dtype: its name, and `.conj` if the tensor is read as the conjugate of what is in memory.
    """

    storage: Name
    dtype: str
    shape: tuple[Natural, ...]
    stride: tuple[Natural, ...]
    offset: Natural = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's object."""
        return DTYPES[self.dtype.removesuffix(_CONJUGATED)]

    @property
    def is_conjugated(self) -> bool:
        """Whether it is read as the conjugate of what is in memory."""
        return self.dtype.endswith(_CONJUGATED)

    @property
    def geometry(self) -> tuple[Any, ...]:
        """Its dtype, shape, stride and offset, as `extent_of` and `fills` take them."""
        return self.torch_dtype, self.shape, self.stride, self.offset

    @property
    def extent(self) -> tuple[int, int]:
        """Its first byte in its storage, and the one after its last."""
        return extent_of(self.geometry)

    @property
    def end(self) -> int:
        """How many bytes of its storage it needs."""
        return self.extent[1]

    def check(self, name: str, storages: Mapping[str, Storage]) -> None:
        """Check that the tensor is valid and fits its storage.

        Raises:
            ValueError: it is invalid.
        """
        name_of_dtype = self.dtype.removesuffix(_CONJUGATED)
        if name_of_dtype not in DTYPES or (self.is_conjugated and not self.torch_dtype.is_complex):
            raise ValueError(f"{name}: {self.dtype!r:.80} is not a dtype")
        if len(self.shape) != len(self.stride) or len(self.shape) > DIMENSIONS:
            raise ValueError(f"{name} has {len(self.shape)} sizes but {len(self.stride)} strides")
        if math.prod(max(size, 1) for size in self.shape) > LIMIT:
            raise ValueError(f"{name} has too many elements for any machine")
        storage = storages.get(self.storage)
        if storage is None:
            raise ValueError(f"{name}: unknown storage {self.storage!r}")
        if 0 not in self.shape and self.end > storage.bytes:  # an empty tensor may lie outside
            raise ValueError(
                f"{name} needs {self.end} bytes of {self.storage}, which has only {storage.bytes}"
            )


class Operation(StrictModel):
    """An operator applied to tensors.

    operator: `aten.name.overload`, or `optim.name.step` for the whole step of one of torch's optimizers;
    arguments and keywords: as `encode` writes them; results: names of the result tensors, in order, null
    for a result that is not a tensor; module: the path of its module, also in the backward phase; line:
    the place, in the table of the program, of the line of code that called it, None if it is unknown.
    """

    phase: Phase
    module: str | None = None
    operator: Name
    arguments: tuple[Any, ...] = ()
    keywords: dict[str, Any] = Field({})
    results: tuple[Name | None, ...] = ()
    line: Annotated[int, Field(ge=0)] | None = None

    @property
    def resolved(self) -> Any:
        """The operator itself."""
        return resolve(self.operator)

    @property
    def name(self) -> str:
        """The operator's name, without its overload."""
        # `aten.add.Tensor` is called `add`.
        return self.operator.split(".")[1]

    def by_place(self) -> list[tuple[str, int | str, Any]]:
        """Return all arguments: the name of the parameter, its position or keyword, and the value."""
        names = (p.name for p in parameters(self.resolved) if p.is_positional)
        positional = zip(names, range(len(self.arguments)), self.arguments, strict=False)
        return [*positional, *((name, name, value) for name, value in self.keywords.items())]

    def given(self) -> dict[str, Any]:
        """Return all arguments by the name of their parameter."""
        return {name: value for name, _, value in self.by_place()}

    def reads(self) -> Iterator[str]:
        """Yield the names of the tensors among its arguments."""
        yield from references(self.arguments)
        yield from references(tuple(self.keywords.values()))

    def written(self) -> list[str]:
        """Return the names of the tensors among its arguments that it writes into, in their order."""
        names = writes(self.resolved)
        given = self.given() if names else {}
        return [tensor for name in names for tensor in references(given.get(name))]

    def changed(self) -> list[str]:
        """Return the names of its results, and of the tensors that it writes into."""
        return [*filter(None, self.results), *self.written()]

    def check(self, tensors: Mapping[str, TensorSpec]) -> None:
        """Check that the operator is allowed, and that its arguments have the right kinds.

        Raises:
            ValueError: it is invalid.
        """
        operator = self.resolved
        if not computes(operator):
            raise ValueError(f"{operator} computes nothing: tensors already have their shapes")
        for name in (*self.reads(), *filter(None, self.results)):
            if name not in tensors:
                raise ValueError(f"{operator}: unknown tensor {name!r}")
        try:
            decode([*self.arguments, *self.keywords.values()], tensors.__getitem__)
        except ValueError as error:
            raise ValueError(f"{operator}: {error}") from None
        if isinstance(operator, OptimizerOperator):
            if len(self.arguments) != len(ARGUMENTS) or not self.keywords.keys().isdisjoint(ARGUMENTS):
                raise ValueError(
                    f"{operator} takes {len(ARGUMENTS)} arguments, and its settings by name"
                )
            operator.check(self.given(), self.results, tensors)
            return
        self._check_tensors()
        kinds = [str(result.type) for result in operator._schema.returns]
        kinds = [kind for kind in kinds if kind != "number"]
        if len(self.results) != len(kinds) and "List[Tensor]" not in kinds:
            raise ValueError(f"{operator} returns {len(kinds)} results, not {len(self.results)}")

    def _check_tensors(self) -> None:
        """Check that the operator gets a tensor, or a number, wherever it needs a tensor.

        In place of another value, torch might use a tensor that is none; all else it checks itself.
        """
        # Kernels of the backward pass get no tensor if the forward pass kept nothing.
        given, may_be_none = self.given(), "backward" in self.name
        for parameter in parameters(self.resolved):
            value, fits = given.get(parameter.name), True
            if parameter.kind == "Tensor":
                fits = isinstance(value, str | int | float | dict) or (value is None and may_be_none)
            elif parameter.kind == "List[Tensor]":
                fits = isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)
            if not fits:
                raise ValueError(f"{self.operator}: {parameter.name} must be of type {parameter.kind}")


class SourceLine(StrictModel):
    """A line in the table of a program.

    file: its path, from the working directory or the place of installed packages if it is in there;
    line: from 1; function: in which it is; text: of the line, empty if unknown; above: the place, in the
    table, of the line that called this function, None for the outermost; a smaller one.
    """

    file: _Named
    line: Annotated[int, Field(ge=1, le=2**31)]
    function: _Named
    text: _Text
    above: Annotated[int, Field(ge=0)] | None = None


class CodeLine(NamedTuple):
    """A line of code that called an operation, as it was when the step ran.

    file, line, function, text: as in `SourceLine`; callers: the lines that called it, the innermost
    first.
    """

    file: str
    line: int
    function: str
    text: str
    callers: tuple[CodeLine, ...] = ()

    @property
    def place(self) -> str:
        """File and line: `train.py:41`."""
        return f"{self.file}:{self.line}"

    def __str__(self) -> str:
        return f"{self.place}  {self.text}".rstrip()

    def data(self) -> dict[str, Any]:
        """Return it as plain data."""
        return self._asdict() | {"callers": [each.data() for each in self.callers]}


def extent_of(geometry: tuple[Any, ...]) -> tuple[int, int]:
    """Return the first byte of a tensor in its memory, and the one after its last.

    geometry: its dtype, shape, stride and offset.
    """
    dtype, shape, stride, offset = geometry
    if 0 in shape:
        return offset * dtype.itemsize, offset * dtype.itemsize
    last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    return offset * dtype.itemsize, (offset + last + 1) * dtype.itemsize


def usual_geometry(name: str, shape: tuple[int, ...] | list[int]) -> dict[str, Any]:
    """Return the storage and the strides of a contiguous tensor with its own storage."""
    stride, product = [], 1
    for size in reversed(shape):
        stride.append(product)
        product *= max(size, 1)
    return {"storage": name, "stride": tuple(reversed(stride))}


def fills(geometry: tuple[Any, ...]) -> bool:
    """Return whether a tensor has each byte between its first and its last once.

    geometry: as of `extent_of`.
    """
    _, shape, stride, _ = geometry
    # Strides from the smallest on: each must be the number of elements within it.
    expected = 1
    for step, size in sorted(zip(stride, shape, strict=True)):
        if step != expected and size > 1:
            return False
        expected *= size
    return True
