"""Rules of rows: which rows of the batch the results of an operation belong to.

A rule is exact or refuses. Where an operator adds up numbers of several rows, the term of a row is the
same operator on the numbers of this row alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from everystep.ops.arguments import decode, references
from everystep.ops.call import kind_of
from everystep.ops.labels import MIXED, SHARED, SUM, Tracked, all_are, broadcast, reduced, rows_in
from everystep.ops.operators import leaves, without_autograd

if TYPE_CHECKING:
    from everystep.program.observed import Observed

__all__ = [
    "MASKS",
    "MixesError",
    "Result",
    "RowsCall",
    "RowsRule",
    "along",
    "asked_of",
    "batched",
    "by_key",
    "filled",
    "none_mixed",
    "of_shape",
    "sum_of",
]


# For each operation of a step, in order, `rows` calls the rule of its kind with a RowsCall: what was
# recorded, and the labels of the inputs. The rule returns a Result for each result: its labels, and the
# terms of a sum, which are computed only when they are asked for. A MixesError makes all results MIXED,
# with its message as the reason; what does not depend on them stays exact.
class MixesError(Exception):
    """Rows cannot be separated in the results of an operation; the message gives the reason."""


class Result(NamedTuple):
    """The labels of a result; terms, is_mean: see `Tracked`; why: the reason of those that are MIXED."""

    labels: Tensor
    terms: Callable[[int], Tensor] | None = None
    is_mean: bool = False
    why: str | None = None


@dataclass(eq=False)
class RowsCall:
    """An operation, with the rows that its arguments belong to.

    tracked: its inputs by name; count: how many rows the batch has; is_term: whether a result may be a
    sum of terms: the loss, a gradient of a parameter, or a single number; is_backward: whether it runs
    after the loss; from_state: names of its inputs that are state.
    """

    seen: Observed
    tracked: Mapping[str, Tracked]
    count: int
    is_term: bool
    is_backward: bool
    from_state: frozenset[str]

    def __post_init__(self) -> None:
        self.operation = self.seen.operation
        self.kind = kind_of(self.operation.name)
        self.results = [*self.seen.results.values()]
        self._given = self.operation.given()

    def __getitem__(self, name: str) -> Any:
        """Return an argument by its name: a `Tracked`, a list of them, or a plain value."""
        value = self._given.get(name)
        if isinstance(value, str):
            return self.tracked[value]
        if isinstance(value, list | tuple) and any(isinstance(item, str) for item in value):
            return [self.tracked[item] if isinstance(item, str) else item for item in value]
        return decode(value, lambda _: torch.empty(0))

    def tensors(self, *left_out: str) -> list[Tracked]:
        """Return all tensors among its arguments."""
        given = [value for name, value in self._given.items() if name not in left_out]
        return [self.tracked[name] for name in references(given)]

    def named(self, *left_out: str) -> dict[str, Tracked]:
        """Return the arguments that are tensors, by name."""
        given = {name: value for name, value in self._given.items() if isinstance(value, str)}
        return {name: self.tracked[value] for name, value in given.items() if name not in left_out}

    def is_state(self, name: str) -> bool:
        """Whether an argument is a tensor of the state."""
        return self._given.get(name) in self.from_state

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

    def require_rows(self, labels: Tensor) -> None:
        """Check that the terms that a backward pass adds up belong to rows.

        Raises:
            MixesError: all are the same for all rows.
        """
        # They may still be one number per row, such as the gradient of a mean: the label is lost.
        if self.is_backward and labels.numel() and all_are(labels, SHARED):
            raise MixesError("adds up numbers that are the same for all rows")

    def again(self, /, **replaced: Any) -> tuple[Tensor, ...]:
        """Run the operator with other arguments, and return its results."""
        written = set(self.operation.written())

        def tensor_of(name: str) -> Tensor:
            value = self.tracked[name].value
            return value.clone() if name in written else value  # the recorded one stays as it is

        given = {name: decode(value, tensor_of) for name, value in self._given.items()} | replaced
        with without_autograd():
            result = self.operation.resolved(**given)
        if isinstance(result, list):
            return tuple(leaves(result))
        return result if isinstance(result, tuple) else (result,)


#: Returns the labels of the results of an operation, in order; raises MixesError.
RowsRule = Callable[[RowsCall], list[Result]]


def none_mixed(labels: Tensor, why: str = "combines numbers of several rows") -> Tensor:
    """Return the labels.

    Raises:
        MixesError: some are MIXED.
    """
    if bool((labels == MIXED).any()):
        raise MixesError(why)
    return labels


def of_shape(labels: Tensor, result: Tensor) -> Result:
    """Return a result with these labels; MixesError: the result does not fit the rule."""
    if labels.shape != result.shape:
        raise MixesError(f"returns the shape {tuple(result.shape)} for {tuple(labels.shape)}")
    return Result(labels)


def filled(label: int, result: Tensor, why: str | None = None) -> Result:
    """Return a result with the same label everywhere."""
    labels = torch.full((), label, dtype=torch.int32, device=result.device)
    return Result(labels.expand(result.shape), why=why)


def sum_of(labels: Tensor, terms: Callable[[int], Tensor], parts: Sequence[Tracked]) -> Result:
    """Return a result; its terms are known where its label is SUM."""
    if not bool((labels == SUM).any()):
        return Result(labels)
    sums = [each for each in parts if each.has(SUM)]
    return Result(labels, terms, is_mean=bool(sums) and all(each.is_mean for each in sums))


def by_key(keys: Tensor, result: Tensor, on: Callable[[Tensor], Tensor]) -> Result:
    """Return a gradient that is a sum over places with labels; `on` computes terms from some places.

    keys: the labels (count). 0 for rows without a place: kernels need not support empty tensors.
    """
    rows = rows_in(keys)
    labels = reduced(keys, [0], is_sum=True, is_strict=True).expand(result.shape)
    return Result(labels, lambda row: on(rows[row]) if row in rows else torch.zeros_like(result))


def along(call: RowsCall) -> list[Result]:
    """Return labels of results computed along an axis, which keeps its size."""
    axis = -1 if call["dim"] is None else call["dim"]
    labels = broadcast([reduced(each.labels, [axis], keepdim=True) for each in call.tensors()])
    none_mixed(labels)
    return [Result(labels.expand(result.shape)) for result in call.results]


_PARAMETERS = ("weight", "bias")
MASKS = ("attn_mask", "attn_bias")
#: Of attention on a GPU: they have no rows, and it has no numbers of theirs.
_OF_KERNEL = ("cum_seq_q", "cum_seq_k", "philox_seed", "philox_offset")


def batched(call: RowsCall, own: str = "", axes: int = 1, *, has_sums: bool = False) -> list[Result]:
    """Return labels of results computed separately for each place along the first axes.

    own: the only argument that the first result depends on, if there is one; axes: their number;
    has_sums: whether the results after the first are gradients of parameters: sums over the places.
    """
    call.require_shared(*_PARAMETERS)
    named = call.named(*_PARAMETERS, *MASKS, *_OF_KERNEL)
    given = {name: reduced(t.labels, range(axes, t.labels.dim())) for name, t in named.items()}
    keys = broadcast([*given.values()])
    for mask in (call[name] for name in MASKS):
        if isinstance(mask, Tracked) and not mask.is_shared:
            if mask.labels.dim() != 4:
                raise MixesError("has a mask of another shape that depends on rows")
            keys = broadcast([keys, reduced(mask.labels, range(1, 4))])
    none_mixed(keys)
    if not has_sums:
        return [_leading(keys, result) for result in call.results]
    asked = asked_of(call)
    if asked != [0]:
        call.require_rows(keys)

    def on(which: int, at: Tensor) -> Tensor:
        chosen: dict[str, Any] = {
            name: each.value.reshape(-1, *each.value.shape[axes:])[at] for name, each in named.items()
        }
        count = {} if call["N"] is None else {"N": len(at)}
        # Of channels last, torch's group norm writes the first result even if it is not asked for.
        mask = [place == which or (place == 0 and bool(count)) for place in range(3)]
        return call.again(**chosen, **count, output_mask=mask)[which]

    return [
        by_key(keys.reshape(-1), result, partial(on, place))
        if place
        else _leading(broadcast([given[own]]) if own else keys, result)
        for place, result in zip(asked, call.results, strict=True)
    ]


def _leading(labels: Tensor, result: Tensor) -> Result:
    """Return a result with labels by its first axes; of what has no rows, any may be in it."""
    if result.shape[: labels.dim()] != labels.shape:
        return filled(MIXED, result, "returns what has no rows")
    return Result(labels[(...,) + (None,) * (result.dim() - labels.dim())].expand(result.shape))


def asked_of(call: RowsCall) -> list[int]:
    """Return which of its results an operator was asked for, by its output_mask."""
    asked = [place for place, is_asked in enumerate(call["output_mask"]) if is_asked]
    if len(asked) != len(call.results):
        raise MixesError("returns other results than it was asked for")
    return asked
