"""Resume: continues a run from its newest snapshot, to the bits of an uninterrupted one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from everystep.device import select
from everystep.errors import RunError, UsageError
from everystep.experiment.source_files import note_named
from everystep.experiment.specification import Experiment, Iteration, check_iteration, load
from everystep.recording.facts import Facts, TrainingFacts
from everystep.recording.files import check_data
from everystep.recording.recorded_run import EXPERIMENT_FILE, RecordedRun
from everystep.recording.recorder import Recorder
from everystep.recording.settings_diff import flat
from everystep.recording.snapshots import DEFAULT_BUDGET
from everystep.replay.changed_steps import FurtherSteps
from everystep.replay.recorded_batches import stored_data
from everystep.replay.recorded_columns import changed_settings
from everystep.replay.trained_objects import (
    iteration_of,
    job_to_continue,
    objects_from,
    with_rows_of,
)
from everystep.replay.without_objects import check_alone, continue_alone, facts_alone
from everystep.step.generators import generators_preserved
from everystep.step.parts_state import PartsState
from everystep.step.state import State
from everystep.training.agreement import Agreement, run_to_continue
from everystep.training.from_experiment import experiment_job, of_torch_alone
from everystep.training.job import Job, Outcome, Progress, StartingPoint
from everystep.training.loop import run_job
from everystep.training.model_step import training_parts
from everystep.training.objects import Objects
from everystep.training.resumed import (
    accepted_changes,
    check_rules,
    check_taken_by_loop,
    facts_resumed,
    refuse_changes,
    resume_facts,
)

__all__ = ["Resume", "resume", "resume_experiment", "resume_objects"]


@dataclass(frozen=True)
class Resume:
    """A request.

    steps: the last step, None for that of the run; is_accepted: continue although something changed, and
    discard the recorded steps after the snapshot; budget: maximum bytes of snapshots; user_facts: of the
    user.
    """

    run: RecordedRun
    steps: int | None = None
    is_accepted: bool = False
    budget: float = DEFAULT_BUDGET
    user_facts: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Check that there is something to train.

        Raises:
            UsageError: the run has all its steps.
        """
        recorded, planned = len(self), self.run.facts.steps or 0
        if self.steps is not None and self.steps < max(recorded, 1):
            raise UsageError(
                f"{self.run.name} has {recorded:,} steps already, so it cannot end at step "
                f"{self.steps:,}; set more steps, or fork it (everystep fork {self.run.name} --at "
                f"{self.steps})"
            )
        if self._is_finished and (self.steps or planned) <= recorded:
            raise UsageError(
                f"{self.run.name} is finished: it has all its {recorded:,} steps; to train it further, "
                f"set more steps (--steps {recorded + 500})"
            )

    @property
    def has_all(self) -> bool:
        """Whether the run is finished, with all steps that are asked for."""
        return self._is_finished and self.last <= len(self)

    @property
    def _is_finished(self) -> bool:
        """Whether all ranks are, which take each step together."""
        return all(rank.status == "finished" for rank in self.run.ranks)

    def of_rank(self) -> Resume:
        """Return the same request, of the rank that this process is.

        Raises:
            RunError: as `run_to_continue`.
        """
        agreement = Agreement()
        agreement.check({"the run to resume": self.run.ranks[0].directory.name})
        return replace(self, run=run_to_continue(self.run, agreement))

    def __len__(self) -> int:
        # Ranks may have recorded different numbers of steps before they were killed.
        common = self.run.common_steps
        return self.run.newest_step() if common is None else common

    @property
    def last(self) -> int:
        """The last step to train.

        Raises:
            RunError: the run has no record of it.
        """
        last = self.steps or self.run.facts.steps
        if last is None:
            raise RunError(f"{self.run.name} has no planned number of steps; set steps")
        return last

    def train(self, job: Job, progress: Progress, left_out: tuple[str, ...] = ()) -> Outcome:
        """Continue with a job equal to that of the run when it began.

        left_out: prefixes of the names of settings that were not compared.
        """
        run, recorded, problems = self.run, len(self), list[str]()
        facts = run.facts.training
        state = run.state_near(recorded, on_problem=problems.append)
        if state is None and (recorded or problems):
            reason = "; ".join(problems) or "the training ended before it wrote one"
            raise RunError(
                f"{run.name} has no readable snapshot to continue from: {reason}; train it again"
            )
        # Without a state it was killed before its first one was on disk, and begins.
        begin = 0 if state is None else state.step
        job = replace(job, steps=self.last).numbered_as(facts)
        # Rows that the run was trained without stay left out.
        job = job.without_rows((), begin, facts.batches.without)
        # By default, how often follows from the number of steps, which may be another one.
        if job.evaluation is not None and facts.evaluate_every is not None:
            job = job.with_facts(evaluate_every=facts.evaluate_every)
        # A metric more or less changes no step.
        left_out = ("data.digest", "evaluate_every", *left_out)
        changed = accepted_changes(run, job.facts, is_accepted=self.is_accepted, left_out=left_out)
        if state is not None:
            check_rules(run, state.step)
            everything = ("model", "loss", "optimizer", "scheduler")
            job.training.restore(state, everything if self.is_accepted else None)
        # With changes accepted, the steps after the snapshot are discarded; else repeated and compared.
        at = begin if self.is_accepted or run.others is not None else recorded
        known = {} if job.training.scheduler else job.training.hyperparameters()
        origin = StartingPoint(
            run=run,
            at=begin,
            hyperparameters=known | changed_settings(run, facts, 0)(begin),
            has_new_data=facts.data_file is None,
            resumed=resume_facts(run, at, changed),
            budget=self.budget,
            user_facts=self.user_facts,
        )
        return run_job(replace(job, origin=origin, notices=[*job.notices, *problems]), progress)


