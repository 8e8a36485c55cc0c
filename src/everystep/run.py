"""A run and everything you can do with it."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from everystep.errors import StepError, UsageError
from everystep.recording.finding import RUNS
from everystep.recording.run import RecordedRun
from everystep.recording.snapshots import DEFAULT_BUDGET

if TYPE_CHECKING:
    import torch
    from plotnine import ggplot
    from torch import Tensor, nn
    from torch.optim.lr_scheduler import LRScheduler
    from torch.utils.data import Dataset

    from everystep.replay.columns import Found
    from everystep.replay.diff import Difference
    from everystep.replay.doctor import Diagnosis
    from everystep.replay.match import Match
    from everystep.replay.nonfinite import NonFinite
    from everystep.replay.processes import Opener
    from everystep.replay.query import Measured
    from everystep.replay.rerun import Rerun
    from everystep.replay.rows import Rows
    from everystep.replay.step import Step
    from everystep.replay.verify import Verification
    from everystep.replay.what_if import WhatIf
    from everystep.replay.why import Why
    from everystep.training.job import Outcome, Progress
    from everystep.training.objects import Objects
    from everystep.views.report import Report
    from everystep.views.table import LossTable

__all__ = ["Run", "Steps", "progress_of", "run_of"]

#: Whether to show a progress bar where stderr is a terminal; or what is called with the number
#: of steps that were just replayed.
Counting = bool | Callable[[int], None]


class Run(RecordedRun):
    """A recorded training, read from its directory on demand.

    `run[137]` opens step 137 with everything in it, and `run[-1]` the newest step. `run[10:20]` is a
    sequence of the steps 10 to 19; it opens each step when you access it, as does iterating over the
    run.
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
        opened = self._opener.step(number + len(self) + 1 if number < 0 else number)
        return dataclasses.replace(
            opened, to_html=self._step_html, why_text=self._why_text, earlier=self.__getitem__
        )

    def _step_html(self, step: Step) -> str:
        from everystep.views.step import step_html

        return step_html(step, self.facts, self.name)

    @staticmethod
    def _why_text(answer: Why) -> str:
        from everystep.views.why import why_text

        return why_text(answer)

    def __iter__(self) -> Iterator[Step]:
        return iter(self[:])

    @property
    def note(self) -> str | None:
        """Your own words on the run, in one line; None if there are none.

        Set it to a text of up to 1,000 characters (line breaks become spaces), or to None to remove it.

        Raises:
            UsageError: the text is too long.
            RunError: the run is still being trained, or another process is adding to it.
            RecordingError: it cannot be written to.
        """
        return self.facts.note

    @note.setter
    def note(self, text: str | None) -> None:
        from everystep.recording.additions import write_note

        if not isinstance(text, str | None):
            raise UsageError(f"a note is a text, or None to remove it; this is {type(text).__name__}")
        write_note(self.directory, text)

    @property
    def problems(self) -> list[str]:
        """Problems found while opening steps, such as an unreadable snapshot."""
        return self._own_opener.problems if self._own_opener else []

    def parameters(self, step: int) -> dict[str, Tensor]:
        """Return the model's state_dict after `step` (0: before the first step).

        Negative steps count from the newest: -1 is the newest state.

        Raises:
            StepError: the run has no such step.
            RunError: a needed file is missing or unreadable.
        """
        number = self._number(step)
        return self._opener.state(number + len(self) + 1 if number < 0 else number).parameters

    def verify(self, *, processes: int | None = None, progress: Counting = True) -> Verification:
        """Replay every step, and compare every loss and every snapshot, bit for bit.

        processes: number of processes; default: one per core, if worth their start.

        Raises:
            RunError: a needed file is missing or unreadable.
        """
        from everystep.replay.verify import verify
        from everystep.views.answers import verify_text
        from everystep.views.progress import counting

        with counting("replaying", len(self), progress) as on_progress:
            found = verify(self._opener, processes, on_progress)
        return dataclasses.replace(found, to_text=partial(verify_text, self.name, self.facts, found))

    def doctor(self, *, repair: str | Path | None = None, progress: Counting = True) -> Diagnosis:
        """Say what is wrong with the run, and what can still be read; replays nothing, as `verify` does.

        repair: where to write a repaired copy: what is sound, and lost steps taken again by replay.

        Raises:
            RunError: with `repair`, nothing can be read, or the place exists.
            RecordingError: the copy cannot be written.
        """
        from everystep.replay.doctor import doctor
        from everystep.views.diagnosis import diagnosis_text
        from everystep.views.progress import counting

        target = None if repair is None else Path(repair)
        wanted = progress if target is not None else False
        with counting("replaying", len(self), wanted) as on_progress:
            found = doctor(self.directory, target, on_progress)
        return dataclasses.replace(found, to_text=partial(diagnosis_text, found))

    def diff(self, other: Run, *, thorough: bool = False, progress: Counting = True) -> Difference:
        """Return how this run differs from another, down to the first operation.

        thorough: compare every step, not only those between the last common state and the first
        difference. That also finds differences that no loss and no snapshot shows.

        Raises:
            RunError: a run is unreadable.
        """
        from everystep.replay.diff import diff
        from everystep.views.difference import diff_text
        from everystep.views.progress import counting

        if not isinstance(other, Run):
            raise UsageError(f"expected another run to compare with, not {other!r:.80}")
        objects = self._objects, other._objects
        with counting("comparing", min(len(self), len(other)), progress) as on_progress:
            found = diff(self, other, thorough=thorough, objects=objects, on_progress=on_progress)
        return dataclasses.replace(found, to_text=partial(diff_text, found))

    def match(self, other: Run, step: int | None = None) -> Match:
        """Return how a step of this run matches one of another that is written differently, by values.

        The gradients, parameters and buffers of this run are looked for among all tensors of the other,
        up to rounding, whatever they are called there: for a backward pass written by hand, another
        module structure, another optimizer of the same mathematics, or another precision.

        step: its number; None: the first that does not match, or else the last that both have.

        Raises:
            StepError: a run has no such step.
            RunError: a step cannot be opened.
        """
        from everystep.replay.match import match
        from everystep.views.match import match_text

        if not isinstance(other, Run):
            raise UsageError(f"expected another run to match with, not {other!r:.80}")
        found = match(self._opener, other._opener, None if step is None else self._number(step))
        return dataclasses.replace(found, to_text=partial(match_text, found))

    def rerun(
        self,
        *,
        threads: int | None = None,
        capability: str | None = None,
        mkl: str | None = None,
        precision: Literal["float64", "bfloat16"] | None = None,
        python: str | None = None,
        beside: Sequence[Run] = (),
        emit: str | Path | None = None,
        progress: Counting = True,
    ) -> Rerun:
        """Take the steps of the run elsewhere, and return where they part from the recording.

        The programs of the run do it, in another process, without its code.

        Args:
            threads: number of threads of torch.
            capability: CPU instructions of torch's kernels: `default`, `avx2` or `avx512`.
            mkl: branch of MKL's reproducibility: `OFF`, `COMPATIBLE`, `AVX2`, ...
            precision: of all floating-point numbers.
            python: another interpreter, with an everystep and a torch of its own.
            beside: other runs; the answer says how far each is from the losses there.
            emit: where to write the operation that parts as a script that needs torch alone.
            progress: as in `measure`.

        Raises:
            ExperimentError: a setting is invalid, or nothing differs from the recording.
            RunError: the steps cannot be taken there; gives the reason.
            TrainingError: the process there does not start, or ended early.
        """
        from everystep.replay.rerun import Place, rerun
        from everystep.views.progress import counting
        from everystep.views.reproduction import reproduce
        from everystep.views.rerun import rerun_text

        place = Place(threads, capability, mkl, precision, python)
        with counting("taking steps", len(self), progress) as on_progress:
            found = rerun(self._opener, place, beside, on_progress)
        if emit is not None:
            reproduce(self._opener, found, Path(emit))
        return dataclasses.replace(found, to_text=partial(rerun_text, found))

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
        """
        from everystep.replay.query import measure
        from everystep.views.answers import measured_text
        from everystep.views.progress import counting

        asked, called = self._question(question)
        with counting("measuring", len(self), progress) as on_progress:
            found = measure(
                self._opener,
                asked,
                name or called,
                every=every,
                overwrite=overwrite,
                processes=processes,
                on_progress=on_progress,
            )
        return dataclasses.replace(found, to_text=partial(measured_text, found))

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
            condition: an expression, `"isnan(loss)"`, or a function of the opened step; `"nonfinite"`
                finds the step that made the first NaN or infinity, see `first_nonfinite`.
            which: steps to find.
            processes: number of processes; default: one per core, if worth their start.
            progress: show a progress bar if stderr is a terminal; or a function, called with the number
                of steps just replayed.

        Raises:
            UsageError: the condition does not fit.
            RunError: a needed file is missing or unreadable.
        """
        from everystep.views.answers import found_text

        if which not in ("first", "last", "all"):
            raise UsageError(f"which must be 'first', 'last' or 'all', not {which!r:.80}")
        found = self._find(condition, which, processes, progress)
        return dataclasses.replace(
            found, to_text=partial(found_text, found, self.losses_at(found.steps))
        )

    def _find(
        self,
        condition: str | Callable[[Step], Any],
        which: Literal["first", "last", "all"],
        processes: int | None,
        progress: Counting,
    ) -> Found:
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
        """Return the operation that made the first NaN or infinity, or None if all is finite.

        Raises:
            RunError: a needed file is missing or unreadable.
        """
        from everystep.replay.nonfinite import find_nonfinite
        from everystep.views.answers import nonfinite_text
        from everystep.views.progress import counting

        with counting("looking", self.facts.nonfinite_step or len(self), progress) as on_progress:
            found = find_nonfinite(self._opener, processes, on_progress)
        return found and dataclasses.replace(found, to_text=partial(nonfinite_text, found))

    def rows(self, step: int) -> Rows:
        """Return how much of the loss of a step, and of each gradient, each row of its batch makes.

        Exact for what the step itself added up row by row; else unknown, with the operation that mixes
        rows. The same as `run[step].rows`.

        Raises:
            StepError: the run has no such step.
            RunError: a needed file is missing or unreadable.
        """
        from everystep.views.rows import rows_text

        opened = self[step]
        return dataclasses.replace(opened.rows, to_text=partial(rows_text, opened, name=self.name))

    def why(self, step: int, expression: str, *, back: int = 0, depth: int = 1, terms: int = 5) -> Why:
        """Return where a number of a step comes from: the operation that made it, and from what.

        NaN and infinity are followed to where they began, with the rows of the batch behind them.

        Args:
            step: the step, from 1, or from the end: -1.
            expression: names the number: `"gradients['0.weight'][3, 5]"`, `"loss"`, or, as answers name
                them, `"#7[17, 3]"`, a number of the result of operation 7.
            back: how many steps before to follow what was there before the step.
            depth: how many operations deep to follow the largest numbers; each number in an answer can
                be followed by its own `why()`.
            terms: how many terms of a sum to return one by one.

        Raises:
            UsageError: an argument is invalid, or the expression is not one number of the step.
            RunError: a step cannot be opened.
        """
        return self[step].why(expression, back=back, depth=depth, terms=terms)

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
        without_rows: Iterable[int] = (),
        relabel: Mapping[int, float] | None = None,
        replace: Mapping[str, str] | None = None,
        directory: str | Path | None = None,
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
            model, loss, optimizer, schedule, schedule_every, data, validation, metrics: the objects to
                continue with, as in `train`, for a run from Python objects that this process did not
                train; `fork` trains them in place. Without them, the run's programs go on alone if
                they took every step (only `lr` and `steps` may change).
            without_rows: rows of the data to leave out of the batches that they were in.
            relabel: other targets, by row of the data.
            replace: what gradients become between backward (with clipping) and the update of each step:
                `{"gradients['0.weight']": "clip(gradients['0.weight'], -1, 1)"}`. Expressions read
                the gradients as backward and clipping left them, parameters, buffers, the batch, the
                loss and the step. Their result has the gradient's shape and dtype, or is a constant
                that fills it. Forks of the fork replace it, too, until one sets the gradient to itself.
            directory: the fork's directory, which must not exist; default: the next free one in runs/.
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
        from everystep.replay.continuing import Fork, fork
        from everystep.replay.replacing import asked_replacements

        short = {"lr": lr, "steps": steps, "batch_size": batch_size, "seed": seed}
        changed = {name: value for name, value in short.items() if value is not None}
        place = None if directory is None else Path(directory)
        asked = Fork(
            self,
            self._number(at),
            changed | dict(settings or {}),
            place,
            RUNS,
            snapshot_budget,
            without=tuple(sorted({operator.index(row) for row in without_rows})),
            targets=dict(relabel or {}),
            replaced=asked_replacements(replace or {}, self.measurement_names),
        )
        given = {
            **{"model": model, "loss": loss, "optimizer": optimizer, "schedule": schedule},
            **{"schedule_every": schedule_every, "data": data, "validation": validation},
            "metrics": metrics,
        }
        outcome, trained = fork(asked, given, self._objects, self._opener, progress_of(progress))
        return run_of(outcome, trained and dataclasses.replace(trained, validation=None))

    def what_if(
        self,
        at: int,
        until: int,
        *,
        without_rows: Iterable[int] = (),
        without_rows_of: int | None = None,
        each: bool = False,
        by: str = "loss",
        processes: int | None = None,
        progress: Counting = True,
    ) -> WhatIf:
        """Train again from a state, with rows of the data left out, and return what becomes of the loss.

        Nothing is recorded. The steps have the bits of a training by hand without those rows.

        Args:
            at: the step after which the trainings start.
            until: the step that they are compared at.
            without_rows: rows of the data to leave out of the batches that they are in.
            without_rows_of: the step of which all rows are left out.
            each: leave out one row after the other, not all at once.
            by: an expression of step `until` to compare: `norm(gradients['0.weight'])`.
            processes: number of processes, each with as many threads as the run was trained with;
                default: as many as there are cores for, if worth their start.
            progress: as in `measure`.

        Raises:
            StepError: the run has no such step.
            UsageError: rows do not exist, or a batch would be empty.
            RunError: the steps cannot be taken again without the rows; gives the reason.
        """
        from everystep.replay.what_if import what_if
        from everystep.views.progress import counting
        from everystep.views.what_if import what_if_text

        chosen = [operator.index(row) for row in without_rows]
        if without_rows_of is not None:
            batch = self[self._number(without_rows_of)].batch
            chosen += range(len(batch.y)) if batch.rows is None else batch.rows.tolist()
        rows = sorted(set(chosen))
        if not rows:
            raise UsageError("set rows to leave out: without_rows=[...], or without_rows_of=STEP")
        cases = [(row,) for row in rows] if each else [tuple(rows)]
        steps = (until - at) * (len(cases) + 1)
        with counting("training", max(0, steps), progress) as on_progress:
            found = what_if(
                self._opener,
                self._number(at),
                self._number(until),
                cases,
                by,
                self._objects,
                processes,
                on_progress,
            )
        return dataclasses.replace(found, to_text=partial(what_if_text, found))

    def resume(
        self,
        steps: int | None = None,
        *,
        anyway: bool = False,
        model: nn.Module | None = None,
        loss: Callable[[Any, Any], Tensor] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        schedule: LRScheduler | None = None,
        schedule_every: Literal["step", "epoch"] = "step",
        data: tuple[Any, Any] | Dataset[Any] | None = None,
        validation: tuple[Any, Any] | float | None = None,
        metrics: Mapping[str, Callable[[Tensor, Tensor], Any]] | None = None,
        snapshot_budget: int = DEFAULT_BUDGET,
        progress: bool | Progress = True,
    ) -> Run:
        """Go on with a training that ended early, or train a finished one further; return the run.

        Training goes on from the newest snapshot, to the bits of a training that did not end. Steps
        recorded after the snapshot are taken again and compared with the recording. The run changes
        only when a new step is taken.

        Args:
            steps: the last step; default: that of the run.
            anyway: go on although the code, the data, the versions or the numerics changed; the recorded
                steps after the snapshot are discarded, and the run says what changed.
            model, loss, optimizer, schedule, schedule_every, data, validation, metrics: the objects as
                they were before training, for a run from Python objects that this process did not
                train; `resume` trains them in place. Without them, the run's programs go on alone if
                they took every step, and nothing checks them against Python.
            snapshot_budget: maximum bytes of snapshots.
            progress: show a progress bar if stderr is a terminal; or an object that watches the
                training.

        Raises:
            UsageError: the run has all its steps, or an argument is invalid.
            RunError: something changed, a step that is taken again differs, or the run is being trained.
            RecordingError: writing the run failed; everything recorded before is kept.
            KeyboardInterrupt: on Ctrl-C, after finishing the step and closing the run.
        """
        from everystep.replay.continuing import Resume, resume

        asked = Resume(self, steps, anyway, snapshot_budget)
        given = {
            **{"model": model, "loss": loss, "optimizer": optimizer, "schedule": schedule},
            **{"schedule_every": schedule_every, "data": data, "validation": validation},
            "metrics": metrics,
        }
        outcome, trained = resume(asked, given, self._objects, progress_of(progress))
        return run_of(outcome, trained and dataclasses.replace(trained, data=None, validation=None))

    def _number(self, step: Any) -> int:
        try:
            return operator.index(step)
        except TypeError:
            raise StepError(f"a step of {self.name} must be an integer, not {step!r:.80}") from None

    def _question(self, question: str | Callable[[Step], Any]) -> tuple[Any, str]:
        """Return a question in the form that queries take, and its name."""
        from everystep import numerics

        numerics.prepare()
        if callable(question):
            return question, getattr(question, "__name__", "measurement")
        if not isinstance(question, str):
            raise UsageError(f"expected an expression or a function of a step, not {question!r:.80}")
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
        losses = ""
        if summary.first_loss is not None and summary.last_loss is not None:
            losses = f", loss {summary.first_loss:.4g} to {summary.last_loss:.4g}"
        return (
            f"<everystep run {str(self.directory)!r}: {summary.status}, {summary.steps} steps{losses}>"
        )

    def table(self, rows: int = 100_000) -> LossTable:
        """Return the losses as a browsable table (DataTables); shows in a notebook; `save(path)`.

        rows: maximum number of rows to embed; a longer run is excerpted, and the table says so.
        """
        from everystep.views.table import loss_table

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
        from everystep.views.summary import summary_html

        return summary_html(self)


class Steps(Sequence["Step"]):
    """A sequence of steps of a run; each opens when you access it."""

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


def progress_of(wanted: bool | Progress) -> Progress:
    """Return what watches a training: the given object, the terminal, or nothing."""
    from everystep.views.progress import Silent, TerminalProgress

    if not isinstance(wanted, bool):
        return wanted
    return TerminalProgress(show_header=False, lines=None) if wanted else Silent()
