"""Diff: where two runs part, down to the first operation whose result differs.

Losses and snapshots say between which two states the runs part; from the last common state on, both
are gone through again, and compared step by step, then operation by operation, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from everystep.errors import RunError
from everystep.recording.facts import TrainingFacts
from everystep.recording.run import RecordedRun
from everystep.recording.snapshots import read_snapshot
from everystep.recording.texts import loss_text, model_text, optimizers_text, schedule_text
from everystep.replay.lockstep import Lockstep, draws_at_random
from everystep.replay.objects import Objects
from everystep.replay.operations import OperationDifference
from everystep.replay.walk import LossDifference, StateDifference, differences
from everystep.replay.workers import recorded_numerics

__all__ = ["Difference", "diff"]

#: Runs that took less time than this together are gone through whole.
THOROUGH_SECONDS = 4.0


@dataclass(frozen=True)
class Difference:
    """What differs between two runs.

    experiments, numerics: what was asked for, and what bits depend on besides, by name, in both; steps:
    how many each took; loss: the first that differs (recorded: of the first run, replayed: of the
    second), None if none does; common_state: the last snapshot that both have and that is the same;
    states: tensors of the first common snapshot that differs; operation: where they part; is_thorough:
    whether every step was gone through; problems: why something could not be said.
    """

    names: tuple[str, str]
    experiments: dict[str, tuple[Any, Any]]
    numerics: dict[str, tuple[Any, Any]]
    steps: tuple[int, int]
    loss: LossDifference | None
    common_state: int | None
    states: tuple[StateDifference, ...]
    operation: OperationDifference | None
    problems: tuple[str, ...]
    is_thorough: bool = False

    @property
    def is_same(self) -> bool:
        """Whether the same was asked for, and all that was compared is the same."""
        parts = (self.loss, self.states, self.operation, self.experiments)
        return not any(parts) and self.steps[0] == self.steps[1]


def diff(
    one: RecordedRun,
    other: RecordedRun,
    *,
    thorough: bool = False,
    objects: tuple[Objects | None, Objects | None] = (None, None),
    told: Callable[[int], None] = lambda steps: None,
) -> Difference:
    """Return what differs between two runs.

    Args:
        one: the first run.
        other: the second run.
        thorough: go through every step, not only those between the last common state and the first
            difference: finds what shows in no loss and in no snapshot. That is done unasked where it
            takes a few seconds, and the experiments or the numerics differ.
        objects: what the user trained each with, for steps that no program takes.
        told: is told of steps that are done.

    Raises:
        RunError: a run cannot be read.
    """
    loss = _first_loss(one, other)
    common, states, problems = _snapshots(one, other)
    steps = (one.summary().steps, other.summary().steps)
    experiments = _experiments(one.facts.training, other.facts.training)
    numerics = recorded_numerics(one.facts).differences(recorded_numerics(other.facts))
    ends = [loss.step] if loss else []
    ends += [states[0].state or 1] if states else []
    asked = thorough
    if not ends and (experiments or numerics):
        thorough |= sum(run.facts.seconds or 0.0 for run in (one, other)) < THOROUGH_SECONDS
    last = min(steps) if thorough and not ends else min(ends, default=0)
    operation = None
    if last:
        first = 1 if thorough else 1 + max((state for state in common if state < last), default=0)
        search = Lockstep(one, other, objects, told)
        try:
            # A state that differs shows in the step after it at the latest.
            operation = search.first(first, min(max(last, first), *steps))
            problems += search.departures()
        except RunError as error:
            if asked and not ends:  # all that was asked for cannot be done
                raise
            thorough = False
            problems.append(str(error))
    return Difference(
        names=(one.name, other.name),
        experiments=experiments,
        numerics=numerics,
        steps=steps,
        loss=loss,
        common_state=common[-1] if common else None,
        states=tuple(states),
        operation=operation,
        problems=tuple(dict.fromkeys(problems)),
        is_thorough=thorough,
    )


def _first_loss(one: RecordedRun, other: RecordedRun) -> LossDifference | None:
    pair = [run.losses["loss"].to_numpy().astype(np.float64) for run in (one, other)]
    count = min(map(len, pair))
    a, b = (losses[:count] for losses in pair)
    different = np.flatnonzero((a != b) & ~(np.isnan(a) & np.isnan(b)))
    if not len(different):
        return None
    first = int(different[0])
    return LossDifference(first + 1, float(a[first]), float(b[first]))


def _snapshots(
    one: RecordedRun, other: RecordedRun
) -> tuple[list[int], list[StateDifference], list[str]]:
    """Return the common states before the first that differs, and what differs in that one."""
    rows = [{row.step: row for row in run.snapshot_rows()} for run in (one, other)]
    common: list[int] = []
    problems: list[str] = []
    random = draws_at_random(one) or draws_at_random(other)
    for step in sorted(rows[0].keys() & rows[1].keys()):
        pair = rows[0][step], rows[1][step]
        if pair[0].digest != pair[1].digest:
            try:
                states = [read_snapshot(r.directory, p) for r, p in zip((one, other), pair, strict=True)]
            except RunError as error:
                problems.append(str(error))
                continue
            different = [
                each
                for each in differences(*states)
                if random or not each.tensor.startswith("generator/")
            ]
            if different:
                return common, different, problems
        common.append(step)
    return common, [], problems


def _experiments(one: TrainingFacts, other: TrainingFacts) -> dict[str, tuple[Any, Any]]:
    """Return what differs in what was asked for, by path."""
    pair = [_flat(_asked(facts)) for facts in (one, other)]
    return {
        path: (pair[0].get(path), pair[1].get(path))
        for path in dict.fromkeys((*pair[0], *pair[1]))
        if pair[0].get(path) != pair[1].get(path)
    }


def _asked(facts: TrainingFacts) -> dict[str, Any]:
    return {
        "device": facts.device,
        "seed": facts.seed,
        "data": facts.data.model_dump(mode="json"),
        "batches": facts.batches.model_dump(),
        "model": {"text": model_text(facts.modules), "parameters": facts.parameters},
        "loss": {"text": loss_text(facts.loss)},
        "optimizer": {"text": optimizers_text(facts.optimizers)},
        "schedule": schedule_text(facts.schedules),
        "clip_norm": facts.clip_norm,
        "evaluate_every": facts.evaluate_every,
        "data.digest": facts.data_file.digest if facts.data_file else None,
    } | dict(_unsaid(facts))


def _unsaid(facts: TrainingFacts) -> Iterator[tuple[str, Any]]:
    """Yield settings of torch's own losses, schedules and optimizers that the texts leave out."""
    if facts.loss and facts.loss.is_torchs:
        yield from ((f"loss.{k}", v) for k, v in facts.loss.settings.items() if k != "reduction")
    for name, schedule in facts.schedules.items():
        if schedule.is_torchs:
            yield from ((f"{name}.{key}", value) for key, value in schedule.settings.items())
    for name, optimizer in facts.optimizers.items():
        for place, group in enumerate(optimizer.groups):
            if place and optimizer.is_torchs:
                yield from ((f"{name}.{key}[{place}]", value) for key, value in group.items())


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= _flat(item, f"{path}.{key}" if path else str(key))
    return found
