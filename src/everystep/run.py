"""A run and everything you can do with it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from everystep.bounded import check_steps
from everystep.errors import EverystepError, StepError, UsageError
from everystep.recording.directories import AWAITED, place_of
from everystep.recording.recorded_run import RecordedRun, stretch_at
from everystep.recording.snapshots import DEFAULT_BUDGET
from everystep.signature import checked

if TYPE_CHECKING:
    import torch
    from plotnine import ggplot
    from torch import Tensor, nn
    from torch.optim.lr_scheduler import LRScheduler
    from torch.utils.data import Dataset

    from everystep.answers.diff import Difference
    from everystep.answers.doctor import Diagnosis
    from everystep.answers.match import Match
    from everystep.answers.measure import Measured
    from everystep.answers.nonfinite import NonFinite
    from everystep.answers.rerun import Rerun
    from everystep.answers.rows import Rows
    from everystep.answers.verify import Verification
    from everystep.answers.why import Why
    from everystep.experiment.metrics import Metrics
    from everystep.replay.opened_step import Step
    from everystep.replay.processes import Opener
    from everystep.replay.recorded_columns import Found
    from everystep.replay.shown import Shown
    from everystep.replay.what_if import WhatIf
    from everystep.training.job import Outcome, Progress
    from everystep.training.objects import Objects
    from everystep.views.loss_table import LossTable
    from everystep.views.report import Report

__all__ = ["Run", "Steps", "StoppedByUser", "diagnosis_of", "progress_of", "run_from_objects", "run_of"]

#: The public face of a run, which the reference describes: `dir(run)`. What else there is, other modules
#: of everystep read.
_PUBLIC = [
    *("name", "directory", "ranks", "status", "facts", "note", "damage", "problems", "summary"),
    *("losses", "measurements", "measured", "snapshots", "parameters", "table", "plot", "report"),
    *("verify", "doctor", "diff", "match", "rerun", "measure", "when", "first_nonfinite"),
    *("rows", "why", "what_if", "fork", "resume"),
]

#: Whether to show a progress bar if stderr is a terminal; or a function, called with the number of steps
#: just replayed.
Counting = bool | Callable[[int], None]

Answer = TypeVar("Answer", bound="Shown | None")


class Run(RecordedRun):
    """A recorded training, read from its directory on demand.

    `run[137]` opens step 137 with everything in it, and `run[-1]` the newest step. `run[10:20]` is a
    sequence of the steps 10 to 19; it opens each step when you access it, as does iterating over the
    run. Opened steps are kept as memory allows. Several threads may ask: one replays, and others wait.

    It warns if the run is damaged, as far as that shows without reading all numbers.

    Raises:
        RunError: the directory is not a run, is unreadable, or lacks the last steps of a finished run.
    """

    def __init__(self, directory: str | Path, objects: Objects | None = None) -> None:
        super().__init__(directory)
        self.check()
        self._objects = objects
        self._own_opener: Opener | None = None
        #: The step opened last, as it was returned: it keeps what was computed from it.
        self._last_opened: tuple[Step, Step] | None = None

    def __dir__(self) -> list[str]:
        return _PUBLIC

    def __repr__(self) -> str:
        try:
            summary = self.summary()
        except EverystepError as error:  # it was removed: a list of runs still shows the others
            return f"<everystep run {str(self.directory)!r}: {error}>"
        losses = ""
        if summary.first_loss is not None and summary.last_loss is not None:
            losses = f", loss {summary.first_loss:.4g} to {summary.last_loss:.4g}"
        return (
            f"<everystep run {str(self.directory)!r}: {summary.status}, {summary.steps} steps{losses}>"
        )

    def __len__(self) -> int:
        return self.newest_step()

    @overload
    def __getitem__(self, step: int) -> Step: ...

    @overload
    def __getitem__(self, step: slice) -> Steps: ...

    def __getitem__(self, step: int | slice) -> Step | Steps:
        if isinstance(step, slice):
            count = len(self)
            ends = step.start, step.stop, step.step
            if not all(each is None or hasattr(each, "__index__") for each in ends) or step.step == 0:
                raise StepError(f"steps of {self.name} are run[10:20] or run[::100], not {step}")
            # Steps are numbered from 1: in `run[:3]`, these are 1 and 2.
            is_before = step.start is None or step.start < -count
            begin = 1 if is_before and (step.step or 1) > 0 else step.start
            first, *others = slice(begin, step.stop, step.step).indices(count + 1)
            return Steps([(self, number) for number in range(first, *others) if number > 0])
        try:
            number = operator.index(step)
        except TypeError:
            raise StepError(f"a step of {self.name} must be an integer, not {step!r:.80}") from None
        # Others stay as they are, so that the error names the number that was asked for.
        number = len(self) + 1 + number if -len(self) <= number < 0 else number
        from everystep.replay.processes import ALONE
        from everystep.views.run_view import RunView

        with ALONE:
            if self._last_opened is not None and self._last_opened[0].number != number:
                self._last_opened = None  # a large step goes before the next one needs its memory
            opened = self._opener.step(number)
            if self._last_opened is not None and self._last_opened[0] is opened:
                return self._last_opened[1]
            of_ranks = self._steps_of_ranks
            # What `replace` returns has no cached results: it is kept, so that `run[137].rows` is
            # computed once.
            shown = replace(opened, view=RunView(self), earlier=self.__getitem__, of_ranks=of_ranks)
            self._last_opened = opened, shown
            return shown

    def _steps_of_ranks(self, number: int) -> Steps:
        # Of the processes that trained this step: a resumed run may have other numbers of them.
        ranks = self.ranks_of(stretch_at(self.stretches, number))
        return Steps([(rank, number) for rank in ranks])

    def __iter__(self) -> Iterator[Step]:
        return iter(self[:])

    def __reversed__(self) -> Iterator[Step]:
        return iter(self[::-1])

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy, or one in another process, opens its own steps.
        return type(self), (self.directory, self._objects)

    @property
    def note(self) -> str | None:
        """Your own note on the run, in one line; None if there is none.

        Set it to a text of up to 1,000 characters (line breaks become spaces), or to None to remove it.

        Raises:
            UsageError: the text is too long.
            RunError: the run is still being trained, or another process is adding to it.
            RecordingError: it cannot be written to.
        """
        return self.facts.note

    @note.setter
    def note(self, text: str | None) -> None:
        from everystep.recording.lock import write_note

        if not isinstance(text, str | None):
            raise UsageError(f"a note is a text, or None to remove it; this is {type(text).__name__}")
        write_note(self.directory, text)

    @property
    def problems(self) -> list[str]:
        """Problems found while opening steps, such as an unreadable snapshot."""
        return self._own_opener.problems if self._own_opener else []

    @checked
    def parameters(self, step: int) -> dict[str, Tensor]:
        """Return the model's state_dict after `step` (0: before the first step).

        Negative steps count from the newest: -1 is the newest state.

        Raises:
            StepError: the run has no such step.
            RunError: a needed file is missing or unreadable.
        """
        states = len(self) + 1
        return self._opener.state(states + step if -states <= step < 0 else step).parameters

    @checked
    def table(self, rows: int = 100_000) -> LossTable:
        """Return the losses as a browsable table (DataTables); shows in a notebook; `save(path)`.

        rows: maximum number of rows to embed; a longer run is excerpted, with a note in the table.
        """
        from everystep.views.loss_table import loss_table

        return loss_table(self, rows)

    @checked
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

    @checked
    def verify(self, *, processes: int | None = None, progress: Counting = True) -> Verification:
        """Replay every step, and compare every loss and every snapshot, bit for bit.

        processes: number of processes; default: one per core, if worth their start.

        Raises:
            RunError: a needed file is missing or unreadable.
        """
        from everystep.answers.verify import verify

        return self._answered("replaying", len(self), progress, partial(verify, self._opener, processes))

    @checked
    def diff(self, other: Run, *, thorough: bool = False, progress: Counting = True) -> Difference:
        """Return how this run differs from another, down to the first operation.

        thorough: compare every step, not only those between the last common state and the first
        difference. That also finds differences that no loss and no snapshot shows.

        For runs of equally many processes, the answer is about the rank that differs first.

        Raises:
            RunError: a run is unreadable.
        """
        from everystep.answers.diff import diff

        objects = self._objects, other._objects
        ask = partial(diff, self, other, thorough=thorough, objects=objects)
        return self._answered("comparing", min(len(self), len(other)), progress, ask)

    @checked
    def match(self, other: Run, step: int | None = None) -> Match:
        """Return how a step of this run matches one of another that is written differently, by values.

        The gradients, parameters and buffers of this run are searched among all tensors of the other, up
        to rounding and by any name: for a backward pass written by hand, a different structure of
        modules, a different optimizer with the same mathematics, or a different precision.

        step: its number; None: the first that does not match, or else the last that both have.

        Raises:
            StepError: a run has no such step.
            RunError: a step cannot be opened.
        """
        from everystep.answers.match import match

        return self._shown(match(self._opener, other._opener, step))

    @checked
    def rerun(
        self,
        *,
        threads: int | None = None,
        capability: str | None = None,
        mkl: str | None = None,
        precision: Literal["float64", "bfloat16"] | None = None,
        python: str | Path | None = None,
        compare: Sequence[Run] = (),
        progress: Counting = True,
    ) -> Rerun:
        """Repeat the steps under different conditions; return where they diverge from the recording.

        The programs of the run compute them in another process, without its code.

        Args:
            threads: number of threads of torch.
            capability: CPU instructions of torch's kernels: `default`, `avx2` or `avx512`.
            mkl: branch of MKL's reproducibility: `OFF`, `COMPATIBLE`, `AVX2`, ...
            precision: of all floating-point numbers.
            python: another interpreter, with its own everystep and torch.
            compare: other runs; the answer reports how far each is from the losses of the rerun.
            progress: as in `measure`.

        Raises:
            ExperimentError: a setting is invalid, or nothing differs from the recording.
            RunError: the steps cannot run there; gives the reason.
            TrainingError: the process there does not start, or ended early.
        """
        from everystep.answers.other_process import Conditions
        from everystep.answers.rerun import rerun

        program = None if python is None else str(python)
        conditions = Conditions(threads, capability, mkl, precision, program)
        ask = partial(rerun, self._opener, conditions, compare)
        count = len(self) - self.stretches[-1].first + 1 if len(self) else 0
        return self._answered("taking steps", count, progress, ask)

    @checked
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
        """Add a measurement to the run, as if it had been made during training.

        Args:
            question: an expression, `"norm(gradients['0.weight'])"`, or a function of the opened step
                that returns a number.
            name: the name of the measurement; default: the expression, or the function's name.
            every: steps between two measurements.
            overwrite: replace an existing measurement of that name.
            processes: number of processes; default: one per core, if worth their start.
            progress: show a progress bar if stderr is a terminal; or a function, called with the number
                of steps just replayed.

        Raises:
            UsageError: the question does not fit, or the name is taken.
            RunError: a needed file is missing, unreadable or being written.
            KeyboardInterrupt: on Ctrl-C; the values so far are kept.
        """
        from everystep.answers.measure import measure

        asked, called = self._question(question)
        ask = partial(
            measure,
            self._opener,
            asked,
            name or called,
            every=every,
            overwrite=overwrite,
            processes=processes,
        )
        return self._answered("measuring", len(self), progress, ask)

    @checked
    def when(
        self,
        condition: str | Callable[[Step], Any],
        which: Literal["first", "last", "all"] = "first",
        *,
        processes: int | None = None,
        progress: Counting = True,
    ) -> Found:
        """Find the first, the last or all steps at which a condition is true.

        Args:
            condition: an expression, `"isnan(loss)"`, or a function of the opened step; or, for a run of
                several processes, `"ranks differ"`: after the step, a parameter is not the same on all.
            which: steps to find.
            processes, progress: as in `measure`.

        Raises:
            UsageError: the condition does not fit.
            RunError: a needed file is missing or unreadable.
        """
        from everystep.replay.recorded_columns import RANKS_DIFFER, Found, ask_columns, chosen

        is_of_ranks = isinstance(condition, str) and condition.split() == RANKS_DIFFER.split()
        asked: Any = RANKS_DIFFER if is_of_ranks else self._question(condition)[0]
        # Losses and measurements answer it: no step is replayed.
        if getattr(asked, "is_recorded", False):
            steps = [step for step, _ in ask_columns(asked, self, as_condition=True)]
            return self._shown(Found(chosen(steps, which)))
        from everystep.answers.measure import when

        ask = partial(when, self._opener, asked, which, processes=processes)
        return self._answered("looking", len(self), progress, ask)

    @checked
    def first_nonfinite(
        self, *, processes: int | None = None, progress: Counting = True
    ) -> NonFinite | None:
        """Return the operation that made the first NaN or infinity, or None if all is finite.

        In a recording with `keep`, it covers only the kept steps.

        Raises:
            RunError: a needed file is missing or unreadable.
        """
        from everystep.answers.nonfinite import find_nonfinite

        # Later steps are not looked at: the loss of this one shows it at the latest.
        count = self.facts.nonfinite_step or len(self)
        ask = partial(find_nonfinite, self._opener, self.__getitem__, processes)
        return self._answered("looking", count, progress, ask)

    def rows(self, step: int) -> Rows:
        """Return how much each row of a step's batch contributes to its loss and to each gradient.

        Exact where the step itself adds up rows; else unknown, with the operation that mixes rows. The
        same as `run[step].rows`.

        Raises:
            StepError: the run has no such step.
            RunError: a needed file is missing or unreadable.
        """
        return self[step].rows

    def why(self, step: int, expression: str, *, back: int = 0, depth: int = 1, terms: int = 5) -> Why:
        """Return where a number of a step comes from: the operation that computed it, and its inputs.

        NaN and infinity are followed to their origin, with the rows of the batch that they depend on.

        Args:
            step: the step, from 1, or from the end: -1.
            expression: names the number: `"gradients['0.weight'][3, 5]"`, `"loss"`, or, as answers name
                them, `"#7[17, 3]"`, a number of the result of operation 7.
            back: how many earlier steps to follow the state into.
            depth: how many operations deep to follow the largest numbers; each number in an answer can
                be followed by its own `why()`.
            terms: how many terms of a sum to return one by one.

        Raises:
            UsageError: an argument is invalid, or the expression is not one number of the step.
            RunError: a step cannot be opened.
        """
        return self[step].why(expression, back=back, depth=depth, terms=terms)

    @checked
    def what_if(
        self,
        at: int | None = None,
        until: int | None = None,
        *,
        without_rows: Iterable[int] = (),
        without_rows_of: int | None = None,
        each: bool = False,
        lr: float | Iterable[float] = (),
        relabel: Mapping[int, float] | None = None,
        by: str = "loss",
        processes: int | None = None,
        progress: Counting = True,
    ) -> WhatIf:
        """Train again from a state with something changed, and return how the loss changes.

        Nothing is recorded. Without rows of the data, the steps have the bits of a training by hand
        without those rows. At other learning rates, and with new targets, programs repeat the recorded
        steps of any run; what your code decided stays as recorded.

        Args:
            at: the step after which the trainings start; default: the one before `without_rows_of`.
            until: the step that they are compared at; default: the last.
            without_rows: rows of the data to leave out of the batches that they are in.
            without_rows_of: the step with the rows that are left out.
            each: leave out each row alone, not all at once.
            lr: learning rates to train at, one training each, for all param groups of torch's own
                optimizers.
            relabel: new targets, by row of the data; for a run that stores its batches, by the place of
                the row in the batch of the step after `at`. The same row gets it in later batches, too.
            by: an expression of step `until` to compare: `norm(gradients['0.weight'])`.
            processes: number of processes, each with as many threads as the run was trained with;
                default: as many as there are cores for, if worth their start.
            progress: as in `measure`.

        Raises:
            StepError: the run has no such step.
            UsageError: rows do not exist, a batch would be empty, or there is nothing to start at.
            RunError: the steps cannot be repeated with the change; gives the reason.
        """
        from everystep.replay.what_if import what_if
        from everystep.replay.without_objects import check_has_rows

        chosen, targets, rates = _changes(without_rows, relabel, lr)
        changes = [bool(chosen) or without_rows_of is not None, bool(rates), bool(targets)]
        if sum(changes) != 1:
            raise UsageError(
                "pass one of these: rows to leave out (without_rows, or without_rows_of), lr, relabel; "
                f"everystep rows {self.name} STEP ranks the rows of a step"
            )
        if wrong := [rate for rate in rates if not 0 <= rate < math.inf]:
            raise UsageError(f"lr is {wrong[0]:g}; pass learning rates from 0 on")
        if not rates and not targets:
            check_has_rows(self, at)
        until = self.newest_step() if until is None else until
        if without_rows_of is not None:
            step = self[without_rows_of]
            at, batch = step.number - 1 if at is None else at, step.batch
            chosen += map(batch.number, range(batch.count))
        if at is None:
            raise UsageError(
                "no start: pass at, the step after which the trainings start, or "
                "without_rows_of, the step to leave out the rows of"
            )
        rows = sorted(set(chosen))
        without = [(row,) for row in rows] if each else [tuple(rows)]
        cases: Any = rates or ([targets] if targets else without)
        # One training more: that without a change, which must be as recorded.
        steps = (until - at) * (len(cases) + 1)
        ask = partial(what_if, self._opener, at, until, cases, by, self._objects, processes)
        return self._answered("training", max(0, steps), progress, ask)

    @checked
    def doctor(self, *, export: str | Path | None = None) -> Diagnosis:
        """Report what is wrong with the run, and what can still be read; replays nothing.

        export: where to write the numbers that can be read, as CSV: series, step, value, and whether the
        digest is the `same`, `differs`, or there is `none`.

        Raises:
            RunError: with `export`, the database cannot be opened.
        """
        return diagnosis_of(self.directory, export)

    @checked
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
        snapshot_budget: float = DEFAULT_BUDGET,
        progress: bool | Progress = True,
    ) -> Run:
        """Train a new run that equals this one up to a step and continues with changes; return it.

        The fork reuses everything up to that step, and is a complete run. A fork without
        changes is bit-identical to this run. The optimizer continues with its state; an optimizer of
        another class starts without state.

        If several processes trained a model, one trains the fork, up to rounding and random draws.

        For your own loop or step function, the recorded programs repeat the recorded steps, with
        `relabel`, `lr` or both; other forks need your code: `everystep.record(fork=run, at=at, ...)`.
        The fork ends before the first step in which Python would read a different number than recorded.

        Args:
            at: the step after which the fork starts; 0: before the first step.
            settings: changes by path, as in an experiment: `{"optimizer.lr": 1e-3}`.
            lr, steps, batch_size, seed: shortcuts for the most common settings.
            model, loss, optimizer, scheduler, scheduler_every, data, validation, metrics: the objects to
                continue with, as in `train`, for a run from Python objects that this process did not
                train; `fork` trains them in place. Without them, the run's programs continue alone if
                they took every step (only `lr` and `steps` may change).
            without_rows: rows of the data to leave out of the batches that they were in.
            relabel: new targets, by row of the data; for your own loop, by the place of the row in the
                batch of the step after `at`. The same row gets it in later batches, too.
            run: the fork: a name in runs/, or a path, which must not exist; default: the next free one.
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
        from everystep.training.objects import Objects

        rows, targets, rates = _changes(without_rows, relabel, () if lr is None else [lr])
        short = {"lr": next(iter(rates), None), "steps": steps, "batch_size": batch_size, "seed": seed}
        wanted = {n: value for n, value in short.items() if value is not None} | dict(settings or {})
        without = tuple(sorted({*rows}))
        asked = Fork(self, at, wanted, place_of(run), snapshot_budget, without=without, targets=targets)
        objects = model, loss, optimizer, data, scheduler, scheduler_every, validation, metrics
        given = Objects(*objects)
        outcome, trained = fork(asked, given, self._objects, self._opener, progress_of(progress))
        if trained is not None and trained.data is None:  # the fork has its rows, split already
            trained = replace(trained, validation=None)
        return run_of(outcome, trained)

    @checked
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
        snapshot_budget: float = DEFAULT_BUDGET,
        progress: bool | Progress = True,
    ) -> Run:
        """Continue a training that ended early, or train a finished one further; return the run.

        Training continues from the newest snapshot, to the bits of an uninterrupted training if there
        are as many processes as before. Steps recorded after the snapshot are repeated and compared with
        the recording. The run changes only when a new step is taken.

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
        from everystep.training.objects import Objects

        last = None if steps is None else check_steps(steps)
        asked = Resume(self, last, force, snapshot_budget)
        objects = model, loss, optimizer, data, scheduler, scheduler_every, validation, metrics
        outcome, trained = resume(asked, Objects(*objects), self._objects, progress_of(progress))
        return run_of(outcome) if trained is None else run_from_objects(outcome, trained)

    def _repr_html_(self) -> str:
        from everystep.views.report import summary_html

        return summary_html(self)

    @property
    def _opener(self) -> Opener:
        # Only now: it imports torch, and a run may be opened for its losses alone.
        from everystep.replay.processes import ALONE, Opener
        from everystep.views.counting import counting

        with ALONE:
            if self._own_opener is None:
                # A bar is shown for steps that are replayed before one can be opened.
                self._own_opener = Opener(self, self._objects, counting)
            return self._own_opener

    def _answered(self, what: str, steps: int, progress: Counting, ask: Callable[..., Answer]) -> Answer:
        """Ask, show how far it is, and return the answer, which shows itself."""
        from everystep.replay.processes import ALONE
        from everystep.views.counting import counting

        with ALONE, counting(what, steps, progress) as on_progress:
            return self._shown(ask(on_progress=on_progress))

    def _shown(self, answer: Answer) -> Answer:
        from everystep.views.run_view import RunView

        return answer and replace(answer, view=RunView(self))  # type: ignore[type-var]

    def _question(self, question: str | Callable[[Step], Any]) -> tuple[Any, str]:
        """Return a question in the form that queries take, and its name."""
        from everystep import numerics

        # As early as possible: MKL reads its environment when it first computes.
        numerics.prepare()
        if callable(question):
            return question, getattr(question, "__name__", "measurement")
        from everystep.replay.recorded_columns import read_question

        expression = read_question(question, self)
        if not expression.is_recorded:
            from everystep.replay.probe import check_question

            check_question(expression, self._opener)
        return expression, question


class Steps(Sequence["Step"]):
    """A sequence of steps of a run, or of its ranks; each opens when you access it."""

    def __init__(self, places: list[tuple[Run, int]]) -> None:
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> Step: ...

    @overload
    def __getitem__(self, place: slice) -> Steps: ...

    def __getitem__(self, place: int | slice) -> Step | Steps:
        if isinstance(place, slice):
            return Steps(self._places[place])
        run, number = self._places[place]
        return run[number]

    def __repr__(self) -> str:
        if not self._places:
            return "<no steps>"
        names = ", ".join(dict.fromkeys(run.name for run, _ in self._places))
        return f"<steps of {names}: {self._places[0][1]} to {self._places[-1][1]}>"


def _changes(
    rows: Iterable[int], relabel: Mapping[int, float] | None, lr: float | Iterable[float]
) -> tuple[list[int], dict[int, float], list[float]]:
    """Return rows, targets by row and learning rates as plain numbers; NumPy and torch have others.

    Raises:
        UsageError: they are none.
    """
    try:
        rates = lr if isinstance(lr, Iterable) else [lr]
        targets = {operator.index(row): float(target) for row, target in (relabel or {}).items()}
        return [*map(operator.index, rows)], targets, [*map(float, rates)]
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise UsageError(
            "pass rows as a list of whole numbers, lr as one number or several, and relabel as a dict "
            "of targets by row: relabel={3: 4}"
        ) from None


def diagnosis_of(directory: Path, export: str | Path | None = None) -> Diagnosis:
    """Answer `everystep.doctor`."""
    from everystep.answers.doctor import doctor
    from everystep.recording.database import FILE_NAME
    from everystep.recording.health import readable_numbers
    from everystep.views.output_file import write_file
    from everystep.views.run_view import RunView

    found = doctor(directory)
    if export is not None:
        write_file(export, readable_numbers(directory / FILE_NAME))
    return replace(found, view=RunView(None))


class StoppedByUser(KeyboardInterrupt):
    """Ctrl-C stopped a training; the run in `directory` has the steps so far."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.directory = directory

    def __str__(self) -> str:
        recorded = f"the steps so far are recorded: everystep.open('{self.directory}')"
        return f"training stopped by the user; {recorded}"


