"""Trains with a user's step function: calls it for each batch, and records it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from everystep import numerics
from everystep.errors import ExperimentError, Fault
from everystep.experiment.specification import Iteration
from everystep.training.function_recording import FunctionRecording
from everystep.training.job import Outcome, Progress
from everystep.training.loop import interrupt_deferred
from everystep.training.rows import called
from everystep.training.step_function import StepFunction

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
    recording: FunctionRecording[Any],
    progress: Progress,
) -> Outcome:
    """Call a step for each batch, and record each call.

    Args:
        step: returns the loss, or numbers by name including `loss`, or None.
        batches: iterated again for each epoch; None: call the step without a batch.
        iteration: steps or epochs, seed, threads and stop_on_nan.
        recording: not started yet.

    Raises:
        UsageError: the step returns something else.
        TrainingError: `engine="program"`, and no program can run a step; or a check failed.
        RecordingError: writing the run failed; everything recorded before is kept.
    """
    numerics.prepare()
    with numerics.in_force(iteration.threads), interrupt_deferred() as interrupted:
        if iteration.seed is not None:
            torch.manual_seed(iteration.seed)
        with recording:
            run = recording.run
            progress.begin(run.directory, run.facts.model_copy(update=_total(iteration, batches)))
            try:
                total = _total(iteration, batches)["steps"] or None
                function = StepFunction(step, recording, iteration.engine, total, _is_quiet(batches))
                recording.note_function(lambda: function.facts)
                for batch in _batches(batches, iteration, progress):
                    logged = function.take(*([] if batches is None else [batch]))
                    if iteration.stop_on_nan and not math.isfinite(loss := _loss_of(logged)):
                        recording.stop(f"the loss is {loss} (stop_on_nan)")
                        break
                    if interrupted():
                        recording.stop("by the user (Ctrl-C)")
                        break
            finally:
                progress.end()
    facts = recording.run.facts
    return Outcome(run.directory, facts.status, facts.reason, interrupted())


def _total(iteration: Iteration, batches: Iterable[Any] | None) -> dict[str, int]:
    """Return the number of steps, 0 if unknown."""
    if iteration.steps is not None:
        return {"steps": iteration.steps}
    return {"steps": (iteration.epochs or 0) * len(batches) if isinstance(batches, Sized) else 0}


def _batches(batches: Iterable[Any] | None, iteration: Iteration, progress: Progress) -> Iterator[Any]:
    """Yield the batches of as many steps or epochs as asked for."""
    if batches is None:
        yield from [None] * (iteration.steps if iteration.steps is not None else iteration.epochs or 0)
        return
    count = epoch = 0
    if iteration.steps == 0:
        return
    while iteration.epochs is None or epoch < iteration.epochs:
        before = count
        for batch in batches:
            count += 1
            yield batch
            if count == iteration.steps:
                return
        epoch += 1
        if count == before:
            what = "no batch" if epoch == 1 else f"no more batches after step {count}"
            progress.notice(f"the loader yields {what}; a generator can be iterated only once")
            return


def _is_quiet(batches: Any) -> bool:
    """Tell whether making a batch runs only torch's code."""
    if batches is None or type(batches) in (list, tuple):
        return True
    return (
        type(batches) is DataLoader
        and type(batches.dataset) is TensorDataset
        and batches.num_workers == 0
        and batches.collate_fn is default_collate
        and type(batches.sampler) in (SequentialSampler, RandomSampler)
        and (batches.batch_sampler is None or type(batches.batch_sampler) is BatchSampler)
    )


def _loss_of(logged: Mapping[str, Any]) -> float:
    """Return the loss that a step has logged, 0 for none."""
    loss = logged.get("loss", 0.0)
    return float(loss.detach() if isinstance(loss, Tensor) else loss)
