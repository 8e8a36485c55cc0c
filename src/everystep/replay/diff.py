"""Diff: where two runs differ, down to the first operation with another result.

Losses and snapshots show between which two states the runs start to differ. From the last common state
on, everystep replays both, and compares them step by step, then operation by operation, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from everystep.device import on_cpu
from everystep.errors import RunError
from everystep.recording.asked import asked_differences, renamed, settings_that_differ
from everystep.recording.facts import TrainingFacts
from everystep.recording.run import EXPERIMENT_FILE, RecordedRun
from everystep.recording.snapshots import read_snapshot
from everystep.replay.causes import causes_of
from everystep.replay.columns import recorded_at
from everystep.replay.data import DataDifference, data_differences
from everystep.replay.evidence import Evidence, around
from everystep.replay.footprints import draws_at_random, footprints, model_digests, programs_of
from everystep.replay.given import name_in_words
from everystep.replay.operations import (
    OperationDifference,
    first_difference,
)
from everystep.replay.parallel import LossDifference
from everystep.replay.processes import Opener, recorded_numerics
from everystep.replay.shown import Shown
from everystep.replay.step import Step
from everystep.step.check import StateDifference, same_bits, state_differences
from everystep.training.objects import Objects

__all__ = ["Difference", "FirstState", "diff"]

#: Runs that took less time than this together are replayed whole.
THOROUGH_SECONDS = 4.0
#: Steps that are replayed between two looks.
STRIDE = 64


class FirstState(NamedTuple):
    """The first state in which a parameter or a buffer differs, after the first operation that does.

    state: None if there is none up to state `last`; name: of the tensor.
    """

    state: int | None
    name: str
    last: int


@dataclass(frozen=True)
class Difference(Shown):
    """How two runs differ.

    experiments, numerics: settings, and other things that bits depend on, by name, in both; steps: the
    number of steps of each; data_tensors: of the data, that differ, where both runs hold it; loss: the
    first that differs (recorded: of the first run, replayed: of the second), None if all match;
    first_state: where that reaches the model, None without an operation;
    common_state: the last snapshot that both have and that is identical; states: tensors of the first
    common snapshot that differs; operation: the first that differs, and why; is_thorough: whether every
    step was replayed; problems: why something could not be compared; is_complete: whether all common
    snapshots could be read, and the replays are those of the recordings; measured: the measurements that
    differ, and their first values that do; renamed: settings of `experiments` that are only names, and
    change nothing; unread: tensors of a batch that differ and that no operation
    reads, in words.
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
    is_complete: bool = True
    is_thorough: bool = False
    data_tensors: tuple[DataDifference, ...] = ()
    measured: tuple[tuple[str, LossDifference], ...] = ()
    unread: tuple[str, ...] = ()
    renamed: tuple[str, ...] = ()
    first_state: FirstState | None = None

    def __repr__(self) -> str:
        if self.is_same:
            found = "all that was compared is the same"
        elif self.operation is not None:
            one = self.operation.one or self.operation.other
            name = f", {one.operation.operator}" if one is not None else ""
            place = f"step {self.operation.step:,} at operation #{self.operation.index}"
            found = f"they diverge in {place}{name}"
        elif self.loss is not None:
            found = f"losses differ from step {self.loss.step:,} on"
        elif self.steps[0] != self.steps[1] and not any(
            (self.states, self.experiments, self.measured, self.unread)
        ):
            found = "one is longer"
        elif not self.is_complete:
            found = "not everything could be compared"
        else:
            found = "they differ in their settings, states, measurements or batches"
        return f"<difference of {self.names[0]} and {self.names[1]}: {found}>"

    @property
    def is_same(self) -> bool:
        """Whether the settings and everything compared are identical, and nothing was unreadable."""
        settings = self.experiments.keys() - self.renamed
        parts = (self.loss, self.states, self.operation, settings, self.measured, self.unread)
        return not any(parts) and self.steps[0] == self.steps[1] and self.is_complete


