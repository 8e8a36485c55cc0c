"""Diff: where two runs differ, down to the first operation with a different result.

Losses and snapshots show between which two states the runs start to differ. From the last common state
on, everystep replays both, and compares them step by step, then operation by operation, bit by bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import xxhash
from pydantic import ValidationError
from torch import Tensor

from everystep.answers.causes import Evidence, causes_of
from everystep.answers.operations import (
    OperationDifference,
    TensorDifference,
    name_in_words,
    rows_that_differ,
    tensor_difference,
)
from everystep.answers.other_process import OtherProcess
from everystep.device import on_cpu
from everystep.errors import RunError
from everystep.experiment.preparation import TablePreparation
from everystep.ops.operators import draws_random_numbers
from everystep.program.allowed import resolve
from everystep.recording.blocks import same_number
from everystep.recording.contents import digest_of
from everystep.recording.facts import TrainingFacts
from everystep.recording.files import bytes_of, program_file
from everystep.recording.keep import kept_text
from everystep.recording.recorded_run import RecordedRun
from everystep.recording.settings_diff import config_differences, renamed, settings_that_differ
from everystep.replay.opened_step import Step
from everystep.replay.processes import Opener
from everystep.replay.recorded_columns import recorded_at
from everystep.replay.run_replay import LossDifference, Replay
from everystep.replay.shown import Shown, same_content
from everystep.step.state import State, StateDifference, same_bits, state_differences
from everystep.training.objects import Objects

__all__ = ["BEFORE", "DataDifference", "Difference", "FirstState", "diff", "in_lockstep"]

#: Runs that took less time than this together are replayed whole.
THOROUGH_SECONDS = 4.0
#: Steps that one run replays before the other follows: a difference ends both soon.
STRIDE = 64


# How the first differing operation is found:
#   recorded      losses and digests of snapshots: the runs agree up to state 64, and differ at step 70
#   in lockstep   both replay from state 64: digests of each step, 1, then 8, then 64 steps at a time
#   opened        the first step that differs is opened in both, and compared operation by operation
#   causes        of the first operation with a different result: see `causes`
class DataDifference(NamedTuple):
    """How a tensor of the data differs.

    tensor: the numbers; rows: those that differ, by their numbers in the first run's data; columns:
    those that differ, by number, of data with two dimensions; names: of all columns, if the data is a
    table.
    """

    tensor: TensorDifference
    rows: list[int]
    columns: list[int]
    names: list[str]


class FirstState(NamedTuple):
    """The first state in which a parameter or buffer differs, after the first differing operation.

    state: None if there is none up to state `last`; name: of the tensor.
    """

    state: int | None
    name: str
    last: int


@dataclass(frozen=True, repr=False, eq=False)
class Difference(Shown):
    """How two runs differ.

    experiments, numerics: differing settings, and other conditions that bits depend on, by name, of
    both; steps: the number of steps of each; data_tensors: of the data, that differ, where both runs
    hold it; loss: the first that differs (recorded: of the first run, replayed: of the second), None if
    all match; first_state: when that reaches the model, None without an operation; common_state: the
    last snapshot that both have and that is identical; states: tensors of the first common snapshot that
    differs; operation: the first that differs, and why; is_thorough: whether every step was replayed;
    problems: why something could not be compared; is_complete: whether all common snapshots could be
    read, and the replays are those of the recordings; measured: the measurements that differ, and their
    first values that do; renamed: settings of `experiments` that change nothing: names, and the config;
    batches: tensors of a batch that differ where no operation has a different result, as text.
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
    batches: tuple[str, ...] = ()
    renamed: tuple[str, ...] = ()
    first_state: FirstState | None = None

    @property
    def is_same(self) -> bool:
        """Whether the settings and everything compared are identical, and nothing was unreadable."""
        settings = self.experiments.keys() - self.renamed
        parts = (self.loss, self.states, self.operation, settings, self.measured, self.batches)
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
    """Answer `Run.diff`; for runs of equally many processes, about the rank that differs first.

    thorough: done anyway if it takes only seconds, and the experiments or the numerics differ; objects:
    that trained each run, for the data of one that does not hold it; on_progress: called with the number
    of steps just replayed.
    """
    pairs = [(one, other)]
    known = one.known_ranks, other.known_ranks
    if all(each is not None and not each.rank for each in known):  # not two ranks of one run
        ranks, others = one.ranks, other.ranks
        if len(ranks) == len(others):
            pairs = [*zip(ranks, others, strict=True)]
    # A difference on one rank reaches all others with the next collective, often in the same step, so
    # the first operation of all decides.
    found = [_diff(*each, thorough=thorough, objects=objects, on_progress=on_progress) for each in pairs]

    def place(each: Difference) -> tuple[bool, float, float]:
        operation, loss = each.operation, each.loss
        if operation is None:
            return each.is_same, float("inf") if loss is None else loss.step, float("inf")
        return False, operation.step, operation.index

    return min(found, key=place)