def resume(
    asked: Resume, given: Objects, known: Objects | None, progress: Progress
) -> tuple[Outcome, Objects | None]:
    """Answer `Run.resume`: by the experiment, by the objects that train, or by the programs alone.

    given: the objects among its arguments; known: those that trained the run in this process.

    Returns what was trained, and the objects that trained it.
    """
    run = asked.run
    if run.facts.training.loop:
        check_taken_by_loop(run.facts)
        raise RunError(
            f"{run.name} was recorded from your own loop; resume it in the loop: "
            f"everystep.record(..., resume={str(run.directory)!r})"
        )
    if (run.directory / EXPERIMENT_FILE).exists() and not given.names:
        return resume_experiment(asked, progress), None
    objects, is_own = objects_from(given, known)
    if objects is not None:
        trained = with_rows_of(run, run.facts.training, objects, given, asked.last, "resume(..., ")
        return resume_objects(asked, trained, is_own, progress), objects
    run.check_alone("continue it without the objects that trained it")
    stretch = run.stretches[-1]
    check_alone(run, stretch, "resume(")
    asked.check()
    at = len(asked)
    facts = facts_resumed(run, facts_alone(run, at), asked.last, resume_facts(run, at))

    def record(_: RecordedRun, state: State) -> tuple[Recorder, Facts]:
        recorder = Recorder(run.directory, facts, asked.budget, at=at, is_resumed=True)
        return recorder, facts.model_copy(update={"name": run.name})

    return continue_alone(run, at, FurtherSteps, record, progress), None


def resume_experiment(
    asked: Resume, progress: Progress, experiment: Experiment | None = None
) -> Outcome:
    """Continue a run of an experiment; create everything from the experiment again.

    experiment: must be the run's, except for the number of steps, which is then this one's.
    """
    asked = asked.of_rank()
    run = asked.run
    facts = run.facts.training
    recorded = run.experiment(facts)
    if recorded is None:
        raise RunError(f"{run.name} has no experiment: {EXPERIMENT_FILE} is missing; train it again")
    known = load(recorded)
    if experiment is None:
        asked.check()
        experiment = known
    else:
        # The user has named these files, so they may be read.
        note_named(experiment.data.files)
        given = experiment.with_fused(select(experiment.device).type)
        _check_same_experiment(run, known, given)
        asked = replace(asked, steps=_steps_of(experiment, facts))
        if asked.has_all:
            return Outcome(run.directory)
    device = select(experiment.device)
    with of_torch_alone(run.name, experiment.threads or facts.numerics.threads, device):
        stored = stored_data(run, facts)
        job = experiment_job(experiment, device, stored)
        if stored is not None:
            job = job.with_facts(preparation=facts.preparation)
        else:
            _check_same_data(job, facts)
        text, name = None, facts.experiment_file
        if asked.last != _steps_of(known, facts):
            text = load(recorded, {"steps": asked.last}).to_toml()
            # The file of before stays: it has the experiment of the steps so far.
            name = f"experiment-{len(asked) + 1}.toml"
        job = replace(job, experiment_toml=text)
        return asked.train(job.with_facts(experiment_file=name), progress)


