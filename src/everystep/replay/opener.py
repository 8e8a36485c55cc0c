"""Opener: opens steps and states of a run where they can be computed as they were.

That is in this process if its numerics are those of the run, and otherwise in a worker started with
them. What cannot be set (another processor, another torch) stays as it is, and each loss is compared.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from everystep import numerics
from everystep.recording.run import RecordedRun
from everystep.replay.objects import Objects, needed
from everystep.replay.replay import Replay
from everystep.replay.step import Step
from everystep.replay.workers import needs_worker, replay_in_worker, workers
from everystep.step.state import State

__all__ = ["Opener"]

P = ParamSpec("P")
T = TypeVar("T")


class Opener:
    """Opens steps and states of a run; what was gone through once is quick the next time."""

    def __init__(self, run: RecordedRun, objects: Objects | None = None) -> None:
        numerics.prepare()
        self._run = run
        self._objects = needed(run, objects)
        self._replay: Replay | None = None
        self._worker: Any = None
        self._engine: Any = None
        self._is_over = False

    @property
    def problems(self) -> list[str]:
        """What was noticed, such as a snapshot that cannot be read."""
        return self.call(_problems)

    @property
    def departed_at(self) -> int | None:
        """The first step whose loss was another when it was taken again, None if there was none."""
        return self.call(_departed_at)

    def step(self, number: int) -> Step:
        """Open a step.

        Raises:
            StepError: it was not taken, or not yet.
            RunError: something that is needed is missing or cannot be read.
        """
        return self.call(Replay.step, number)

    def state(self, number: int) -> State:
        """Return the state after a step (0: before the first).

        Raises:
            StepError: it was not taken, or not yet.
            RunError: something that is needed is missing or cannot be read.
        """
        return self.call(Replay.state, number)

    def call(self, task: Callable[Concatenate[Replay, P], T], *given: P.args, **named: P.kwargs) -> T:
        """Do something with the replay of the run, where it can be computed as it was.

        Raises:
            whatever the task raises.
        """
        self._prepare()
        if self._replay is not None:
            return task(self._replay, *given, **named)
        work = self._worker.submit(_in_worker, self._run.directory, self._objects, task, given, named)
        result: T = work.result()
        return result

    def _prepare(self) -> None:
        """Choose where to replay; begin anew where a run that is being trained has gone on."""
        if self._is_over and (self._replay is not None or self._worker is not None):
            return
        facts = self._run.facts
        self._is_over = self._run.status != "running"
        engine = facts.training.engine
        if self._engine is not None and engine == self._engine:
            return
        self._engine = engine
        self._replay = None
        if not needs_worker(facts):
            self._replay = Replay(self._run, self._objects)
        elif self._worker is None:
            stack = ExitStack()
            self._worker = stack.enter_context(workers(facts, 1, facts.training.numerics.threads))
            weakref.finalize(self, stack.close)


def _problems(replay: Replay) -> list[str]:
    return replay.problems


def _departed_at(replay: Replay) -> int | None:
    return replay.departed_at


def _in_worker(directory: Path, objects: Objects | None, task: Any, given: Any, named: Any) -> Any:
    return task(replay_in_worker(directory, objects, None), *given, **named)