def _diff(
    one: RecordedRun,
    other: RecordedRun,
    *,
    thorough: bool,
    objects: tuple[Objects | None, Objects | None],
    on_progress: Callable[[int], None],
) -> Difference:
    # Not the frame: importing polars takes longer than reading some thousand losses.
    pairs = zip(one.losses_of_all(), other.losses_of_all(), strict=False)
    loss = _first_number(enumerate(pairs, start=1))
    # Where no step draws, generators may differ without any effect.
    random = _draws_at_random(one) or _draws_at_random(other)
    common, states, problems = _snapshots(one, other, compares_generators=random)
    steps = (one.newest_step(), other.newest_step())
    settings = settings_that_differ(one.facts.training, other.facts.training)
    experiments = {each.listed: each.values for each in settings}
    configs = config_differences(one.facts, other.facts)
    numerics = one.facts.training.numerics.differences(other.facts.training.numerics)
    # The steps at which a difference is known to show: in a loss, or in a state on the disk.
    ends = [loss.step] if loss else []
    ends += [states[0].state or 1] if states else []
    asked = thorough
    if not ends and (experiments or numerics):
        thorough |= sum(run.facts.seconds or 0.0 for run in (one, other)) < THOROUGH_SECONDS
    # 0: no difference is known, and a search through all steps was not asked for.
    last = min(steps) if thorough and not ends else min(ends, default=0)
    operation, first_state, batches, partly = None, None, list[str](), list[str]()
    is_complete = not problems
    if last:
        first = 1 if thorough else 1 + max((state for state in common if state < last), default=0)
        search = _Lockstep((one, other), objects, numerics, random, on_progress)
        # A state that differs shows in the step after it at the latest.
        last = min(max(last, first), *steps)
        kept = one.facts.kept_with(other.facts, min(steps))
        if thorough:
            partly = [
                f"of {run.name}, {kept_text(run.facts, run.newest_step())}"
                for run in (one, other)
                if run.facts.not_kept
            ]
            problems += partly
        within = [(max(first, a), min(last, b)) for a, b in kept] if thorough else [(first, last)]
        try:
            for first, last in within:
                operation = search.first(first, last)
                if operation is not None:
                    end = max(ends, default=min(steps))
                    ends_kept = (b for a, b in kept if a <= operation.step <= b)
                    end = min(max(end, operation.step), *ends_kept, *steps)
                    first_state = search.first_state(operation.step, end)
                    break
            diverged = search.divergences()
            is_complete &= not diverged
            problems += diverged
            batches = search.batches
        except RunError as error:
            if asked and not ends:  # the complete comparison is not possible
                raise
            # What is left of the answer, the losses and the settings, is still true.
            thorough = False
            problems.append(str(error))
    return Difference(
        names=(one.name, other.name),
        experiments=experiments | configs,
        numerics=numerics,
        steps=steps,
        loss=loss,
        common_state=common[-1] if common else None,
        states=tuple(states),
        operation=operation,
        problems=tuple(dict.fromkeys(problems)),
        is_complete=is_complete,
        is_thorough=thorough and not partly,
        data_tensors=_data_differences(one, other),
        measured=tuple(_measured(one, other)),
        batches=tuple(batches),
        renamed=(*renamed(one.facts.training, other.facts.training), *configs),
        first_state=first_state,
    )


def _data_differences(one: RecordedRun, other: RecordedRun) -> tuple[DataDifference, ...]:
    """Return the tensors of the data that differ, if both runs hold it, and those of the same shape."""
    facts = [run.facts.training for run in (one, other)]
    files = [each.data_file for each in facts if each.data_file is not None and each.data_file.stored]
    if len(files) < 2 or files[0].digest == files[1].digest:
        return ()
    try:
        pair = one.data(files[0]), other.data(files[1])
    except RunError:  # the replay reports problems with it
        return ()
    both = ((name, tensor, pair[1].get(name)) for name, tensor in sorted(pair[0].items()))
    return tuple(
        _in_data(name, tensor, its, facts)
        for name, tensor, its in both
        if its is not None and its.shape == tensor.shape and its.dtype == tensor.dtype and tensor.ndim
        if not same_bits(tensor, its)
    )


