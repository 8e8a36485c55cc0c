"""Fork: a run that equals its parent up to a step and continues with changes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR, ReduceLROnPlateau

from everystep.bounded import check_steps
from everystep.device import select
from everystep.errors import ExperimentError, Fault, RunError, UsageError
from everystep.experiment.batches import RowsOf
from everystep.experiment.source_files import note_named
from everystep.experiment.specification import check_iteration, load
from everystep.recording.directories import create_directory
from everystep.recording.facts import Facts, ForkFacts
from everystep.recording.recorded_run import EXPERIMENT_FILE, RecordedRun, Stretch, stretch_at
from everystep.recording.recorder import Recorder
from everystep.recording.snapshots import DEFAULT_BUDGET
from everystep.replay.changed_steps import ChangedSteps, FurtherSteps
from everystep.replay.processes import Opener
from everystep.replay.recorded_batches import stored_data
from everystep.replay.recorded_columns import changed_settings
from everystep.replay.run_replay import no_such_step
from everystep.replay.trained_objects import (
    iteration_of,
    job_to_continue,
    objects_from,
    state_to_continue,
    with_rows_of,
)
from everystep.replay.without_objects import (
    by_own_code,
    check_alone,
    check_determined,
    check_has_rows,
    continue_alone,
    facts_alone,
)
from everystep.step.own_state import optimizer_settings
from everystep.step.state import State, same_bits
from everystep.training.description import optimizer_facts
from everystep.training.from_experiment import experiment_job, of_torch_alone
from everystep.training.job import Job, Outcome, Progress, StartingPoint
from everystep.training.loop import run_job
from everystep.training.model_step import Training
from everystep.training.objects import Objects
from everystep.training.writer import now

__all__ = ["Fork", "fork"]


@dataclass(frozen=True)
class Fork:
    """A request: a fork of `run` at state `at`, in a directory or the next free one.

    settings: what changes, by path, as in an experiment; of a run from Python objects, `lr` and the
    arguments of `train` that are plain values; without: rows of the data that are left out of the
    batches that they were in; targets: other targets, by row.
    """

    run: RecordedRun
    at: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    directory: Path | None = None
    budget: float = DEFAULT_BUDGET
    without: tuple[int, ...] = ()
    targets: Mapping[int, float] = field(default_factory=dict)

    @property
    def changed(self) -> dict[str, Any]:
        """The changes that are plain data."""
        plain = (int, float, str, list, type(None))
        found = {path: each for path, each in self.settings.items() if isinstance(each, plain)}
        if self.without:
            found["without_rows"] = list(self.without)
        if self.targets:
            found["relabel"] = [f"{row}={target:g}" for row, target in self.targets.items()]
        return found

    @property
    def last(self) -> int:
        """The last step of a fork by programs."""
        run = self.run
        planned = run.newest_step() if run.facts.training.loop else run.facts.steps
        return self.settings.get("steps") or planned or 0

    @property
    def stretch(self) -> Stretch:
        """The part of the parent that the state belongs to."""
        stretches = self.run.stretches
        # The state may be the last of a stretch, but the fork takes the steps that follow it.
        return stretches[stretch_at(stretches, self.at + 1)]

    def facts(self, steps: int) -> ForkFacts:
        """Return the facts of a fork that ends at a step.

        Raises:
            UsageError: it has no step to take.
        """
        if steps <= self.at:
            raise UsageError(
                f"the fork starts after step {self.at} but would end at step {steps}; set more "
                f"steps (steps={self.at + 500})"
            )
        run, changed = self.run, self.changed
        return ForkFacts(parent=run.name, directory=str(run.directory), at=self.at, changed=changed)

    def state(self, opener: Opener, objects: Objects | None = None) -> State:
        """Return the parent's state. objects: those that trained it, if it has no experiment.

        Raises:
            RunError: it cannot be reached, or not bit for bit.
        """
        state = opener.call(state_to_continue, self.at, objects)
        diverged = opener.diverged_at
        if diverged is not None and diverged <= self.at:
            raise RunError(
                f"state {self.at} of {self.run.name} cannot be restored bit for bit: in the replay, "
                f"the loss of step {diverged} differs from the recording (run everystep verify "
                "for details); snapshots: "
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
        fork = self.facts(job.steps)
        if (count := self.stretch.facts.processes) > 1:
            notice = (
                f"{count} processes trained {self.run.name}, and one trains the fork: results differ by "
                "rounding and by random draws, and the steps so far open in the former only"
            )
            job = replace(job, notices=[*job.notices, notice])
        job = job if new_data else job.numbered_as(self.stretch.facts)
        job = job.relabelled(self.targets)
        # With a scheduler, all is recorded; without one, only what changed.
        known = {} if job.training.scheduler else hyperparameters
        known = known | changed_settings(self.run, self.run.facts.training, 0)(self.at)
        has_new_data = new_data or bool(self.targets)
        given = self.run, self.at, known, has_new_data, fork
        origin = StartingPoint(*given, directory=self.directory, budget=self.budget)
        job = replace(job, name=f"{self.run.name}-fork", origin=origin)
        job = job.without_rows(self.without, self.at, self.stretch.facts.batches.without)
        return run_job(job, progress)

    def bring(
        self,
        training: Training,
        state: State,
        kinds: Sequence[str],
        own: Collection[str] | None,
        *,
        has_scheduler: bool,
    ) -> dict[str, float]:
        """Bring a training to the parent's state; return the parent's lr and similar settings.

        kinds: what to bring, as in `Training.restore`; own: the settings of the fork's optimizer that
        stay, None for all; has_scheduler: whether it continues the parent's scheduler.

        Raises:
            RunError: something does not fit the state.
        """
        groups = training.optimizer.param_groups
        # `restore` overwrites them with the settings of the parent.
        fresh = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        training.restore(self._with_scheduler(training, state) if has_scheduler else state, kinds)
        if "optimizer" not in kinds:
            return {}
        before = training.hyperparameters()
        for group, settings in zip(training.optimizer.param_groups, fresh, strict=True):
            chosen = {key: value for key, value in settings.items() if own is None or key in own}
            _check_kept(training.optimizer, group, chosen)
            group.update(chosen)
        return before

    def _with_scheduler(self, training: Training, state: State) -> State:
        """Bring a scheduler to the parent's state; return the state with what the scheduler set."""
        scheduler = training.scheduler
        # A replayed state has no scheduler: it continues from the snapshot before.
        known = self.run.state_near(self.at, after=self.stretch.first - 2)
        if scheduler is None or known is None:
            return state
        training.restore(known, ("model", "optimizer", "scheduler"))
        batches = self.stretch.facts.batches
        # Epochs are the parent's up to here.
        continued = replace(training, steps_per_epoch=batches.steps_per_epoch)
        followed = self.run.values_of("validation_loss")
        with warnings.catch_warnings():
            # torch warns that the optimizer has not stepped, which is correct here.
            warnings.simplefilter("ignore", UserWarning)
            for number in range(known.step + 1, self.at + 1):
                # This scheduler follows the validation loss, which only the run still has.
                if isinstance(scheduler, ReduceLROnPlateau) and number in followed:
                    scheduler.step(followed[number])
                continued.advance(number)
        names = training.parts.parameter_names()
        groups = optimizer_settings(training.optimizer, names)["groups"]
        return state.with_optimizer("optimizer", groups)


