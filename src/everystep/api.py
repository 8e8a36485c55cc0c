"""The public functions: train, record, open and list runs."""

from __future__ import annotations

import os
import shlex
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from everystep.errors import RunError, UsageError
from everystep.recording.contents import DEFAULT_BATCH_BUDGET
from everystep.recording.directories import (
    AWAITED,
    RUNS,
    SWEEP_FILE,
    create_directory,
    find_run,
    find_runs,
    is_run,
    is_sweep,
    place_of,
    remove_unbegun,
)
from everystep.recording.snapshots import DEFAULT_BUDGET
from everystep.run import Run, diagnosis_of, progress_of, run_from_objects, run_of
from everystep.signature import checked

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.optim.lr_scheduler import LRScheduler
    from torch.utils.data import Dataset

    from everystep.answers.doctor import Diagnosis
    from everystep.answers.sweep import Sweep
    from everystep.experiment.metrics import Metrics
    from everystep.experiment.specification import Experiment
    from everystep.training.job import Progress
    from everystep.training.record import Recording

__all__ = ["doctor", "open", "record", "runs", "sweep", "train", "train_experiment"]


# Functions import what they need when they are called: `import everystep` is quick, and commands that
# need no torch do not wait for it.
@checked
def open(
    run: str | Path,
    *,
    model: nn.Module | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    data: tuple[Any, Any] | Dataset[Any] | None = None,
) -> Run:
    """Open a run by its directory, or by its name in runs/.

    A run opens without the objects that trained it. Pass them to continue it or to ask what if, in
    another process than the one that trained it, or if the run does not hold its data. everystep copies
    them and leaves them unchanged.

    Args:
        run: the directory, or a name in runs/.
        model: the model as it was before training, in the same mode.
        loss: a function of (prediction, target).
        optimizer: the optimizer of the model's parameters.
        data: x (N, ...) and y (N, ...), the training rows, or the Dataset.

    Raises:
        RunError: the run does not exist; the message names the most similar run.
    """
    objects = None
    if any(given is not None for given in (model, loss, optimizer, data)):
        from everystep.training.objects import Objects

        objects = Objects(model, loss, optimizer, data)
    return Run(find_run(run), objects)


@checked
def doctor(run: str | Path, *, export: str | Path | None = None) -> Diagnosis:
    """Report what is wrong with a run, and what can still be read; also of one that cannot be opened.

    Args:
        run: the directory, or a name in runs/.
        export: where to write the numbers that can be read, as CSV: series, step, value, and whether the
            digest is the `same`, `differs`, or there is `none`.

    Raises:
        RunError: there is no such run; or, with `export`, its database cannot be opened.
    """
    return diagnosis_of(find_run(run), export)


@checked
def runs(directory: str | Path = RUNS) -> list[Run]:
    """Return all runs directly in a directory, in the order of their names; warn about unreadable ones.

    Raises:
        RunError: the directory does not exist.
    """
    found = []
    for path in find_runs(directory):
        try:
            found.append(Run(path))
        except RunError as error:
            warnings.warn(f"skipped: {error}", stacklevel=3)
    return found