@on_cpu()
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
    steps = (one.newest_step(), other.newest_step())
    experiments = asked_differences(one.facts.training, other.facts.training)
    numerics = recorded_numerics(one.facts).differences(recorded_numerics(other.facts))
    ends = [loss.step] if loss else []
    ends += [states[0].state or 1] if states else []
    asked = thorough
    if not ends and (experiments or numerics):
        thorough |= sum(run.facts.seconds or 0.0 for run in (one, other)) < THOROUGH_SECONDS
    last = min(steps) if thorough and not ends else min(ends, default=0)
    operation, first_state, unread = None, None, []
    is_complete = not problems
    if last:
        first = 1 if thorough else 1 + max((state for state in common if state < last), default=0)
        search = Lockstep(one, other, objects, on_progress)
        try:
            # A state that differs shows in the step after it at the latest.
            operation = search.first(first, min(max(last, first), *steps))
            if operation is not None:
                end = max(ends, default=min(steps))
                first_state = search.first_state(operation.step, min(max(end, operation.step), *steps))
            diverged = search.divergences()
            is_complete &= not diverged
            problems += diverged
            unread = search.unread
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
        is_complete=is_complete,
        is_thorough=thorough,
        data_tensors=data_differences(one, other),
        measured=tuple(_measured(one, other)),
        unread=tuple(unread),
        renamed=tuple(renamed(one.facts.training, other.facts.training)),
        first_state=first_state,
    )


def _first_loss(one: RecordedRun, other: RecordedRun) -> LossDifference | None:
    pair = [run.losses["loss"].to_numpy().astype(np.float64) for run in (one, other)]
    count = min(map(len, pair))
    return _first_number(np.arange(1, count + 1), pair[0][:count], pair[1][:count])


def _measured(one: RecordedRun, other: RecordedRun) -> Iterator[tuple[str, LossDifference]]:
    """Yield the measurements that differ at steps that both runs have, and where they begin to."""
    last = min(one.newest_step(), other.newest_step())
    for name in sorted({*one.measurement_names} & {*other.measurement_names}):
        own = [run.measured(name) for run in (one, other)]
        pair = [recorded_at(run, name) for run in (one, other)]
        known = [
            (step, a, b)
            for step in sorted({*own[0], *own[1]})
            for a, b in [[at(step) for at in pair]]
            if step <= last and a is not None and b is not None
        ]
        steps, a, b = np.array(known, dtype=np.float64).reshape(-1, 3).T
        difference = _first_number(steps.astype(np.int64), a, b)
        if difference is not None:
            yield name, difference


def _first_number(
    steps: NDArray[np.int64], one: NDArray[np.float64], other: NDArray[np.float64]
) -> LossDifference | None:
    """Return the first of two series of numbers that differs; NaN is the same as any NaN."""
    different = np.flatnonzero((one != other) & ~(np.isnan(one) & np.isnan(other)))
    if not len(different):
        return None
    first = int(different[0])
    return LossDifference(int(steps[first]), float(one[first]), float(other[first]))


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
                for each in state_differences(*states)
                if random or not each.tensor.startswith("generator/")
            ]
            if different:
                return _readable(common, one, other, problems), different, problems
        common.append(step)
    return _readable(common, one, other, problems), [], problems


def _readable(common: list[int], one: RecordedRun, other: RecordedRun, problems: list[str]) -> list[int]:
    """Return the common states up to the last of which both files are as their digests say."""
    left = list(common)
    while left:
        try:
            for run in (one, other):
                row = next(row for row in run.snapshot_rows() if row.step == left[-1])
                read_snapshot(run.directory, row)
            break
        except RunError as error:
            problems.append(str(error))
            left.pop()
    return left


