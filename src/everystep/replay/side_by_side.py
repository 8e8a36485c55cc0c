"""Trainings side by side: each in a process of its own, which ends in order with this one."""

from __future__ import annotations

import inspect
import pickle
import random
import runpy
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from everystep import numerics
from everystep.errors import EverystepError, UsageError
from everystep.experiment.specification import Experiment
from everystep.recording.directories import AWAITED, is_run, remove_unbegun
from everystep.recording.recorded_run import RecordedRun
from everystep.replay.processes import is_ending
from everystep.replay.resume import Resume, resume_experiment
from everystep.training.from_experiment import train_experiment
from everystep.training.interrupt import Interrupt
from everystep.training.job import Progress, StartingPoint

__all__ = [
    "TrainingEnd",
    "call_function",
    "on_ray",
    "place_of_function",
    "side_by_side",
    "train_one",
]


class TrainingEnd(NamedTuple):
    """How a training ended. problem: why it failed, if it did; notices: what it reported."""

    problem: str | None = None
    notices: tuple[str, ...] = ()


def side_by_side(
    start: Callable[[], AbstractContextManager[Any]],
    count: int,
    tasks: Mapping[str, tuple[Any, ...]],
    ended: Callable[[str, TrainingEnd], None],
    *,
    reuses_processes: bool,
) -> bool:
    """Train, so many at once; return whether Ctrl-C stopped that, after the step of each training.

    start: starts a process, as `pool` does; one that was killed is replaced; tasks: of each training by
    its name: what to call in the process, and with what; ended: called with the name of a training that
    ended, and how it did; reuses_processes: whether a process may train again: a user's code may leave
    anything behind.
    """
    #: What takes trainings, what stops it, and what ends it.
    free: list[tuple[Any, Any, ExitStack]] = []
    busy: dict[Future[TrainingEnd], tuple[str, Any]] = {}

    def stop() -> None:
        # A copy: a signal may come while the loop below changes it.
        for _, (_, connection, _) in [*busy.values()]:
            # The process ends in order once the other end of its pipe has closed: see `pool`.
            connection.close()

    waiting = iter(tasks)
    with Interrupt(stop) as interrupt, ExitStack() as ends:
        while True:
            while len(busy) < count and not interrupt and (name := next(waiting, None)) is not None:
                if not free:
                    own = ends.enter_context(ExitStack())
                    free.append((*own.enter_context(start()), own))
                process = free.pop()
                busy[process[0].submit(_ended, *tasks[name])] = name, process
            if interrupt:  # it may have come just before the last one began
                stop()
            if not busy:
                return bool(interrupt)
            for future in wait(busy, return_when=FIRST_COMPLETED).done:
                name, process = busy.pop(future)
                try:
                    found = future.result()
                    if reuses_processes:
                        free.append(process)
                    else:
                        process[2].close()
                except Exception as error:  # nothing that the training raised, which `_ended` returns
                    problem = "its process ended: it was killed, or memory ran out"
                    if not isinstance(error, BrokenProcessPool):
                        problem += f" ({type(error).__name__})"
                    found = TrainingEnd(None if interrupt else problem)  # it had not begun
                ended(name, found)


class _OnRay:
    """Hands one training at a time to Ray, and cancels it."""

    def __init__(self, ray: Any, threads: int) -> None:
        self._cancel = ray.cancel
        variables = numerics.ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)}
        options = {"num_cpus": threads, "max_retries": 0, "runtime_env": {"env_vars": variables}}
        self._remote = ray.remote(max_calls=1)(_ended).options(**options)
        self._last: Any = None

    def submit(self, task: Callable[..., TrainingEnd], *given: Any) -> Future[TrainingEnd]:
        assert task is _ended
        self._last = self._remote.remote(*given)
        found: Future[TrainingEnd] = self._last.future()
        return found

    def close(self) -> None:
        self._cancel(self._last)


@contextmanager
def on_ray(threads: int) -> Iterator[tuple[_OnRay, _OnRay]]:
    """Return what lets Ray train, with so many cores each, and what stops it: as `pool` does."""
    import ray

    if not ray.is_initialized():
        ray.init(logging_level="ERROR", log_to_driver=False)
    place = _OnRay(ray, threads)
    yield place, place


def _ended(train: Callable[..., TrainingEnd], *given: Any) -> TrainingEnd:
    """Train in this process, and let Ctrl-C end that; return how it ended, in any case."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        # Ctrl-C may have come before the handler was there.
        return TrainingEnd() if is_ending.is_set() else train(*given)
    except KeyboardInterrupt:
        return TrainingEnd()
    except EverystepError as error:
        return TrainingEnd(str(error))
    except Exception as error:  # of the user's function
        at = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error}".removesuffix(": ")
        return TrainingEnd(f"{reason} ({Path(at.filename).name}:{at.lineno})")
    finally:
        signal.signal(signal.SIGINT, before)


class _Noted(Progress):
    """Keeps the notices of a training."""

    def __init__(self) -> None:
        self.notices: list[str] = []

    def notice(self, message: str) -> None:
        """Keep a notice."""
        self.notices.append(message)


def train_one(place: Path, experiment: Experiment, budget: float) -> TrainingEnd:
    """Train an experiment, or continue its run. budget: maximum bytes of snapshots."""
    noted = _Noted()
    if remove_unbegun(place):
        origin = StartingPoint(directory=place, budget=budget)
        train_experiment(experiment, place.name, origin, noted)
    else:
        resume_experiment(Resume(RecordedRun(place), budget=budget), noted, experiment)
    return TrainingEnd(notices=tuple(noted.notices))


def place_of_function(
    function: Callable[..., Any], runs: Iterable[Mapping[str, Any]]
) -> tuple[str, str]:
    """Return by what other processes import a function: its module, or its script, and its name.

    runs: the settings that it will be called with.

    Raises:
        UsageError: it cannot be imported, or does not take the settings, which must be plain data.
    """
    name = getattr(function, "__qualname__", repr(function))
    module = sys.modules.get(getattr(function, "__module__", ""))
    spec, file = getattr(module, "__spec__", None), getattr(module, "__file__", None)
    if file is None or getattr(module, name, None) is not function:
        raise UsageError(
            f"{name:.80} is called in other processes, which must import it: write it at the top of a "
            "file, not in a notebook, nor within a function (of a notebook: %%writefile training.py; "
            "from training import ...)"
        )
    for settings in runs:
        try:
            inspect.signature(function).bind(**settings)
            pickle.dumps(settings)
        except Exception as error:  # of any object
            raise UsageError(f"{name} cannot be called with {settings!r:.200}: {error}") from None
    return (file if spec is None else spec.name), name


@cache
def _imported(module: str, name: str) -> Any:
    is_script = module.endswith(".py")
    # As multiprocessing names the main module of a child, so that `if __name__ == "__main__"` is off.
    found = runpy.run_path(module, run_name="__mp_main__") if is_script else vars(import_module(module))
    return found[name]


def call_function(place: Path, module: str, name: str, settings: Mapping[str, Any]) -> TrainingEnd:
    """Call a user's function; the first run that it records without a name goes to `place`."""
    AWAITED.update(place=place, settings=settings)
    try:
        function = _imported(module, name)
        # Each call begins with the same random numbers, whatever ran in this process before.
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        function(**settings)
    finally:
        AWAITED.clear()
    return TrainingEnd(
        None if is_run(place) else "it recorded no run: train or record one, without run="
    )
