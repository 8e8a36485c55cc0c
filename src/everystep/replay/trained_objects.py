"""What trained a run: its arguments, its data, and the objects that continue it.

`Living` takes steps with them that are not recorded: those of a what-if, and those on the way to a state
from which Python continues.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FunctionType
from typing import Any

import torch

from everystep import numerics
from everystep.bounded import MOST_STEPS
from everystep.device import select
from everystep.errors import EverystepError, ExperimentError, RunError
from everystep.experiment.batches import Batches, RowsOf
from everystep.experiment.specification import Iteration, load
from everystep.ops.operators import without_autograd
from everystep.program.interpreter import Interpreter
from everystep.program.memory import copy_into, copy_on_cpu
from everystep.recording.facts import EAGERLY, TrainingFacts
from everystep.recording.recorded_run import RecordedRun, Stretch
from everystep.replay.opened_step import Batch, Step, observed_step, of_kind
from everystep.replay.recorded_batches import batch_source, stored_data
from everystep.replay.recorded_columns import changed_settings
from everystep.replay.run_replay import Replay
from everystep.step.generators import Generators, generators_preserved
from everystep.step.hyperparameters import set_hyperparameter
from everystep.step.observe import StepObserver
from everystep.step.state import State
from everystep.training.dataset import DEFAULT_DATASET_LIMIT
from everystep.training.from_experiment import experiment_job
from everystep.training.from_objects import objects_job
from everystep.training.job import Job, Progress
from everystep.training.model_step import Training
from everystep.training.objects import Objects, is_dataset
from everystep.training.stepper import Engine, Stepper
from everystep.training.writer import Unwritten

__all__ = [
    "Living",
    "iteration_of",
    "job_to_continue",
    "objects_from",
    "state_to_continue",
    "with_rows_of",
]


def objects_from(given: Objects, known: Objects | None) -> tuple[Objects | None, bool]:
    """Return the objects that continue a run, and whether they are those that trained it.

    given: to `fork` or `resume`; known: the objects that trained the run in this process. Without
    objects, None: only the run's programs can continue.

    Raises:
        RunError: some are given, without those that a step needs.
    """
    is_own = given.model is None and given.loss is None and given.optimizer is None
    objects = known if is_own else given
    if objects is None or objects.model is None:
        if given.names:  # nothing would use them
            given.check_complete()
        return None, is_own
    names = ["data", "validation", "metrics", "scheduler"]
    names += ["scheduler_every"] * (given.scheduler is not None)
    others = {name: each for name, each in vars(given).items() if name in names and each is not None}
    return replace(objects, **others), is_own


def with_rows_of(
    run: RecordedRun, facts: TrainingFacts, objects: Objects, given: Objects, last: float, call: str
) -> Objects:
    """Return objects without their Dataset, if the run holds the rows of all steps up to `last`.

    given: those that were passed: a Dataset among them is read; call: the beginning of the user's call.

    Raises:
        RunError: the run holds those of the recorded steps only, and a Dataset is missing.
    """
    file, is_longer = facts.data_file, facts.data.of_recorded_steps and last > run.newest_step()
    if is_longer and objects.data is None:
        validation = ", validation=(x, y)" * (facts.has_validation and objects.validation is None)
        raise RunError(
            f"{run.name} was trained on a Dataset that everystep read at every step, and holds only the "
            f"rows of its recorded steps; pass it: {call}data=dataset{validation})"
        )
    has_rows = file is not None and file.stored and not is_longer
    is_needless = has_rows and given.data is None and is_dataset(objects.data)
    return replace(objects, data=None) if is_needless else objects


def state_to_continue(replay: Replay, number: int, objects: Objects | None) -> State:
    """Return a state from which Python can continue.

    number: the step before the state; objects: those that trained the run, if it has no experiment.
    """
    run = replay.run
    stretch = replay.stretches[replay.stretch_of(number)]
    engine = stretch.facts.engine
    turn = None if engine is None else engine.eager_from
    is_shared = stretch.facts.ranks is not None  # Python would need all ranks to repeat the steps
    if is_shared or turn is None or turn > number + 1:
        return replay.state(number)
    known = objects or Objects()
    # Another call would change what a function or a Dataset keeps.
    has_next = not isinstance(known.loss, FunctionType) and not stretch.facts.data.lazy
    has_next &= stretch.first <= number + 1 <= (stretch.last or run.newest_step())
    is_stored = turn > number or number in run.snapshots
    if is_stored and not has_next:
        return replay.state(number)
    # A replay of steps that Python took restores tensors only; for everything else that objects hold (a
    # counter, a scheduler's rate), Python repeats the steps since the last snapshot.
    # The state that a stretch begins with has the objects of the stretch, not of the one before.
    begin = run.state_near(number, after=stretch.first - 2) or replay.state(stretch.first - 1)
    begin = replay.state(number) if is_stored else begin
    with replay.in_force(number):
        stepper = Living(run, stretch, known, begin, "eager")
        losses = stepper.run(number)
        replay.compare(begin.step + 1, losses)
        state = begin if is_stored else stepper.capture()
        # Their next step shows whether they hold what no state has, such as a count of calls.
        if (
            replay.diverged_at is None
            and has_next
            and replay.compare(number + 1, stepper.run(number + 1))
        ):
            raise RunError(
                f"the objects that trained {run.name} do not continue it: from state {number} on, the "
                f"loss of step {number + 1} differs from the recording, as they hold something that no "
                "state has; pass them as they were before training: model=..., loss=..., optimizer=..."
            )
        return state


@contextmanager
def job_to_continue(
    objects: Objects,
    run: RecordedRun,
    facts: TrainingFacts,
    iteration: Iteration,
    call: str,
    seed: int | None,
    progress: Progress,
) -> Iterator[Job]:
    """Yield the job of objects, with the run's rows if they have none; compute as a training meanwhile.

    call: the beginning of the user's call; seed: of torch's generator, None to leave it as it is.

    Raises:
        RunError: the run does not hold its data, or its validation rows.
        ExperimentError: an object is invalid; lists every error.
    """
    device = select(facts.device)
    lacks_validation = objects.validation is None and facts.has_validation
    if objects.data is None or lacks_validation:
        stored = stored_data(run, facts)
        if objects.data is None:
            if stored is None:
                data = "dataset" if facts.data.lazy else "(x, y)"
                raise RunError(f"the data of {run.name} is not in the run; pass it: {call}data={data})")
            objects = replace(objects, data=(stored.x, stored.y))
        if lacks_validation:
            if stored is None or stored.validation is None:
                raise RunError(
                    f"{run.name} measured rows for validation, which are not in the run; pass them: "
                    f"{call}validation=(x, y))"
                )
            objects = replace(objects, validation=stored.validation)
    trained = replace(objects, dataset_limit=DEFAULT_DATASET_LIMIT)
    trained.check()
    numerics.prepare()
    with numerics.in_force(iteration.threads), generators_preserved(device):
        trained.model.to(device)
        if seed is not None:
            torch.manual_seed(seed)
        yield objects_job(trained, iteration, device, progress)


def iteration_of(facts: TrainingFacts, steps: int | None) -> dict[str, Any]:
    """Return the arguments of `train` that a run was trained with."""
    engine = facts.engine or EAGERLY
    return {
        "steps": steps,
        "batch_size": facts.batches.batch_size,
        "drop_last": facts.batches.drop_last,
        "threads": facts.numerics.threads,
        "max_grad_norm": facts.max_grad_norm,
        "evaluate_every": facts.evaluate_every,
        "stop_on_nan": facts.stop_on_nan,
        "engine": engine.asked,
    }


class Living:
    """A training of a run, restored at a state.

    stretch: the part of the run that the training is of; objects: those that trained it, if it has no
    experiment; engine: `auto`: programs may take steps; `eager`: Python takes all, as objects may hold
    more than tensors.

    Raises:
        RunError: there are no objects, or they do not fit the state.
    """

    def __init__(
        self,
        run: RecordedRun,
        stretch: Stretch,
        objects: Objects,
        state: State,
        engine: Engine = "auto",
    ) -> None:
        self._run = run
        self._training = training = _training(run, stretch, objects)
        self._settings = changed_settings(run, stretch.facts, stretch.first)
        self._between = run.change_files()
        try:
            training.restore(state, ("model", "loss", "optimizer"))
        except RunError as error:
            raise RunError(
                f"state {state.step} does not fit the training: {error}; open the run with objects as "
                "they were before training: everystep.open(run, model=..., loss=..., optimizer=...)"
            ) from None
        self._beginning = training.snapshot(state.step)
        # Takes what the stepper would write: nothing of these steps is recorded.
        self._new = Unwritten()
        self._stepper = Stepper(training, self._new, MOST_STEPS, engine)
        self._watched = self._stepper.watched
        self._stepper.restart(state.step)

    def begin(self, batches: Batches) -> None:
        """Start again, with these batches of the same rows."""
        assert isinstance(self._training.batch, RowsOf)
        self._training.batch.use(batches)
        self._training.restore(self._beginning)
        self._stepper.restart(self._beginning.step)

    def capture(self) -> State:
        """Return the current state in the form that is written to disk."""
        # A rate that is a tensor is of the state: it is set before that is copied.
        if self._training.has_tensor_settings:
            self._set_hyperparameters()
        return self._training.snapshot(self._stepper.step)

    def run(self, last: int) -> list[float]:
        """Run the steps up to `last`; return their losses.

        Raises:
            RunError: a step fails.
        """
        losses: list[float] = []
        while self._stepper.step < last:
            number = self._set_hyperparameters()
            # Settings, and tensors, may change before each step.
            alone = self._between or self._settings(MOST_STEPS)
            with self._watching():
                self._stepper.advance(number if alone else last)
            losses += self._stepper.collect().tolist()
            self._new.clear()
            self._settle()
        return losses

    def open(self) -> Step:
        """Run the next step in Python, and return everything in it.

        Raises:
            RunError: it fails, or no program can hold it.
        """
        number, watched, device = self._set_hyperparameters(), self._watched, self._training.device
        # Python is about to change these, and the program takes the step again from them.
        state = {name: tensor.clone() for name, tensor in watched.parts.state().items()}
        generators = Generators.capture(device)
        with self._watching():
            batch = dict(zip("xy", self._training.batch(number), strict=True))
            inputs = {f"batch/{name}": tensor.detach().clone() for name, tensor in batch.items()}
            self._stepper.watch(number, *batch.values())
        built, taken = watched.last_program(), self._new.taken[-1]
        if isinstance(built, str):
            raise RunError(f"step {number} cannot be observed: a program cannot hold what it does")
        inputs |= taken.inputs
        # The step has been taken once, to see its operations, and is repeated from the same draws.
        generators.restore(device)
        interpreter, numbers = Interpreter(built.program, device).at(taken.numbers or ())
        observer = StepObserver(interpreter, numbers, state)
        with without_autograd():
            loss, _ = interpreter.run(state, inputs, numbers, observer.looks)
        self._stepper.restart(number)
        assert loss is not None
        tensors = {name: copy_on_cpu(tensor) for name, tensor in batch.items()}
        seen = Batch(tensors, None, tuple(tensors.values()))
        return observed_step(number, observer.observation(loss), seen)

    def _settle(self) -> None:
        """Apply the changes of other code after the last step, before anything else runs."""
        step = self._stepper.step
        if step not in self._between:
            return
        tensors = self._run.change(self._between[step]).tensors
        live = self._training.named_state()
        with torch.no_grad():
            for name, tensor in tensors.items():
                if name in live and live[name].shape == tensor.shape:
                    copy_into(live[name], tensor)
        device = self._training.device
        if drawn := of_kind(tensors, "generator"):
            # Only those that were drawn from are in a change: the others stay.
            Generators.from_tensors(Generators.capture(device).tensors() | drawn).restore(device)

    def _set_hyperparameters(self) -> int:
        """Set what the optimizer uses in the next step; return the number of that step."""
        number = self._stepper.step + 1
        for name, value in self._settings(number).items():
            set_hyperparameter(self._training.optimizer.param_groups, name, value)
        return number

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Follow modules and optimizers within; name the step in which user code or torch raised."""
        try:
            yield
        except EverystepError:
            raise
        except Exception as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            number = self._stepper.step + 1
            raise RunError(f"step {number} fails during the replay: {reason}") from error
        finally:
            self._watched.finish()


