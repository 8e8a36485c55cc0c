"""What rules say of results, and of the places of rows along an axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from everystep.replay.rows.call import Call, MixesError, Result
from everystep.replay.rows.labels import SHARED, SUM, Tracked, elementwise, reduced, rows_in

__all__ = ["asked_of", "by_key", "first_axis", "leading", "of_shape", "sum_of", "with_parameters"]


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
    call: Call,
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


def asked_of(call: Call) -> list[int]:
    """Return which of its results an operator was asked for, by its output_mask."""
    asked = [place for place, is_asked in enumerate(call["output_mask"]) if is_asked]
    if len(asked) != len(call.results):
        raise MixesError("returns other results than it was asked for")
    return asked
