"""The input and output of a rule: a call with a wanted number, and where that comes from."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from everystep.ops.arguments import decode
from everystep.ops.formula import number_text, parsed, value, written
from everystep.ops.operators import parameters

if TYPE_CHECKING:
    from everystep.program.operation import Operation

__all__ = [
    "Axis",
    "Call",
    "Formula",
    "Made",
    "NoRuleError",
    "Numbers",
    "Piece",
    "Sum",
    "Terms",
    "Words",
    "aligned",
    "grid",
    "kind_of",
    "numbers_of",
    "product",
    "single",
]

# For number [2, 5] of `addmm(bias, x, weight)` with 64 inputs, a rule returns
#   Sum((Terms("factor * self", {"self": Piece("parameter/0.bias", (5,))}),
#        Terms("factor * mat1 * mat2", {"mat1": Piece("x", (2, [0 .. 63])),
#                                       "mat2": Piece("parameter/0.weight~1", ([0 .. 63], 5))})))
# A piece names places and holds no numbers: these are read when the answer is computed, and the answer
# names each of them as an expression that can be asked for in turn.
#: Numbers of a piece, in double precision.
Numbers = NDArray[Any]
#: Indices along a dimension: one for each number, or the same for all.
Axis = NDArray[np.int64] | int

_DECORATIONS = re.compile(r"^_|(?<=[a-z0-9])_$")  # but not the last one of `__and__`
#: In these dtypes an operator first rounds the numbers among its arguments to float32.
_ROUNDED = {torch.float32, torch.float16, torch.bfloat16}
#: Arguments that are rounded to the dtype of a float16 or bfloat16 result instead, by operator.
_OPERANDS = {
    **dict.fromkeys(("add", "sub", "rsub"), ("other", "alpha")),
    **dict.fromkeys(("fmod", "remainder", "atan2"), ("other",)),
    "pow": ("self", "exponent"),
}


def kind_of(name: str) -> str:
    """Return the name of an operator without what distinguishes variants: `addmm` of `addmm_`."""
    return _DECORATIONS.sub("", name)


class NoRuleError(Exception):
    """There is no rule for this call."""


class Piece(NamedTuple):
    """Numbers of one tensor.

    name: of the tensor; places: their indices, for each dimension; is_result: whether the tensor is
    another result of the same operation, not an input.
    """

    name: str
    places: tuple[Axis, ...] = ()
    is_result: bool = False

    @property
    def size(self) -> int:
        """How many numbers they are."""
        return max((len(axis) for axis in self.places if not isinstance(axis, int)), default=1)

    def at(self, number: int) -> tuple[int, ...]:
        """Return the index of one of its numbers."""
        return tuple(axis if isinstance(axis, int) else int(axis[number]) for axis in self.places)


@dataclass(frozen=True)
class Formula:
    """A formula of numbers.

    text: the formula, in its language, with the names of the pieces and settings in it; given: the
    pieces, including those that only name a place; settings: numbers by name; note: a remark.
    """

    text: str
    given: dict[str, Piece] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    divisor: ClassVar[float] = 1.0

    @property
    def shown(self) -> str:
        """The formula as it is shown."""
        return written(self.text, self.settings, self.given)

    def of(self, numbers: Mapping[str, Numbers]) -> Any:
        """Return its result for the numbers of the pieces."""
        return np.reshape(value(self.text, {**self.settings, **numbers}), 1)[0]


class Terms(Formula):
    """Terms of a sum, one for each number of its pieces.

    text: one term; given: pieces of the same length; settings: numbers, or arrays of one for each term.
    """

    @property
    def size(self) -> int:
        """How many terms they are."""
        sizes = [piece.size for piece in self.given.values()]
        # A piece of one number is in each term, so that it is in none where the others are empty.
        return 0 if 0 in sizes else max(sizes, default=0)

    def of(self, numbers: Mapping[str, Numbers]) -> Numbers:
        """Return the terms of the pieces' numbers."""
        return np.broadcast_to(value(self.text, {**self.settings, **numbers}), self.size)


def single(name: str, piece: Piece, factor: float = 1) -> Terms:
    """Return the numbers of a piece times a factor."""
    return Terms(f"factor * {name}", {name: piece}, {"factor": factor})


def product(one: tuple[str, Piece], other: tuple[str, Piece], factor: float = 1) -> Terms:
    """Return the products of two pieces, number by number, times a factor."""
    (a, first), (b, second) = one, other
    return Terms(f"factor * {a} * {b}", {a: first, b: second}, {"factor": factor})


