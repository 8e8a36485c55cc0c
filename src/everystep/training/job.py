"""A training that is ready to start, wherever it came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from everystep.experiment.data import Data
from everystep.step.eager import Trainee
from everystep.step.evaluate import Evaluation
from everystep.step.iterate import Engine

__all__ = ["Job", "Outcome", "Progress"]


@dataclass(frozen=True)
class Job:
    """All that the training loop needs.

    name: names the run's directory; facts: what is known before training, for the run and for the
    eyes; data: what to store, on the CPU, or None where the run cannot hold it; evaluation: what is
    measured every `evaluate_every` steps and at the last.
    """

    name: str
    trainee: Trainee
    steps: int
    facts: dict[str, Any]
    data: Data | None
    experiment_toml: str | None = None
    evaluation: Evaluation | None = None
    evaluate_every: int = 1
    stop_on_nan: bool = False
    engine: Engine = "auto"
    fold: bool = False
    notices: list[str] = field(default_factory=list)


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

    def begin(self, directory: Path, facts: dict[str, Any]) -> None:
        """Training is about to start."""

    def advance(self, first_step: int, losses: Sequence[float]) -> None:
        """These consecutive steps have been taken."""

    def notice(self, message: str) -> None:
        """Something the user should know."""

    def end(self) -> None:
        """Training has ended, well or not."""
