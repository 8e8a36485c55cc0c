"""Diff: where two runs differ, down to the first operation with another result.

Losses and snapshots show between which two states the runs start to differ. From the last common state
on, everystep replays both, and compares them step by step, then operation by operation, bit by bit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from everystep.errors import RunError
from everystep.recording.asked import asked_differences
from everystep.recording.facts import EAGERLY
from everystep.recording.files import own_path
from everystep.recording.run import RecordedRun
from everystep.recording.snapshots import read_snapshot
from everystep.replay.operations import COMPUTED_OTHERWISE, OperationDifference, compare_steps, draws
from everystep.replay.parallel import LossDifference
from everystep.replay.processes import Opener, recorded_numerics
from everystep.replay.replay import Replay
from everystep.replay.shown import Shown
from everystep.replay.step import ReplayStepper
from everystep.step.check import StateDifference, bytes_of, state_differences
from everystep.training.objects import Objects

__all__ = ["Difference", "diff"]

#: Runs that took less time than this together are replayed whole.
THOROUGH_SECONDS = 4.0
#: Steps that are replayed between two looks.
STRIDE = 64


@dataclass(frozen=True)
class Difference(Shown):
    """How two runs differ.

    experiments, numerics: settings, and other things that bits depend on, by name, in both; steps: the
    number of steps of each; loss: the first that differs (recorded: of the first run, replayed: of the
    second), None if all match; common_state: the last snapshot that both have and that is identical;
    states: tensors of the first common snapshot that differs; operation: the first that differs;
    is_thorough: whether every step was replayed; problems: why something could not be compared.
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

    def __repr__(self) -> str:
        if self.is_same:
            found = "all that was compared is the same"
        elif self.operation is not None:
            one = self.operation.one or self.operation.other
            name = f", {one.operation.operator}" if one is not None else ""
            found = (
                f"they part in step {self.operation.step:,} at operation #{self.operation.index}{name}"
            )
        elif self.loss is not None:
            found = f"losses differ from step {self.loss.step:,} on"
        else:
            found = "they differ in their settings or states"
        return f"<difference of {self.names[0]} and {self.names[1]}: {found}>"

    @property
    def is_same(self) -> bool:
        """Whether the settings and everything compared are identical."""
        parts = (self.loss, self.states, self.operation, self.experiments)
        return not any(parts) and self.steps[0] == self.steps[1]


def diff(
    one: RecordedRun,
    other: RecordedRun,
    *,
    thorough: bool = False,
    objects: tuple[Objects | None, Objects | None] = (None, None),
    on_progress: Callable[[int], None] = lambda steps: None,
) -> Difference:
    """Return how two runs differ.

    Args:
        one: the first run.
        other: the second run.
        thorough: replay every step, not only those between the last common state and the first
            difference. That also finds differences that no loss and no snapshot shows. `diff` does it
            anyway if it takes only seconds, and the experiments or the numerics differ.
        objects: the objects that trained each run, for steps that no program runs.
        on_progress: called with the number of steps just replayed.

    Raises:
        RunError: a run is unreadable.
    """
    loss = _first_loss(one, other)
    common, states, problems = _snapshots(one, other)
    steps = (one.summary().steps, other.summary().steps)
    experiments = asked_differences(one.facts.training, other.facts.training)
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
        search = Lockstep(one, other, objects, on_progress)
        try:
            # A state that differs shows in the step after it at the latest.
            operation = search.first(first, min(max(last, first), *steps))
            problems += search.divergences()
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
    random = _draws_at_random(one) or _draws_at_random(other)
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
                for each in state_differences(*states)
                if random or not each.tensor.startswith("generator/")
            ]
            if different:
                return common, different, problems
        common.append(step)
    return common, [], problems


