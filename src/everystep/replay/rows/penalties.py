"""Which parameters have a term of the loss that no row has a part in, such as a penalty."""

from __future__ import annotations

from collections.abc import Mapping

from everystep.ops.labels import SUM, Tracked
from everystep.program.observed import Observed
from everystep.step.observe import Places

__all__ = ["Penalties"]

_PARAMETER = "parameter/"


class Penalties:
    """Follows the state through the forward pass, up to where it meets numbers of rows.

    A parameter that goes into a loss only by way of numbers of rows has a gradient that rows make up:
    what is left of it is not a penalty, but numbers that are the same for all rows.
    """

    def __init__(self, places: Places) -> None:
        self._places = places
        #: Which parameters a storage was made from without rows; at first, those that lie there.
        self._ways: dict[str, frozenset[str]] = {}
        for name, spec in places.tensors.items():
            if name.startswith(_PARAMETER):
                own = frozenset({name.removeprefix(_PARAMETER)})
                self._ways[spec.storage] = self._ways.get(spec.storage, frozenset()) | own
        self._ends: set[str] = set()

    def note(self, seen: Observed, given: Mapping[str, Tracked], made: Mapping[str, Tracked]) -> None:
        """Note an operation that is not of a backward pass, with its arguments and results."""
        ways = [self._of(name) for name in given]
        together = frozenset[str]().union(*ways)
        self._ends -= {self._storage(name) for name in given}
        for name, tracked in made.items():
            storage = self._storage(name)
            has_rows = not tracked.is_shared and not tracked.has(SUM)
            before = self._ways.get(storage, frozenset()) if name in seen.written else frozenset()
            self._ways[storage] = before | (frozenset() if has_rows else together)
            if tracked.value.numel() == 1:
                self._ends.add(storage)

    @property
    def parameters(self) -> frozenset[str]:
        """The parameters that have such a term in a loss, which is a number that nothing reads."""
        names = frozenset[str]().union(*(self._ways.get(end, frozenset()) for end in self._ends))
        loss = self._places.loss
        return names | (self._of(loss) if loss is not None else frozenset())

    def _of(self, name: str) -> frozenset[str]:
        return self._ways.get(self._storage(name), frozenset())

    def _storage(self, name: str) -> str:
        return self._places.tensors[name].storage