def fork(
    asked: Fork, given: Objects, known: Objects | None, opener: Opener, progress: Progress
) -> tuple[Outcome, Objects | None]:
    """Answer `Run.fork`: by the experiment, by the objects that train, or by the programs alone.

    given: the objects among its arguments; known: those that trained the run in this process; opener:
    opens the parent's states.

    Returns what was trained, and the objects that trained it.
    """
    if asked.run.facts.training.loop:
        # The run of any rank stands for the whole: a fork is made from that of rank 0.
        asked = replace(asked, run=asked.run.ranks[0])
    run = asked.run
    if not 0 <= asked.at <= run.newest_step():
        raise no_such_step(run, asked.at)
    if (steps := asked.settings.get("steps")) is not None:
        asked = replace(asked, settings={**asked.settings, "steps": check_steps(steps)})
        asked.facts(asked.last)  # a step to take comes first
    is_experiment = (run.directory / EXPERIMENT_FILE).exists() and not given.names
    # An experiment calls it `optimizer.lr`, other runs `lr`; a user may give either.
    other, own = ("lr", "optimizer.lr") if is_experiment else ("optimizer.lr", "lr")
    asked = replace(asked, settings={own if k == other else k: v for k, v in asked.settings.items()})
    if run.facts.training.loop:
        _check_loop(asked, given)
        return _fork_alone(asked, progress), None
    if is_experiment:
        return _fork_experiment(asked, opener, progress), None
    objects, is_own = objects_from(given, known)
    if objects is not None:
        return _fork_objects(asked, objects, given, is_own, opener, progress), objects
    others = set(asked.changed) - {"lr", "steps"}
    check_alone(run, asked.stretch, "fork(..., ", "only lr and steps can change" if others else None)
    return _fork_alone(asked, progress), None


