"""An operation of a step, with the rows that its arguments belong to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from everystep.ops.labels import MIXED, SHARED, SUM, Tracked, elementwise, reduced, rows_in
from everystep.program.arguments import decode, references
from everystep.program.calls import without_autograd
from everystep.program.observed import Observed
from everystep.program.operators import leaves

__all__ = [
    "MixesError",
    "Result",
    "RowsCall",
    "RowsRule",
    "asked_of",
    "by_key",
    "first_axis",
    "leading",
    "none_mixed",
    "of_shape",
    "sum_of",
    "with_parameters",
]


class MixesError(Exception):
    """Rows cannot be told apart in the results of an operation; the message says why."""


class Result(NamedTuple):
    """The labels of a result; terms, is_mean: see `Tracked`; why: the reason of those that are MIXED."""

    labels: Tensor
    terms: Callable[[int], Tensor] | None = None
    is_mean: bool = False
    why: str | None = None


class RowsCall:
    """An operation.

    tracked: its inputs by name; is_term: whether a result may be a sum of terms: the loss, a gradient
    of a parameter, or a single number; is_backward: whether it runs after the loss; from_state: names of
    its inputs that are state.
    """

    def __init__(
        self,
        seen: Observed,
        tracked: Mapping[str, Tracked],
        *,
        is_term: bool,
        is_backward: bool,
        from_state: frozenset[str],
    ) -> None:
        self.operation = seen.operation
        self.name = seen.operation.name.rstrip("_")
        self.results = [*seen.results.values()]
        self.is_term = is_term
        self.is_backward = is_backward
        self._from_state = from_state
        self._tracked = tracked
        self._given = seen.operation.given()

    def __getitem__(self, name: str) -> Any:
        """Return an argument by its name: a `Tracked`, a list of them, or a plain value."""
        value = self._given.get(name)
        if isinstance(value, str):
            return self._tracked[value]
        if isinstance(value, list | tuple) and any(isinstance(item, str) for item in value):
            return [self._tracked[item] if isinstance(item, str) else item for item in value]
        return decode(value, lambda _: torch.empty(0))

    def tensors(self, *left_out: str) -> list[Tracked]:
        """Return all tensors among its arguments."""
        given = [value for name, value in self._given.items() if name not in left_out]
        return [self._tracked[name] for name in references(given)]

    def is_state(self, name: str) -> bool:
        """Whether an argument is a tensor of the state."""
        return self._given.get(name) in self._from_state

    def require_shared(self, *names: str) -> None:
        """Check that arguments belong to no row.

        Raises:
            MixesError: one does.
        """
        for name in names:
            value = self[name]
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, Tracked) and not each.is_shared:
                    raise MixesError(f"has a {name} that depends on rows")

    def again(self, /, **replaced: Any) -> tuple[Tensor, ...]:
        """Run the operator with other arguments, and return its results."""
        written = set(self.operation.written())

        def tensor_of(name: str) -> Tensor:
            value = self._tracked[name].value
            return value.clone() if name in written else value

        given = {name: decode(value, tensor_of) for name, value in self._given.items()} | replaced
        with without_autograd():
            result = self.operation.resolved(**given)
        return tuple(leaves(result)) if isinstance(result, list) else _as_tuple(result)


def none_mixed(labels: Tensor, why: str = "combines numbers of several rows") -> Tensor:
    """Return the labels.

    Raises:
        MixesError: some are MIXED.
    """
    if bool((labels == MIXED).any()):
        raise MixesError(why)
    return labels


def _as_tuple(result: Any) -> tuple[Any, ...]:
    return tuple(result) if isinstance(result, tuple) else (result,)


#: Returns what is known of the results of an operation, in order; raises MixesError.
RowsRule = Callable[[RowsCall], list[Result]]


def of_shape(labels: Tensor, result: Tensor) -> Result:
    """Return a result with these labels; MixesError: the operator did something else than its rule."""
    if labels.shape != result.shape:
        raise MixesError(f"returns the shape {tuple(result.shape)} for {tuple(labels.shape)}")
    return Result(labels)


def sum_of(labels: Tensor, terms: Callable[[int], Tensor], parts: Sequence[Tracked]) -> Result:
    """Return a result; its terms are known where its label is SUM."""
    if not bool((labels == SUM).any()):
        return Result(labels)
    sums = [each for each in parts if each.has(SUM)]
    return Result(labels, terms, is_mean=bool(sums) and all(each.is_mean for each in sums))


def by_key(
    rows: dict[int, Tensor], result: Tensor, on: Callable[[Tensor], Tensor]
) -> Callable[[int], Tensor]:
    """Return terms that are computed from the places of a row along an axis; 0 for rows without any.

    Kernels do not have to bear empty tensors.
    """
    return lambda row: on(rows[row]) if row in rows else torch.zeros_like(result)


def first_axis(*tracked: Tracked) -> Tensor:
    """Return the labels of entries along the first axis that tensors share."""
    return elementwise([reduced(each.labels, range(1, each.labels.dim())) for each in tracked])


def leading(labels: Tensor, result: Tensor) -> Tensor:
    """Return the labels of a result from those along its first axis."""
    return labels.reshape(-1, *[1] * (result.dim() - 1)).expand(result.shape)


def with_parameters(
    call: RowsCall,
    laid: Callable[[Tensor, Tensor], Tensor],
    own: Tensor,
    keys: Tensor,
    select: Callable[[int], Callable[[Tensor], Tensor]],
) -> list[Result]:
    """Return a gradient by rows, and those of parameters as sums over places.

    laid: expands the labels of places to a tensor; own: labels of the gradient by rows; keys: labels of
    the places of a sum; select: returns what computes result 1 or 2 from some places.
    """
    asked = asked_of(call)
    rows = rows_in(keys)
    if set(rows) == {SHARED} and call.is_backward and asked != [0]:
        raise MixesError("adds up numbers that are the same for all rows")
    found = []
    for place, result in zip(asked, call.results, strict=True):
        if place == 0:
            found.append(Result(laid(own, result)))
        else:
            labels = reduced(keys, [0], is_sum=True).expand(result.shape)
            found.append(Result(labels, by_key(rows, result, select(place))))
    return found


def asked_of(call: RowsCall) -> list[int]:
    """Return which of its results an operator was asked for, by its output_mask."""
    asked = [place for place, is_asked in enumerate(call["output_mask"]) if is_asked]
    if len(asked) != len(call.results):
        raise MixesError("returns other results than it was asked for")
    return asked
