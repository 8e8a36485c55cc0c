"""Workers: processes that replay a run under its numerics, some at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from everystep.errors import RunError
from everystep.numerics import Numerics
from everystep.recording.facts import Facts
from everystep.recording.run import RecordedRun
from everystep.replay.objects import Objects
from everystep.replay.replay import Replay

if TYPE_CHECKING:
    from loky import ProcessPoolExecutor

__all__ = ["cores", "needs_worker", "recorded_numerics", "replay_in_worker", "workers"]

#: No machine computes one step with more.
MOST_THREADS = 4096


def recorded_numerics(facts: Facts) -> Numerics:
    """Return the numerics that a run was trained under.

    Raises:
        RunError: it was never begun, or was altered.
    """
    known = facts.training.numerics
    if not 1 <= known.threads <= MOST_THREADS:
        raise RunError(f"the run says that it was trained with {known.threads} threads: it was altered")
    return known


def needs_worker(facts: Facts) -> bool:
    """Tell whether this process cannot compute as the run did, and another one could."""
    here = Numerics.read(torch.device(facts.training.device))
    return recorded_numerics(facts).needs_other_process(here)


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def workers(facts: Facts, count: int, threads: int) -> Iterator[ProcessPoolExecutor]:
    """Return processes that compute as the run did, with so many threads each; gone at the end."""
    from loky import ProcessPoolExecutor

    environment = recorded_numerics(facts).environment() | {"OMP_NUM_THREADS": str(threads)}
    executor = ProcessPoolExecutor(count, env=environment, initializer=_begin, initargs=(threads,))
    try:
        yield executor
    finally:
        executor.shutdown(wait=True, kill_workers=True)


@lru_cache(maxsize=2)
def _replay(directory: Path, threads: int | None) -> Replay:
    return Replay(RecordedRun(directory), threads=threads)


def replay_in_worker(directory: Path, objects: Objects | None, threads: int | None) -> Replay:
    """Return the replay of a run in this worker: the same each time, if the run is all it needs."""
    if objects is None:
        return _replay(directory, threads)
    return Replay(RecordedRun(directory), objects, threads)


def _begin(threads: int) -> None:
    # Ctrl-C is for the process that waits; it ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