@checked
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
    scheduler: LRScheduler | None = None,
    scheduler_every: Literal["step", "epoch"] = "step",
    max_grad_norm: float | None = None,
    validation: tuple[Any, Any] | float | None = None,
    metrics: Metrics | None = None,
    evaluate_every: int | None = None,
    stop_on_nan: bool = False,
    engine: Literal["auto", "program", "eager"] = "auto",
    run: str | Path | None = None,
    resume: bool | str | Path = False,
    force: bool = False,
    fork: str | Path | Run | None = None,
    at: int | None = None,
    config: Any = None,
    tags: Iterable[str] = (),
    snapshot_budget: float = DEFAULT_BUDGET,
    batch_budget: float = DEFAULT_BATCH_BUDGET,
    keep: str | Sequence[tuple[int, int]] | None = None,
    dataset_limit: float | None = None,
    progress: bool | Progress = True,
) -> Run:
    """Train a live model in place, record every step, and return the run.

    When `train` returns or is stopped, the parameters, buffers and optimizer hold the last state.

    For any other kind of training, pass a step function and its parts:

    def step(batch):
        ...
        return loss
    run = everystep.train(step, loader, parts={"model": model, "optimizer": optimizer}, steps=1000)

    everystep records each call, as `everystep.record` records a loop. The step returns the loss, or a
    dict of numbers such as `{"loss": loss, "accuracy": accuracy}`, or None.

    Args:
        model: any module, in the mode (`train()`, `eval()`) to train in; or a step function of the
            batch.
        data: x (N, ...) and y (N, ...), tensors or NumPy arrays, or a map-style Dataset of pairs.
            everystep reads a Dataset once if it is torch's own, of tensors, and any other Dataset at
            every step. For a step function: a DataLoader, or any other iterable that yields the batches
            of one epoch each time; None: call the step without a batch.
        parts: what a step function carries from call to call, by any names, as in `record`.
        loss: a function of (prediction, target) that returns one number.
        optimizer: the optimizer of the model's parameters: `everystep.GradientDescent`, or any torch
            optimizer that needs no closure.
        steps: the number of steps; or set `epochs`, the number of passes over all rows.
        batch_size: rows per step, shuffled again every epoch; default: all rows at every step, in order.
        drop_last: drop the last batch of an epoch if it is incomplete.
        seed: reseed torch's global generator first. Default: keep its state, and derive the order of
            batches from the seed it was last given (`torch.initial_seed()`).
        device: `cpu`, `cuda`, `cuda:1`, `mps`, `xpu`, `auto`; default: the device of the model.
        threads: the number of threads that torch uses.
        scheduler: a scheduler of the optimizer's learning rate; advanced every `scheduler_every`.
        max_grad_norm: clip the 2-norm of all gradients together to this before the update.
        validation: x and y to measure but not to train on, or the fraction of rows to hold out for it.
        metrics: more measurements of the validation part, or of the data if there is none: names of
            metrics (`["accuracy"]`), or name to a function of all predictions and targets.
        evaluate_every: steps between measurements; default: an epoch, or a hundredth of the steps if
            every step sees all rows. The last step is always measured.
        stop_on_nan: stop at the first loss that is not finite; by default, record it and print a notice.
        engine: `auto`: run steps by a program if the model and the loss are torch's own, else run Python
            and record the reason; `eager`: run Python at every step; `program`: you vouch that your code
            does the same operations at every step: programs run most steps, and are compared with Python
            in some; raise an error if no program can. Python runs every step of a step function unless
            you vouch for it.
        run: the new run: a name in runs/, or a path, which must not exist; default: the next free one.
        resume: the run to continue, after it was killed or stopped: its directory, or its name in runs/.
            True: continue `run` if it exists, else begin it. The other arguments are as before,
            except for more `steps`; see `Run.resume`.
        force: continue although something changed, as in `Run.resume`.
        fork, at: of a step function: begin with the state of a run after step `at`, as in `record`;
            a run of a model has `Run.fork`.
        config, tags: the settings of your script, and words by which to find the run, as in `record`.
        snapshot_budget: maximum bytes of snapshots.
        batch_budget: maximum bytes of batches to keep for a step function, as in `record`.
        keep: the steps of a step function that open afterwards, as in `record`.
        dataset_limit: maximum bytes of a Dataset as tensors; default: 2 GB.
        progress: show a progress bar if stderr is a terminal; or an object that watches the training.

    Raises:
        UsageError: an argument is invalid; lists every error with a fix.
        RecordingError: writing the run failed (disk full, ...); everything recorded before is kept.
        KeyboardInterrupt: on Ctrl-C, after finishing the step and closing the run.
    """
    from everystep.experiment.specification import check_iteration
    from everystep.training.dataset import DEFAULT_DATASET_LIMIT
    from everystep.training.from_objects import train_objects
    from everystep.training.job import StartingPoint
    from everystep.training.objects import Objects

    iteration = check_iteration(
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        drop_last=drop_last,
        seed=seed,
        device=device,
        threads=threads,
        max_grad_norm=max_grad_norm,
        evaluate_every=evaluate_every,
        stop_on_nan=stop_on_nan,
        engine=engine,
    )
    place, resumed, user_facts = _start(run, resume, config, tags)
    watcher = progress_of(progress)
    if parts is not None:
        # What only a model takes: `check_step` reports each that is given with a step function.
        others = {
            **{"loss": loss, "optimizer": optimizer, "batch_size": batch_size, "drop_last": drop_last},
            **{"device": device, "scheduler": scheduler, "max_grad_norm": max_grad_norm},
            **{"validation": validation, "metrics": metrics, "evaluate_every": evaluate_every},
            **{"dataset_limit": dataset_limit},
        }
        from everystep.recording.keep import keep_of
        from everystep.training.conditions import LoopConditions
        from everystep.training.loop_start import LoopStart
        from everystep.training.record import Recording
        from everystep.training.step_function import check_step, train_step

        check_step(model, data, parts, others)
        budgets = snapshot_budget, batch_budget, keep_of(keep)
        forked = _forked(fork, at, resumed)
        start = LoopStart(place, *budgets, watcher.advance, resumed, forked, force, user_facts)
        batches: Any = data
        recording = Recording(dict(parts), start, Run, LoopConditions((), ()))
        return run_of(train_step(model, batches, iteration, recording, watcher))
    if fork is not None or at is not None:
        raise UsageError("a training of a model is forked by its run: everystep.open(run).fork(at, ...)")
    if keep is not None:
        raise UsageError(
            "keep is for a step function: batches of a model follow from a rule, so that all its steps "
            "open, and snapshots stay within snapshot_budget"
        )
    limit = DEFAULT_DATASET_LIMIT if dataset_limit is None else dataset_limit
    # Checked later, where all faults are reported at once.
    trained = model, loss, optimizer, data, scheduler, scheduler_every
    objects = Objects(*trained, validation, metrics, limit)
    if resumed is not None:
        from everystep.replay.resume import Resume, resume_objects

        objects.check()
        asked = Resume(resumed, is_accepted=force, budget=snapshot_budget, user_facts=user_facts)
        outcome = resume_objects(asked, objects, False, watcher, iteration)
    else:
        origin = StartingPoint(directory=place, budget=snapshot_budget, user_facts=user_facts)
        outcome = train_objects(objects, iteration, origin, watcher)
    return run_from_objects(outcome, replace(objects, metrics=copy(metrics)))


