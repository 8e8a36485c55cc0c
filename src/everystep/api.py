"""The public face: train, open, and what a run can do."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from everystep.errors import RunError
from everystep.experiment.specification import Experiment, check_iteration, load
from everystep.recording.recorder import DEFAULT_BUDGET
from everystep.recording.run import EXPERIMENT_FILE, RUNS, RecordedRun, find_run, find_runs

if TYPE_CHECKING:
    import torch
    from plotnine import ggplot
    from torch import Tensor, nn
    from torch.optim.lr_scheduler import LRScheduler
    from torch.utils.data import Dataset

    from everystep.replay.diff import Difference
    from everystep.replay.measure import Found, Measured
    from everystep.replay.nonfinite import NonFinite
    from everystep.replay.opener import Opener
    from everystep.replay.revive import Objects
    from everystep.replay.step import Step
    from everystep.replay.verify import Verification
    from everystep.training.job import Outcome, Progress
    from everystep.views.table import LossTable

__all__ = ["Run", "Steps", "open", "runs", "train", "train_experiment"]


class Run(RecordedRun):
    """A recorded training, read from its directory whenever something is asked for.

    `run[137]` opens step 137: everything that was in it. `run[-1]` is the newest step, `run[10:20]` the
    steps 10 to 19, each opened when it is its turn; so it is when one iterates over the run.
    """

    def __init__(self, directory: str | Path, objects: Objects | None = None) -> None:
        super().__init__(directory)
        self._objects = objects
        self._own_opener: Opener | None = None

    def __len__(self) -> int:
        return self.summary().steps

    @overload
    def __getitem__(self, step: int) -> Step: ...

    @overload
    def __getitem__(self, step: slice) -> Steps: ...

    def __getitem__(self, step: int | slice) -> Step | Steps:
        count = len(self)
        if isinstance(step, slice):
            begin = 1 if step.start is None and (step.step or 1) > 0 else step.start
            first, *others = slice(begin, step.stop, step.step).indices(count + 1)
            return Steps(self, [number for number in range(first, *others) if number > 0])
        return self._opener.step(step + count + 1 if step < 0 else step)

    def __iter__(self) -> Iterator[Step]:
        return iter(self[:])

    @property
    def problems(self) -> list[str]:
        """What was noticed when steps were opened, such as a snapshot that cannot be read."""
        return self._own_opener.problems if self._own_opener else []

    def parameters(self, step: int) -> dict[str, Tensor]:
        """Return the model's state_dict after `step` (0: before the first).

        Negative steps count from the newest: -1 is the newest state.

        Raises:
            StepError: there is no such step.
            RunError: something that is needed is missing or cannot be read.
        """
        return self._opener.state(step + len(self) + 1 if step < 0 else step).parameters

    def verify(self, *, processes: int | None = None, progress: bool = True) -> Verification:
        """Take every step again, and compare every loss and every snapshot, bit for bit.

        processes: how many at once; absent: one for each core, where that is worth their start.

        Raises:
            RunError: something that is needed is missing or cannot be read.
        """
        from everystep import numerics
        from everystep.replay.verify import verify
        from everystep.views.progress import counting

        numerics.prepare()
        with counting("replaying", len(self), progress) as told:
            return verify(self, self._objects, processes, told)

    def diff(self, other: Run, *, thorough: bool = False, progress: bool = True) -> Difference:
        """Return what differs between this run and another, down to the first operation.

        thorough: go through every step, not only those between the last common state and the first
        difference: finds what shows in no loss and in no snapshot.

        Raises:
            RunError: a run cannot be read.
        """
        from everystep.replay.diff import diff
        from everystep.views.progress import counting

        objects = self._objects, other._objects
        with counting("comparing", min(len(self), len(other)), progress) as told:
            return diff(self, other, thorough=thorough, objects=objects, told=told)

    def measure(
        self,
        question: str | Callable[[Step], Any],
        *,
        name: str | None = None,
        every: int = 1,
        overwrite: bool = False,
        processes: int | None = None,
        progress: bool = True,
    ) -> Measured:
        """Add a measurement to the run, as if it had been made while it was trained.

        Args:
            question: an expression, `"norm(gradients['0.weight'])"`, or a function of the opened step
                that gives a number.
            name: of the measurement; absent: the expression, or the function's name.
            every: steps between two measurements.
            overwrite: take the place of an earlier measurement of that name.
            processes: how many at once; absent: one for each core, where that is worth their start.
            progress: show a progress bar where stderr is a terminal.

        Raises:
            UsageError: the question does not fit, or the name is taken.
            RunError: something that is needed is missing, cannot be read, or is being written.
        """
        from everystep.replay.measure import measure
        from everystep.views.progress import counting

        asked, called = self._question(question)
        with counting("measuring", len(self), progress) as told:
            return measure(
                self,
                asked,
                name or called,
                every=every,
                overwrite=overwrite,
                objects=self._objects,
                processes=processes,
                told=told,
            )

    def when(
        self,
        condition: str | Callable[[Step], Any],
        which: Literal["first", "last", "all"] = "first",
        *,
        processes: int | None = None,
        progress: bool = True,
    ) -> Found:
        """Find the first step at which a condition is true, the last, or all.

        Args:
            condition: an expression, `"isnan(loss)"`, or a function of the opened step.
            which: steps to find.
            processes: how many at once; absent: one for each core, where that is worth their start.
            progress: show a progress bar where stderr is a terminal.

        Raises:
            UsageError: the condition does not fit.
            RunError: something that is needed is missing or cannot be read.
        """
        from everystep.replay.measure import when
        from everystep.views.progress import counting

        asked, _ = self._question(condition)
        with counting("looking", len(self), progress) as told:
            return when(self, asked, which, objects=self._objects, processes=processes, told=told)

    def first_nonfinite(
        self, *, processes: int | None = None, progress: bool = True
    ) -> NonFinite | None:
        """Return which operation made the first NaN or infinity, or None if all is finite.

        Raises:
            RunError: something that is needed is missing or cannot be read.
        """
        from everystep import numerics
        from everystep.replay.nonfinite import find_nonfinite
        from everystep.views.progress import counting

        numerics.prepare()
        with counting("looking", len(self), progress) as told:
            return find_nonfinite(self, self._objects, processes, told)

    def fork(
        self,
        at: int,
        settings: Mapping[str, Any] | None = None,
        *,
        lr: float | None = None,
        steps: int | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
        model: nn.Module | None = None,
        loss: Callable[[Any, Any], Tensor] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        schedule: LRScheduler | None = None,
        schedule_every: Literal["step", "epoch"] = "step",
        data: tuple[Any, Any] | None = None,
        validation: tuple[Any, Any] | None = None,
        metrics: Mapping[str, Callable[[Tensor, Tensor], Any]] | None = None,
        directory: str | Path | None = None,
        snapshot_budget: int = DEFAULT_BUDGET,
        progress: bool = True,
    ) -> Run:
        """Train a run that is this one up to a step, and goes on by other rules from there; return it.

        Nothing up to that step is computed again, and the fork is a complete run of its own. One that
        changes nothing has this run's very bits. The optimizer goes on with the state that it had;
        another class of optimizer begins with none.

        Args:
            at: the step after which the fork begins; 0: before the first.
            settings: what changes, by path, as in an experiment: `{"optimizer.lr": 1e-3}`.
            lr, steps, batch_size, seed: the same, for what changes most often.
            model, loss, optimizer, schedule, schedule_every, data, validation, metrics: what a run from
                Python objects goes on with, as in `train`: the model, loss and optimizer are needed,
                unless the run has been trained in this process, and are trained in place.
            directory: of the fork, which must not exist; absent: the next free one under runs/.
            snapshot_budget: bytes of snapshots that the fork may keep.
            progress: show a progress bar where stderr is a terminal.

        Raises:
            StepError: there is no such step.
            UsageError: a setting does not serve.
            RunError: the state cannot be reached as it was.
            RecordingError: writing the fork failed; what was recorded is kept.
            KeyboardInterrupt: Ctrl-C, after the step is finished and the fork is closed.
        """
        from everystep.replay.fork import Fork, fork_experiment, fork_objects
        from everystep.replay.revive import Objects

        short = {"lr": lr, "steps": steps, "batch_size": batch_size, "seed": seed}
        given = {name: value for name, value in short.items() if value is not None}
        place = None if directory is None else Path(directory)
        if (self.directory / EXPERIMENT_FILE).exists() and model is None:
            if "lr" in given:
                given["optimizer.lr"] = given.pop("lr")
            asked = Fork(self, at, given | dict(settings or {}), place, RUNS, snapshot_budget)
            return _run_of(fork_experiment(asked, self._opener, _progress(progress)))
        asked = Fork(self, at, given | dict(settings or {}), place, RUNS, snapshot_budget)
        is_own = model is None and loss is None and optimizer is None
        objects = self._objects if is_own else Objects(model, loss, optimizer)
        if objects is None or objects.model is None:
            raise RunError(
                f"{self.name} was trained from Python objects, which a run does not hold; give what the "
                "fork goes on with: fork(..., model=..., loss=..., optimizer=...)"
            )
        changes: dict[str, Any] = {"data": data, "metrics": metrics, "schedule": schedule}
        if schedule is not None:
            changes["schedule_every"] = schedule_every
        objects = replace(objects, **{k: v for k, v in changes.items() if v is not None})
        opener, shown = self._opener, _progress(progress)
        return _run_of(fork_objects(asked, objects, validation, is_own, opener, shown), objects)

    def _question(self, question: str | Callable[[Step], Any]) -> tuple[Any, str]:
        """Return a question as it can be put, and its name."""
        from everystep import numerics

        numerics.prepare()
        if not isinstance(question, str):
            return question, getattr(question, "__name__", "measurement")
        from everystep.replay.ask import read_question

        return read_question(question, self, self._objects), question

    @property
    def _opener(self) -> Opener:
        from everystep.replay.opener import Opener

        if self._own_opener is None:
            self._own_opener = Opener(self, self._objects)
        return self._own_opener

    def __repr__(self) -> str:
        summary = self.summary()
        losses = f", loss {summary.first_loss:.4g} to {summary.last_loss:.4g}" if summary.steps else ""
        return (
            f"<everystep run {str(self.directory)!r}: {summary.status}, {summary.steps} steps{losses}>"
        )

    def table(self, rows: int = 100_000) -> LossTable:
        """Return the losses as a table to browse (DataTables): shows in a notebook, `save(path)`.

        rows: embed at most so many; of a longer run, an excerpt that says so.
        """
        from everystep.views.table import loss_table

        return loss_table(self, rows)

    def plot(self, *others: RecordedRun, log: bool = False, measurements: Sequence[str] = ()) -> ggplot:
        """Return a plot of the loss at each iteration: shows in a notebook, `save(path)`.

        others: runs to lay over it; log: a logarithmic axis; measurements: names to draw as lines.
        """
        from everystep.views.plot import loss_plot

        return loss_plot([self, *others], log=log, measurements=measurements)

    def report(self) -> str:
        """Return everything about the run as one HTML page that needs nothing else."""
        from everystep.views.report import report_html

        return report_html(self)

    def _repr_html_(self) -> str:
        from everystep.views.summary import summary_html

        return summary_html(self)


class Steps(Sequence["Step"]):
    """Some steps of a run, each opened when it is asked for."""

    def __init__(self, run: Run, numbers: list[int]) -> None:
        self._run = run
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, place: int) -> Step: ...

    @overload
    def __getitem__(self, place: slice) -> Steps: ...

    def __getitem__(self, place: int | slice) -> Step | Steps:
        if isinstance(place, slice):
            return Steps(self._run, self._numbers[place])
        return self._run[self._numbers[place]]

    def __repr__(self) -> str:
        ends = f"{self._numbers[0]} to {self._numbers[-1]}" if self._numbers else "none"
        return f"<steps of {self._run.name}: {ends}>"


def open(
    run: str | Path,
    *,
    model: nn.Module | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    data: tuple[Any, Any] | None = None,
) -> Run:
    """Open a run: its directory, or its name under runs/.

    What the run was trained with is needed only to open steps that were taken eagerly from Python
    objects, or whose data was too large to be kept in the run. It is copied, and stays as it is.

    Args:
        run: where it is.
        model: as it was trained, in the mode that it trained in.
        loss: of prediction and target.
        optimizer: over the model's parameters.
        data: x (N, ...) and y (N, ...), the rows that were trained on.

    Raises:
        RunError: there is no such run; names the nearest.
    """
    objects = None
    if any(given is not None for given in (model, loss, optimizer, data)):
        from everystep.replay.revive import Objects

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
    model: nn.Module,
    data: tuple[Any, Any] | Dataset[Any],
    *,
    loss: Callable[[Any, Any], Tensor],
    optimizer: torch.optim.Optimizer,
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
    dataset_limit: int | None = None,
    progress: bool = True,
) -> Run:
    """Train a live model in place, recording every step, and return the run.

    When it returns, or is stopped, the same parameters, buffers and optimizer hold the last state.

    Args:
        model: any module, in the mode (`train()`, `eval()`) that it shall train in.
        data: x (N, ...) and y (N, ...), tensors or NumPy arrays, or a map-style Dataset of pairs. A
            Dataset is read once into tensors; one that gives other rows each time, at every step.
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
        engine: `program`: take steps by the program that is captured from the first one, and refuse
            where that cannot be; `eager`: run Python at every step; `auto`: by program where it gives
            the very bits, and eagerly otherwise, with a word why.
        fold: let the program fold updates into the matrix products that make their gradients: faster,
            but rounded otherwise than the eager step.
        directory: of the run, which must not exist; absent: the next free one under runs/.
        snapshot_budget: bytes of snapshots that the run may keep.
        dataset_limit: bytes that a Dataset may take as tensors; absent: 2 GB.
        progress: show a progress bar where stderr is a terminal.

    Raises:
        UsageError: something does not serve; lists everything, each with the cure.
        RecordingError: writing the run failed (disk full, ...); what was recorded is kept.
        KeyboardInterrupt: Ctrl-C, after the step is finished and the run is closed.
    """
    from everystep.replay.revive import Objects as TrainedWith
    from everystep.training.dataset import DEFAULT_DATASET_LIMIT
    from everystep.training.from_objects import Objects, train_objects

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
    limit = DEFAULT_DATASET_LIMIT if dataset_limit is None else dataset_limit
    objects = Objects(
        model, data, loss, optimizer, schedule, schedule_every, validation, metrics or {}, limit
    )
    place = None if directory is None else Path(directory)
    outcome = train_objects(objects, iteration, place, RUNS, snapshot_budget, _progress(progress))
    trained_with = TrainedWith(
        model, loss, optimizer, None, schedule, schedule_every, dict(metrics or {})
    )
    return _run_of(outcome, trained_with)


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
    from everystep.training.from_experiment import train_experiment as train_loaded

    name = Path(experiment).stem if isinstance(experiment, str | Path) else "experiment"
    source = (
        experiment.model_dump(exclude_none=True) if isinstance(experiment, Experiment) else experiment
    )
    loaded = load(source, settings)
    place = None if directory is None else Path(directory)
    outcome = train_loaded(loaded, name, place, RUNS, snapshot_budget, _progress(progress))
    return _run_of(outcome)


def _run_of(outcome: Outcome, objects: Objects | None = None) -> Run:
    if outcome.interrupted:
        raise KeyboardInterrupt(
            f"training stopped by the user; what was recorded: everystep.open('{outcome.directory}')"
        )
    return Run(outcome.directory, objects)


def _progress(wanted: bool) -> Progress:
    from everystep.views.progress import Silent, TerminalProgress

    return TerminalProgress(show_header=False, lines=None) if wanted else Silent()
