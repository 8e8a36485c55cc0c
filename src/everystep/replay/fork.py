"""Fork: a run that equals its parent up to a step and continues with changes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from everystep import numerics
from everystep.errors import EverystepError, ExperimentError, Fault, RunError, TrainingError, UsageError
from everystep.experiment.data import Data
from everystep.experiment.device import select
from everystep.experiment.optimizer import with_fused
from everystep.experiment.specification import Experiment, check_iteration, load
from everystep.recording.facts import EAGERLY, ForkFacts, TrainingFacts
from everystep.recording.run import EXPERIMENT_FILE, RecordedRun, Stretch
from everystep.replay.processes import Opener
from everystep.replay.reopen import stored_data
from everystep.replay.replay import no_such_step
from everystep.step.eager import EagerStep, Training
from everystep.step.generators import generators_preserved
from everystep.step.hyperparameters import is_hyperparameter
from everystep.step.named_state import parameter_names
from everystep.step.optimizer_state import optimizer_settings
from everystep.step.state import State
from everystep.training.dataset import DEFAULT_DATASET_LIMIT
from everystep.training.facts import optimizer_facts
from everystep.training.from_experiment import experiment_job
from everystep.training.from_objects import objects_job
from everystep.training.job import Job, Origin, Outcome, Progress
from everystep.training.loop import run_job
from everystep.training.objects import Objects

__all__ = ["Fork", "fork_experiment", "fork_objects", "iteration_of", "recorded_hyperparameters"]


@dataclass(frozen=True)
class Fork:
    """What is asked for: a fork of `run` at state `at`, in a directory or the next free one in `runs`.

    settings: what changes, by path, as in an experiment; of a run from Python objects, `lr` and the
    arguments of `train` that are plain values.
    """

    run: RecordedRun
    at: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    directory: Path | None = None
    runs: Path = Path("runs")
    budget: int = 0

    def check(self) -> None:
        """Check that the state exists.

        Raises:
            StepError: it does not.
        """
        if not 0 <= self.at <= self.run.summary().steps:
            raise no_such_step(self.run, self.at)

    @property
    def stretch(self) -> Stretch:
        """The part of the parent that the state belongs to."""
        return [stretch for stretch in self.run.stretches if stretch.first <= max(self.at, 1)][-1]

    def state(self, opener: Opener) -> State:
        """Return the parent's state.

        Raises:
            RunError: it cannot be reached, or not bit for bit.
        """
        state = opener.state(self.at)
        diverged = opener.diverged_at
        if diverged is not None and diverged <= self.at:
            raise RunError(
                f"state {self.at} of {self.run.name} cannot be restored bit for bit: in the replay, "
                f"the loss of step {diverged} differs from the recording (everystep verify says "
                "more); snapshots: "
                + ", ".join(map(str, self.run.snapshots))
                + "".join(f"; {problem}" for problem in opener.problems)
            )
        return state

    def train(
        self, job: Job, hyperparameters: dict[str, float], new_data: bool, progress: Progress
    ) -> Outcome:
        """Continue training from the state of the job's training.

        hyperparameters: the lr and similar settings in the parent's state.
        """
        if job.steps <= self.at:
            raise UsageError(
                f"the fork starts after step {self.at} but would end at step {job.steps}; set more "
                f"steps (steps={self.at + 500})"
            )
        fork = ForkFacts(
            parent=self.run.name,
            directory=str(self.run.directory),
            at=self.at,
            changed={path: value for path, value in self.settings.items() if _is_plain(value)},
        )
        # With a schedule, all is recorded; otherwise, only what changed.
        known = {} if job.training.schedule else hyperparameters
        recorded = recorded_hyperparameters(self.run, self.at)
        job = replace(
            job,
            name=f"{self.run.name}-fork",
            origin=Origin(self.run, self.at, known | recorded, new_data, fork),
        )
        return run_job(job, self.directory, self.runs, self.budget, progress)

    def with_schedule(self, training: Training, state: State) -> State:
        """Bring a schedule to the parent's state; return the state with what the schedule set.

        A replayed state has no schedule: it continues from the snapshot before.
        """
        schedule, settings = training.schedule, state.settings
        known = self.run.state_near(self.at, after=self.stretch.first - 2)
        if schedule is None or known is None:
            return state
        known.restore(training.model, training.loss, training.optimizer, schedule, training.device)
        batches = self.stretch.facts.batches
        # Epochs are the parent's up to here.
        advance = EagerStep(replace(training, steps_per_epoch=batches.steps_per_epoch)).advance
        followed = self.run.measured("validation_loss")
        with warnings.catch_warnings():
            # It says that the optimizer has not stepped, which is true.
            warnings.simplefilter("ignore", UserWarning)
            for number in range(known.step + 1, self.at + 1):
                if isinstance(schedule, ReduceLROnPlateau):
                    if number in followed:
                        schedule.step(followed[number])
                elif advance is not None:
                    advance(number)
        names = parameter_names(training.model, training.optimizer)
        optimizer = optimizer_settings(training.optimizer, names)
        optimizer |= {"values": settings["optimizer"]["values"]}
        return replace(state, settings={"step": self.at, "optimizer": optimizer})


def recorded_hyperparameters(run: RecordedRun, at: int) -> dict[str, float]:
    """Return the lr and similar settings as last recorded up to a step."""
    found: dict[str, float] = {}
    for name in filter(is_hyperparameter, run.measurement_names):
        values = [value for step, value in run.measured(name).items() if step <= at]
        if values:
            found[name] = values[-1]
    return found


def fork_experiment(asked: Fork, opener: Opener, progress: Progress) -> Outcome:
    """Fork a run of an experiment; create everything from the experiment with its changes.

    Raises:
        UsageError: the state does not exist, or a setting is invalid.
        RunError: the state cannot be restored bit for bit.
        TrainingError: torch failed in a step.
        RecordingError: writing the run failed.
    """
    asked.check()
    facts = asked.stretch.facts
    path = asked.run.experiment_file(facts)
    if path is None:
        raise RunError(f"{asked.run.name} has no experiment: {EXPERIMENT_FILE} is missing")
    old, new = load(path), load(path, asked.settings)
    device = select(new.device)
    old, new = with_fused(old, device), with_fused(new, device)
    state = asked.state(opener)
    numerics.prepare()
    threads = new.threads or facts.numerics.threads
    with numerics.in_force(threads), generators_preserved(device):
        try:
            data = None
            if new.data == old.data:  # also where the seed that it was drawn with changes
                data = stored_data(asked.run, facts) or _made_data(asked.run, old)
            job = experiment_job(new, asked.run.name, device, data)
            if old.optimizer.name == new.optimizer.name and old.schedule == new.schedule:
                state = asked.with_schedule(job.training, state)
            before = _bring_to(job.training, state, old, new)
            if new.seed != old.seed:
                torch.manual_seed(new.seed)
            if data is not None:
                kept = {"preparation": facts.preparation}
                job = replace(job, facts=job.facts.model_copy(update=kept))
            return asked.train(job, before, data is None, progress)
        except EverystepError:
            raise
        except Exception as error:  # no code but torch's has run
            reason = str(error).strip() or type(error).__name__
            raise TrainingError(f"the fork failed: {reason}") from error


def fork_objects(
    asked: Fork,
    objects: Objects,
    validation: tuple[Any, Any] | None,
    is_own: bool,
    opener: Opener,
    progress: Progress,
) -> Outcome:
    """Fork a run from Python objects.

    Args:
        asked: the fork to make.
        objects: the model, loss, optimizer, ... to continue with; trained in place, unless they are
            `is_own`: those that trained the run itself. Otherwise, the optimizer's settings apply.
        validation: x and y to measure, instead of the parent's.
        is_own: see objects.
        opener: opens the parent's states.
        progress: watches the training.

    Raises:
        UsageError: the state does not exist, or an argument is invalid.
        RunError: the state cannot be restored bit for bit.
        RecordingError: writing the run failed.
    """
    asked.check()
    objects.check_complete()
    facts = asked.stretch.facts
    settings = dict(asked.settings)
    lr = settings.pop("lr", None)
    iteration = check_iteration(**(iteration_of(facts, asked.run.facts.steps) | settings))
    state = asked.state(opener)
    own = objects.copied() if is_own else objects
    known = stored_data(asked.run, facts) if own.data is None else None
    if own.data is None and known is None:
        raise RunError(
            f"the data of {asked.run.name} is not in the run; pass it: fork(..., data=(x, y))"
        )
    trained = replace(
        own,
        data=own.data if known is None else (known.x, known.y),
        validation=known.validation if known is not None and validation is None else validation,
        dataset_limit=DEFAULT_DATASET_LIMIT,
    )
    trained.check()
    numerics.prepare()
    device = select(facts.device)
    with numerics.in_force(iteration.threads), generators_preserved(device):
        trained.model.to(device)
        torch.manual_seed(settings.get("seed", facts.batches.seed))
        job = objects_job(trained, iteration, device, progress)
        goes_on = type(own.schedule).__name__ in {each.class_name for each in facts.schedules.values()}
        if goes_on:
            state = asked.with_schedule(job.training, state)
        before = _bring_objects_to(job.training, state, keep=not is_own and not goes_on)
        if "seed" in settings:
            torch.manual_seed(settings["seed"])
        if lr is not None:
            _set_rate(job.training, lr)
        now = {"optimizers": {"optimizer": optimizer_facts(job.training.optimizer)}}
        kept = {} if "seed" in settings else {"seed": facts.seed}
        job = replace(job, facts=job.facts.model_copy(update=now | kept))
        return asked.train(job, before, own.data is not None, progress)


def _bring_to(training: Training, state: State, old: Experiment, new: Experiment) -> dict[str, float]:
    """Bring a training to the parent's state, except for the changes; return the parent's lr."""
    optimizer, schedule = training.optimizer, training.schedule
    fresh = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    same_optimizer = old.optimizer.name == new.optimizer.name
    same_schedule = same_optimizer and old.schedule == new.schedule
    try:
        state.restore(
            training.model,
            training.loss if old.loss == new.loss else None,
            optimizer if same_optimizer else None,
            None,
            training.device,
        )
    except ValueError as error:
        raise ExperimentError(
            [Fault("model.layers", f"the parent's parameters do not fit: {error}")], "the fork"
        ) from None
    if not same_optimizer:
        return {}
    before = training.hyperparameters()
    keywords = old.optimizer.keywords, new.optimizer.keywords
    changed = {
        key for key in {*keywords[0], *keywords[1]} if keywords[0].get(key) != keywords[1].get(key)
    }
    for group, settings in zip(optimizer.param_groups, fresh, strict=True):
        group.update({k: v for k, v in settings.items() if not same_schedule or k in changed})
    if same_schedule and schedule is not None and "lr" in changed:
        _set_rate(training, optimizer.param_groups[0]["lr"])
    return before


def _set_rate(training: Training, lr: float) -> None:
    """Set the learning rate; a schedule continues from it."""
    for group in training.optimizer.param_groups:
        group["lr"] = lr
        if "initial_lr" in group:
            group["initial_lr"] = lr
    if training.schedule is not None and hasattr(training.schedule, "base_lrs"):
        training.schedule.base_lrs = [lr for _ in training.optimizer.param_groups]


def _bring_objects_to(training: Training, state: State, keep: bool) -> dict[str, float]:
    """Bring live objects to the parent's state; `keep`: the settings of the optimizer stay."""
    optimizer = training.optimizer
    fresh = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    same = type(optimizer).__qualname__ == state.settings["optimizer"]["class"]
    try:
        state.restore(training.model, training.loss, optimizer if same else None, None, training.device)
    except ValueError as error:
        raise RunError(f"the objects do not fit the run's state: {error}") from None
    before = training.hyperparameters() if same else {}
    if keep:
        for group, settings in zip(optimizer.param_groups, fresh, strict=True):
            group.update(settings)
    return before


def _made_data(run: RecordedRun, experiment: Experiment) -> Data | None:
    return experiment_job(experiment, run.name, torch.device("cpu")).data


def iteration_of(facts: TrainingFacts, steps: int | None) -> dict[str, Any]:
    """Return the arguments of `train` that a run was trained with."""
    engine = facts.engine or EAGERLY
    return {
        "steps": steps,
        "batch_size": facts.batches.batch_size,
        "drop_last": facts.batches.drop_last,
        "threads": facts.numerics.threads,
        "clip_norm": facts.clip_norm,
        "evaluate_every": facts.evaluate_every,
        "engine": engine.asked,
        "fold": engine.fold,
    }


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | list)