class Lockstep:
    """Replays two runs side by side."""

    def __init__(
        self,
        one: RecordedRun,
        other: RecordedRun,
        objects: tuple[Objects | None, Objects | None],
        on_progress: Callable[[int], None],
    ) -> None:
        self._runs = (one, other)
        self._openers = (Opener(one, objects[0]), Opener(other, objects[1]))
        self._on_progress = on_progress
        # Under the same numerics, the same program gives the same for the same inputs.
        differences = recorded_numerics(one.facts).differences(recorded_numerics(other.facts))
        self._numerics = [f"{name} {a} and {b}" for name, (a, b) in differences.items()]
        is_own_loop = any(run.facts.training.loop for run in self._runs)
        self._by_operation = bool(self._numerics) or is_own_loop or _programs(one) != _programs(other)
        self._is_random = _draws_at_random(one) or _draws_at_random(other)

    def first(self, first: int, last: int) -> OperationDifference | None:
        """Return the first operation, of steps `first` to `last`, with another result."""
        for step in self._suspicious(first, last):
            found = compare_steps(*(opener.step(step) for opener in self._openers))
            if found is not None and found.causes == [COMPUTED_OTHERWISE] and self._numerics:
                cause = f"{COMPUTED_OTHERWISE}, under other numerics: {', '.join(self._numerics)}"
                return replace(found, causes=[cause])
            if found is not None:
                return found
        return None

    def divergences(self) -> list[str]:
        """Report in words which replays differ from their recording."""
        diverged = [opener.diverged_at for opener in self._openers]
        return [
            f"the replay of {run.name} differs from its recording from step {step} on; results for "
            "later steps are not those of the original run"
            for run, step in zip(self._runs, diverged, strict=True)
            if step is not None
        ]

    def _suspicious(self, first: int, last: int) -> Iterator[int]:
        """Yield steps that differ between both runs, in order."""
        for begin in range(first, last + 1, STRIDE):
            end = min(last, begin + STRIDE - 1)
            pair = [
                opener.call(_footprints, begin, end, self._by_operation, self._is_random)
                for opener in self._openers
            ]
            for step, (one, other) in enumerate(zip(*pair, strict=True), start=begin):
                if one != other:
                    yield step
            self._on_progress(end - begin + 1)


def _footprints(replay: Replay, first: int, last: int, by_operation: bool, is_random: bool) -> list[str]:
    """Replay steps; return a digest of the inputs and results of each."""
    found = []
    at = -1
    with replay.in_force(first):
        for number in range(first, last + 1):
            digest = hashlib.sha256()
            if replay.stretch_of(number) != at:
                at = replay.stretch_of(number)
                stepper = replay.go_to(number - 1, at)
                _add_state(digest, stepper)
            given = stepper.given(number)
            if is_random:
                digest.update(bytes_of(torch.get_rng_state()))
            digest.update(given)
            if by_operation:
                observation = stepper.observe()
                losses = [float(observation.loss)]
                for observed in observation.operations:
                    digest.update(observed.operation.operator.encode())
                    for tensor in observed.results.values():
                        digest.update(bytes_of(tensor))
            else:
                losses = stepper.run(number).tolist()
            replay.compare(number, losses, replay.recorded_losses(number, number))
            _add_state(digest, stepper)
            found.append(digest.hexdigest())
    return found


def _add_state(digest: Any, stepper: ReplayStepper) -> None:
    for name, tensor in sorted(stepper.named_state().items()):
        digest.update(name.encode())
        digest.update(bytes_of(tensor))


def _draws_at_random(run: RecordedRun) -> bool:
    """Tell whether a step of the run draws random numbers, if programs show it; otherwise it may."""
    engine = run.facts.training.engine or EAGERLY
    if engine.eager_from is not None:
        return True
    try:
        return any(
            draws(operation["operator"])
            for each in _programs(run)
            for operation in json.loads(each)["operations"]
        )
    except (ValueError, LookupError, TypeError, RecursionError):
        return True


def _programs(run: RecordedRun) -> list[bytes]:
    rules = (run.facts.training.engine or EAGERLY).programs
    try:
        return [own_path(run.directory, rule.file).read_bytes() for rule in rules]
    except (OSError, RunError):
        return []
