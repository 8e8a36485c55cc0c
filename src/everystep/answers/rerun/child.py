"""The process of a rerun: tasks on stdin, results on stdout, as pickles.

Only `place` starts it and writes to it.
"""

from __future__ import annotations

import pickle
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from everystep.errors import DamageWarning, EverystepError
from everystep.program.precision import Precision
from everystep.recording.run import RecordedRun
from everystep.replay.parent import end_with_stdin
from everystep.replay.replay import Replay

__all__ = ["PROTOCOL", "main", "opened"]

#: Of the tasks and results: both ends must have the same.
PROTOCOL = 5


def opened(run: Path, threads: int, precision: str | None) -> Replay:
    """Return a replay of a run, to which the tasks after this one are done."""
    wanted = None if precision is None else Precision(getattr(torch, precision))
    return Replay(RecordedRun(run), threads=threads, conversion=wanted)


def main() -> None:
    """Run tasks until stdin ends."""
    end_with_stdin()
    warnings.simplefilter("ignore", DamageWarning)  # the caller reports damage
    _send(PROTOCOL)
    replay: Replay | None = None
    with suppress(EOFError):
        while True:
            task, given, named = pickle.load(sys.stdin.buffer)
            try:
                if task is opened:
                    replay = opened(*given)
                _send(None if task is opened else task(replay, *given, **named))
            except (EverystepError, RuntimeError, OSError) as error:
                _send(RuntimeError(str(error).strip().partition("\n")[0] or type(error).__name__))


def _send(result: Any) -> None:
    pickle.dump(result, sys.stdout.buffer)
    sys.stdout.flush()
