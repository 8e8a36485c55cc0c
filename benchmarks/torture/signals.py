"""SIGTERM and Ctrl-C: the step is finished, a snapshot is taken, the run is closed."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.torture.children import ask, run
from benchmarks.torture.trainings import STEP_FUNCTION
from benchmarks.torture.trial import Reference, Result, Trial
from everystep.recording.database import FILE_NAME
from everystep.recording.files import state_folder
from everystep.run import Run

__all__ = ["signals"]

#: Seconds after state 0 was written.
INSTANTS = (0.0, 0.05)


def signals(references: Sequence[Reference]) -> list[Callable[[], Result]]:
    """Return a trial for each training and signal."""
    function = Reference(STEP_FUNCTION, {}, 1.0, Path())
    return [
        partial(_ended, reference, number, instant)
        for reference in [*references, function]
        if reference.training.part != "measure"
        for number in (signal.SIGTERM, signal.SIGINT)
        for instant in INSTANTS
    ]


def _ended(reference: Reference, number: signal.Signals, instant: float) -> Result:
    """Send a signal to a training; look whether its run is closed; let it finish."""
    trial = Trial(reference)
    training, result = trial.training, trial.result
    ended = run(
        lambda file: training.go(trial.place, reference.prepared, trial.steps, file),
        trial.folder,
        instant,
        number,
        (trial.place / state_folder(0)).exists,  # an earlier one finds nothing to close
    )
    found = ask(lambda: _closed(trial.place), trial.folder)
    if "error" in found or ended.has_hung:
        result.failures.append(f"after {number.name}: {found.get('error', 'it hung')}")
        return trial.close()
    if found["status"] == "finished":  # before the signal
        return trial.close()
    trial.look()
    is_loop = training.part == "own loop" and number == signal.SIGINT  # ends within a step
    if found["status"] != "stopped" or not (found["newest"] == found["steps"] or is_loop):
        result.failures.append(f"after {number.name} the run is not closed: {found}")
    # What `train` raises at Ctrl-C is a KeyboardInterrupt of its own.
    is_interrupted = str(ended.error).startswith(("KeyboardInterrupt", "StoppedByUser"))
    is_right = ended.signal == number if number == signal.SIGTERM else is_interrupted
    if not (is_right or found["steps"] == trial.steps):
        result.failures.append(f"{number.name} ended the process otherwise: {ended}")
    if not result.failures and training is not STEP_FUNCTION:
        trial.finish()
    return trial.close()


def _closed(place: Path) -> dict[str, Any]:
    run = Run(place)
    return {
        "status": run.status,
        "reason": run.facts.reason,
        "steps": run.summary().steps,
        "newest": run.snapshots[-1],
        "log": (place / f"{FILE_NAME}-wal").exists(),
    }
