"""A training that is ready to start, from any source."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from everystep.errors import ExperimentError, Fault, UsageError
from everystep.experiment.batches import RowsOf
from everystep.experiment.data import Data
from everystep.recording.facts import Facts, ForkFacts, ResumeFacts, TrainingFacts
from everystep.recording.recorded_run import RecordedRun
from everystep.recording.snapshots import DEFAULT_BUDGET
from everystep.training.measurements import Evaluation
from everystep.training.model_step import Training
from everystep.training.stepper import Engine

__all__ = ["Job", "Outcome", "Progress", "StartingPoint", "relabelled_rows"]


@dataclass(frozen=True)
class StartingPoint:
    """Where a training starts: new, or at a state of a run that it forks or continues.

    run: None for a new training; at: the state; hyperparameters: the lr and similar settings there;
    has_new_data: whether the data is not the run's; fork: the facts about a fork; resumed: those about
    continuing; directory: of a new run, which must not exist, None for the next free one; budget:
    maximum bytes of snapshots; user_facts: those that the user gave.
    """

    run: RecordedRun | None = None
    at: int = 0
    hyperparameters: Mapping[str, float] = field(default_factory=dict)
    has_new_data: bool = True
    fork: ForkFacts | None = None
    resumed: ResumeFacts | None = None
    directory: Path | None = None
    budget: float = DEFAULT_BUDGET
    user_facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """Everything that the training loop needs.

    name: of the run's directory; facts: known before training, for the run and the display; data: to
    store, on the CPU, or None if the run cannot hold it; evaluation: measured as often as the facts have
    it, and at the last step.
    """

    training: Training
    steps: int
    facts: TrainingFacts
    data: Data | None
    name: str = ""
    experiment_toml: str | None = None
    evaluation: Evaluation | None = None
    engine: Engine = "auto"
    notices: list[str] = field(default_factory=list)
    origin: StartingPoint = StartingPoint()

    def check(self) -> None:
        """Check what neither a program nor an eager step can do, before writing anything.

        Raises:
            ExperimentError: gradients are switched off.
            UsageError: several processes would make a fork.
        """
        if self.facts.ranks is not None and self.origin.fork is not None:
            raise UsageError("a fork is trained by one process; start it without torchrun")
        if not torch.is_grad_enabled():
            fault = Fault("train", "is called within torch.no_grad(); call it outside")
            raise ExperimentError([fault], "the training")

    def numbered_as(self, facts: TrainingFacts) -> Job:
        """Return the job with the rows of another training's data, with the same numbers."""
        # Rows have the numbers of the file, where some may have been dropped or kept out.
        if isinstance(self.training.batch, RowsOf):
            numbers = facts.data.numbers()
            batches = self.training.batch.batches
            known = None if numbers is None else numbers[0]
            source = facts.data.file or batches.source
            self.training.batch.use(replace(batches, numbers=known, source=source))
        update = {"split_seed": facts.data.split_seed, "dropped": facts.data.dropped}
        return self.with_facts(data=self.facts.data.model_copy(update=update))

    def without_rows(self, rows: Collection[int], start: int, inherited: Collection[int] = ()) -> Job:
        """Return the job with batches that lack some rows.

        rows: those asked for; start: the state that the training begins with; inherited: those that the
        steps before it lack already.

        Raises:
            ExperimentError: a row does not exist, or is in no batch; or a step would have no rows.
            UsageError: the rows are read from a Dataset at every step.
        """
        if not rows and not inherited:
            return self
        batch = self._rows("rows can be left out")
        # From the first step of the fork on: those before it are the parent's.
        batch.use(batch.batches.without_rows(rows, start + 1, self.steps, inherited))
        known = self.facts.batches.model_copy(update={"without": batch.batches.without})
        return self.with_facts(batches=known)

    def relabelled(self, targets: Mapping[int, float]) -> Job:
        """Return the job with other targets for some rows, as `relabelled_rows`.

        Raises:
            UsageError: the rows stay in files, or are read from a Dataset at every step.
        """
        if not targets:
            return self
        if self.data is not None and self.data.sources:
            raise UsageError("the data stays in its files: to relabel rows, change a copy of the file")
        batch = relabelled_rows(self._rows("rows can be relabelled"), targets, "the fork")
        assert self.data is not None
        y, training = batch.y, replace(self.training, batch=batch)
        # Rows that are kept out for validation are not relabelled.
        evaluation = self.evaluation
        if evaluation is not None and self.data.validation is None:  # it measures on these rows
            evaluation = replace(evaluation, y=y)
        data = replace(self.data, y=y.cpu())
        return replace(self, training=training, data=data, evaluation=evaluation)

    def _rows(self, what: str) -> RowsOf:
        if not isinstance(self.training.batch, RowsOf):
            raise UsageError(f"{what} only if everystep holds the data, not for a Dataset that it reads")
        return self.training.batch

    def with_facts(self, **facts: Any) -> Job:
        """Return the job with other facts about it."""
        return replace(self, facts=self.facts.model_copy(update=facts))


def relabelled_rows(batch: RowsOf, targets: Mapping[int, float], what: str) -> RowsOf:
    """Return batches with other targets for some rows, which have one number each.

    Raises:
        ExperimentError: lists rows that do not exist, and targets that do not fit; what: of what.
    """
    y = batch.y.clone()  # the data of the caller stays as it is

    def at(row: int) -> int:
        return int(batch.batches.places([row])[0])

    faults = [
        Fault(f"relabel {row}", reason)
        for row, target in targets.items()
        if (reason := batch.batches.why_not(row) or _why_not_target(y, at(row), target))
    ]
    if faults:
        raise ExperimentError(faults, what)
    for row, target in targets.items():
        y[at(row)] = target
    return batch.with_targets(y)


def _why_not_target(y: Tensor, row: int, target: float) -> str | None:
    """Return why a row cannot have another target, or None; row: its place."""
    if y[row].numel() != 1:
        return f"a target has {y[row].numel()} numbers; only single numbers can be replaced"
    if not y.is_floating_point() and not int(y.min()) <= target <= int(y.max()):
        return f"{target:g} is not a class; they are {int(y.min())} to {int(y.max())}"
    if not y.is_floating_point() and target != int(target):
        return f"{target:g} is not a class, which is a whole number"
    return None


class Outcome(NamedTuple):
    """Where a training was recorded, and how it ended. reason: why before its last step, if it did."""

    directory: Path
    reason: str | None = None
    interrupted: bool = False


class Progress:
    """Watches a training; does nothing by itself."""

    def reading(self, done: int, total: int, unit: str = "rows") -> None:
        """Data is being read: `done` of `total` rows, or of another unit."""

    def begin(self, directory: Path, facts: Facts) -> None:
        """Training is about to start."""

    def advance(self, first_step: int, losses: Sequence[float]) -> None:
        """These consecutive steps have run."""

    def notice(self, message: str) -> None:
        """A message to the user."""

    def end(self) -> None:
        """Training has ended, well or not."""
