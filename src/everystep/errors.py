"""The errors that everystep raises, and the notices that it prints.

    EverystepError
    ├── UsageError (a ValueError): the request is invalid; exit code 2
    │   ├── ExperimentError: an experiment file, or the arguments of `train`
    │   ├── DataError: the data set
    │   ├── ModelError: the model does not fit its data, or the data its loss
    │   ├── DeviceError: the device is not available
    │   ├── RunError: the run is missing, unreadable, or already exists
    │   │   ├── ForeignDatabaseError: the database is that of another program
    │   │   ├── ProgramError: a program is invalid, or cannot run here
    │   │   └── StepError (an IndexError): the run does not have this step
    │   └── ExpressionError: an expression is invalid, or does not fit the run
    ├── TrainingError: a step failed, or cannot be trusted; exit code 1
    │   └── DatasetChangedError: a Dataset that was read once now returns different rows
    └── RecordingError: writing the run failed (disk full, read-only, ...); exit code 1

Every message reports what is wrong, where, and what to do. Where several things are wrong, one error
reports all of them, in `faults` and in its message.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import NamedTuple

__all__ = [
    "NAMED",
    "DamageWarning",
    "DataError",
    "DatasetChangedError",
    "DeviceError",
    "EverystepError",
    "ExperimentError",
    "ExpressionError",
    "Fault",
    "ForeignDatabaseError",
    "ModelError",
    "ProgramError",
    "RecordingError",
    "RunError",
    "StepError",
    "TrainingError",
    "UsageError",
    "did_you_mean",
    "exit_code_of",
    "kind_text",
    "named",
    "rephrased",
    "say",
    "short_text",
    "size_text",
]


#: Faults that a message lists; `faults` has all of them.
MOST_SHOWN = 20
#: States, tensors, names and rows that are named before the rest is counted.
NAMED = 6

_OF_NAMES = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP),
    *(errno.ENAMETOOLONG, errno.EINVAL),
}


def exit_code_of(error: OSError) -> int:
    """Return 2 if a typed name cannot be opened, 1 if the machine failed, such as a full disk."""
    return 2 if error.errno in _OF_NAMES else 1


class Fault(NamedTuple):
    """One error: its location (`model.layers[2]`; empty if it has none), and what is wrong."""

    path: str
    problem: str

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}" if self.path else self.problem


class EverystepError(Exception):
    """The base class of all errors that everystep raises on purpose."""

    exit_code = 1


class UsageError(EverystepError, ValueError):
    """The request is invalid. `faults` lists every error."""

    exit_code = 2

    def __init__(self, faults: str | Sequence[Fault], where: str = "") -> None:
        self.faults = [Fault("", faults)] if isinstance(faults, str) else list(faults)
        self.where = where
        # One fault is a sentence; several are a list under a heading.
        if len(self.faults) == 1:
            super().__init__(f"{where}: {self.faults[0]}" if where else str(self.faults[0]))
            return
        heading = f"{len(self.faults):,} errors{f' in {where}' if where else ''}:"
        shown = [*map(str, self.faults[:MOST_SHOWN])]
        more = len(self.faults) - len(shown)
        super().__init__("\n  ".join([heading, *shown, *([f"and {more:,} more"] if more else [])]))


class ExperimentError(UsageError):
    """An experiment file, or an argument of `train`, is invalid."""


class DataError(UsageError):
    """The data set is missing, empty, incomplete or of the wrong kind."""


class ModelError(UsageError):
    """The model does not fit its data, or the data its loss."""


class DeviceError(UsageError):
    """The requested device is not available."""


class RunError(UsageError):
    """The run is missing, unreadable, or already exists.

    environment: variables of a process that could do what this one cannot, None if none could.
    """

    environment: dict[str, str] | None = None


class ProgramError(RunError):
    """A program is invalid, needs a newer everystep, or uses an operator that is not allowed."""


class ForeignDatabaseError(RunError):
    """The database of a run is that of another program."""


class StepError(RunError, IndexError):
    """The run does not have this step, or not yet."""


class ExpressionError(UsageError):
    """An expression is invalid, or does not fit the run."""


class TrainingError(EverystepError):
    """A step failed, or cannot be trusted; the steps before it are recorded."""


class DatasetChangedError(TrainingError):
    """The Dataset no longer returns the rows that the model was trained on.

    Args:
        what: what changed, in words.
        step: the step after which everystep detected it.
    """

    def __init__(self, what: str, step: int) -> None:
        super().__init__(
            f"{what} in the Dataset, although everystep read it once, before training; detected after "
            f"step {step}. Pass the rows as tensors (x, y) to keep them fixed"
        )


class RecordingError(EverystepError):
    """Writing the run failed; everything recorded before is kept."""


class DamageWarning(UserWarning):
    """A run is damaged: what was read is incomplete, or differs from what was recorded."""


def did_you_mean(name: str, known: Sequence[str] | Mapping[str, str]) -> str:
    """Return a fix for an unknown name: the most similar known names, or all if there are few.

    known: the names; or how to write each of them.
    """
    if not known:
        return "there are none"
    written = known if isinstance(known, Mapping) else {candidate: candidate for candidate in known}
    # Without case: `adam` is like `Adam`.
    folded = {candidate.lower(): text for candidate, text in written.items()}
    near = [folded[match] for match in get_close_matches(name.lower(), folded, n=2, cutoff=0.6)]
    if near:
        return "did you mean " + " or ".join(near) + "?"
    # More names than that would hide the message.
    if len(known) <= 12:
        return "known here: " + ", ".join(written.values())
    return ""


def named(things: Sequence[object], most: int = NAMED) -> str:
    """Return the first of some things by name, and how many more there are."""
    more = f" and {len(things) - most:,} more" if len(things) > most else ""
    return ", ".join(map(str, things[:most])) + more


def kind_text(value: object) -> str:
    """Return the class of a value, with an article: `an int`; None as such."""
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def short_text(value: object) -> str:
    """Return plain data as Python writes it, shortened; of anything else, its class."""
    is_plain = isinstance(value, str | bytes | int | float | list | tuple | dict | None)
    return f"{value!r:.80}" if is_plain else kind_text(value)


def rephrased(problem: str) -> str:
    """Return what pydantic reports of a value in the words of other errors."""
    for theirs, ours in (
        *(("Input should ", "must "), ("a valid integer", "an integer"), ("a valid string", "a text")),
        *(
            ("a valid boolean", "true or false"),
            ("a valid ", "a "),
            ("greater than or equal to", "at least"),
        ),
        ("less than or equal to", "at most"),
    ):
        problem = problem.replace(theirs, ours)
    return problem


def say(message: str) -> None:
    """Print a notice on stderr while a run is recorded."""
    # stdout is for what a command returns, which a program may read.
    print(f"everystep: {message}", file=sys.stderr)


def size_text(count: float) -> str:
    """Return a number of bytes: `12 kB`, `3.4 MB`."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        number = count / size
        if number >= 0.9995:  # which three digits round to 1
            return f"{number:.3g} {unit}" if number < 999.5 else f"{number:,.0f} {unit}"
    return f"{count / 1000:,.0f} kB" if count >= 1000 else f"{count:.0f} bytes"