def _training(run: RecordedRun, stretch: Stretch, objects: Objects) -> Training:
    """Return the training with its model, from the user or from the experiment, without a scheduler."""
    facts = stretch.facts
    device = select(facts.device)
    batch = batch_source(run, facts, objects.data, device)
    if objects.model is not None:
        objects.check_complete()
        # The user's objects stay as they are: a what-if trains many times.
        own = objects.copied()
        own.model.to(device)
        norm = facts.max_grad_norm
        return Training(own.model, own.loss, own.optimizer, batch, device, max_grad_norm=norm)
    # Without its file, a run is still replayed as far as its programs go.
    experiment = None if run.lost_experiment(facts) else run.experiment(facts)
    if experiment is None:
        raise RunError(
            f"steps other than the recorded ones need the objects that trained {run.name}: "
            "everystep.open(run, model=..., loss=..., optimizer=...)"
        )
    try:
        # Data that the run holds is not read from its source, which may be gone, or named by a stranger.
        training = experiment_job(load(experiment), device, stored_data(run, facts)).training
    except ExperimentError as error:
        raise RunError(f"the experiment of {run.name} cannot be used: {error}") from None
    # The rates are the recorded ones, set before each step: see `_set_hyperparameters`.
    return replace(training, batch=batch, scheduler=None)