def _in_data(name: str, one: Tensor, other: Tensor, facts: list[TrainingFacts]) -> DataDifference:
    rows = torch.nonzero(rows_that_differ(one, other)).flatten()
    numbers = facts[0].data.numbers()
    if numbers is not None:  # in the source of the data
        rows = numbers[1 if name.startswith("validation_") else 0][rows]
    columns = rows_that_differ(one.mT, other.mT) if one.ndim == 2 else rows.new_empty(0)
    names = _column_names(facts) if name.endswith("x") else []
    return DataDifference(
        tensor_difference(name, one, other),
        rows.tolist(),
        torch.nonzero(columns).flatten().tolist(),
        names if len(names) == len(columns) else [],
    )


def _column_names(facts: list[TrainingFacts]) -> list[str]:
    """Return the names of the columns of x, if both runs have a table with the same ones."""
    try:
        one, other = (TablePreparation.model_validate(each.preparation).x_names for each in facts)
    except ValidationError:
        return []
    return one if one == other else []


def _measured(one: RecordedRun, other: RecordedRun) -> Iterator[tuple[str, LossDifference]]:
    """Yield the measurements that differ at steps that both runs have, and where they begin to."""
    last = min(one.newest_step(), other.newest_step())
    for name in sorted({*one.measurement_names} & {*other.measurement_names}):
        steps = sorted(step for step in {*one.values_of(name), *other.values_of(name)} if step <= last)
        # A setting is recorded where it changes: at other steps, it has the number of before.
        at = recorded_at(one, name), recorded_at(other, name)
        difference = _first_number((step, (at[0](step), at[1](step))) for step in steps)
        if difference is not None:
            yield name, difference


def _first_number(
    pairs: Iterable[tuple[int, tuple[float | None, float | None]]],
) -> LossDifference | None:
    """Return the first pair of numbers that differs, by step; NaN is the same as any NaN."""
    for step, (one, other) in pairs:
        if one is not None and other is not None and not same_number(one, other):
            return LossDifference(step, one, other)
    return None


def _snapshots(
    one: RecordedRun, other: RecordedRun, *, compares_generators: bool
) -> tuple[list[int], list[StateDifference], list[str]]:
    """Return the common states before the first that differs, and what differs in that one.

    Up to the last with intact files in both runs; also the damaged files.
    """
    rows = [{row.step: row for row in run.snapshot_rows()} for run in (one, other)]
    common: list[int] = []
    different: list[StateDifference] = []
    problems: list[str] = []

    def states(step: int) -> list[State]:
        """Read a state of both; none if one cannot be read."""
        near = (run.state_near(step, after=step - 1, on_problem=problems.append) for run in (one, other))
        found = [state for state in near if state is not None]
        return found if len(found) == 2 else []

    for step in sorted(rows[0].keys() & rows[1].keys()):
        # Files with the same bytes have the same state; others may, since names and settings are in
        # them, too.
        if rows[0][step].digests != rows[1][step].digests:
            pair = states(step)
            if not pair:
                continue
            found = state_differences(pair[0], pair[1])
            different = [
                each for each in found if compares_generators or not each.tensor.startswith("generator/")
            ]
            if different:
                break
        common.append(step)
    # The replay of both begins with the last one, so it must be readable.
    while common and not states(common[-1]):
        common.pop()
    return common, different, problems


