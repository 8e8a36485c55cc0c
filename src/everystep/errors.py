"""The errors a user can meet.

    EverystepError
    ├── UsageError (a ValueError): something was asked for that cannot be; exit code 2
    │   ├── ExperimentError: an experiment file or the arguments of `train`
    │   ├── DataError: the data set
    │   ├── ModelError: the model does not fit its data, or the data its loss
    │   ├── DeviceError: the device is not there
    │   ├── RunError: no run there, a run that is in the way, or one that cannot be read
    │   │   ├── ProgramError: a program that cannot be read, or cannot be run here
    │   │   └── StepError (an IndexError): a step that the run does not have
    │   └── ExpressionError: an expression that cannot be read, or does not fit the run
    ├── TrainingError: a step failed, or cannot be trusted; exit code 1
    │   └── DatasetChangedError: a Dataset that was read once gives other rows now
    └── RecordingError: writing the run failed (disk full, read-only, ...); exit code 1

Every message names the thing, says what is wrong and what to do about it. Where several things are
wrong at once, all of them are in `faults`, and in the message.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import NamedTuple

__all__ = [
    "DataError",
    "DatasetChangedError",
    "DeviceError",
    "EverystepError",
    "ExperimentError",
    "ExpressionError",
    "Fault",
    "ModelError",
    "ProgramError",
    "RecordingError",
    "RunError",
    "StepError",
    "TrainingError",
    "UsageError",
    "did_you_mean",
]


class Fault(NamedTuple):
    """One thing that is wrong: where (`model.layers[2]`, empty if it has no place), and what."""

    path: str
    problem: str

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}" if self.path else self.problem


class EverystepError(Exception):
    """The root of all errors that everystep raises on purpose."""

    exit_code = 1


class UsageError(EverystepError, ValueError):
    """Something was asked for that cannot be. `faults` lists everything that is wrong."""

    exit_code = 2

    def __init__(self, faults: str | Sequence[Fault], where: str = "") -> None:
        self.faults = [Fault("", faults)] if isinstance(faults, str) else list(faults)
        self.where = where
        super().__init__(self._message())

    def _message(self) -> str:
        if len(self.faults) == 1:
            return f"{self.where}: {self.faults[0]}" if self.where else str(self.faults[0])
        heading = f"{len(self.faults)} things are wrong" + (f" in {self.where}" if self.where else "")
        return "\n  ".join([heading + ":", *map(str, self.faults)])


class ExperimentError(UsageError):
    """An experiment file, or the arguments of `train`, cannot be used as they are."""


class DataError(UsageError):
    """The data set is missing, empty, incomplete or of the wrong kind."""


class ModelError(UsageError):
    """The model does not fit its data, or the data its loss."""


class DeviceError(UsageError):
    """The device that was asked for is not there."""


class RunError(UsageError):
    """No run is there, one is in the way, or it cannot be read."""


class ProgramError(RunError):
    """A program that is none, is of a newer everystep, or uses what is not allowed."""


class StepError(RunError, IndexError):
    """A step that the run does not have, or not yet."""


class ExpressionError(UsageError):
    """An expression that cannot be read, or that does not fit the run."""


class TrainingError(EverystepError):
    """A step failed, or cannot be trusted; the steps before it are recorded."""


class DatasetChangedError(TrainingError):
    """The rows that were trained on are not the Dataset's any more.

    Args:
        what: what has changed, in words.
        step: after which step that was found.
    """

    def __init__(self, what: str, step: int) -> None:
        super().__init__(
            f"{what} in the Dataset, which was read once, before training; this was found after step "
            f"{step}. Pass the rows as tensors (x, y) if they are to stay the same"
        )


class RecordingError(EverystepError):
    """Writing the run failed; what was recorded before is kept."""


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Return the cure for an unknown name: the nearest known ones, or all where they are few."""
    folded = {candidate.lower(): candidate for candidate in known}
    near = [folded[match] for match in get_close_matches(name.lower(), folded, n=2, cutoff=0.6)]
    if near:
        return "did you mean " + " or ".join(near) + "?"
    if len(known) <= 12:
        return "known here: " + ", ".join(known)
    return ""