@dataclass(frozen=True)
class Sum:
    """A sum of terms, divided by a number."""

    terms: tuple[Terms, ...]
    divisor: float = 1.0
    note: ClassVar[str] = ""

    @property
    def shown(self) -> str:
        """The sum as it is shown."""
        parts = []
        for terms in self.terms:
            text = f"({terms.shown})" if _is_loose(terms.shown) else terms.shown
            parts.append(text if terms.size == 1 else f"the sum of {terms.size:,} terms {text}")
        whole = " + ".join(parts)
        if self.divisor == 1:
            return whole
        divisor = int(self.divisor) if float(self.divisor).is_integer() else self.divisor
        return f"({whole}) / {f'{divisor:,}' if isinstance(divisor, int) else number_text(divisor)}"


@dataclass(frozen=True)
class Words:
    """Which numbers a number was computed from, if there is no formula.

    note: a description.
    """

    note: str
    given: dict[str, Piece] = field(default_factory=dict)
    shown: ClassVar[str] = ""
    divisor: ClassVar[float] = 1.0


Made = Sum | Formula | Words


def _is_loose(text: str) -> bool:
    """Return whether a term needs parentheses in a sum."""
    tree = parsed(text)
    is_added = isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add | ast.Sub)
    return is_added or isinstance(tree, ast.IfExp | ast.Compare | ast.BoolOp)


@dataclass(eq=False)
class Call:
    """An operation with one wanted number.

    inputs, results: its tensors by name, before and after; outputs: the names of its results in order;
    place: which of the outputs; index: the place of the number there; kind: the name of the operator
    without what distinguishes its variants (`addmm` of `addmm_`), or another operator that has the same
    result, with these arguments.
    """

    operation: Operation
    inputs: Mapping[str, Tensor]
    results: Mapping[str, Tensor]
    outputs: Sequence[str | None]
    place: int
    index: tuple[int, ...]
    kind: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.written = self.outputs[self.place] or ""
        self.kind = self.kind or kind_of(self.operation.name)
        if not self.arguments:
            # A program has only the arguments that were passed: rules find the defaults as well.
            known = {each.name: each.default for each in parameters(self.operation.resolved)}
            # In a program, a string is the name of a tensor.
            defaults = {k: {"text": v} if isinstance(v, str) else v for k, v in known.items()}
            self.arguments = defaults | self.operation.given()

    def __contains__(self, key: str) -> bool:
        return self.arguments.get(key) is not None

    def again(self, /, **replaced: Any) -> Sequence[Tensor]:
        """Run the operator with other arguments, and return its results."""
        given = {
            # On the CPU, where rules make the arguments that replace others.
            key: decode(value, lambda name: self.inputs[name].cpu())
            for key, value in self.arguments.items()
        }
        found = self.operation.resolved(**given | replaced)
        return found if isinstance(found, list | tuple) else [found]

    def value(self, key: str) -> Any:
        """Return an argument that is not a tensor."""
        return decode(self.arguments.get(key), _refuse)

    def scalar(self, key: str) -> float:
        """Return an argument that is a number, rounded as the operator rounds it."""
        value = self.value(key)
        if not isinstance(value, int | float):
            raise NoRuleError(f"{key} is not a number")
        if self.dtype == torch.bool and isinstance(self.arguments.get("self"), str):
            # A comparison first converts the number to the dtype of the tensor: with 0.1 in float32,
            # `self <= 0.1` holds for a float32 0.1, which is larger than 0.1 in double precision.
            dtype = torch.result_type(self.tensor("self"), value)
            return torch.tensor(value, dtype=dtype).item() if dtype.is_floating_point else value
        if isinstance(value, float) and self.dtype in _ROUNDED:
            # In the place of a tensor, a number becomes one of the result's dtype; on a CPU at least.
            is_operand = key in _OPERANDS.get(self.kind, ()) and self.device.type == "cpu"
            dtype = self.dtype if is_operand else torch.float32
            # Beyond the range, it is infinite for the operator, too.
            return torch.tensor(value, dtype=torch.float64).to(dtype).item()
        # A tensor of whole numbers keeps the whole part: `fill_(1.7)` writes 1.
        is_whole = not self.dtype.is_floating_point and not self.dtype.is_complex
        return int(value) if is_whole and self.dtype != torch.bool and math.isfinite(value) else value

    def name(self, key: str) -> str:
        """Return the name of the tensor that an argument is."""
        value = self.arguments.get(key)
        if not isinstance(value, str):
            raise NoRuleError(f"{key} is not a tensor")
        return value

    def names(self, key: str) -> list[str]:
        """Return the names of the tensors in a list."""
        value = self.arguments.get(key)
        if not isinstance(value, list | tuple) or not all(isinstance(each, str) for each in value):
            raise NoRuleError(f"{key} is not a list of tensors")
        return list(value)

    def tensor(self, key: str) -> Tensor:
        """Return an argument that is a tensor."""
        return self.inputs[self.name(key)]

    def tensor_of(self, piece: Piece) -> Tensor:
        """Return the tensor that a piece is of."""
        return (self.results if piece.is_result else self.inputs)[piece.name]

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of an argument."""
        return tuple(self.tensor(key).shape)

    @property
    def device(self) -> torch.device:
        """The device of the result."""
        return self.results[self.output(self.place)].device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the result."""
        return self.results[self.output(self.place)].dtype

    def output(self, place: int) -> str:
        """Return the name of a result."""
        # None: a result that the operator was not asked for, such as the gradient of what needs none.
        name = self.outputs[place] if place < len(self.outputs) else None
        if name is None or name not in self.results:
            raise NoRuleError(f"result {place} is not there")
        return name

    def piece(self, key: str, *places: Axis) -> Piece:
        """Return numbers of an argument."""
        return Piece(self.name(key), places)

    def result_piece(self, place: int, *places: Axis) -> Piece:
        """Return numbers of another result."""
        return Piece(self.output(place), places, is_result=True)

    def along(self, key: str, dim: int, places: Axis) -> Piece:
        """Return numbers of an argument at the wanted place, at all places along a dimension."""
        axes: list[Axis] = list(self.index)
        axes[dim] = places
        return self.piece(key, *axes)

    def aligned(self, key: str, index: Sequence[Axis] | None = None) -> Piece:
        """Return the numbers of an argument that are broadcast to an index, or to the wanted one."""
        return aligned(self.name(key), self.shape(key), self.index if index is None else index)

    def line(self, key: str) -> Piece:
        """Return all numbers of an argument along `dim` that the wanted one is in.

        torch takes dimensions 0 and -1 of a tensor without dimensions, too: its only number.
        """
        if not self.index:
            return self.piece(key)
        dim = self.value("dim") % len(self.index)
        return self.along(key, dim, np.arange(self.shape(key)[dim]))

    def whole(self, key: str) -> Piece:
        """Return all numbers of an argument."""
        return Piece(self.name(key), grid(*map(range, self.shape(key))))


