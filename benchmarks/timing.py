"""Run the peers of a workload in alternation, and keep each run's time and whether it did the work."""

from __future__ import annotations

import gc
import math
import random
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.utils.deterministic

from benchmarks.peers import PLAIN, NotComparable, Peer
from benchmarks.workloads import Workload

__all__ = ["Agreement", "Outcome", "time_workload"]


@dataclass(frozen=True, order=True)
class Agreement:
    """How far losses are from the plain loop's; the greater of two is the worse."""

    relative: float  # difference of the last loss, or of the last epoch's mean
    differs: bool  # in any bit of any loss
    means: bool  # the framework gives the mean loss of each epoch only

    @classmethod
    def of(cls, losses: Sequence[float], reference: Sequence[float], workload: Workload) -> Agreement:
        """Compare `losses` to the plain loop's.

        Raises:
            ArithmeticError: there are fewer losses than steps and epochs, or the last is not finite.
        """
        means = len(losses) == workload.epochs < workload.steps
        if not (means or len(losses) == workload.steps):
            raise ArithmeticError(f"returned {len(losses)} losses for {workload.steps} steps")
        if not math.isfinite(losses[-1]):
            raise ArithmeticError(f"its last loss is {losses[-1]}")
        steps_an_epoch = workload.steps // workload.epochs
        expected = statistics.fmean(reference[-steps_an_epoch:]) if means else reference[-1]
        differs = means or list(losses) != list(reference)
        return cls(abs(losses[-1] - expected) / abs(expected), differs, means)


@dataclass
class Outcome:
    """A peer's runs of one workload."""

    peer: Peer
    first: float = math.nan  # seconds of the warm-up run, which compiles where there is a compiler
    seconds: list[float] = field(default_factory=list)  # of each round
    agreement: Agreement | None = None  # the worst of all runs; None of a floor
    absent: str = ""  # why there are no numbers
    failed: bool = False

    @property
    def median(self) -> float:
        """Of the seconds of all rounds."""
        return statistics.median(self.seconds)

    def ratios(self, plain: Outcome) -> list[float]:
        """Return this peer's time in parts of the plain loop's in the same round."""
        return [own / other for own, other in zip(self.seconds, plain.seconds, strict=True)]


def time_workload(workload: Workload, peers: Sequence[Peer], rounds: int) -> list[Outcome]:
    """Return the outcome of each peer, among which must be the plain loop."""
    outcomes = [Outcome(peer) for peer in sorted(peers, key=lambda peer: peer is not PLAIN)]
    reference: list[float] = []
    for outcome in outcomes:  # the plain loop first, since all others are compared to it
        outcome.first = _run(outcome, workload, reference)
    # What was imported and compiled so far need not be looked through by the collections to come.
    gc.collect()
    gc.freeze()
    for number in range(1, rounds + 1):
        # Every other round in the opposite order: being second must not be an advantage.
        for outcome in outcomes[:: 1 if number % 2 else -1]:
            if not outcome.absent:
                outcome.seconds.append(_run(outcome, workload, reference))
    gc.unfreeze()
    return sorted(outcomes, key=lambda outcome: peers.index(outcome.peer))


def _run(outcome: Outcome, workload: Workload, reference: list[float]) -> float:
    """Return the seconds of one run; where there is none, the outcome says why.

    reference: the plain loop's losses; its first run puts them there.
    """
    try:
        with _undisturbed(), tempfile.TemporaryDirectory() as folder:
            train = outcome.peer.prepare(workload, Path(folder))
            gc.collect()
            started = time.perf_counter()
            losses = train()
            seconds = time.perf_counter() - started
        if not outcome.peer.is_floor:
            if not reference:
                reference.extend(losses)
            agreement = Agreement.of(losses, reference, workload)
            outcome.agreement = max(outcome.agreement or agreement, agreement)
    except NotComparable as reason:
        outcome.absent = str(reason)
    except Exception as error:  # one peer's failure must not take the others' numbers along
        if outcome.peer is PLAIN:
            raise
        print(file=sys.stderr)
        traceback.print_exc()
        outcome.absent, outcome.failed = f"failed: {type(error).__name__}: {error}", True
    else:
        return seconds
    return math.nan


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Restore what belongs to the process, so that a peer cannot touch those after it."""
    threads = torch.get_num_threads()
    dtype = torch.get_default_dtype()
    precision = torch.get_float32_matmul_precision()
    deterministic = torch.get_deterministic_debug_mode()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    gradients = torch.is_grad_enabled()
    generators = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "has not converged", "use more workers", ...
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(precision)
        torch.set_deterministic_debug_mode(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.set_grad_enabled(gradients)
        torch.set_flush_denormal(False)  # torch's own default; it cannot be read
        torch.set_rng_state(generators[0])
        np.random.set_state(generators[1])
        random.setstate(generators[2])