def resume_objects(
    asked: Resume,
    objects: Objects,
    is_own: bool,
    progress: Progress,
    iteration: Iteration | None = None,
) -> Outcome:
    """Continue a run from Python objects, which are trained in place.

    is_own: whether they are those that trained the run in this process; iteration: must be the run's,
    except for the number of steps, which is then this one's.
    """
    objects.check_complete()
    asked = asked.of_rank()
    run = asked.run
    facts = run.facts.training
    if iteration is not None:
        asked = replace(asked, steps=_steps_of(iteration, facts))
        if asked.has_all:
            _restore_objects(run, objects)
            return Outcome(run.directory)
        # Sums depend on the number of threads: the default is that of the run, not of this machine.
        iteration = iteration.model_copy(update={"threads": iteration.threads or facts.numerics.threads})
    else:
        asked.check()
        iteration = check_iteration(**iteration_of(facts, asked.last))
    is_stored = objects.data is None
    objects = _without_share(objects, run, facts) if is_stored else objects
    # The order of batches follows from this seed, whether torch's generator was reseeded or not.
    in_order = iteration.model_copy(update={"seed": facts.batches.seed})
    # Without a seed, it began with the caller's generator, as it does again.
    with job_to_continue(objects, run, facts, in_order, "resume(..., ", facts.seed, progress) as job:
        job = job.with_facts(seed=facts.seed)
        left_out: tuple[str, ...] = ("optimizer", "scheduler") if is_own else ()
        if is_stored:
            data = facts.data
            if data.of_recorded_steps:  # the rows that it holds do not include those for validation
                digest = job.facts.data.validation_digest
                data = data.model_copy(update={"validation_digest": digest})
            elif objects.validation is not None:
                _check_same_data(job, facts, "the validation data")
            job = job.with_facts(data=data)
        elif job.data is not None:
            _check_same_data(job, facts)
        elif facts.data.of_recorded_steps:  # of a Dataset, its rows are known once they have been read
            left_out += ("data.x", "data.y", "data.source", "data.lazy", "data.of_recorded_steps")
        return asked.train(job, progress, left_out)


def _without_share(objects: Objects, run: RecordedRun, facts: TrainingFacts) -> Objects:
    """Return objects without the share of rows to keep out: those that the run holds are split.

    Raises:
        RunError: another share was kept out.
    """
    share, kept_out = objects.validation, facts.data.validation_rows or 0
    if not isinstance(share, float):
        return objects
    count = facts.data.rows + kept_out
    if round(share * count) != kept_out:
        raise RunError(
            f"validation = {share} is not what {run.name} was trained with: {kept_out} of its {count} "
            "rows are kept out; resume it without validation="
        )
    return replace(objects, validation=None)


def _restore_objects(run: RecordedRun, objects: Objects) -> None:
    last, problems = run.newest_step(), list[str]()
    state = run.state_near(last, after=last - 1, on_problem=problems.append)
    if state is None:
        raise RunError(f"the last state of {run.name} cannot be read: {'; '.join(problems)}")
    device = select(run.facts.training.device)
    # A state includes the random generators, but the caller asked for the objects alone.
    with generators_preserved(device):
        objects.model.to(device)
        PartsState(training_parts(objects)).restore(state)


def _steps_of(iteration: Iteration, facts: TrainingFacts) -> int:
    """Return the number of steps, which may be set in epochs."""
    return iteration.steps or (iteration.epochs or 0) * facts.batches.steps_per_epoch


def _check_same_experiment(run: RecordedRun, known: Experiment, given: Experiment) -> None:
    one, other = (flat(each.model_dump(exclude={"steps", "epochs"})) for each in (known, given))
    changed = [path for path in one | other if one.get(path) != other.get(path)]
    texts = tuple(f"{path}: {one.get(path)} | {other.get(path)}" for path in changed)
    if texts:
        refuse_changes(run, texts)


def _check_same_data(job: Job, facts: TrainingFacts, what: str = "the data") -> None:
    if facts.data_file is None or job.data is None:
        return
    check_data(job.data.tensors(), facts.data_file, what)