def _check_loop(asked: Fork, given: Objects) -> None:
    """Check that the programs of a user's loop can take its recorded steps with the changes."""
    run, at = asked.run, asked.at
    if asked.without:
        check_has_rows(run, at)
    if asked.targets:
        run.check_alone("make a fork of such a run with other targets")
    others = given.names | {*asked.settings} - {"lr", "steps"}
    if others or not (asked.targets or "lr" in asked.settings):
        raise RunError(
            f"{run.name} was recorded from your own code, which makes its forks: {by_own_code(run, at)}"
            "; its programs alone can change lr and targets (relabel)"
        )
    last = asked.last
    if at >= (newest := run.newest_step()) or last > newest:
        raise UsageError(
            f"{run.name} has no batches after step {newest:,}: a fork by its programs begins before "
            "that step, and ends there at the latest"
        )
    change = "relabelled" if asked.targets else "at another rate"
    for rank in run.ranks:
        check_determined(rank, at, last, change, is_of_rates="lr" in asked.settings)


def _fork_alone(asked: Fork, progress: Progress) -> Outcome:
    run, at, lr = asked.run, asked.at, asked.settings.get("lr")
    if lr is not None and not (type(lr) in (int, float) and 0 <= lr < math.inf):
        raise UsageError(f"lr is {lr!r:.80}; pass a learning rate from 0 on")
    changed = {key: value for key, value in asked.changed.items() if key != "steps"}
    tops: list[Path] = []

    def steps_of(of_rank: RecordedRun, stretch: Stretch, rule: RowsOf | None) -> ChangedSteps:
        if stretch.facts.loop is None:
            return FurtherSteps(of_rank, stretch, rule, lr)
        last = min(asked.last, of_rank.newest_step())  # a rank may have fewer batches
        return ChangedSteps(of_rank, stretch, rule, range(at + 1, last + 1), lr, asked.targets)

    def record(of_rank: RecordedRun, state: State) -> tuple[Recorder, Facts]:
        # An experiment of the parent does not describe the fork.
        trained = facts_alone(of_rank, at, lr).model_copy(update={"experiment_file": None})
        # Rank 0 comes first; the directories of the others lie within its own.
        wanted = tops[0] / of_rank.within if tops else asked.directory
        tops.append(place := create_directory(wanted, f"{run.name}-fork"))
        fork = replace(asked, run=of_rank).facts(asked.last).model_copy(update={"changed": changed})
        facts = Facts(name=place.name, started=now(), steps=asked.last, trained=trained, fork=fork)
        # The batches are the parent's, which kept to its budget; only what changed is new.
        recorder = Recorder(place, facts, asked.budget, of_rank, at, math.inf, beginning=state)
        return recorder, facts

    return continue_alone(run, at, steps_of, record, progress)