class Lockstep:
    """Replays two runs side by side."""

    def __init__(
        self,
        one: RecordedRun,
        other: RecordedRun,
        objects: tuple[Objects | None, Objects | None],
        on_progress: Callable[[int], None],
    ) -> None:
        #: Tensors of a batch that differ, and that no operation reads, in words.
        self.unread: list[str] = []
        self._runs = (one, other)
        self._openers = (Opener(one, objects[0]), Opener(other, objects[1]))
        self._on_progress = on_progress
        # Under the same numerics, the same program gives the same for the same inputs.
        differences = recorded_numerics(one.facts).differences(recorded_numerics(other.facts))
        self._numerics = [f"{name} {a} and {b}" for name, (a, b) in differences.items()]
        is_own_loop = any(run.facts.training.loop for run in self._runs)
        self._by_operation = (
            bool(self._numerics) or is_own_loop or programs_of(one) != programs_of(other)
        )
        self._is_random = draws_at_random(one) or draws_at_random(other)

    def first(self, first: int, last: int) -> OperationDifference | None:
        """Return the first operation, of steps `first` to `last`, with another result."""
        for number in self._suspicious(first, last):
            one, other = (opener.step(number) for opener in self._openers)
            evidence = self._evidence(one, other)
            found = first_difference(one, other, has_rows=evidence.has_rows)
            if found is not None:
                return replace(found, causes=causes_of(found, evidence))
            self.unread += self.unread or _other_batch(one, other)
        return None

    def first_state(self, first: int, last: int) -> FirstState:
        """Return the first of the states `first` to `last` in which the models differ."""
        begin, count = first, 1
        while begin <= last:
            end = min(last, begin + count - 1)
            pair = [opener.call(model_digests, begin, end) for opener in self._openers]
            for state, (one, other) in enumerate(zip(*pair, strict=True), start=begin):
                for name in one:
                    if name in other and one[name] != other[name]:
                        return FirstState(state, name_in_words(name), last)
            begin, count = end + 1, min(8 * count, STRIDE)
        return FirstState(None, "", last)

    def _evidence(self, one: Step, other: Step) -> Evidence:
        """Return what is known of both runs at a step."""
        number = one.number
        facts = [_facts_at(run, number) for run in self._runs]
        classes = [
            {name: each.class_name for name, each in named.items()}
            for named in (facts[0].modules, facts[0].optimizers)
        ]
        openers = self._openers
        return Evidence(
            names=(self._runs[0].name, self._runs[1].name),
            steps=(one, other),
            settings=settings_that_differ(*facts),
            modules=classes[0],
            optimizers=classes[1],
            look=lambda: (openers[0].call(around, number), openers[1].call(around, number)),
            look_at_first=lambda: (openers[0].state(0), openers[1].state(0)),
            numerics=self._numerics,
            is_seeded=all((run.directory / EXPERIMENT_FILE).exists() for run in self._runs),
            is_data_drawn=all(each.data.source == "random" for each in facts),
            has_rows=not any(each.loop for each in facts),
            unseen=tuple(
                dict.fromkeys(text for each in facts if each.loop for text in each.loop.unseen)
            ),
        )

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
                opener.call(footprints, begin, end, self._by_operation, self._is_random)
                for opener in self._openers
            ]
            for step, (one, other) in enumerate(zip(*pair, strict=True), start=begin):
                if one != other:
                    yield step
            self._on_progress(end - begin + 1)


def _facts_at(run: RecordedRun, step: int) -> TrainingFacts:
    """Return how a step of a run was trained."""
    return max((each for each in run.stretches if each.first <= step), key=lambda each: each.first).facts


def _other_batch(one: Step, other: Step) -> list[str]:
    """Return the tensors of a batch that differ, in words."""
    pair = one.batch.tensors, other.batch.tensors
    names = [
        name
        for name in dict.fromkeys((*pair[0], *pair[1]))
        if name not in pair[0] or not _is_same(pair[0][name], pair[1].get(name))
    ]
    return [f"{name} of step {one.number:,}" for name in names]


def _is_same(one: torch.Tensor, other: torch.Tensor | None) -> bool:
    return other is not None and same_bits(one, other)