@checked
def record(
    *unnamed: Any,
    run: str | Path | None = None,
    resume: bool | str | Path = False,
    force: bool = False,
    fork: str | Path | Run | None = None,
    at: int | None = None,
    config: Any = None,
    tags: Iterable[str] = (),
    snapshot_budget: float = DEFAULT_BUDGET,
    batch_budget: float = DEFAULT_BATCH_BUDGET,
    stop_when: str | Iterable[str] = (),
    mark_when: str | Iterable[str] = (),
    keep: str | Sequence[tuple[int, int]] | None = None,
    **parts: Any,
) -> Recording[Run]:
    """Record your own training loop while it runs, every step, without changing it.

    with everystep.record(model=model, optimizer=optimizer) as recording:
        for batch in recording.steps(loader):
            loss = ...; loss.backward(); optimizer.step(); optimizer.zero_grad()
            recording.log(loss=loss)
    recording.run[137].gradients

    Python runs at every step. everystep records its tensor operations, so that each step opens again
    without your code.

    With `resume`, the same script continues where its run ended, to the bits of an uninterrupted loop if
    there are as many processes: the parts get the values of the newest snapshot, and `steps` skips the
    batches before it. Later steps are repeated and compared with the recording.

    With `fork` and `at`, a new run equals another one up to step `at` and continues with this loop. The
    parts get the values of the newest snapshot before, and `steps` skips the batches before that. The
    loop repeats the steps from there to `at`, compared with the recording; settings that should differ,
    such as a learning rate, may change once `recording.step_count` is `at`.

    Args:
        run: the new run: a name in runs/, or a path, which must not exist; default: the next free
            `runs/loop-1`, ...
        resume: the run to continue: its directory, or its name in runs/. True: continue `run` if it
            exists, else begin it.
        force: continue although the parts, the versions or the numerics changed; the recorded steps
            after the snapshot are discarded, and the run records what changed.
        fork, at: the run to make a fork of, and the step after which the fork begins.
        config: the settings of your script: a dict, a dataclass or an `argparse.Namespace`. It is shown
            with the run, and compared by `diff`; everystep does nothing with it.
        tags: words by which to find the run: `everystep runs --tag NAME`.
        snapshot_budget: maximum bytes of snapshots.
        batch_budget: maximum bytes of batches; beyond that, everystep drops the oldest ones, and their
            steps no longer open.
        stop_when: conditions that end the loop after a step: `"norm(gradients['0.weight']) > 100"`, in
            the language of `Run.when`. They read `loss`, `step`, logged numbers, `parameters`,
            `buffers`, `gradients`, `updates` and `previous.loss`.
        mark_when: conditions that mark a step and let the loop continue: the run has a measurement named
            like the condition, with the value 1 at these steps.
        keep: the steps that open afterwards, if not all: `"last 2000 steps"`, or windows with their
            first and last steps: `[(0, 500), (9000, 10000)]`. For other steps, everystep keeps the
            losses and all logged numbers, and what a resume needs. A resumed loop may have a different
            `keep`, from there on.
        parts: what the loop carries from step to step, by any names: models, optimizers, schedulers,
            scalers, averaged copies, tensors. The tensors of the part called `model` (or of the only
            module with tensors) keep their names; the names of all others start with the name of their
            part. Models and optimizers in attributes, dicts and lists of a part are parts as well:
            `agent_actor`.

    Raises:
        UsageError: an argument is not a part of a training, or has no name; or a condition is invalid.
        RunError: the run to continue or to fork does not exist.
    """
    from everystep.recording.keep import keep_of
    from everystep.training.conditions import LoopConditions
    from everystep.training.loop_start import LoopStart
    from everystep.training.record import Recording

    if unnamed:
        kinds = ", ".join(type(part).__name__ for part in unnamed)
        raise UsageError(
            f"record got {kinds} without a name; name each part: everystep.record(model=model, "
            "optimizer=optimizer)"
        )
    place, resumed, user_facts = _start(run, resume, config, tags)
    budgets = snapshot_budget, batch_budget, keep_of(keep)
    start = LoopStart(place, *budgets, None, resumed, _forked(fork, at, resumed), force, user_facts)
    return Recording(parts, start, Run, LoopConditions(stop_when or (), mark_when or ()))


