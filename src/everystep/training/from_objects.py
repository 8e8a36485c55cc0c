"""A job from the user's live model, loss and optimizer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everystep import numerics
from everystep.bounded import check_steps
from everystep.device import select
from everystep.errors import DataError, DeviceError
from everystep.experiment.batches import Batches, RowsOf
from everystep.experiment.data import Data, Numbering, split_rows
from everystep.experiment.specification import Iteration
from everystep.recording.contents import digest_of
from everystep.training.agreement import ranks_here
from everystep.training.dataset import DatasetBatches, guards_of, is_of_tensors, length_of, read_rows
from everystep.training.description import describe
from everystep.training.job import Job, Outcome, Progress, StartingPoint
from everystep.training.loop import run_job
from everystep.training.measurements import evaluation_of
from everystep.training.model_step import Training
from everystep.training.objects import Objects, is_dataset
from everystep.training.shares import shares_of

__all__ = ["job_of", "objects_job", "train_objects"]


def train_objects(
    objects: Objects, iteration: Iteration, origin: StartingPoint, progress: Progress
) -> Outcome:
    """Train the live model in place, and record every step.

    Raises:
        UsageError: an object, the data, the device or a setting is invalid; gives the reason and a fix.
        RecordingError: writing the run failed; the model holds the last state.
    """
    objects.check()
    numerics.prepare()
    with numerics.in_force(iteration.threads):
        if iteration.seed is not None:
            torch.manual_seed(iteration.seed)
        device = _device(objects, iteration.device)
        job = objects_job(objects, iteration, device, progress)
        return run_job(replace(job, origin=origin), progress)


def objects_job(objects: Objects, iteration: Iteration, device: torch.device, progress: Progress) -> Job:
    """Create everything else that a training of live objects needs.

    Raises:
        UsageError: the data or a setting is invalid; gives the reason and a fix.
    """
    # Without a seed, the order of the batches follows the one that torch was last seeded with.
    seed = torch.initial_seed() if iteration.seed is None else iteration.seed
    notices = []
    if not objects.model.training:
        notices.append(
            "the model is in evaluation mode, so dropout and batch norm behave as in evaluation; to "
            "train in training mode, call model.train() first"
        )
    data = _read(objects, seed, progress)
    rows = length_of(objects.data) if data is None else len(data.x)
    numbers = None if data is None else data.numbers
    # `numbers`: which rows of the data these are, where others are kept out for validation.
    batches = Batches(rows, iteration.batch_size, seed, iteration.drop_last, numbers=numbers)
    if data is None:
        kind = type(objects.data).__name__
        notices.append(f"the Dataset is read at every step: {kind} is not one of torch's, of tensors")
    source = {"source": "dataset" if is_dataset(objects.data) else "tensors", "lazy": data is None}
    job = job_of(objects, iteration, batches, data, source, device)
    job.training.parts.check()
    return replace(job, name=_snake(type(objects.model).__name__), notices=[*job.notices, *notices])


def job_of(
    objects: Objects,
    iteration: Iteration,
    batches: Batches,
    data: Data | None,
    source: dict[str, Any],
    device: torch.device,
) -> Job:
    """Return the job of training live objects.

    batches: the rows that each step sees; data: None if the Dataset of the objects is read at every
    step; source: the facts about where it comes from.

    Raises:
        UsageError: there are too many steps, a metric does not fit, or not several processes.
    """
    if (ranks := ranks_here()) is not None:
        batches = batches.shared(ranks.rank, ranks.count)
        if ranks.rank and iteration.seed is not None:  # else all would draw the same, in dropout say
            torch.manual_seed(iteration.seed + ranks.rank)
    is_read = data is not None and is_dataset(objects.data)
    if data is None:
        batch: RowsOf | DatasetBatches = DatasetBatches(
            objects.data, batches, device, objects.dataset_limit
        )
        validation = objects.validation and _tensors(objects.validation)
        measured = validation and (validation[0].to(device), validation[1].to(device))
    else:
        on_device = data.to(device)
        x, y, validation = on_device.x, on_device.y, on_device.validation
        batch = batches.of(x, y, is_read=is_read)
        # Without validation rows, metrics are measured on the data itself.
        measured = validation or ((x, y) if objects.metrics else None)
    if objects.validation and not isinstance(objects.validation, float):
        # A run of a Dataset does not hold these rows, and its resume must notice others.
        digests = map(digest_of, _tensors(objects.validation))
        source = source | {"validation_digest": "".join(digests)}
    is_validation = validation is not None
    evaluation = measured and evaluation_of(objects, measured, is_validation=is_validation)
    training = Training(
        model=objects.model,
        loss=objects.loss,
        optimizer=objects.optimizer,
        batch=batch,
        device=device,
        scheduler=objects.scheduler,
        scheduler_every=objects.scheduler_every,
        steps_per_epoch=batches.steps_per_epoch,
        max_grad_norm=iteration.max_grad_norm,
        shares=shares_of(objects, batch, iteration) if ranks is not None else None,
        guards=guards_of(objects.data) if is_read else None,
    )
    steps = check_steps(iteration.steps or (iteration.epochs or 0) * batches.steps_per_epoch)
    # By default an epoch, or a hundredth of all steps if each step is an epoch.
    usual = batches.steps_per_epoch if batches.batch_size else max(1, steps // 100)
    every = iteration.evaluate_every or usual
    return Job(
        training=training,
        steps=steps,
        facts=describe(training, data, source, iteration, every if evaluation else None),
        # To be stored: a run opens on any machine.
        data=None if data is None else data.to(torch.device("cpu")),
        evaluation=evaluation,
        engine=iteration.engine,
        notices=[message] if (message := numerics.warning()) else [],
    )


def _read(objects: Objects, seed: int, progress: Progress) -> Data | None:
    """Return the data, None if it is read at every step."""
    pair = objects.data
    if is_dataset(objects.data):
        if not is_of_tensors(objects.data):
            _check_lazy(objects)
            return None
        pair = read_rows(objects.data, objects.dataset_limit, progress.reading)
    x, y = _tensors(pair)
    if isinstance(objects.validation, float):
        # By the seed, so that a fork and a resume keep the same rows out.
        training, kept_out = split_rows(len(x), objects.validation, seed)
        held_out = x[kept_out], y[kept_out]
        return Data(x[training], y[training], held_out, numbering=Numbering(seed))
    validation = _tensors(objects.validation) if objects.validation else None
    if validation and validation[0].shape[1:] != x.shape[1:]:
        shapes = f"{tuple(validation[0].shape)}, but the data's x is {tuple(x.shape)}"
        raise DataError(f"validation: x is {shapes}; the rows must have the same shape")
    return Data(x, y, validation)


def _check_lazy(objects: Objects) -> None:
    kind = type(objects.data).__name__
    problem = f"the Dataset is read at every step ({kind} is not one of torch's, of tensors)"
    if isinstance(objects.validation, float):
        raise DataError(f"{problem}, so its rows cannot be split; pass validation=(x, y)")
    if objects.metrics and objects.validation is None:
        raise DataError(f"{problem}, so metrics need separate rows; pass validation=(x, y)")


def _tensors(pair: Any) -> tuple[Tensor, Tensor]:
    """Return x and y as tensors, the same objects if they already are; `Objects` has checked them."""

    def as_tensor(part: Any) -> Tensor:
        try:
            return torch.from_numpy(part) if isinstance(part, np.ndarray) else part
        except ValueError:  # it has strides that no tensor has, as `x[::-1]` does
            return torch.from_numpy(part.copy())

    x, y = map(as_tensor, pair)
    return x, y


def _device(objects: Objects, name: str | None) -> torch.device:
    """Return the device to train on, the model moved there if it was asked for."""
    # The user's own placement counts: a model is moved only where `device` asks for it.
    parameter = next(objects.model.parameters(), None)
    here = parameter.device if parameter is not None else torch.device("cpu")
    if here.type == "meta":
        raise DeviceError(
            "the model is on the meta device and has no values; call model.to_empty(...) first"
        )
    if name is None:
        return here
    device = select(name)
    if device != here and objects.optimizer.state:
        raise DeviceError(
            f"the model is on {here}, and its optimizer already has state there; move both to "
            f"{device} before training, or omit device"
        )
    objects.model.to(device)
    return device


# e.g. "TwoLayer" -> "two-layer", and its runs are two-layer-1, two-layer-2, ...
def _snake(name: str) -> str:
    words = "".join(f"-{c.lower()}" if c.isupper() else c for c in name)
    return words.strip("-").replace("_", "-") or "run"
