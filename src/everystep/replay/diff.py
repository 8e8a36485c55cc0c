"""Diff: where two runs part, down to the first operation whose result differs.

Losses and snapshots say between which two states the runs part; from the last common state on, both
are gone through again, and compared step by step, then operation by operation, bit by bit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from everystep.errors import RunError
from everystep.program.execute import Observed
from everystep.program.operators import draws_random_numbers, resolve
from everystep.recording.run import RecordedRun
from everystep.recording.snapshots import read_snapshot
from everystep.replay.opener import Opener
from everystep.replay.replay import Replay
from everystep.replay.revive import Objects
from everystep.replay.step import Step
from everystep.replay.walk import LossDifference, StateDifference, differences
from everystep.replay.workers import recorded_numerics
from everystep.step.check import as_integers, distance, same_bits

__all__ = ["Difference", "OperationDifference", "TensorDifference", "diff"]

#: Steps that are gone through between two looks.
STRIDE = 64
_COMPUTED_OTHERWISE = "the same inputs give other bits"
#: Positions of differing numbers that are named.
NAMED = 10


class TensorDifference(NamedTuple):
    """How two tensors of the same name differ.

    elements: how many numbers differ, of how many; positions: of the first of them; values: there, in
    both; largest: the largest distance in units in the last place, None where that has no meaning.
    """

    name: str
    elements: int
    of: int
    positions: list[tuple[int, ...]]
    values: list[tuple[float, float]]
    largest: int | None


@dataclass(frozen=True)
class OperationDifference:
    """The first operation whose result differs, and why.

    step, index: where; one, other: as both runs have it (None where one has no such operation);
    results: those that differ; inputs: of what it takes, what differed already; rows: of the batch, as
    (place, row in the first run, row in the second); causes: in words, what of its own made it differ.
    """

    step: int
    index: int
    one: Observed | None
    other: Observed | None
    results: list[TensorDifference] = field(default_factory=list)
    inputs: list[TensorDifference] = field(default_factory=list)
    rows: list[tuple[int, int, int]] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Difference:
    """What differs between two runs.

    experiments, numerics: what was asked for, and what bits depend on besides, by name, in both; steps:
    how many each took; loss: the first that differs (recorded: of the first run, replayed: of the
    second), None if none does; common_state: the last snapshot that both have and that is the same;
    states: tensors of the first common snapshot that differs; operation: where they part; problems: why
    something could not be said.
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

    @property
    def is_same(self) -> bool:
        """Whether both runs took as many steps, with the same losses and states."""
        parts = (self.loss, self.states, self.operation)
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
            difference: finds what shows in no loss and in no snapshot.
        objects: what the user trained each with, for steps that no program takes.
        told: is told of steps that are done.

    Raises:
        RunError: a run cannot be read.
    """
    loss = _first_loss(one, other)
    common, states, problems = _snapshots(one, other)
    steps = (one.summary().steps, other.summary().steps)
    ends = [loss.step if loss else None, states[0].state or 1 if states else None]
    last = min((end for end in ends if end is not None), default=min(steps) if thorough else 0)
    operation = None
    if last:
        begin = 0 if thorough or common is None else common
        # A state that differs shows in the step after it at the latest.
        last = min(max(last, begin + 1), *steps)
        search = _Search(one, other, objects, told)
        try:
            operation = search.first(begin + 1, last)
            problems += search.departures()
        except RunError as error:
            problems.append(str(error))
    return Difference(
        names=(one.name, other.name),
        experiments=_experiments(one.facts, other.facts),
        numerics=recorded_numerics(one.facts).differences(recorded_numerics(other.facts)),
        steps=steps,
        loss=loss,
        common_state=common,
        states=tuple(states),
        operation=operation,
        problems=tuple(dict.fromkeys(problems)),
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
) -> tuple[int | None, list[StateDifference], list[str]]:
    """Return the last common state before the first that differs, and what differs in that one."""
    rows = [{row.step: row for row in run.snapshot_rows()} for run in (one, other)]
    common: int | None = None
    problems: list[str] = []
    random = _draws_random_numbers(one) or _draws_random_numbers(other)
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
        common = step
    return common, [], problems


class _Search:
    """Goes through two runs side by side."""

    def __init__(
        self,
        one: RecordedRun,
        other: RecordedRun,
        objects: tuple[Objects | None, Objects | None],
        told: Callable[[int], None],
    ) -> None:
        self._runs = (one, other)
        self._openers = (Opener(one, objects[0]), Opener(other, objects[1]))
        self._told = told
        # Under the same numerics, the same program gives the same for the same inputs.
        differences = recorded_numerics(one.facts).differences(recorded_numerics(other.facts))
        self._numerics = [f"{name} {a} and {b}" for name, (a, b) in differences.items()]
        self._by_operation = bool(self._numerics) or _programs(one) != _programs(other)
        self._is_random = _draws_random_numbers(one) or _draws_random_numbers(other)

    def first(self, first: int, last: int) -> OperationDifference | None:
        """Return the first operation, of steps `first` to `last`, whose result differs."""
        for step in self._suspicious(first, last):
            found = _compare_steps(*(opener.step(step) for opener in self._openers))
            if found is not None and found.causes == [_COMPUTED_OTHERWISE] and self._numerics:
                cause = f"{_COMPUTED_OTHERWISE}, under other numerics: {', '.join(self._numerics)}"
                return replace(found, causes=[cause])
            if found is not None:
                return found
        return None

    def departures(self) -> list[str]:
        """Return in words which run was not the same when it was taken again."""
        departed = [opener.departed_at for opener in self._openers]
        return [
            f"{run.name} was not the same when it was taken again, from step {step} on: what is said of "
            "later steps is not of the original"
            for run, step in zip(self._runs, departed, strict=True)
            if step is not None
        ]

    def _suspicious(self, first: int, last: int) -> Iterator[int]:
        """Yield steps that are not the same in both runs, in order."""
        for begin in range(first, last + 1, STRIDE):
            end = min(last, begin + STRIDE - 1)
            pair = [
                opener.call(_footprints, begin, end, self._by_operation, self._is_random)
                for opener in self._openers
            ]
            for step, (one, other) in enumerate(zip(*pair, strict=True), start=begin):
                if one != other:
                    yield step
            self._told(end - begin + 1)


def _footprints(replay: Replay, first: int, last: int, by_operation: bool, is_random: bool) -> list[str]:
    """Take steps again; return for each a digest of what it took and gave."""
    found = []
    batch = b""
    with replay.in_force(first):
        for number in range(first, last + 1):
            revived = replay.go_to(number - 1, replay.stretch_of(number))
            trainee = revived.trainee
            digest = hashlib.sha256()
            if revived.is_by_program(number):
                revived.begin(number)
            digest.update(json.dumps(trainee.hyperparameters()).encode())
            if is_random:
                digest.update(_bytes(torch.get_rng_state()))
            if not (batch and trainee.batch.is_fixed):
                batch = b"".join(hashlib.sha256(_bytes(part)).digest() for part in trainee.batch(number))
            digest.update(batch)
            if by_operation:
                observation = revived.observe()
                losses = [float(observation.loss)]
                for observed in observation.operations:
                    digest.update(observed.operation.operator.encode())
                    for tensor in observed.results.values():
                        digest.update(_bytes(tensor))
            else:
                losses = revived.run(number).tolist()
            replay.compare(number, losses, replay.run.losses_between(number, number))
            for name, tensor in sorted(trainee.named_state().items()):
                digest.update(name.encode())
                digest.update(_bytes(tensor))
            found.append(digest.hexdigest())
    return found


def _compare_steps(one: Step, other: Step) -> OperationDifference | None:
    """Return the first operation of a step whose result differs, or which only one of them has."""
    for index in range(max(len(one.operations), len(other.operations))):
        pair = [s.operations[index] if index < len(s.operations) else None for s in (one, other)]
        a, b = pair
        if a is None or b is None or _outline(a) != _outline(b):
            return OperationDifference(one.number, index, a, b, causes=["another operation"])
        results = _different(a.results, b.results)
        if results:
            return _explained(one, other, index, a, b, results)
    return None


def _explained(
    one: Step, other: Step, index: int, a: Observed, b: Observed, results: list[TensorDifference]
) -> OperationDifference:
    inputs = _different(a.inputs, b.inputs)
    names = {difference.name for difference in inputs}
    is_of_batch = any(name.partition("~")[0] in ("x", "y") for name in names)
    rows = _different_rows(one, other) if is_of_batch else []
    causes = _causes(one, other, a, b, names)
    return OperationDifference(one.number, index, a, b, results, inputs, rows, causes)


def _different_rows(one: Step, other: Step) -> list[tuple[int, int, int]]:
    """Return the places of a batch that differ, with the rows of the data that lie there."""
    pairs = [(one.batch.x, other.batch.x), (one.batch.y, other.batch.y)]
    if any(a.shape != b.shape or not a.ndim for a, b in pairs):
        return []
    count = len(one.batch.x)
    different = torch.zeros(count, dtype=torch.bool)
    for a, b in pairs:
        if len(a) == count:
            different |= (as_integers(a) != as_integers(b)).reshape(count, -1).any(1).cpu()
    rows = [step.batch.rows if step.batch.rows is not None else range(count) for step in (one, other)]
    places = torch.nonzero(different).flatten().tolist()
    return [(place, int(rows[0][place]), int(rows[1][place])) for place in places]


def _causes(one: Step, other: Step, a: Observed, b: Observed, inputs: set[str]) -> list[str]:
    """Return what of the operation's own made its result differ."""
    changed = [
        f"{name} {value!r} and {other.hyperparameters.get(name)!r}"
        for name, value in one.hyperparameters.items()
        if value != other.hyperparameters.get(name)
    ]
    given = _arguments(a), _arguments(b)
    arguments = [
        f"{name} {value!r} and {given[1].get(name)!r}"
        for name, value in given[0].items()
        if value != given[1].get(name)
    ]
    if any(name.startswith("hyperparameter/") for name in inputs):
        return ["another hyperparameter: " + ", ".join(changed)]
    if arguments:
        return ["other arguments: " + ", ".join(arguments)]
    if inputs:
        return []
    if changed and a.operation.phase == "update":
        return ["another hyperparameter: " + ", ".join(changed)]
    return ["another random draw" if _draws(a.operation.operator) else _COMPUTED_OTHERWISE]