def _forked(
    fork: str | Path | Run | None, at: int | None, resumed: Run | None
) -> tuple[Run, int] | None:
    """Return the run to make a fork of, and the step after which it begins; None for no new fork.

    resumed: the run to continue, which must then be that fork.
    """
    if fork is None and at is None:
        return None
    if fork is None or at is None or at < 0:
        raise UsageError("a fork needs a run and a step: fork=RUN, at=STEP")
    parent = fork if isinstance(fork, Run) else Run(find_run(fork))
    if resumed is None:
        return parent, at
    # A script with fork= and resume=True makes the fork when it runs first, and continues it afterwards.
    made = resumed.facts.fork
    if made is None or (made.parent, made.at) != (parent.name, at):
        raise UsageError(
            f"{resumed.name} exists, and is not the fork of {parent.name} at step {at}; choose another "
            "directory, or omit fork and at"
        )
    return None


def _start(
    run: str | Path | None, resume: bool | str | Path, config: Any, tags: Iterable[str]
) -> tuple[Path | None, Run | None, dict[str, Any]]:
    """Return where a run goes, the run to continue (None: begin one), and the facts that the user gives.

    In a function that a sweep calls, the first run without a name goes to the sweep, and continues there
    if it was begun; its config is the settings, unless it has one.
    """
    from everystep.training.agreement import Agreement
    from everystep.training.description import facts_from

    # Only the first run of a call is the one of the sweep.
    place = AWAITED.pop("place", None) if run is None and resume is False else None
    if place is None:
        place = place_of(run)
    else:
        resume, config = True, AWAITED["settings"] if config is None else config
    user_facts = facts_from(config, tags)
    if resume is False:
        return place, None, user_facts
    if resume is True:
        if place is None:
            raise UsageError("resume=True needs the run: run=...; or pass resume=RUN")
        # A run that was killed before its first state has nothing to continue: it begins again.
        is_unbegun = Agreement().of_first(partial(remove_unbegun, place))
        return place, None if is_unbegun or not is_run(place) else Run(place), user_facts
    if place is not None:
        raise UsageError("both run and resume name a run; pass one of them")
    return None, Run(find_run(resume)), user_facts


