"""Kills at random instants: SIGKILL, once or several times in a row."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from benchmarks.torture.trial import Reference, Result, Trial

__all__ = ["kills"]

#: Kills in a row, and how often each is drawn.
IN_A_ROW = {1: 5, 2: 3, 3: 2, 5: 1}


def kills(references: list[Reference], count: int, seed: int) -> list[Callable[[], Result]]:
    """Return trials that kill about so many times, in turn for each training."""
    generator = random.Random(seed)
    trials: list[Callable[[], Result]] = []
    left, number = count, 0
    while left > 0:
        reference = references[number % len(references)]
        rows = generator.choices(list(IN_A_ROW), list(IN_A_ROW.values()))[0]
        instants = [generator.uniform(0.0, 1.02) for _ in range(rows)]
        trials.append(partial(_killed, reference, instants))
        left -= rows
        number += 1
    return trials


def _killed(reference: Reference, instants: list[float]) -> Result:
    """Kill a training at these instants, as shares of the time that it takes; let it finish."""
    trial = Trial(reference)
    for number, instant in enumerate(instants):
        # A process that goes on has less to do: earlier instants, so that it is hit before it ends.
        share = instant if not number else instant * 0.6
        ended = trial.go(share * reference.seconds)
        if not ended.killed:
            if ended.error is not None and not ended.is_clear:
                trial.result.failures.append(f"it does not go on: {ended.error}")
            break
        trial.look(with_report=not number)
        if trial.result.failures:
            break
    if not trial.result.failures:
        trial.finish()
    return trial.close()
