"""The training of a model: runs the steps, and passes their results to the recorder and the display."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from everystep import clock
from everystep.errors import DatasetChangedError
from everystep.recording.contents import digest_of
from everystep.recording.facts import EngineFacts, Facts
from everystep.recording.files import DATA_FILE
from everystep.recording.recorded_run import EXPERIMENT_FILE
from everystep.recording.recorder import Recorder
from everystep.recording.settings_diff import flat
from everystep.step.hyperparameters import changes_more_than_lr, expected_to_change
from everystep.step.torchs_own import is_torchs_scheduler
from everystep.training.agreement import Agreement
from everystep.training.dataset import DatasetBatches
from everystep.training.interrupt import Interrupt
from everystep.training.job import Job, Outcome, Progress
from everystep.training.measurements import Evaluation
from everystep.training.resumed import facts_resumed
from everystep.training.stepper import Stepper
from everystep.training.writer import RunWriter, now

__all__ = ["run_job"]


def run_job(job: Job, progress: Progress) -> Outcome:
    """Train, and record every step.

    Raises:
        ExperimentError: the job is impossible; gives the reason.
        RunError: the directory exists already.
        RecordingError: writing the run failed.
    """
    job.check()
    with Interrupt() as interrupt:  # from here on a run is open, and must be closed
        recorder, facts = _recorder(job)
        progress.begin(recorder.directory, facts)
        training = _ModelWriter(job, recorder, facts, progress)
        try:
            reason = training.train(interrupt)
            training.close("finished" if reason is None else "stopped", reason, training.engine())
        finally:
            training.let_go()
            progress.end()
        place = recorder.directory
        if interrupt and not interrupt.is_by_user:
            progress.notice(f"stopped {reason} after step {training.step}; everystep resume {place}")
    return Outcome(place, reason, interrupt.is_by_user)


def _recorder(job: Job) -> tuple[Recorder, Facts]:
    """Return what records a job, and what is known of the run so far."""
    agreement = Agreement()
    # Digests of the data and of the parameters take their time, and one process agrees with itself.
    if agreement.ranks is not None:
        agreement.check(_about(job))
    origin, text = job.origin, job.experiment_toml
    texts = {} if text is None else {job.facts.experiment_file or EXPERIMENT_FILE: text}
    if origin.run is not None and origin.resumed is not None:
        place = origin.run.directory
        facts = facts_resumed(origin.run, job.facts, job.steps, origin.resumed)
        facts = facts.model_copy(update=dict(origin.user_facts))
        recorder = Recorder(place, facts, origin.budget, at=origin.at, is_resumed=True, texts=texts)
        return recorder, facts.model_copy(update={"name": place.name})
    place = agreement.directory(origin.directory, job.name)
    at, fork = origin.at, origin.fork
    about = {"trained": job.facts, "fork": fork, **origin.user_facts}
    facts = Facts(name=place.name, started=now(), steps=job.steps, **about)
    given = origin.budget, origin.run, at
    beginning = None if fork is None else job.training.snapshot(at)
    try:
        return Recorder(place, facts, *given, texts=texts, beginning=beginning), facts
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)  # made just now, and not started
        raise


def _about(job: Job) -> dict[str, Any]:
    """Return what must be equal on all ranks."""
    # Those that differ on each rank, or on each machine.
    of_rank = {"ranks", "numerics", "data_file", "engine", "experiment_file"}
    settings = job.facts.model_dump(mode="json", exclude=of_rank)
    about = {name: str(value) for name, value in flat(settings).items()}
    about |= {"the run": str(job.origin.directory), "the last step": str(job.steps)}
    tensors = job.training.named_state()
    if job.data is not None and job.data.sources:
        about |= {f"the data {each.path}": f"digest {each.digest}" for each in job.data.sources}
    elif job.data is not None:
        tensors |= {f"data/{name}": rows for name, rows in job.data.tensors().items()}
    # Ranks that continue a run may have other buffers, such as those of batch norm.
    kinds = ("data/", "parameter/") + ("buffer/", "optimizer/") * (job.origin.run is None)
    given = {name: tensor for name, tensor in tensors.items() if name.startswith(kinds)}
    return about | {n.replace("/", " ", 1): f"digest {digest_of(t.cpu())}" for n, t in given.items()}


class _ModelWriter(RunWriter):
    """Takes the steps of a training of a model, and writes them."""

    def __init__(self, job: Job, recorder: Recorder, facts: Facts, progress: Progress) -> None:
        origin = job.origin
        earlier = None if origin.run is None else origin.run.facts
        super().__init__(recorder, origin.at, facts, progress.notice, progress.advance, earlier)
        goes_on = "training continues (stop_on_nan = true stops it)"
        ends = "training stops" if job.facts.stop_on_nan else goes_on
        self.advice = f"{ends}. ", "; a smaller lr often helps"
        self.job = job
        self._stepper: Stepper | None = None
        self.rates = self._expected()
        if origin.run is not None:
            now = job.training.hyperparameters()
            # What is gone, and was never recorded, needs no end.
            known = {*now, *origin.run.measurement_names}
            self.rates |= {n: rate for n, rate in origin.hyperparameters.items() if n in known}
            self.note_rates(origin.at + 1, now)
        self._loss_dtype: torch.dtype | None = None
        # The state that a continued run begins with is on disk already.
        self._snapshot_step = -1 if origin.run is None else origin.at
        #: The step from which on Python takes all, as the run has it.
        self._eager_from: int | None = None

    def train(self, interrupt: Interrupt) -> str | None:
        """Train to the end; return None, or why it stopped before. Close the run if that raises."""
        try:
            reason = self._run(interrupt)
            self._finish()
        except BaseException as error:
            self.close_failed(error)
            raise
        finally:
            if self._stepper is not None:
                self._stepper.watched.finish()
        return reason

    def _run(self, interrupt: Interrupt) -> str | None:
        """Run all steps; return None, or why it stopped before the last."""
        job, every = self.job, self.job.facts.evaluate_every
        self._keep_beginning()
        stepper = self._stepper = Stepper(job.training, self, job.steps, job.engine)
        self.recorder.facts(self.engine())
        self._note_eager(stepper)
        while self.step < job.steps:
            if not self._advance(stepper):  # nothing below holds for steps that are void
                continue
            is_due = every is not None and (self.step % every == 0 or self.step == job.steps)
            if job.evaluation is not None and is_due:
                self._evaluate(stepper, job.evaluation)
            if job.facts.stop_on_nan and not math.isfinite(loss := float(self.losses[-1])):
                self.flush()
                return f"the loss is {loss} at step {self.step} (stop_on_nan)"
            if self.is_snapshot_due():
                self._snapshot()
            if interrupt:
                self.flush()
                return interrupt.reason
            self.flush_if_due()
        self.flush()
        return None

    def _finish(self) -> None:
        """Leave the live training in its last state, and take a snapshot of it."""
        guards = self.job.training.guards
        # Once with all numbers: each step has compared only the counts of torch's changes.
        if guards is not None and (changed := guards.difference()) is not None:
            raise DatasetChangedError(changed, self.step)
        if self._stepper is not None:
            self._stepper.finish()
            self.flush()
        if self._snapshot_step != self.step:  # a second copy of a large state may not fit into memory
            self._snapshot()
        self._keep_rows()

    def close_failed(self, error: BaseException) -> None:
        """Write what there is, and close the run."""
        # Losses are still on the device.
        with suppress(Exception):  # the device or the disk may be what failed
            self.flush()
        super().close_failed(error)

    def let_go(self) -> None:
        """Refer to the training no more: its memory is free before Python collects garbage."""
        self._stepper = None  # it refers to this object

    def flush(self) -> None:
        """Fetch the losses from the device, which waits for it once; write them and the measurements."""
        self.recorder.wait()
        if self._stepper is not None:  # before, there are only rates, which belong to the first step
            super().flush()

    def _collected(self) -> tuple[Sequence[float | None], dict[str, Any]]:
        assert self._stepper is not None
        values = self._stepper.collect()
        # A run has one dtype of losses: the first that holds all of them.
        widest = torch.promote_types(values.dtype, self._loss_dtype or values.dtype)
        facts = self.engine()
        if len(values) and widest != self._loss_dtype:
            self._loss_dtype = widest
            facts["loss_dtype"] = str(widest).removeprefix("torch.")
        return values.tolist(), facts

    def _keep_beginning(self) -> None:
        job, recorder = self.job, self.recorder
        for message in job.notices:
            self._notice(message)
        # A fork was made with its beginning, and a run that is resumed has it.
        if self.step not in recorder.plan.kept:
            self._snapshot()
        if job.data is not None and job.origin.has_new_data:
            if job.data.sources:
                recorder.facts({"data_file": job.facts.data_file})
                return
            recorder.data(job.data.tensors(), self._data_file)

    def _advance(self, stepper: Stepper) -> bool:
        """Run steps up to the next with something to do; return False if a failed check went back."""
        before, started, job = self.step, clock.now(), self.job
        every, one_by_one = job.facts.evaluate_every, job.facts.stop_on_nan
        stepper.advance(self.next_stop(job.steps, one_by_one=one_by_one, every=every))
        if self.step > before:
            self.timed(started, job.training.named_state, self.step - before)
        self._note_eager(stepper)
        return self.step > before

    def _keep_rows(self) -> None:
        """Record the rows of a Dataset that was read at every step, if they stayed the same."""
        batch = self.job.training.batch
        if isinstance(batch, DatasetBatches) and (rows := batch.rows()) is not None:
            named = dict(zip("xy", rows, strict=True))
            self.recorder.data(named, self._data_file)
            found: dict[str, Any] = {name: tuple(part.shape) for name, part in named.items()}
            found |= {"lazy": False, "of_recorded_steps": True}
            self.recorder.facts({"data": self.job.facts.data.model_copy(update=found)})

    @property
    def _data_file(self) -> str:
        """The name of the file of these steps: those before them may have another."""
        at = self.job.origin.at
        return f"data-{at + 1}.safetensors" if at or self.job.origin.fork else DATA_FILE

    def engine(self) -> dict[str, Any]:
        """Return which programs there are, how far they are verified, and what is eager, and why."""
        stepper = self._stepper
        assert stepper is not None
        engine = EngineFacts(
            asked=self.job.engine,
            stands_behind=stepper.stands_behind,
            programs=tuple(stepper.watched.programs),
            by_program=stepper.by_program,
            checks=len(stepper.checked),
            verified_to=stepper.checked[-1] if stepper.checked else 0,
            # Steps that are taken again, and compared, stay as they were recorded.
            eager_from=stepper.eager_from and max(stepper.eager_from, self.recorder.recorded + 1),
            reason=stepper.reason,
            unseen=stepper.watched.unseen,
        )
        return {"engine": engine}

    def _note_eager(self, stepper: Stepper) -> None:
        """Report that Python takes the steps from here on."""
        first = stepper.eager_from
        if first is None or first == self._eager_from:
            return
        self._eager_from = first
        if self.job.engine != "eager":
            since = f" from step {first} on" if first > self.job.origin.at + 1 else ""
            cure = '; engine="program" vouches for such code' if stepper.is_vouchable else ""
            if self.job.facts.ranks is None:  # else no program could
                self._notice(f"Python runs the steps{since}: {stepper.reason}{cure}")
        self.recorder.facts(self.engine())

    def go_back(self, step: int) -> None:
        """Discard later steps, which a failed check made void."""
        super().go_back(step)
        self._snapshot_step = min(self._snapshot_step, step)

    def _snapshot(self) -> None:
        self.flush()  # a state on disk means that its steps are there
        self.recorder.snapshot(self.waiting_for(partial(self.job.training.snapshot, self.step)))
        self._snapshot_step = self.step

    def _expected(self) -> dict[str, float]:
        """Return the numbers of the optimizer that are recorded only when they change.

        What a scheduler changes is recorded from the first step on.
        """
        scheduler, numbers = self.job.training.scheduler, self.job.training.hyperparameters()
        if scheduler is None:
            return numbers
        more = changes_more_than_lr(scheduler)
        return {n: value for n, value in numbers.items() if not expected_to_change(n, more_than_lr=more)}

    def _evaluate(self, stepper: Stepper, evaluation: Evaluation) -> None:
        """Measure; a scheduler that follows the validation loss advances."""
        scheduler = self.job.training.scheduler
        follows = scheduler if isinstance(scheduler, ReduceLROnPlateau) else None
        # Known code changes only what `measure` restores, and the rate, which is noted at each step.
        is_known = not evaluation.has_foreign_code and is_torchs_scheduler(follows)
        had_rule = stepper.has_rule
        with nullcontext() if is_known else stepper.foreign_code():
            measured = self._measured(evaluation)
            if follows is not None:
                follows.step(measured["validation_loss"])
        if had_rule and not stepper.has_rule:
            self._notice(
                f"after step {self.step}, your code changed the data: the run keeps the batches of "
                "later steps, but a resume and a fork begin with the data as it was"
            )
        self.measured += [(name, self.step, value) for name, value in measured.items()]

    def _measured(self, evaluation: Evaluation) -> dict[str, float]:
        """Return the measurements of rank 0, which the run shows."""
        ranks = self.job.facts.ranks
        if ranks is None:
            return evaluation.measure()
        # A scheduler may follow it, and must set the same rate on all ranks.
        found: list[Any] = [evaluation.measure() if ranks.rank == 0 else None]
        torch.distributed.broadcast_object_list(found)
        return dict(found[0])