@checked
def train_experiment(
    experiment: str | Path | Mapping[str, Any] | Experiment,
    settings: Mapping[str, Any] | None = None,
    *,
    run: str | Path | None = None,
    resume: bool | str | Path = False,
    force: bool = False,
    tags: Iterable[str] = (),
    snapshot_budget: float = DEFAULT_BUDGET,
    progress: bool | Progress = True,
) -> Run:
    """Train an experiment, record every step, and return the run.

    The caller's random generators keep their state.

    Args:
        experiment: the name of a built-in experiment, a TOML file, its content as a dict, or a loaded
            experiment.
        settings: values to override, by path: `{"optimizer.lr": 1e-3}`.
        run: the new run: a name in runs/, or a path, which must not exist; default: the next free one.
        resume, force: continue a run of this experiment, as in `train`.
        tags: words by which to find the run, as in `record`.
        snapshot_budget: maximum bytes of snapshots.
        progress: show a progress bar if stderr is a terminal; or an object that watches the training.

    Raises:
        UsageError: the experiment is invalid; lists every error with a fix.
        TrainingError: torch failed in a step; the steps before it are recorded.
        RecordingError: writing the run failed (disk full, ...); everything recorded before is kept.
        KeyboardInterrupt: on Ctrl-C, after finishing the step and closing the run.
    """
    from everystep.experiment.specification import Experiment, load
    from everystep.training.from_experiment import train_experiment as train_loaded
    from everystep.training.job import StartingPoint

    name = Path(experiment).stem if isinstance(experiment, str | Path) else "experiment"
    source = (
        experiment.model_dump(exclude_none=True) if isinstance(experiment, Experiment) else experiment
    )
    loaded = load(source, settings)
    place, resumed, user_facts = _start(run, resume, None, tags)
    watcher = progress_of(progress)
    if resumed is None:
        origin = StartingPoint(directory=place, budget=snapshot_budget, user_facts=user_facts)
        return run_of(train_loaded(loaded, name, origin, watcher))
    from everystep.replay.resume import Resume, resume_experiment

    asked = Resume(resumed, is_accepted=force, budget=snapshot_budget, user_facts=user_facts)
    return run_of(resume_experiment(asked, watcher, loaded))


