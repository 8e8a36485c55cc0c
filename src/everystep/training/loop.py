"""The training loop: takes the steps, and hands what they give to the recorder and the eyes."""

from __future__ import annotations

import math
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from everystep import numerics
from everystep.recording.recorder import Recorder, create_directory
from everystep.step.iterate import FinishedStep, iterate
from everystep.training.job import Job, Outcome, Progress

__all__ = ["run_job"]

#: Seconds between two looks at the losses: each waits for the device once.
FLUSH_SECONDS = 0.1
#: Steps that are timed before the snapshots' interval is chosen.
TIMED_STEPS = 8


def run_job(job: Job, directory: Path | None, runs: Path, budget: int, progress: Progress) -> Outcome:
    """Train, recording every step.

    Args:
        job: what to train.
        directory: the run's directory, which must not exist; None takes the next free one in `runs`.
        runs: where runs are kept.
        budget: bytes of snapshots to keep.
        progress: who watches.

    Raises:
        RunError: the directory exists already.
        RecordingError: writing failed; what was written before is kept.
    """
    place = create_directory(directory, job.name, runs)
    facts = {"name": place.name, "started": _now()} | job.facts | _circumstances(job)
    recorder = Recorder(place, facts, budget)
    started = time.perf_counter()
    progress.begin(place, facts)
    training = _Training(job, recorder, progress)
    try:
        with _interrupt_deferred() as interrupted:
            reason = training.run(interrupted)
        training.keep_last_state()
    except BaseException as error:
        _finish_failed(recorder, training, error)
        raise
    finally:
        progress.end()
    status = "finished" if reason is None else "stopped"
    seconds = time.perf_counter() - started
    recorder.finish({"status": status, "reason": reason, "finished": _now(), "seconds": seconds})
    return Outcome(place, status, reason, interrupted())


class _Training:
    """One training under way: the steps not yet handed over, and what is due next."""

    def __init__(self, job: Job, recorder: Recorder, progress: Progress) -> None:
        self.job = job
        self.recorder = recorder
        self.progress = progress
        self.step = 0
        self._pending: list[Tensor] = []
        self._measurements: list[tuple[str, int, float]] = []
        self._rates: tuple[float, ...] = ()
        self._snapshot_step = -1
        self._nonfinite_step: int | None = None

    def run(self, interrupted: Callable[[], bool]) -> str | None:
        """Take all steps; returns None, or why it stopped before the last."""
        job = self.job
        self._keep_beginning()
        flush_at = time.perf_counter() + FLUSH_SECONDS
        timed_from = 0.0
        for finished in iterate(job.trainee, 1, job.steps):
            step = self.step = finished.number
            self._pending.append(finished.loss)
            if finished.rates is not None:
                self._note_rates(finished)
            if job.evaluation is not None and self._is_evaluation(step):
                self._evaluate()
            if job.stop_on_nan and not math.isfinite(finished.loss.item()):
                self.flush()
                return f"the loss is {finished.loss.item()} at step {step} (stop_on_nan)"
            if step <= TIMED_STEPS:
                timed_from = self._time(step, timed_from)
            elif self.recorder.plan.is_due(step) and not self.recorder.is_behind:
                self._snapshot()
            if interrupted():
                self.flush()
                return "by the user (Ctrl-C)"
            if time.perf_counter() >= flush_at:
                self.flush()
                flush_at = time.perf_counter() + FLUSH_SECONDS
        self.flush()
        return None

    def keep_last_state(self) -> None:
        """Take a snapshot of the newest state, if it is not kept yet."""
        if self._snapshot_step != self.step:
            self._snapshot()

    def flush(self) -> None:
        """Fetch the losses from the device; hand them and the measurements over."""
        self.recorder.check()
        if self._measurements:
            self.recorder.measurements(self._measurements)
            self._measurements = []
        if not self._pending:
            return
        first = self.step - len(self._pending) + 1
        losses: list[float] = torch.stack(self._pending).flatten().tolist()
        if first == 1:
            dtype = str(self._pending[0].dtype).removeprefix("torch.")
            self.recorder.facts({"loss.dtype": dtype})
        self._pending = []
        self.recorder.losses(first, losses)
        self.progress.advance(first, losses)
        self._say_if_not_finite(first, losses)

    def _keep_beginning(self) -> None:
        job, recorder = self.job, self.recorder
        for message in job.notices:
            self.progress.notice(message)
        if job.experiment_toml is not None:
            recorder.text("experiment.toml", job.experiment_toml)
        self._snapshot()
        if job.data is not None:
            named = {"x": job.data.x, "y": job.data.y}
            if job.data.validation is not None:
                named["validation_x"], named["validation_y"] = job.data.validation
            recorder.data(named)

    def _snapshot(self) -> None:
        self.recorder.snapshot(self.job.trainee.state(self.step))
        self._snapshot_step = self.step

    def _time(self, step: int, timed_from: float) -> float:
        """Time the first steps, but not the very first, which warms up; then choose the interval."""
        if step == 1:
            return time.perf_counter()
        if step == TIMED_STEPS:
            step_seconds = (time.perf_counter() - timed_from) / (TIMED_STEPS - 1)
            self.recorder.choose_interval(step_seconds)
        return timed_from

    def _note_rates(self, finished: FinishedStep) -> None:
        if finished.rates == self._rates or finished.rates is None:
            return
        for index, rate in enumerate(finished.rates):
            if self._rates[index : index + 1] != (rate,):
                name = "lr" if index == 0 else f"lr[{index}]"
                self._measurements.append((name, finished.number, rate))
        self._rates = finished.rates

    def _is_evaluation(self, step: int) -> bool:
        return step % self.job.evaluate_every == 0 or step == self.job.steps

    def _evaluate(self) -> None:
        if self.job.evaluation is None:
            return
        measured = self.job.evaluation.measure()
        self._measurements += [(name, self.step, value) for name, value in measured.items()]
        if isinstance(self.job.trainee.schedule, ReduceLROnPlateau):
            self.job.trainee.schedule.step(measured["validation_loss"])

    def _say_if_not_finite(self, first: int, losses: Sequence[float]) -> None:
        if self._nonfinite_step is not None:
            return
        for step, loss in enumerate(losses, start=first):
            if not math.isfinite(loss):
                self._nonfinite_step = step
                self.recorder.facts({"nonfinite_step": step})
                self.progress.notice(
                    f"the loss is {loss} at step {step}; it is recorded and training goes on "
                    "(stop_on_nan = true stops there); a smaller lr is the usual cure"
                )
                return


def _finish_failed(recorder: Recorder, training: _Training, error: BaseException) -> None:
    """Close the run of a training that raised; what the training raised comes first."""
    with suppress(Exception):  # the device or the disk may be what failed
        training.flush()
    reason = str(error).strip() or type(error).__name__
    with suppress(Exception):
        recorder.finish({"status": "failed", "reason": reason, "finished": _now()})


def _circumstances(job: Job) -> dict[str, Any]:
    return {
        "steps": job.steps,
        "engine": "eager",
        "numerics": numerics.Numerics.read(job.trainee.device).to_json(),
        "versions": {"python": platform.python_version()} | _versions(),
    }


@cache
def _versions() -> dict[str, str]:
    return {package: version(package) for package in ("everystep", "torch", "numpy", "safetensors")}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@contextmanager
def _interrupt_deferred() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C wait for the end of the step, so that the state is one of a whole step.

    A second Ctrl-C does not wait.
    """
    asked = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or not callable(before):
        yield asked.is_set
        return

    def note(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, before)
        asked.set()

    signal.signal(signal.SIGINT, note)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)
