"""The segments of a step of a user's loop; an update has its settings and the changed parameters."""

from __future__ import annotations

from typing import NamedTuple

import torch

from everystep.recording.facts import LoopFacts, TrainingFacts
from everystep.replay.step import Segment, Step
from everystep.views.formula import Formula, update_formulas

__all__ = ["Happened", "SegmentSeen", "as_it_happened"]


class SegmentSeen(NamedTuple):
    """A segment of a step.

    optimizer: the name of the optimizer that updates in it; None if it is not an update, or unknown.
    settings: the optimizer's learning rates and similar settings at this step. formulas: of the
    parameters that it changed, in the order of the step; a parameter that several segments change
    belongs to the last of them.
    """

    segment: Segment
    optimizer: str | None
    settings: dict[str, float]
    formulas: dict[str, Formula]


class Happened(NamedTuple):
    """All segments, and the parameters that other code than an optimizer changed."""

    segments: list[SegmentSeen]
    changed_otherwise: list[str]


def as_it_happened(step: Step, training: TrainingFacts, loop: LoopFacts) -> Happened:
    """Return the segments of a step in the order in which they happened."""
    left = [n for n, u in step.updates.items() if not torch.equal(u.before, u.after)]
    optimizers = training.optimizers
    known = {name: update_formulas(step.operations, {name: o}) for name, o in optimizers.items()}
    found = []
    for segment in reversed(step.segments(loop.parts)):
        if segment.phase != "update":
            found.append(SegmentSeen(segment, None, {}, {}))
            continue
        optimizer = segment.part if segment.part in optimizers else next(iter(optimizers), None)
        formulas = known.get(optimizer or "", {})
        numbers = set(range(segment.first, segment.last + 1))
        own = [n for n in left if n in formulas and not numbers.isdisjoint(formulas[n].numbers)]
        left = [name for name in left if name not in own]
        settings = _settings(step, segment.part)
        found.append(SegmentSeen(segment, optimizer, settings, {n: formulas[n] for n in own}))
    return Happened(found[::-1], left)


def _settings(step: Step, part: str | None) -> dict[str, float]:
    """Return the settings of an update's optimizer; without a prefix if it is the only one."""
    prefix = f"{part}." if part else ""
    given = step.hyperparameters.items()
    return {name.removeprefix(prefix): value for name, value in given if name.startswith(prefix)}