def aligned(name: str, shape: Sequence[int], index: Sequence[Axis]) -> Piece:
    """Return the number, or the numbers, of a tensor that is broadcast to an index."""
    if len(shape) > len(index):
        raise NoRuleError(f"{name} has more dimensions than the result")
    # As torch broadcasts: dimensions correspond from the last on, and one of size 1 has one number for
    # all.
    last = index[len(index) - len(shape) :]
    places = tuple(0 if size == 1 else place for size, place in zip(shape, last, strict=True))
    # An index beyond the size: the operator uses this argument in another way than number by number.
    if any(np.any(np.asarray(p) >= size) for p, size in zip(places, shape, strict=True)):
        raise NoRuleError(f"{name} is not broadcast to the result")
    return Piece(name, places)


def grid(*axes: Sequence[int] | NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
    """Return the indices of all combinations of places along each axis, the last fastest."""
    if not axes:
        return ()
    meshed = np.meshgrid(*(np.asarray(axis, dtype=np.int64) for axis in axes), indexing="ij")
    return tuple(axis.ravel() for axis in meshed)


def numbers_of(tensor: Tensor, piece: Piece) -> Numbers:
    """Return the numbers of a piece (size), in double precision."""
    places = tuple(
        axis if isinstance(axis, int) else torch.tensor(axis, device=tensor.device)
        for axis in piece.places
    )
    found = tensor.detach()[places].reshape(-1).cpu()
    # As formulas are computed; whole numbers beyond 2**53 are rounded here.
    wide = found.to(torch.complex128 if found.is_complex() else torch.float64)
    return np.broadcast_to(wide.numpy(), piece.size)


def _refuse(name: str) -> Tensor:
    raise NoRuleError(f"{name} is a tensor")
