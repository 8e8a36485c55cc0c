"""An operation of a step, with the rows that its arguments belong to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from everystep.program.arguments import decode, references
from everystep.program.calls import without_autograd
from everystep.program.observed import Observed
from everystep.program.operators import leaves
from everystep.replay.rows.labels import MIXED, Tracked

__all__ = ["Call", "MixesError", "Result", "Rule", "none_mixed"]


class MixesError(Exception):
    """Rows cannot be told apart in the results of an operation; the message says why."""


class Result(NamedTuple):
    """The labels of a result; terms, is_mean: see `Tracked`; why: the reason of those that are MIXED."""

    labels: Tensor
    terms: Callable[[int], Tensor] | None = None
    is_mean: bool = False
    why: str | None = None


class Call:
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
Rule = Callable[[Call], list[Result]]
