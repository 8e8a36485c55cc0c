"""Trains with a user's step function: calls it for each batch, and records it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from everystep import numerics
from everystep.bounded import check_steps
from everystep.errors import ExperimentError, Fault, UsageError
from everystep.experiment.specification import Iteration
from everystep.training.dataset import called
from everystep.training.interrupt import Interrupt, interrupt_deferred
from everystep.training.job import Outcome, Progress
from everystep.training.loader_position import is_quiet
from everystep.training.record import Recording
from everystep.training.step_function import VouchedStep, run_step

__all__ = ["check_step", "train_step"]

Step = Callable[..., Any]


def check_step(step: Any, batches: Any, parts: Any, others: Mapping[str, Any]) -> None:
    """Check the arguments of `train` for a user's step function.

    Args:
        others: those for a training of a model and a loss only; each must be None or False.

    Raises:
        ExperimentError: lists every invalid argument, with a fix.
    """
    faults = []
    if isinstance(step, nn.Module) or inspect.isclass(step) or not callable(step):
        faults.append(Fault("step", f"must be a function of the batch, not {called(step)}"))
    if not isinstance(parts, Mapping) or not parts:
        example = 'parts={"model": model, "optimizer": optimizer}'
        faults.append(Fault("parts", f"must name what the step carries from call to call: {example}"))
    if batches is not None and not isinstance(batches, Iterable):
        faults.append(
            Fault("batches", f"must be a DataLoader or another iterable, not {called(batches)}")
        )
    faults += [
        Fault(
            name,
            "does not apply to a step of your own; do it in the step, or pass what it needs in parts",
        )
        for name, value in others.items()
        if value is not None and value is not False
    ]
    if faults:
        raise ExperimentError(faults, "the arguments of train")


def train_step(
    step: Step,
    batches: Iterable[Any] | None,
    iteration: Iteration,
    recording: Recording[Any],
    progress: Progress,
) -> Outcome:
    """Call a step for each batch, and record each call.

    Args:
        step: returns the loss, or numbers by name including `loss`, or None.
        batches: iterated again for each epoch; None: call the step without a batch.
        iteration: steps or epochs, seed, threads and stop_on_nan.
        recording: not started yet.

    Raises:
        UsageError: the step returns another type.
        TrainingError: `engine="program"`, and no program can run a step; or a check failed.
        RecordingError: writing the run failed; everything recorded before is kept.
    """
    numerics.prepare()
    with numerics.in_force(iteration.threads), interrupt_deferred() as interrupt:
        if iteration.seed is not None:
            torch.manual_seed(iteration.seed)
        try:
            with recording:
                run = recording.run
                progress.begin(run.directory, run.facts.model_copy(update=_total(iteration, batches)))
                _take_all(step, batches, iteration, recording, interrupt, progress)
        finally:
            progress.end()
    facts = recording.run.facts
    return Outcome(run.directory, facts.status, facts.reason, interrupt.is_by_user)


def _take_all(
    step: Step,
    batches: Iterable[Any] | None,
    iteration: Iteration,
    recording: Recording[Any],
    interrupt: Interrupt,
    progress: Progress,
) -> None:
    """Call the step for each batch, until a signal or a loss that is not finite ends the training."""
    total = _total(iteration, batches)["steps"] or None
    if iteration.steps is not None and iteration.steps < (known := recording.run.newest_step()):
        raise UsageError(f"the run has {known:,} steps already; set more steps than {iteration.steps:,}")
    take: Callable[..., dict[str, Any]] = partial(run_step, step, recording)
    if iteration.engine == "program":
        vouched = VouchedStep(step, recording, total, is_quiet(batches))
        recording.writer.function = lambda: vouched.facts
        take = vouched.take
    for batch in _batches(batches, iteration, recording, progress):
        logged = take(*([] if batches is None else [batch]))
        if iteration.stop_on_nan and not math.isfinite(loss := _loss_of(logged)):
            recording.stop(f"the loss is {loss} (stop_on_nan)")
            return
        if interrupt.reason is not None:
            recording.stop(interrupt.reason)
            return


def _total(iteration: Iteration, batches: Iterable[Any] | None) -> dict[str, int]:
    """Return the number of steps, 0 if unknown."""
    if iteration.steps is not None:
        return {"steps": iteration.steps}
    count = (iteration.epochs or 0) * len(batches) if isinstance(batches, Sized) else 0
    return {"steps": check_steps(count)}


def _batches(
    batches: Iterable[Any] | None,
    iteration: Iteration,
    recording: Recording[Any],
    progress: Progress,
) -> Iterator[Any]:
    """Yield the batches of as many steps or epochs as asked for, except those of recorded steps."""
    count, epoch = recording.step_count, 0
    if batches is None:
        total = iteration.steps if iteration.steps is not None else iteration.epochs or 0
        yield from [None] * (total - count)
        return
    last, epochs = (math.inf if n is None else n for n in (iteration.steps, iteration.epochs))
    while count < last and epoch < epochs:
        before, is_skipping = count, recording.is_resuming
        for batch in recording.drawn(batches):
            count += 1
            yield batch
            if count == last:
                return
        epoch += 1
        if count == before and not is_skipping:
            what = "no batch" if epoch == 1 else f"no more batches after step {count}"
            progress.notice(f"the loader yields {what}; a generator can be iterated only once")
            return


def _loss_of(logged: Mapping[str, Any]) -> float:
    """Return the loss that a step has logged, 0 for none."""
    loss = logged.get("loss", 0.0)
    return float(loss.detach() if isinstance(loss, Tensor) else loss)