def run_of(outcome: Outcome, objects: Objects | None = None) -> Run:
    """Return the run that a training recorded, with the objects that trained it.

    Raises:
        StoppedByUser: Ctrl-C stopped the training.
    """
    if outcome.interrupted:
        raise StoppedByUser(outcome.directory)
    return Run(outcome.directory, objects)


def run_from_objects(outcome: Outcome, objects: Objects) -> Run:
    """Return the run that a training recorded, with the objects that trained it.

    With their data and validation rows only if later steps need them: those of a Dataset that is read at
    every step.

    Raises:
        StoppedByUser: Ctrl-C stopped the training.
    """
    facts = [stretch.facts.data for stretch in run_of(outcome).stretches]
    is_needed = any(each.lazy or each.of_recorded_steps for each in facts)
    return run_of(outcome, objects if is_needed else replace(objects, data=None, validation=None))


def progress_of(wanted: bool | Progress) -> Progress:
    """Return the progress of a training: the given object, the terminal, or none.

    It is none for all ranks but 0, and in a sweep.
    """
    from everystep.training.agreement import ranks_here
    from everystep.training.job import Progress
    from everystep.views.progress import Silent, TerminalProgress

    if not isinstance(wanted, bool):
        return wanted
    if (ranks := ranks_here()) is not None and ranks.rank:
        return Progress()
    is_shown = wanted and not AWAITED
    return TerminalProgress(show_header=False, lines=None) if is_shown else Silent()
