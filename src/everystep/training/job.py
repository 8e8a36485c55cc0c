"""A training that is ready to start, wherever it came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from everystep.errors import ExperimentError, Fault
from everystep.experiment.data import Data
from everystep.recording.facts import Facts, ForkFacts, TrainingFacts
from everystep.recording.run import RecordedRun
from everystep.step.eager import Training
from everystep.step.evaluate import Evaluation
from everystep.step.purity.torchs_own import is_torchs_optimizer
from everystep.step.stepper import Engine

__all__ = ["Job", "Origin", "Outcome", "Progress"]


@dataclass(frozen=True)
class Origin:
    """Where a fork begins: in a state of its parent.

    fork: what the run says of it; hyperparameters: the lr and its like as the parent had them there;
    has_new_data: whether the data is not the parent's.
    """

    parent: RecordedRun
    fork: ForkFacts
    hyperparameters: dict[str, float]
    has_new_data: bool


@dataclass(frozen=True)
class Job:
    """All that the training loop needs.

    name: names the run's directory; facts: what is known before training, for the run and for the
    eyes; data: what to store, on the CPU, or None where the run cannot hold it; evaluation: what is
    measured every `evaluate_every` steps and at the last; origin: of a fork.
    """

    name: str
    training: Training
    steps: int
    facts: TrainingFacts
    data: Data | None
    experiment_toml: str | None = None
    evaluation: Evaluation | None = None
    evaluate_every: int = 1
    stop_on_nan: bool = False
    engine: Engine = "auto"
    fold: bool = False
    notices: list[str] = field(default_factory=list)
    origin: Origin | None = None

    def check(self) -> None:
        """Check what no program and no eager step can do, before anything is written.

        Raises:
            ExperimentError: lists everything that does not serve, with the cure.
        """
        training, faults = self.training, []
        if self.fold and self.engine != "eager":
            if training.schedule is not None:
                faults.append(Fault("fold", "needs a fixed lr, and there is a schedule; leave one out"))
            if not is_torchs_optimizer(training.optimizer):
                name = type(training.optimizer).__name__
                faults.append(
                    Fault(
                        "fold", f"needs an optimizer of torch's, and {name} is not one; leave fold out"
                    )
                )
        if not torch.is_grad_enabled():
            faults.append(Fault("train", "is called within torch.no_grad(); call it outside"))
        if faults:
            raise ExperimentError(faults, "the training")

    @property
    def start(self) -> int:
        """The state that the training begins with."""
        return self.origin.fork.at if self.origin else 0


class Outcome(NamedTuple):
    """How a training ended: `finished`, or `stopped` with a reason."""

    directory: Path
    status: str
    reason: str | None
    interrupted: bool = False


class Progress(Protocol):
    """Whoever watches a training."""

    def reading(self, done: int, total: int) -> None:
        """A Dataset is being read: so many of its rows are."""

    def begin(self, directory: Path, facts: Facts) -> None:
        """Training is about to start."""

    def advance(self, first_step: int, losses: Sequence[float]) -> None:
        """These consecutive steps have been taken."""

    def notice(self, message: str) -> None:
        """Something the user should know."""

    def end(self) -> None:
        """Training has ended, well or not."""
