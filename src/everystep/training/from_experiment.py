"""A job from an experiment: device, data, model, loss, optimizer, batches, in that order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from everystep import numerics
from everystep.device import select
from everystep.errors import EverystepError, ExperimentError, Fault, TrainingError
from everystep.experiment.batches import Batches
from everystep.experiment.catalogue import build
from everystep.experiment.data import Data, make_data
from everystep.experiment.loss import check_loss, target_of
from everystep.experiment.model import build_model, try_model
from everystep.experiment.preparation import CategoricalColumn, TablePreparation
from everystep.experiment.prepared_rows import Reading
from everystep.experiment.source_files import check_may_be_read, note_named
from everystep.experiment.specification import Experiment
from everystep.step.generators import generators_preserved
from everystep.training.from_objects import job_of
from everystep.training.job import Job, Outcome, Progress, StartingPoint
from everystep.training.loop import run_job
from everystep.training.objects import Objects

__all__ = ["experiment_job", "of_torch_alone", "train_experiment"]


def train_experiment(
    experiment: Experiment, name: str, origin: StartingPoint, progress: Progress
) -> Outcome:
    """Train an experiment, and record every step; the caller's random generators keep their state.

    Raises:
        UsageError: the device, the data or the model is invalid; gives the reason and a fix.
        TrainingError: torch failed in a step.
        RecordingError: writing the run failed.
    """
    note_named(experiment.data.files)
    device = select(experiment.device)
    try:
        with of_torch_alone(name, experiment.threads, device):
            job = experiment_job(experiment, device, progress=progress.reading)
            return run_job(replace(job, name=name, origin=origin), progress)
    finally:
        progress.end()


@contextmanager
def of_torch_alone(what: str, threads: int | None, device: torch.device) -> Iterator[None]:
    """Compute as a training does that runs no code but torch's; restore the process afterwards.

    Raises:
        TrainingError: torch failed, with `what`.
    """
    numerics.prepare()
    with numerics.in_force(threads, suspends_device=True), generators_preserved(device):
        try:
            yield
        except EverystepError:
            raise
        except Exception as error:
            reason = str(error).strip() or type(error).__name__
            raise TrainingError(
                f"{what} failed: {reason}\n(run `everystep runs` to list what was recorded before)"
            ) from error


def experiment_job(
    experiment: Experiment,
    device: torch.device,
    data: Data | None = None,
    progress: Reading = lambda done, total, unit="": None,
) -> Job:
    """Create everything that an experiment names, in the chapter's order; seeds torch's generator.

    data: replaces the data of the experiment, and no file of it is read; progress: called with how much
    of a large file has been read, and of all.

    Raises:
        UsageError: the data or the model is invalid, or in files that the user has not named; gives the
            reason and a fix.
    """
    experiment = experiment.with_fused(device.type)
    # Random data is drawn first, as in the chapter, and then the parameters of the model.
    torch.manual_seed(experiment.seed)
    if data is None:
        check_may_be_read(experiment.data)
        data = make_data(experiment, target_of(experiment.loss), progress)
    if data.sources and experiment.batch_size is None:
        problem = "is missing: the data stays in its files, and a step would read all of it"
        raise ExperimentError([Fault("batch_size", problem)])
    order = experiment.batch_size, experiment.seed, experiment.drop_last
    path = getattr(experiment.data, "path", None)
    name_of_rows = Path(path).name if path else "the data"
    batches = Batches(len(data.x), *order, numbers=data.numbers, source=name_of_rows)
    model = build_model(experiment.model, data.x[:2])
    loss = build("loss", experiment.loss.name, experiment.loss.keywords)
    # Two, unless a batch has one: batch norm refuses that, and would do so only at the end of an epoch.
    few_rows = data.x[: min(2, batches.smallest)]
    prediction = try_model(model, few_rows, experiment.model.layers, _origin(data))
    check_loss(loss, prediction, data)
    # Before the optimizer is made, as torch asks for.
    model.to(device)
    loss.to(device)
    _check_scheduler(experiment)
    wanted = experiment.optimizer
    optimizer = build("optimizer", wanted.name, wanted.keywords, [*model.parameters()])
    objects = Objects(model, loss, optimizer, metrics=experiment.metrics)
    if (asked := experiment.scheduler) is not None:
        scheduler = build("scheduler", asked.name, asked.keywords, optimizer)
        objects = replace(objects, scheduler=scheduler, scheduler_every=asked.every)
    source = experiment.data.model_dump(exclude_none=True)
    job = job_of(objects, experiment, batches, data, source, device)
    return replace(job, experiment_toml=experiment.to_toml())


def _origin(data: Data) -> str:
    """Return the source of the data for messages about layers: which columns became several."""
    columns = data.preparation.columns if isinstance(data.preparation, TablePreparation) else ()
    wide = (column for column in columns if isinstance(column, CategoricalColumn))
    words = [f"{column.name} becomes {len(column.categories)} columns" for column in wide]
    return "the data" + (f" ({', '.join(words)})" if words else "")


def _check_scheduler(experiment: Experiment) -> None:
    scheduler = experiment.scheduler
    if scheduler and scheduler.name == "ReduceLROnPlateau" and not experiment.data.validation:
        problem = "ReduceLROnPlateau needs a validation loss; add validation = 0.2 to [data]"
        raise ExperimentError([Fault("scheduler", problem)])