def _fork_experiment(asked: Fork, opener: Opener, progress: Progress) -> Outcome:
    facts = asked.stretch.facts
    experiment = asked.run.experiment(facts)
    if experiment is None:
        raise RunError(f"{asked.run.name} has no experiment: {EXPERIMENT_FILE} is missing")
    old, new = load(experiment), load(experiment, asked.settings)
    # A file that the user names may be read; those that only the run names may be a stranger's choice.
    note_named(set(new.data.files) - set(old.data.files))
    device = select(new.device)
    old, new = old.with_fused(device.type), new.with_fused(device.type)
    state = asked.state(opener)
    with of_torch_alone("the fork", new.threads or facts.numerics.threads, device):
        data = None
        if new.data == old.data:  # also where the seed that it was drawn with changes
            data = stored_data(asked.run, facts)
            # The run does not hold it; from the old experiment, since data is drawn with its seed.
            if data is None:
                data = experiment_job(old, torch.device("cpu")).data
        job = experiment_job(new, device, data)
        training = job.training
        same_optimizer = old.optimizer.name == new.optimizer.name
        same_scheduler = same_optimizer and old.scheduler == new.scheduler
        keywords = old.optimizer.keywords, new.optimizer.keywords
        keys = {*keywords[0], *keywords[1]}
        changed = {key for key in keys if keywords[0].get(key) != keywords[1].get(key)}
        sets_rate = same_scheduler and training.scheduler is not None and "lr" in changed
        if sets_rate:
            _check_follows(training)
        # A loss or an optimizer of another class begins without the state of the parent's.
        kinds = ["model", *["loss"] * (old.loss == new.loss), *["optimizer"] * same_optimizer]
        try:
            own = changed if same_scheduler else None
            before = asked.bring(training, state, kinds, own, has_scheduler=same_scheduler)
        except RunError as error:
            fault = Fault("model.layers", f"the parent's parameters do not fit: {error}")
            raise ExperimentError([fault], "the fork") from None
        # Not that of the param groups: a warm-up has multiplied it as it was made.
        if sets_rate:
            _set_rate(training, training.optimizer.defaults["lr"])
        # After the parent's state, which includes the parent's random generators.
        if new.seed != old.seed:
            torch.manual_seed(new.seed)
        if data is not None:
            job = job.with_facts(preparation=facts.preparation)
        return asked.train(job, before, data is None, progress)


def _fork_objects(
    asked: Fork,
    objects: Objects,
    given: Objects,
    is_own: bool,
    opener: Opener,
    progress: Progress,
) -> Outcome:
    """Train the objects in place, or copies of those that trained the run itself (`is_own`).

    given: those among them that were passed. The settings of an optimizer that is not the run's own
    apply. A scheduler continues from the parent's, unless it is a new one with other settings.
    """
    objects.check_complete()
    facts = asked.stretch.facts
    settings = dict(asked.settings)
    lr = settings.pop("lr", None)
    iteration = check_iteration(**(iteration_of(facts, asked.run.facts.steps) | settings))
    # A Dataset may give other rows to batches other than the recorded ones.
    last = math.inf if settings.keys() & {"epochs", "batch_size", "drop_last", "seed"} else asked.last
    objects = with_rows_of(asked.run, facts, objects, given, last, "fork(..., ")
    state = asked.state(opener, objects)
    own = objects.copied() if is_own else objects
    seed = settings.get("seed", facts.batches.seed)
    with job_to_continue(own, asked.run, facts, iteration, "fork(..., ", seed, progress) as job:
        is_known = (is_own and given.scheduler is None) or job.facts.schedulers == facts.schedulers
        known = {each.class_name for each in facts.schedulers.values()} if is_known else set()
        goes_on = type(own.scheduler).__name__ in known
        training = job.training
        # What differs from the parent's in state 0 is a change of the user's, and stays.
        first = None if is_own else asked.run.state_near(0)
        own_settings = _other_settings(training, first) if is_own or goes_on else None
        sets_rate = lr is not None or "lr" in (own_settings or ())
        if sets_rate:
            _check_follows(training)
        kinds = ["model", *["loss"] * (first is None or not _has_other_loss(training, first))]
        kinds += ["optimizer"] * (
            type(training.optimizer).__qualname__ == state.optimizer("optimizer")["class"]
        )
        try:
            before = asked.bring(training, state, kinds, own_settings, has_scheduler=goes_on)
        except RunError as error:
            raise RunError(f"the objects do not fit the run's state: {error}") from None
        # After the parent's state, which includes the parent's random generators.
        if "seed" in settings:
            torch.manual_seed(settings["seed"])
        else:
            job = job.with_facts(seed=facts.seed)
        if sets_rate:
            _set_rate(training, lr)
        job = job.with_facts(optimizers={"optimizer": optimizer_facts(job.training.optimizer)})
        if own.data is None:  # rows of recorded steps stay that
            of_steps = {"of_recorded_steps": facts.data.of_recorded_steps}
            job = job.with_facts(data=job.facts.data.model_copy(update=of_steps))
        # Of other validation rows, or of a share, the file of the parent has nothing.
        has_new_data = own.data is not None or given.validation is not None
        return asked.train(job, before, has_new_data, progress)


