"""Versions: how often torch has counted a change of each tensor, which shows what has changed since."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

__all__ = ["Versions", "counts_of", "version_of"]


class Versions(NamedTuple):
    """Of the tensors of a state, in order: names, ids, counted changes, and addresses.

    They differ where the values of a tensor have changed; `tensor.data = ...` counts nothing.
    """

    # Lists, since Python compares those of a thousand tensors at once.
    names: list[str]
    objects: list[int]
    counts: list[int | None]
    places: list[int]

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> Versions:
        """Return the versions of the tensors of a state."""
        tensors = [*state.values()]
        return cls([*state], [*map(id, tensors)], counts_of(tensors), [*map(Tensor.data_ptr, tensors)])

    def by_name(self) -> dict[str, tuple[int, int | None, int]]:
        """Return the id, the count and the address of each tensor."""
        return dict(zip(self.names, zip(*self[1:], strict=True), strict=True))


def counts_of(tensors: Iterable[Tensor | None]) -> list[int | None]:
    """Return how often each tensor was changed, None where it is gone or torch does not count."""
    # Mostly all are counted, and to ask each tensor first takes twice as long.
    given = [*tensors]
    try:
        return [None if tensor is None else tensor._version for tensor in given]
    except RuntimeError:  # of a tensor made in inference mode
        return [*map(version_of, given)]


def version_of(tensor: Tensor | None) -> int | None:
    """Return how often a tensor was changed, None if it is gone or torch does not count."""
    return None if tensor is None or tensor.is_inference() else tensor._version