class _Lockstep:
    """Replays two runs side by side.

    batches: tensors of a batch that differ where no operation has a different result, as text.
    """

    def __init__(
        self,
        runs: tuple[RecordedRun, RecordedRun],
        objects: tuple[Objects | None, Objects | None],
        numerics: dict[str, tuple[Any, Any]],
        is_random: bool,
        on_progress: Callable[[int], None],
    ) -> None:
        self.batches: list[str] = []
        self._openers = Opener(runs[0], objects[0]), Opener(runs[1], objects[1])
        self._on_progress = on_progress
        self._numerics = [f"{name} {a} and {b}" for name, (a, b) in numerics.items()]
        # Under the same numerics, the same program gives the same for the same inputs.
        # Python of a user's loop may act on numbers, so its programs alone do not show what steps do.
        is_own_loop = any(run.facts.training.loop for run in runs)
        is_same = not is_own_loop and not numerics and _programs_of(runs[0]) == _programs_of(runs[1])
        self._how = {"by_operation": not is_same, "is_random": is_random}

    def first(self, first: int, last: int) -> OperationDifference | None:
        """Return the first operation, in steps `first` to `last`, with a different result."""
        for number, one, other in in_lockstep(self._openers, first, last, **self._how):
            self._on_progress(1)
            if one == other:
                continue
            evidence = Evidence(self._openers, number, self._numerics)
            found = evidence.first_difference()
            if found is not None:
                return replace(found, causes=causes_of(found, evidence))
            self.batches = self.batches or _other_batch(*evidence.steps)
        return None

    def first_state(self, first: int, last: int) -> FirstState:
        """Return the first of the states `first` to `last` in which the models differ."""
        for state, one, other in in_lockstep(self._openers, first, last):
            for name in one:
                is_of_model = name.startswith(("parameter/", "buffer/"))
                if is_of_model and name in other and one[name] != other[name]:
                    return FirstState(state, name_in_words(name), last)
        return FirstState(None, "", last)

    def divergences(self) -> list[str]:
        """Describe which replays differ from their recording."""
        return [
            f"the replay of {opener.run.name} differs from its recording from step "
            f"{opener.diverged_at} on; results for later steps are not those of the original run"
            for opener in self._openers
            if opener.diverged_at is not None
        ]


def _programs_of(run: RecordedRun) -> list[bytes]:
    """Return the programs of a run as they are on disk; none if one of them cannot be read."""
    try:
        return [run.read_file(program_file(number)) for number in run.facts.training.programs]
    except RunError:
        return []


def _draws_at_random(run: RecordedRun) -> bool:
    """Return whether a step of the run draws random numbers, if programs show it; True if none does."""
    training = run.facts.training
    if training.loop or training.unseen:
        return True
    try:  # without checking all of a program, which takes as long as a small diff
        programs = [json.loads(program)["operations"] for program in _programs_of(run)]
        operators = {each["operator"] for program in programs for each in program}
        return any(draws_random_numbers(resolve(operator)) for operator in operators)
    except (ValueError, LookupError, TypeError, RecursionError):
        return True


def _other_batch(one: Step, other: Step) -> list[str]:
    """Return the tensors of a batch that differ, as texts."""
    x, y = one.batch.tensors, other.batch.tensors
    differing = (name for name in {**x, **y} if not same_content(x.get(name), y.get(name)))
    return [f"{name} of step {one.number:,}" for name in differing]


def in_lockstep(
    sides: Sequence[Opener | OtherProcess], first: int, last: int, **how: bool
) -> Iterator[tuple[int, dict[str, str], dict[str, str]]]:
    """Yield each step with its footprints in two replays. how: see `footprints`."""
    count = 1  # mostly, the first step differs already
    while first <= last:
        end = min(last, first + count - 1)
        # Digests, not tensors: one of the two may be another process.
        one, other = (side.call(footprints, first, end, **how) for side in sides)
        yield from zip(range(first, end + 1), one, other, strict=True)
        first, count = end + 1, min(8 * count, STRIDE)


#: The name of the digest of the state before the first step.
BEFORE = "before"


def footprints(
    replay: Replay, first: int, last: int, *, by_operation: bool = False, is_random: bool = False
) -> list[dict[str, str]]:
    """Replay steps; return digests of the inputs and results of each by name, and of the state after it.

    by_operation: also of what each operation makes; is_random: also of the generator that steps draw
    from.
    """
    found = []
    with replay.in_force(first):
        for number in range(first, last + 1):
            at = replay.stretch_of(number)
            stepper = replay.go_to(number - 1, at)
            digests: dict[str, str] = {}
            # Else it is the state after the step before, which has its digests there.
            if number in (first, replay.stretches[at].first):
                named = sorted(stepper.named_state().items())
                digests[BEFORE] = repr([(name, digest_of(tensor)) for name, tensor in named])
            digests["given"] = xxhash.xxh3_128(stepper.given(number)).hexdigest()
            if is_random:
                digests["generator"] = digest_of(torch.get_rng_state())
            if by_operation:
                made = xxhash.xxh3_128()
                observation = stepper.observe()
                losses = [float(observation.loss)]
                for seen in observation.operations:
                    made.update(seen.operation.operator.encode())
                    for tensor in seen.made.values():
                        made.update(bytes_of(tensor))
                digests["operations"] = made.hexdigest()
            else:
                losses = stepper.run(number)
            digests["loss"] = repr(losses)
            replay.compare(number, losses)
            state = stepper.named_state().items()
            found.append(digests | {name: digest_of(tensor) for name, tensor in state})
    return found
