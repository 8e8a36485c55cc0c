"""Verify: take every step of a run again, and say exactly what is as recorded and what is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from everystep.numerics import Numerics
from everystep.recording.run import RecordedRun
from everystep.replay.parallel import LossDifference, Visitor, parallel, spans
from everystep.replay.processes import Opener, recorded_numerics
from everystep.step.check import StateDifference, distance

__all__ = ["Verification", "verify"]


@dataclass(frozen=True)
class Verification:
    """What taking every step of a run again has shown.

    steps: how many were taken again; different_steps: of how many the loss was another; first_loss:
    the first of these, None if there is none; loss_distance: how far it is off, in units in the last
    place; snapshots: how many states after state 0 were compared, of `all_snapshots`; states: what
    differed in them, in their order;
    numerics: what bits depend on and is another here, with the recorded value and the one here;
    problems: what could not be read; threads: with how many threads which number of steps was taken.
    """

    steps: int
    different_steps: int
    first_loss: LossDifference | None
    loss_distance: int | None
    snapshots: int
    all_snapshots: int
    states: tuple[StateDifference, ...]
    numerics: dict[str, tuple[Any, Any]]
    problems: tuple[str, ...]
    threads: dict[int, int]

    @property
    def is_exact(self) -> bool:
        """Whether every loss and every snapshot was as recorded, bit for bit, and all could be read."""
        return not (self.different_steps or self.states or self.problems)


def verify(
    opener: Opener,
    processes: int | None = None,
    on_progress: Callable[[int], None] = lambda steps: None,
) -> Verification:
    """Take every step of a run again, and compare every loss and every snapshot, bit for bit.

    Args:
        opener: of the run.
        processes: how many at once; absent: one for each core, where that is worth their start.
        on_progress: called with the number of steps that were just replayed.

    Raises:
        RunError: something that is needed is missing or cannot be read.
    """
    run = opener.run
    steps = run.summary().steps
    found = parallel(opener, spans(run, 1, steps), Visitor(), processes, on_progress)
    replayed = list(found) if steps else []
    replayed.sort(key=lambda each: each.span)
    firsts = [each.first_loss for each in replayed if each.first_loss is not None]
    threads: dict[int, int] = {}
    for each in replayed:
        taken = each.span.last - each.span.first + 1
        threads[each.threads] = threads.get(each.threads, 0) + taken
    return Verification(
        steps=steps,
        different_steps=sum(each.different_losses for each in replayed),
        first_loss=firsts[0] if firsts else None,
        loss_distance=_loss_distance(run, firsts[0]) if firsts else None,
        snapshots=sum(each.compared for each in replayed),
        all_snapshots=sum(0 < row.step <= steps for row in run.snapshot_rows()),
        states=tuple(difference for each in replayed for difference in each.states),
        numerics=_other_numerics(run, replayed[0].numerics if replayed else None),
        problems=tuple(dict.fromkeys(problem for each in replayed for problem in each.problems)),
        threads=threads,
    )


def _other_numerics(run: RecordedRun, here: Numerics | None) -> dict[str, tuple[Any, Any]]:
    """Return what could not be made as it was; without the number of threads, which `threads` has."""
    if here is None:
        return {}
    differences = recorded_numerics(run.facts).differences(here)
    return {name: pair for name, pair in differences.items() if name != "threads"}


def _loss_distance(run: RecordedRun, difference: LossDifference) -> int | None:
    dtype = getattr(torch, run.facts.loss_dtype)
    pair = [torch.tensor([n], dtype=dtype) for n in (difference.recorded, difference.replayed)]
    return distance(*pair)