@checked
def sweep(
    training: str | Path | Mapping[str, Any] | Callable[..., Any],
    settings: Mapping[str, Any],
    *,
    run: str | Path | None = None,
    resume: bool = False,
    processes: int | None = None,
    threads: int = 1,
    ray: bool = False,
    force: bool = False,
    snapshot_budget: float = DEFAULT_BUDGET,
    progress: bool = True,
) -> Sweep:
    """Train with every combination of some settings, in processes side by side; return all runs.

    Each is an ordinary run in one directory, with the bits of the same training alone with as many
    threads. A training that fails does not stop the others.

    Args:
        training: an experiment, as in `train_experiment`; or a function that takes the settings as
            keyword arguments, and trains or records a run, which it does not name. Each call begins
            with torch's, NumPy's and Python's generators seeded with 0.
        settings: the values of each setting: `{"optimizer.lr": [1e-4, 1e-3], "seed": range(8)}`.
        run: the directory of the runs: a name in runs/, or a path; default: the next free
            `runs/digits-sweep-1`, ...
        resume: continue the sweep that `run` names: finished runs stay as they are, unfinished ones
            continue, and missing ones are trained.
        processes: trainings at a time; default: one per core, fewer if each has several threads.
        threads: of torch in each process, unless the experiment sets them.
        ray: let Ray run them, on all machines of its cluster, which must share the directory.
        force: train more than 1,000 runs.
        snapshot_budget: maximum bytes of snapshots, of each run.
        progress: show a line for each run, and a bar, on stderr.

    Raises:
        UsageError: an experiment or a setting is invalid; lists every error of every run. Or the
            function does not take the settings, or cannot be sent to another process.
        KeyboardInterrupt: on Ctrl-C, after finishing the step of each training and closing its run.
    """
    from loky import cpu_count

    from everystep import numerics
    from everystep.answers.sweep import note_settings, sweep_of, sweep_run
    from everystep.experiment.grid import combinations, experiments_of
    from everystep.recording.settings_diff import flat
    from everystep.replay.processes import pool
    from everystep.replay.side_by_side import (
        TrainingEnd,
        call_function,
        on_ray,
        place_of_function,
        side_by_side,
        train_one,
    )
    from everystep.views.progress import line_for_each
    from everystep.views.run_view import RunView

    _check_sweep(run, resume=resume, ray=ray)
    runs = combinations(settings, may_be_many=force)
    numerics.prepare()
    calls: dict[str, tuple[Any, ...]]  # what to call for each run, and with what after its directory
    if callable(training):
        kind, wanted = training.__name__, runs
        function = place_of_function(training, runs.values())
        calls = {name: (call_function, *function, each) for name, each in runs.items()}
    else:
        kind = Path(training).stem if isinstance(training, str | Path) else "experiment"
        experiments = experiments_of(training, runs, threads)
        threads = max(each.threads or 1 for each in experiments.values())
        wanted = {name: flat(each.model_dump(exclude_none=True)) for name, each in experiments.items()}
        calls = {name: (train_one, each, snapshot_budget) for name, each in experiments.items()}
    place = place_of(run)
    if place is None or not (resume and is_sweep(place)):
        place = create_directory(place, f"{kind}-sweep")
    note_settings(place / SWEEP_FILE, wanted)
    cases = {name: sweep_run(Run, place / name, each) for name, each in runs.items()}
    tasks = {
        name: (call, place.absolute() / name, *given)
        for name, (call, *given) in calls.items()
        if not cases[name].is_over
    }
    # A pool of one process for each training at a time, so that one that is killed takes no other along.
    start = partial(on_ray, threads) if ray else partial(pool, 1, threads, {}, in_order=True)
    # Ray itself decides how many its machines can run.
    cores = len(tasks) if ray else cpu_count() // threads
    count = max(1, min(processes or max(1, cores), len(tasks)))
    how = "by Ray" if ray else f"{count} at a time"
    with line_for_each(place, len(cases), len(tasks), how, is_shown=progress) as show:

        def ended(name: str, how: TrainingEnd) -> None:
            cases[name] = sweep_run(Run, place / name, runs[name], how.problem)
            show(cases[name], how.notices)

        is_stopped = side_by_side(start, count, tasks, ended, reuses_processes=not callable(training))
    if is_stopped:
        raise KeyboardInterrupt(
            "stopped; the same sweep continues, with its finished runs as they are: --run "
            f"{shlex.quote(str(place))} --resume (run={str(place)!r}, resume=True)"
        )
    return replace(sweep_of(place, cases.values()), view=RunView(None))


def _check_sweep(run: str | Path | None, *, resume: bool, ray: bool) -> None:
    """Check that a sweep can start here, and with what it needs."""
    # The process of a training imports the function, and with it the script that calls the sweep.
    if AWAITED:
        raise UsageError(
            "a sweep is called where its function is imported or called; call it below "
            "if __name__ == '__main__':"
        )
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise UsageError("a sweep starts its own processes; start it without torchrun")
    if ray and find_spec("ray") is None:
        raise UsageError("Ray is not installed: pip install ray; or leave out --ray (ray=True)")
    if resume and run is None:
        raise UsageError("to resume a sweep, name its directory: run=... (--run)")
