"""Which storages hold the same values at every step: the operations that fill them run only once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from everystep.program.operators import draws_random_numbers
from everystep.step.capture import Capture

__all__ = ["Effect", "unchanging", "unchanging_in"]


class Effect(NamedTuple):
    """The effect of an operation on storages: those it reads, and those it writes."""

    reads: Collection[Any]
    writes: Collection[Any]
    is_random: bool


def unchanging(effects: Sequence[Effect], candidates: set[Any]) -> set[Any]:
    """Return the storages with the same values at every step: those made only from such storages."""
    fixed = set(candidates)
    before = None
    while before != len(fixed):
        before = len(fixed)
        for effect in effects:
            if effect.is_random or not fixed.issuperset(effect.reads):
                fixed.difference_update(effect.writes)
    return fixed


def unchanging_in(captured: Capture) -> set[int]:
    """Return the storages that hold the same at every step, including unchanged state.

    What Python reads from these (whether a mask is causal, say) is the same at every step.
    """
    written = {storage for each in captured.operations for storage in each.writes}
    candidates = {
        number
        for number, storage in enumerate(captured.storages)
        if storage.kind in ("constant", "temporary")
        or (storage.kind == "state" and number not in written)
    }
    effects = [
        Effect(each.reads, each.writes, draws_random_numbers(each.operator))
        for each in captured.operations
    ]
    return unchanging(effects, candidates)