def _check_kept(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], chosen: Mapping[str, Any]
) -> None:
    """Check that an optimizer which has taken steps has all the state that changed settings need."""
    # Adam creates `max_exp_avg_sq` in its first step, with amsgrad only, and RMSprop its averages: a
    # later step that needs them would fail, or begin them in the middle.
    names = ("amsgrad", "centered") + ("momentum",) * isinstance(optimizer, torch.optim.RMSprop)
    kind = type(optimizer).__name__
    faults = [
        Fault(
            f"optimizer.{name}",
            f"cannot be turned on after step 1: {kind} keeps what it needs for that from there on; fork "
            "at step 0",
        )
        for name in names
        if optimizer.state and chosen.get(name) and not group.get(name)
    ]
    if faults:
        raise ExperimentError(faults, "the fork")


def _schedulers(scheduler: Any) -> list[Any]:
    """Return a scheduler and those within it; an empty list for None."""
    within = [_schedulers(each) for each in getattr(scheduler, "_schedulers", ())]
    return [*([] if scheduler is None else [scheduler]), *chain.from_iterable(within)]


def _check_follows(training: Training) -> None:
    """Raise RunError if a scheduler has rates of its own, so that another rate would end with a step."""
    for each in _schedulers(training.scheduler):
        if isinstance(each, CyclicLR | OneCycleLR):
            name = type(each).__name__
            raise RunError(
                f"{name} has rates of its own, so a different lr would end after one step; change its "
                "max_lr instead: scheduler.max_lr of an experiment, or a fork with another scheduler=..."
            )


def _set_rate(training: Training, lr: float | None) -> None:
    """Set the learning rate; a scheduler, and those within it, continue from it.

    lr: None for what each param group began with.
    """
    groups = training.optimizer.param_groups
    rates = [group["initial_lr"] if lr is None else lr for group in groups]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
        # A scheduler computes from this rate, and most of them from `base_lrs`, below.
        if "initial_lr" in group:
            group["initial_lr"] = rate
    for each in _schedulers(training.scheduler):
        if hasattr(each, "base_lrs"):
            each.base_lrs = [*rates]


def _other_settings(training: Training, first: State | None) -> set[str]:
    """Return the settings of the optimizer that differ from those of one of its class in a state."""
    now = optimizer_settings(training.optimizer, training.parts.parameter_names())
    begun = {} if first is None else first.optimizer("optimizer")
    if begun.get("class") != now["class"]:
        return set()
    pairs = zip(now["groups"], begun["groups"], strict=False)
    return {name for own, known in pairs for name in own if own[name] != known.get(name)}


def _has_other_loss(training: Training, first: State) -> bool:
    """Return whether the tensors of the loss are not those of a state."""
    known, of_model = first.named(), training.parts.only(["model"]).state()
    live = training.parts.only(["model", "loss"]).state()
    own = {name: tensor for name, tensor in live.items() if name not in of_model}
    return any(n not in known or not same_bits(t.cpu(), known[n]) for n, t in own.items())
