"""The public face: train, and open."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from everystep.errors import RunError
from everystep.recording.contents import DEFAULT_BATCH_BUDGET
from everystep.recording.recorder import DEFAULT_BUDGET
from everystep.recording.run import RUNS, find_run, find_runs
from everystep.run import Run, progress_of, run_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.optim.lr_scheduler import LRScheduler
    from torch.utils.data import Dataset

    from everystep.experiment.specification import Experiment, Iteration
    from everystep.training.record import Recording

__all__ = ["open", "record", "runs", "train", "train_experiment"]


def open(
    run: str | Path,
    *,
    model: nn.Module | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    data: tuple[Any, Any] | Dataset[Any] | None = None,
) -> Run:
    """Open a run: its directory, or its name under runs/.

    What the run was trained with is needed only to open steps that Python took, wholly or in part, or
    whose data is not in the run. It is copied, and stays as it is.

    Args:
        run: where it is.
        model: as it was trained, in the mode that it trained in.
        loss: of prediction and target.
        optimizer: over the model's parameters.
        data: x (N, ...) and y (N, ...), the rows that were trained on, or the Dataset that was read at
            every step.

    Raises:
        RunError: there is no such run; names the nearest.
    """
    objects = None
    if any(given is not None for given in (model, loss, optimizer, data)):
        from everystep.training.objects import Objects

        objects = Objects(model, loss, optimizer, data)
    return Run(find_run(run), objects)


def runs(directory: str | Path = RUNS) -> list[Run]:
    """Return all runs directly in a directory, by name; one that cannot be read gives a warning.

    Raises:
        RunError: the directory does not exist.
    """
    found = []
    for path in find_runs(directory):
        try:
            found.append(Run(path))
        except RunError as error:
            warnings.warn(f"left out: {error}", stacklevel=2)
    return found


def train(
    model: nn.Module | Callable[..., Any],
    data: tuple[Any, Any] | Dataset[Any] | Iterable[Any] | None = None,
    *,
    loss: Callable[[Any, Any], Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    parts: Mapping[str, Any] | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    drop_last: bool = False,
    seed: int | None = None,
    device: str | None = None,
    threads: int | None = None,
    schedule: LRScheduler | None = None,
    schedule_every: Literal["step", "epoch"] = "step",
    clip_norm: float | None = None,
    validation: tuple[Any, Any] | float | None = None,
    metrics: Mapping[str, Callable[[Tensor, Tensor], Any]] | None = None,
    evaluate_every: int | None = None,
    stop_on_nan: bool = False,
    engine: Literal["auto", "program", "eager"] = "auto",
    fold: bool = False,
    directory: str | Path | None = None,
    snapshot_budget: int = DEFAULT_BUDGET,
    batch_budget: float = DEFAULT_BATCH_BUDGET,
    dataset_limit: int | None = None,
    progress: bool = True,
) -> Run:
    """Train a live model in place, recording every step, and return the run.

    When it returns, or is stopped, the same parameters, buffers and optimizer hold the last state.

    Any other training is a step of your own, and its parts:

    def step(batch):
        ...
        return loss
    run = everystep.train(step, loader, parts={"model": model, "optimizer": optimizer}, steps=1000)

    Each call is recorded, as in a loop that `everystep.record` records. The step returns the loss, or
    numbers by name such as `{"loss": loss, "accuracy": accuracy}`, or None. Where its source can be read
    and it does nothing but operations on tensors, a program takes most steps in place of Python.

    Args:
        model: any module, in the mode (`train()`, `eval()`) that it shall train in; or a step of your
            own: a function of the batch.
        data: x (N, ...) and y (N, ...), tensors or NumPy arrays, or a map-style Dataset of pairs. A
            Dataset of torch's, or one whose code is proven to return the same rows, is read once; any
            other is read at every step. For a step of your own: a DataLoader, or whatever else gives
            batches and can be iterated over once for each epoch; or None, and the step takes nothing.
        parts: what a step of your own carries from call to call, by any names, as `record` has them.
        loss: of prediction and target; gives one number.
        optimizer: over the model's parameters: `everystep.GradientDescent`, or any torch optimizer
            that needs no closure.
        steps: how many steps to take; or `epochs`: how often to see all rows.
        batch_size: rows a step, shuffled anew every epoch; absent: all rows at every step, in order.
        drop_last: leave out an epoch's last batch where it is short.
        seed: reseeds torch's global generator first. Absent: it goes on from where it is, and the
            order of batches follows the seed it was last given (`torch.initial_seed()`).
        device: `cpu`, `cuda`, `cuda:1`, `mps`, `auto`; absent: where the model is.
        threads: how many threads torch computes with.
        schedule: of the optimizer's learning rate; advanced every `schedule_every`.
        clip_norm: clip the 2-norm of all gradients together to this before the update.
        validation: x and y to measure but not to train on, or the share of rows to keep out for it.
        metrics: more to measure: name to a function of all predictions and targets of the
            validation part, or of the data where there is none.
        evaluate_every: steps between measurements; absent: an epoch, or a hundredth of the steps
            where every step sees all rows. The last step is always measured.
        stop_on_nan: stop at the first loss that is not finite; otherwise it is recorded and said.
        engine: `auto`: take steps by a program where the Python that it stands in for is proven to do
            nothing else, and run Python otherwise, with the reason; `eager`: run Python at every step;
            `program`: as `auto`, but you answer for code that cannot be read, and it is an error where
            no program can take a step. For a step of your own, it is an error where its source cannot
            be read, too.
        fold: let the program fold updates into the matrix products that make their gradients: faster,
            but rounded otherwise than the eager step. Needs one of torch's optimizers and no schedule.
        directory: of the run, which must not exist; absent: the next free one under runs/.
        snapshot_budget: bytes of snapshots that the run may keep.
        batch_budget: bytes of batches to keep of a step of your own, as `record` has it.
        dataset_limit: bytes that a Dataset may take as tensors; absent: 2 GB.
        progress: show a progress bar where stderr is a terminal.

    Raises:
        UsageError: something does not serve; lists everything, each with the cure.
        RecordingError: writing the run failed (disk full, ...); what was recorded is kept.
        KeyboardInterrupt: Ctrl-C, after the step is finished and the run is closed.
    """
    from everystep.experiment.specification import check_iteration
    from everystep.training.dataset import DEFAULT_DATASET_LIMIT
    from everystep.training.from_objects import train_objects
    from everystep.training.objects import Objects

    iteration = check_iteration(
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        drop_last=drop_last,
        seed=seed,
        device=device,
        threads=threads,
        clip_norm=clip_norm,
        evaluate_every=evaluate_every,
        stop_on_nan=stop_on_nan,
        engine=engine,
        fold=fold,
    )
    place = None if directory is None else Path(directory)
    if parts is not None:
        others = {
            **{"loss": loss, "optimizer": optimizer, "batch_size": batch_size, "drop_last": drop_last},
            **{"device": device, "schedule": schedule, "clip_norm": clip_norm, "fold": fold},
            **{"validation": validation, "metrics": metrics, "evaluate_every": evaluate_every},
            **{"dataset_limit": dataset_limit},
        }
        return _train_step(
            model, data, parts, others, iteration, place, (snapshot_budget, batch_budget), progress
        )
    limit = DEFAULT_DATASET_LIMIT if dataset_limit is None else dataset_limit
    # What they are is checked where all faults are found at once.
    live, of_pair, updating, rows = cast("tuple[Any, Any, Any, Any]", (model, loss, optimizer, data))
    objects = Objects(
        live, of_pair, updating, rows, schedule, schedule_every, validation, metrics or {}, limit
    )
    outcome = train_objects(objects, iteration, place, RUNS, snapshot_budget, progress_of(progress))
    # The run holds the data, and a fork its own validation part.
    trained_with = replace(objects, data=None, validation=None, metrics=dict(metrics or {}))
    run = run_of(outcome, trained_with)
    if run.facts.training.data.lazy:
        run = run_of(outcome, replace(trained_with, data=rows))
    return run


def _train_step(
    step: Any,
    batches: Any,
    parts: Any,
    others: dict[str, Any],
    iteration: Iteration,
    place: Path | None,
    budgets: tuple[int, float],
    progress: bool,
) -> Run:
    from everystep.training.from_step import check_step, train_step
    from everystep.training.function_recording import FunctionRecording

    check_step(step, batches, parts, others)
    watcher = progress_of(progress)
    recording = FunctionRecording(dict(parts), place, RUNS, *budgets, Run, watcher.advance)
    return run_of(train_step(step, batches, iteration, recording, watcher))


def record(
    *,
    run: str | Path | None = None,
    snapshot_budget: int = DEFAULT_BUDGET,
    batch_budget: float = DEFAULT_BATCH_BUDGET,
    **parts: Any,
) -> Recording[Run]:
    """Record a loop of your own while it runs, every step of it, and change nothing in it.

    with everystep.record(model=model, optimizer=optimizer) as recording:
        for batch in recording.steps(loader):
            loss = ...; loss.backward(); optimizer.step(); optimizer.zero_grad()
            recording.log(loss=loss)
    recording.run[137].gradients

    Python runs at every step. What it does to tensors is written down, so that each step opens again
    without it.

    Args:
        run: the run's directory, which must not exist; absent: the next free one, `runs/loop-1`.
        snapshot_budget: bytes of snapshots to keep.
        batch_budget: bytes of batches to keep; if more come, the oldest go, and their steps cannot be
            opened any more.
        parts: what the loop carries from step to step, by any names: models, optimizers, schedules,
            scalers, averaged copies, tensors. The tensors of the one called `model` (or of the only
            module) keep their names; those of others begin with that of the part.

    Raises:
        UsageError: something is not a part of a training.
    """
    from everystep.training.record import Recording

    place = None if run is None else Path(run)
    return Recording(parts, place, RUNS, snapshot_budget, batch_budget, Run)


def train_experiment(
    experiment: str | Path | Mapping[str, Any] | Experiment,
    settings: Mapping[str, Any] | None = None,
    *,
    directory: str | Path | None = None,
    snapshot_budget: int = DEFAULT_BUDGET,
    progress: bool = True,
) -> Run:
    """Train an experiment, recording every step, and return the run.

    The caller's random generators are left as they were.

    Args:
        experiment: the name of a built-in one, a TOML file, its content as a dict, or one loaded.
        settings: values to override, by path: `{"optimizer.lr": 1e-3}`.
        directory: of the run, which must not exist; absent: the next free one under runs/.
        snapshot_budget: bytes of snapshots that the run may keep.
        progress: show a progress bar where stderr is a terminal.

    Raises:
        UsageError: something does not serve; lists everything, each with the cure.
        TrainingError: torch failed within a step; the steps before it are recorded.
        RecordingError: writing the run failed (disk full, ...); what was recorded is kept.
        KeyboardInterrupt: Ctrl-C, after the step is finished and the run is closed.
    """
    from everystep.experiment.specification import Experiment, load
    from everystep.training.from_experiment import train_experiment as train_loaded

    name = Path(experiment).stem if isinstance(experiment, str | Path) else "experiment"
    source = (
        experiment.model_dump(exclude_none=True) if isinstance(experiment, Experiment) else experiment
    )
    loaded = load(source, settings)
    place = None if directory is None else Path(directory)
    outcome = train_loaded(loaded, name, place, RUNS, snapshot_budget, progress_of(progress))
    return run_of(outcome)