def _arguments(observed: Observed) -> dict[str, Any]:
    is_operator = observed.operation.operator.startswith("aten.")
    return observed.operation.given() if is_operator else {}


def _draws(operator: str) -> bool:
    return operator.startswith("aten.") and draws_random_numbers(resolve(operator))


def _draws_random_numbers(run: RecordedRun) -> bool:
    """Tell whether a step of the run draws random numbers, as far as programs say; else it may."""
    engine = run.facts.get("engine") or {"eager_from": 1}
    if engine["eager_from"] is not None:
        return True
    try:
        return any(
            _draws(operation["operator"])
            for each in _programs(run)
            for operation in json.loads(each)["operations"]
        )
    except (ValueError, LookupError, TypeError):
        return True


def _outline(observed: Observed) -> tuple[Any, ...]:
    operation = observed.operation
    return operation.phase, operation.module, operation.operator


def _different(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[TensorDifference]:
    found = []
    for name in one.keys() & other.keys() if one.keys() != other.keys() else one:
        a, b = one[name], other[name]
        if not same_bits(a, b):
            found.append(_tensor_difference(name, a, b))
    return found


def _tensor_difference(name: str, one: Tensor, other: Tensor) -> TensorDifference:
    if one.shape != other.shape or one.dtype != other.dtype:
        return TensorDifference(name, one.numel(), one.numel(), [], [], None)
    where = torch.nonzero(as_integers(one) != as_integers(other))
    positions = [tuple(position) for position in where[:NAMED].tolist()]
    values = [(_number(one[p]), _number(other[p])) for p in positions]
    return TensorDifference(name, len(where), one.numel(), positions, values, distance(one, other))


def _number(tensor: Tensor) -> Any:
    return tensor.item()


def _experiments(one: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what differs in what was asked for, by path."""
    keys = (
        *("device", "seed", "data", "batches", "model", "loss", "optimizer", "schedule"),
        *("clip_norm", "evaluate_every"),
    )
    pair = [_flat({key: facts.get(key) for key in keys}) for facts in (one, other)]
    for each, facts in zip(pair, (one, other), strict=True):
        each["data.digest"] = facts.get("data.file", {}).get("digest")
    return {
        path: (pair[0].get(path), pair[1].get(path))
        for path in dict.fromkeys((*pair[0], *pair[1]))
        if pair[0].get(path) != pair[1].get(path)
    }


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= _flat(item, f"{path}.{key}" if path else str(key))
    return found


def _programs(run: RecordedRun) -> list[bytes]:
    rules = (run.facts.get("engine") or {}).get("programs", [])
    try:
        return [(run.directory / rule["file"]).read_bytes() for rule in rules]
    except OSError:
        return []


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
