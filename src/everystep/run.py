"""A run and everything you can do with it."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from everystep.questions import Questions
from everystep.recording.directories import RUNS
from everystep.recording.recorded_run import RecordedRun
from everystep.recording.snapshots import DEFAULT_BUDGET

if TYPE_CHECKING:
    import torch
    from plotnine import ggplot
    from torch import Tensor, nn
    from torch.optim.lr_scheduler import LRScheduler
    from torch.utils.data import Dataset

    from everystep.answers.doctor import Diagnosis
    from everystep.experiment.metrics import Metrics
    from everystep.training.job import Outcome, Progress
    from everystep.training.objects import Objects
    from everystep.views.loss_table import LossTable
    from everystep.views.report import Report

#: The public face of a run, which the reference describes: `dir(run)`. What else there is, other modules
#: of everystep read.
_PUBLIC = [
    *("name", "directory", "status", "facts", "note", "damage", "problems", "summary"),
    *("losses", "measurements", "measured", "snapshots", "parameters", "table", "plot", "report"),
    *("verify", "doctor", "diff", "match", "rerun", "measure", "when", "first_nonfinite"),
    *("rows", "why", "what_if", "fork", "resume"),
]

__all__ = ["Run", "diagnosis_of", "progress_of", "run_from_objects", "run_of"]


class Run(Questions):
    """A recorded training, read from its directory on demand.

    `run[137]` opens step 137 with everything in it, and `run[-1]` the newest step. `run[10:20]` is a
    sequence of the steps 10 to 19; it opens each step when you access it, as does iterating over the
    run.
    """

    def doctor(self, *, export: str | Path | None = None) -> Diagnosis:
        """Report what is wrong with the run, and what can still be read; replays nothing.

        export: where to write the numbers that can be read, as CSV: series, step, value, and whether the
        digest is the `same`, `differs`, or there is `none`.

        Raises:
            RunError: with `export`, the database cannot be opened.
        """
        return diagnosis_of(self.directory, export)

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
        scheduler: LRScheduler | None = None,
        scheduler_every: Literal["step", "epoch"] = "step",
        data: tuple[Any, Any] | Dataset[Any] | None = None,
        validation: tuple[Any, Any] | None = None,
        metrics: Metrics | None = None,
        without_rows: Iterable[int] = (),
        relabel: Mapping[int, float] | None = None,
        run: str | Path | None = None,
        snapshot_budget: int = DEFAULT_BUDGET,
        progress: bool | Progress = True,
    ) -> Run:
        """Train a new run that equals this one up to a step and continues with changes; return it.

        The fork reuses everything up to that step and is a complete run of its own. A fork without
        changes is bit-identical to this run. The optimizer continues with its state; an optimizer of
        another class starts without state.

        Args:
            at: the step after which the fork starts; 0: before the first step.
            settings: changes by path, as in an experiment: `{"optimizer.lr": 1e-3}`.
            lr, steps, batch_size, seed: shortcuts for the most common settings.
            model, loss, optimizer, scheduler, scheduler_every, data, validation, metrics: the objects to
                continue with, as in `train`, for a run from Python objects that this process did not
                train; `fork` trains them in place. Without them, the run's programs continue alone if
                they took every step (only `lr` and `steps` may change).
            without_rows: rows of the data to leave out of the batches that they were in.
            relabel: other targets, by row of the data.
            run: the fork's directory, which must not exist; default: the next free one in runs/.
            snapshot_budget: maximum bytes of snapshots.
            progress: show a progress bar if stderr is a terminal; or an object that watches the
                training.

        Raises:
            StepError: the run has no such step.
            UsageError: a setting is invalid.
            RunError: the state cannot be restored bit for bit.
            RecordingError: writing the fork failed; everything recorded before is kept.
            KeyboardInterrupt: on Ctrl-C, after finishing the step and closing the fork.
        """
        from everystep.replay.fork import Fork, fork

        short = {"lr": lr, "steps": steps, "batch_size": batch_size, "seed": seed}
        changed = {name: value for name, value in short.items() if value is not None}
        place = None if run is None else Path(run)
        asked = Fork(
            self,
            self._number(at),
            changed | dict(settings or {}),
            place,
            RUNS,
            snapshot_budget,
            without=tuple(sorted({operator.index(row) for row in without_rows})),
            targets=dict(relabel or {}),
        )
        given = {
            **{"model": model, "loss": loss, "optimizer": optimizer, "scheduler": scheduler},
            **{"scheduler_every": scheduler_every, "data": data, "validation": validation},
            "metrics": metrics,
        }
        outcome, trained = fork(asked, given, self._objects, self._opener, progress_of(progress))
        return run_of(outcome, trained and dataclasses.replace(trained, validation=None))

    def resume(
        self,
        steps: int | None = None,
        *,
        force: bool = False,
        model: nn.Module | None = None,
        loss: Callable[[Any, Any], Tensor] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: LRScheduler | None = None,
        scheduler_every: Literal["step", "epoch"] = "step",
        data: tuple[Any, Any] | Dataset[Any] | None = None,
        validation: tuple[Any, Any] | float | None = None,
        metrics: Metrics | None = None,
        snapshot_budget: int = DEFAULT_BUDGET,
        progress: bool | Progress = True,
    ) -> Run:
        """Continue a training that ended early, or train a finished one further; return the run.

        Training continues from the newest snapshot, to the bits of an uninterrupted training. Steps
        recorded after the snapshot are repeated and compared with the recording. The run changes only
        when a new step is taken.

        Args:
            steps: the last step; default: that of the run.
            force: continue although the code, the data, the versions or the numerics changed; the
                recorded steps after the snapshot are discarded, and the run records what changed.
            model, loss, optimizer, scheduler, scheduler_every, data, validation, metrics: the objects as
                they were before training, for a run from Python objects that this process did not
                train; `resume` trains them in place. Without them, the run's programs continue alone if
                they took every step, and nothing checks them against Python.
            snapshot_budget: maximum bytes of snapshots.
            progress: show a progress bar if stderr is a terminal; or an object that watches the
                training.

        Raises:
            UsageError: the run has all its steps, or an argument is invalid.
            RunError: something changed, a repeated step differs, or the run is being trained.
            RecordingError: writing the run failed; everything recorded before is kept.
            KeyboardInterrupt: on Ctrl-C, after finishing the step and closing the run.
        """
        from everystep.replay.resume import Resume, resume

        asked = Resume(self, steps, force, snapshot_budget)
        given = {
            **{"model": model, "loss": loss, "optimizer": optimizer, "scheduler": scheduler},
            **{"scheduler_every": scheduler_every, "data": data, "validation": validation},
            "metrics": metrics,
        }
        outcome, trained = resume(asked, given, self._objects, progress_of(progress))
        return run_of(outcome) if trained is None else run_from_objects(outcome, trained)

    def __dir__(self) -> list[str]:
        return _PUBLIC

    def __repr__(self) -> str:
        summary = self.summary()
        losses = ""
        if summary.first_loss is not None and summary.last_loss is not None:
            losses = f", loss {summary.first_loss:.4g} to {summary.last_loss:.4g}"
        return (
            f"<everystep run {str(self.directory)!r}: {summary.status}, {summary.steps} steps{losses}>"
        )

    def table(self, rows: int = 100_000) -> LossTable:
        """Return the losses as a browsable table (DataTables); shows in a notebook; `save(path)`.

        rows: maximum number of rows to embed; a longer run is excerpted, with a note in the table.
        """
        from everystep.views.loss_table import loss_table

        return loss_table(self, rows)

    def plot(self, *others: RecordedRun, log: bool = False, measurements: Sequence[str] = ()) -> ggplot:
        """Return a plot of the loss at each iteration; shows in a notebook; `save(path)`.

        others: runs to draw in the same plot; log: a logarithmic loss axis; measurements: names to draw
        as lines.
        """
        from everystep.views.plot import loss_plot

        return loss_plot([self, *others], log=log, measurements=measurements)

    def report(self) -> Report:
        """Return everything about the run as one self-contained HTML page.

        The page is a str; it shows in a notebook, and `save(path)` writes it.
        """
        from everystep.views.report import Report, report_html

        return Report(report_html(self), self.name)

    def _repr_html_(self) -> str:
        from everystep.views.summary_html import summary_html

        return summary_html(self)


def diagnosis_of(directory: Path, export: str | Path | None = None) -> Diagnosis:
    """Return what is wrong with a run; export: where to write the numbers that can be read.

    Raises:
        RunError: there is no such run; or, with `export`, its database cannot be opened.
    """
    from everystep.answers.doctor import doctor
    from everystep.recording.database import FILE_NAME
    from everystep.recording.health import readable_numbers
    from everystep.views.output_file import write_file
    from everystep.views.run_view import RunView

    found = doctor(directory)
    if export is not None:
        write_file(export, readable_numbers(directory / FILE_NAME))
    return dataclasses.replace(found, view=RunView(None))


def run_of(outcome: Outcome, objects: Objects | None = None) -> Run:
    """Return the run that a training recorded, with the objects that trained it.

    Raises:
        KeyboardInterrupt: Ctrl-C stopped the training.
    """
    if outcome.interrupted:
        raise KeyboardInterrupt(
            "training stopped by the user; the steps so far are recorded: "
            f"everystep.open('{outcome.directory}')"
        )
    return Run(outcome.directory, objects)


def run_from_objects(outcome: Outcome, objects: Objects) -> Run:
    """Return the run that a training recorded, with the objects that trained it.

    With their data only if the run does not hold it: a Dataset that is read at every step. A resumed run
    may hold the rows of its new steps only.

    Raises:
        KeyboardInterrupt: Ctrl-C stopped the training.
    """
    is_read = any(stretch.facts.data.lazy for stretch in run_of(outcome).stretches)
    data = objects.data if is_read else None
    return run_of(outcome, dataclasses.replace(objects, data=data, validation=None))


def progress_of(wanted: bool | Progress) -> Progress:
    """Return the progress of a training: the given object, the terminal, or none."""
    from everystep.views.progress import Silent, TerminalProgress

    if not isinstance(wanted, bool):
        return wanted
    return TerminalProgress(show_header=False, lines=None) if wanted else Silent()
