"""A run, and all that can be done with it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from everystep.errors import RunError, StepError, UsageError
from everystep.recording.recorder import DEFAULT_BUDGET
from everystep.recording.run import EXPERIMENT_FILE, RUNS, RecordedRun

if TYPE_CHECKING:
    import torch
    from plotnine import ggplot
    from torch import Tensor, nn
    from torch.optim.lr_scheduler import LRScheduler
    from torch.utils.data import Dataset

    from everystep.replay.columns import Found
    from everystep.replay.diff import Difference
    from everystep.replay.hooks import NonFinite
    from everystep.replay.processes import Opener
    from everystep.replay.query import Measured
    from everystep.replay.step import Step
    from everystep.replay.verify import Verification
    from everystep.training.job import Outcome, Progress
    from everystep.training.objects import Objects
    from everystep.views.table import LossTable

__all__ = ["Run", "Steps", "progress_of", "run_of"]

#: Whether to show a progress bar where stderr is a terminal; or what is called with the number
#: of steps that were just replayed.
Counting = bool | Callable[[int], None]


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
        if isinstance(step, slice):
            count = len(self)
            begin = 1 if step.start is None and (step.step or 1) > 0 else step.start
            first, *others = slice(begin, step.stop, step.step).indices(count + 1)
            return Steps(self, [number for number in range(first, *others) if number > 0])
        number = self._number(step)
        return self._opener.step(number + len(self) + 1 if number < 0 else number)

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
        number = self._number(step)
        return self._opener.state(number + len(self) + 1 if number < 0 else number).parameters

    def verify(self, *, processes: int | None = None, progress: Counting = True) -> Verification:
        """Take every step again, and compare every loss and every snapshot, bit for bit.

        processes: how many at once; absent: one for each core, where that is worth their start.

        Raises:
            RunError: something that is needed is missing or cannot be read.
        """
        from everystep.replay.verify import verify
        from everystep.views.progress import counting

        with counting("replaying", len(self), progress) as on_progress:
            return verify(self._opener, processes, on_progress)

    def diff(self, other: Run, *, thorough: bool = False, progress: Counting = True) -> Difference:
        """Return what differs between this run and another, down to the first operation.

        thorough: go through every step, not only those between the last common state and the first
        difference: finds what shows in no loss and in no snapshot.

        Raises:
            RunError: a run cannot be read.
        """
        from everystep.replay.diff import diff
        from everystep.views.progress import counting

        if not isinstance(other, Run):
            raise UsageError(f"a run is compared with another run, not {other!r:.80}")
        objects = self._objects, other._objects
        with counting("comparing", min(len(self), len(other)), progress) as on_progress:
            return diff(self, other, thorough=thorough, objects=objects, on_progress=on_progress)

    def measure(
        self,
        question: str | Callable[[Step], Any],
        *,
        name: str | None = None,
        every: int = 1,
        overwrite: bool = False,
        processes: int | None = None,
        progress: Counting = True,
    ) -> Measured:
        """Add a measurement to the run, as if it had been made while it was trained.

        Args:
            question: an expression, `"norm(gradients['0.weight'])"`, or a function of the opened step
                that gives a number.
            name: of the measurement; absent: the expression, or the function's name.
            every: steps between two measurements.
            overwrite: take the place of an earlier measurement of that name.
            processes: how many at once; absent: one for each core, where that is worth their start.
            progress: show a progress bar where stderr is a terminal; or what is called with the number
                of steps that were just replayed.

        Raises:
            UsageError: the question does not fit, or the name is taken.
            RunError: something that is needed is missing, cannot be read, or is being written.
        """
        from everystep.replay.query import measure
        from everystep.views.progress import counting

        asked, called = self._question(question)
        with counting("measuring", len(self), progress) as on_progress:
            return measure(
                self._opener,
                asked,
                name or called,
                every=every,
                overwrite=overwrite,
                processes=processes,
                on_progress=on_progress,
            )

    def when(
        self,
        condition: str | Callable[[Step], Any],
        which: Literal["first", "last", "all"] = "first",
        *,
        processes: int | None = None,
        progress: Counting = True,
    ) -> Found:
        """Find the first step at which a condition is true, the last, or all.

        Args:
            condition: an expression, `"isnan(loss)"`, or a function of the opened step; `"nonfinite"`:
                the step in which the first NaN or infinity was made, see `first_nonfinite`.
            which: steps to find.
            processes: how many at once; absent: one for each core, where that is worth their start.
            progress: show a progress bar where stderr is a terminal; or what is called with the number
                of steps that were just replayed.

        Raises:
            UsageError: the condition does not fit.
            RunError: something that is needed is missing or cannot be read.
        """
        if which not in ("first", "last", "all"):
            raise UsageError(f"which must be 'first', 'last' or 'all', not {which!r:.80}")
        if isinstance(condition, str) and condition.strip() == "nonfinite":
            from everystep.replay.columns import Found

            made = self.first_nonfinite(processes=processes, progress=progress)
            return Found(() if made is None else (made.step.number,))
        asked, _ = self._question(condition)
        if getattr(asked, "is_recorded", False):
            from everystep.replay.columns import Found, ask_columns, chosen

            steps = [step for step, _ in ask_columns(asked, self, (1, len(self)), as_condition=True)]
            return Found(chosen(steps, which))
        from everystep.replay.query import when
        from everystep.views.progress import counting

        with counting("looking", len(self), progress) as on_progress:
            return when(self._opener, asked, which, processes=processes, on_progress=on_progress)

    def first_nonfinite(
        self, *, processes: int | None = None, progress: Counting = True
    ) -> NonFinite | None:
        """Return which operation made the first NaN or infinity, or None if all is finite.

        Raises:
            RunError: something that is needed is missing or cannot be read.
        """
        from everystep.replay.hooks import find_nonfinite
        from everystep.views.progress import counting

        with counting("looking", len(self), progress) as on_progress:
            return find_nonfinite(self._opener, processes, on_progress)

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
        data: tuple[Any, Any] | Dataset[Any] | None = None,
        validation: tuple[Any, Any] | None = None,
        metrics: Mapping[str, Callable[[Tensor, Tensor], Any]] | None = None,
        directory: str | Path | None = None,
        snapshot_budget: int = DEFAULT_BUDGET,
        progress: bool | Progress = True,
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
            progress: show a progress bar where stderr is a terminal; or who watches the training.

        Raises:
            StepError: there is no such step.
            UsageError: a setting does not serve.
            RunError: the state cannot be reached as it was.
            RecordingError: writing the fork failed; what was recorded is kept.
            KeyboardInterrupt: Ctrl-C, after the step is finished and the fork is closed.
        """
        from everystep.replay.fork import Fork, fork_experiment, fork_objects
        from everystep.training.objects import Objects

        if self.facts.training.loop:
            raise RunError(
                f"{self.name} was recorded from a loop of your own, which a fork would need; load "
                f"run.parameters({at}) into your model and record your loop from there"
            )

        at = self._number(at)
        short = {"lr": lr, "steps": steps, "batch_size": batch_size, "seed": seed}
        given = {name: value for name, value in short.items() if value is not None}
        place = None if directory is None else Path(directory)
        if (self.directory / EXPERIMENT_FILE).exists() and model is None:
            if "lr" in given:
                given["optimizer.lr"] = given.pop("lr")
            asked = Fork(self, at, given | dict(settings or {}), place, RUNS, snapshot_budget)
            return run_of(fork_experiment(asked, self._opener, progress_of(progress)))
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
        opener, shown = self._opener, progress_of(progress)
        return run_of(fork_objects(asked, objects, validation, is_own, opener, shown), objects)

    def _number(self, step: Any) -> int:
        try:
            return operator.index(step)
        except TypeError:
            raise StepError(f"a step of {self.name} is a whole number, not {step!r:.80}") from None

    def _question(self, question: str | Callable[[Step], Any]) -> tuple[Any, str]:
        """Return a question as it can be put, and its name."""
        from everystep import numerics

        numerics.prepare()
        if callable(question):
            return question, getattr(question, "__name__", "measurement")
        if not isinstance(question, str):
            raise UsageError(
                f"a question is an expression or a function of a step, not {question!r:.80}"
            )
        from everystep.replay.columns import read_question

        expression = read_question(question, self)
        if not expression.is_recorded:
            from everystep.replay.query import check_question

            check_question(expression, self._opener)
        return expression, question

    @property
    def _opener(self) -> Opener:
        from everystep.replay.processes import Opener

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


def run_of(outcome: Outcome, objects: Objects | None = None) -> Run:
    """Return the run that a training has left, with the objects that it was trained with.

    Raises:
        KeyboardInterrupt: it was stopped by Ctrl-C.
    """
    if outcome.interrupted:
        raise KeyboardInterrupt(
            f"training stopped by the user; what was recorded: everystep.open('{outcome.directory}')"
        )
    return Run(outcome.directory, objects)


def progress_of(wanted: bool | Progress) -> Progress:
    """Return who watches a training: the one given, the terminal, or nobody."""
    from everystep.views.progress import Silent, TerminalProgress

    if not isinstance(wanted, bool):
        return wanted
    return TerminalProgress(show_header=False, lines=None) if wanted else Silent()
