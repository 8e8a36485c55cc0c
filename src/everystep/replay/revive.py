"""Revive: a recorded training brought back, so that any of its steps can be taken again.

By its programs, none of the run's code is needed: there is a skeleton of the training, and nothing
more. Steps that were taken eagerly need the model, the loss and the optimizer themselves: from the
run's experiment, or from the user.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from everystep.errors import ExperimentError, ProgramError, RunError
from everystep.experiment.batches import Batches, RowsOf
from everystep.experiment.device import select
from everystep.experiment.specification import load
from everystep.program.execute import BoundProgram, without_autograd
from everystep.program.program import Program
from everystep.recording.data import check_data, read_data
from everystep.recording.run import RecordedRun, Stretch
from everystep.replay.skeleton import Skeleton, make_skeleton
from everystep.step.build import Built
from everystep.step.check import Saved
from everystep.step.eager import EagerStep, Trainee
from everystep.step.hyperparameters import is_hyperparameter, set_hyperparameter
from everystep.step.observe import Observation, observe_eager, observe_program
from everystep.step.programs import Programs
from everystep.step.state import State, generators_preserved
from everystep.training.from_experiment import experiment_job

__all__ = ["Objects", "Revived", "needed", "revive"]


@dataclass(frozen=True)
class Objects:
    """What the user trained with, for steps that no program takes, and for forks.

    data: x and y, where the run is too large to hold them; schedule and metrics: for forks alone.
    """

    model: nn.Module | None = None
    loss: Callable[[Any, Any], Tensor] | None = None
    optimizer: torch.optim.Optimizer | None = None
    data: tuple[Any, Any] | None = None
    schedule: LRScheduler | None = None
    schedule_every: str = "step"
    metrics: Mapping[str, Callable[[Tensor, Tensor], Any]] = field(default_factory=dict)

    def copied(self) -> Objects:
        """Return copies that belong to each other as these do.

        Raises:
            RunError: they cannot be copied.
        """
        try:
            model, loss, optimizer, schedule = copy.deepcopy(
                (self.model, self.loss, self.optimizer, self.schedule)
            )
        except Exception as error:  # whatever the user's objects make of being copied
            raise RunError(
                f"the model, loss and optimizer cannot be copied ({_first_sentence(error)}); "
                "give new ones: model=..., loss=..., optimizer=..."
            ) from None
        return replace(self, model=model, loss=loss, optimizer=optimizer, schedule=schedule)

    def check_complete(self) -> None:
        """Check that a step can be taken with them.

        Raises:
            RunError: names what is missing.
        """
        missing = [n for n in ("model", "loss", "optimizer") if getattr(self, n) is None]
        if missing:
            raise RunError(
                f"give {' and '.join(missing)} as well: a step takes a model, a loss and an optimizer"
            )


class _Changes(NamedTuple):
    """When a number of the optimizer changed, and to what."""

    steps: list[int]
    values: list[float]


class Revived:
    """A training whose steps can be taken again, in any order of loading and going on.

    first: the first step; state: the step whose state it holds, None before anything is loaded.
    """

    def __init__(
        self,
        first: int,
        trainee: Trainee,
        programs: Programs,
        eager_from: int | None,
        batches: Batches,
        changes: dict[str, _Changes],
    ) -> None:
        self.first = first
        self.trainee = trainee
        self.batches = batches
        self.programs = programs
        self.eager_from = eager_from
        self.state: int | None = None
        self._loaded: int | None = None
        self._changes = changes
        self._eager = EagerStep(trainee)

    def load(self, state: State) -> None:
        """Bring everything to a state from disk.

        Raises:
            RunError: it does not belong to this training.
        """
        trainee = self.trainee
        try:
            if isinstance(trainee.model, Skeleton):
                self._load_into_skeleton(state)
            else:
                state.restore(
                    trainee.model, trainee.loss, trainee.optimizer, trainee.schedule, trainee.device
                )
        except ValueError as error:
            raise RunError(f"state {state.step} does not fit the training: {error}") from None
        self._moved(state.step)

    def save(self) -> Saved:
        """Return a copy of the state as it is now."""
        return Saved(self.trainee)

    def restore(self, step: int, saved: Saved) -> None:
        """Bring everything back to what `save` returned after `step`."""
        saved.restore(self.trainee, forget_new=True)
        self._moved(step)

    def capture(self) -> State:
        """Return the state as it is now, as it is written to disk."""
        assert self.state is not None
        return self.trainee.state(self.state)

    def run(self, last: int) -> Tensor:
        """Take the steps up to `last`; return their losses, on the CPU.

        Raises:
            RunError: a step that neither a program nor a model takes.
        """
        assert self.state is not None
        losses: list[Tensor] = []
        while self.state < last:
            number = self.state + 1
            if self.is_by_program(number):
                bound = self.begin(number)
                with without_autograd():
                    for call in bound.calls:
                        call()
                    losses.append(bound.loss.clone())
            else:
                self.begin_eagerly(number)
                losses.append(self._eager.take(*self.trainee.batch(number)))
            self.state = number
        found = torch.stack([loss.reshape(()) for loss in losses]) if losses else torch.empty(0)
        return found.cpu()

    def observe(self) -> Observation:
        """Take the next step, and return all that is in it.

        Raises:
            RunError: a step that neither a program nor a model takes.
        """
        assert self.state is not None
        number = self.state + 1
        if self.is_by_program(number):
            observation = observe_program(self.begin(number))
        else:
            self.begin_eagerly(number)
            observation = observe_eager(self._eager, number)
        self.state = number
        return observation

    def begin(self, number: int) -> BoundProgram:
        """Put everything in place for a step; return the program that takes it."""
        self._set_hyperparameters(number)
        bound = self.programs.bound(number)
        self.programs.load_batch(number, bound)
        return bound

    @property
    def has_gradients(self) -> bool:
        """Whether the gradients of the last step are there: not where a state has just been loaded."""
        return self.state is not None and self._loaded != self.state

    def gradients(self) -> dict[str, Tensor]:
        """Return copies of the gradients that the last step has left, by parameter."""
        if not self.has_gradients:
            return {}
        assert self.state is not None
        found = self.trainee.gradients()
        if self.is_by_program(self.state):
            found = self.programs.bound(self.state).gradients
        return {name: gradient.detach().clone() for name, gradient in found.items()}

    def is_by_program(self, number: int) -> bool:
        """Tell whether a step is taken by a program."""
        if self.eager_from is not None and number >= self.eager_from:
            return False
        # The first program may make state that only the optimizer itself knows where to keep.
        makes_state = number == self.first and not isinstance(self.trainee.model, Skeleton)
        return not makes_state and self.programs.has(number)

    def begin_eagerly(self, number: int) -> None:
        """Put everything in place for a step that Python takes.

        Raises:
            RunError: there is no model to take it.
        """
        self._set_hyperparameters(number)
        if isinstance(self.trainee.model, Skeleton):
            raise RunError(
                f"step {number} was taken eagerly, and no program repeats it; open the run with what "
                "it was trained with: everystep.open(run, model=..., loss=..., optimizer=...)"
            )

    def _load_into_skeleton(self, state: State) -> None:
        trainee = self.trainee
        if self.programs.has_optimizer_step:
            state.restore(trainee.model, trainee.loss, trainee.optimizer, None, trainee.device)
            return
        saved = state.named()
        with torch.no_grad():
            for name, tensor in trainee.named_state().items():
                given = saved.get(name)
                if given is not None and given.shape != tensor.shape:
                    raise ValueError(f"{name} is {tuple(given.shape)}, not {tuple(tensor.shape)}")
                if given is not None:
                    tensor.copy_(given)
                elif name.startswith(("optimizer/", "gradient/")):  # the first step makes it
                    tensor.zero_()
                else:
                    raise ValueError(f"it has no {name}")
        for group, known in zip(
            trainee.optimizer.param_groups, state.settings["optimizer"]["groups"], strict=True
        ):
            group.update({k: v for k, v in known.items() if k != "params"})
        state.generators.restore(trainee.device)

    def _moved(self, step: int) -> None:
        self.state = self._loaded = step
        self.programs.refresh()
        self.programs.load_rates()

    def _set_hyperparameters(self, step: int) -> None:
        if not self._changes:
            return
        for name, changes in self._changes.items():
            index = bisect_right(changes.steps, step) - 1
            if index >= 0:
                set_hyperparameter(self.trainee.optimizer, name, changes.values[index])
        self.programs.load_rates()


def revive(run: RecordedRun, stretch: Stretch, objects: Objects) -> Revived:
    """Bring the training of a stretch of a run back; no state is loaded yet.

    Torch's random generators are as they were.

    Raises:
        RunError: something of the run is missing or cannot be read; says what, and the cure.
    """
    facts = stretch.facts
    device = select(facts["device"])
    batches = _batches(facts)
    engine = facts.get("engine") or {"programs": [], "eager_from": 1}
    built = [(rule, _read_program(run.directory / rule["file"])) for rule in engine["programs"]]
    with generators_preserved(device):
        x, y = (part.to(device) for part in _data(run, facts, objects))
        batch = batches.of(x, y)
        trainee = _living(run, facts, objects, batch, device) if engine["eager_from"] else None
        if trainee is None:
            trainee = _skeleton(run, stretch, [b.program for _, b in built], batch, device)
    programs = Programs(trainee, fold=False, first_step=stretch.first)
    for rule, each in built:
        shape = each.program.tensors["x"].shape
        programs.use(each, rule["steps"], shape[0] if shape else 0)
    changes = _changes(run, stretch.first)
    return Revived(stretch.first, trainee, programs, engine["eager_from"], batches, changes)


def needed(run: RecordedRun, objects: Objects | None) -> Objects | None:
    """Return the objects if the run cannot be replayed without them, else None."""
    for stretch in run.stretches:
        engine = stretch.facts.get("engine") or {"eager_from": 1}
        stored = stretch.facts.get("data.file", {}).get("stored", True)
        if engine["eager_from"] is not None or not stored:
            return objects
    return None


def _batches(facts: dict[str, Any]) -> Batches:
    """Return which rows each step saw."""
    known = facts["batches"]
    return Batches(facts["data"]["rows"], known["batch_size"], known["seed"], known["drop_last"])


def _data(run: RecordedRun, facts: dict[str, Any], objects: Objects) -> tuple[Tensor, Tensor]:
    if facts["data"].get("lazy"):
        raise RunError(
            f"{run.name} was trained on a Dataset that gives other rows each time it is read, so its "
            "batches cannot be had again; its losses, measurements and snapshots can be looked at"
        )
    fact = facts.get("data.file")
    if fact is None:
        raise RunError(f"{run.name} has no data yet; training has only just begun")
    if fact["stored"]:
        tensors = read_data(run.directory, fact)
        return tensors["x"], tensors["y"]
    if objects.data is not None:
        x, y = (torch.as_tensor(part) for part in objects.data)
        check_data({"x": x, "y": y}, fact, "the data given")
        return x, y
    size = f"{fact['bytes'] / 1e6:,.0f} MB"
    if (path := _experiment_file(run, facts)) is None:
        raise RunError(
            f"the data of {run.name} ({size}) was too large to be kept in the run; open it with "
            "everystep.open(run, data=(x, y))"
        )
    data = experiment_job(load(path), run.name, torch.device("cpu")).data
    assert data is not None
    tensors = {"x": data.x, "y": data.y}
    if data.validation is not None:
        tensors["validation_x"], tensors["validation_y"] = data.validation
    check_data(tensors, fact, f"what {path} says of the data")
    return data.x, data.y


def _experiment_file(run: RecordedRun, facts: dict[str, Any]) -> Path | None:
    path = run.directory / facts.get("experiment.file", "experiment.toml")
    return path if path.is_file() else None


def _read_program(path: Path) -> Built:
    from safetensors import SafetensorError
    from safetensors.torch import load as load_tensors

    constants = path.with_suffix(".safetensors")
    try:
        program = Program.from_json(path.read_bytes())
        content = load_tensors(constants.read_bytes()) if constants.exists() else {}
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} cannot be read: {error}") from None
    except ProgramError as error:
        raise ProgramError(f"{path}: {error}") from None
    return Built(program, content)


def _living(
    run: RecordedRun, facts: dict[str, Any], objects: Objects, batch: RowsOf, device: torch.device
) -> Trainee | None:
    """Return the training with its model, from the user or from the experiment, if there is one."""
    if objects.model is not None:
        return _from_objects(facts, objects, batch, device)
    path = _experiment_file(run, facts)
    if path is None:
        return None
    try:
        trainee = experiment_job(load(path), run.name, device).trainee
    except ExperimentError as error:
        raise RunError(f"{path} cannot be used: {error}") from None
    return replace(trainee, batch=batch, schedule=None)


def _from_objects(
    facts: dict[str, Any], objects: Objects, batch: RowsOf, device: torch.device
) -> Trainee:
    objects.check_complete()
    own = objects.copied()
    assert own.model is not None and own.loss is not None and own.optimizer is not None
    own.model.to(device)
    return Trainee(own.model, own.loss, own.optimizer, batch, device, clip_norm=facts["clip_norm"])


def _skeleton(
    run: RecordedRun, stretch: Stretch, programs: list[Program], batch: RowsOf, device: torch.device
) -> Trainee:
    if not programs:
        raise RunError(
            f"the steps of {run.name} were taken eagerly, and no program repeats them; open the run "
            "with what it was trained with: everystep.open(run, model=..., loss=..., optimizer=...)"
        )
    problems: list[str] = []
    state = run.state_near(stretch.first, told=problems.append)
    if state is None:
        raise RunError(
            f"{run.name} has no state to begin with: {'; '.join(problems) or 'none is there'}"
        )
    return make_skeleton(programs, state, batch, device, stretch.facts["clip_norm"])


def _changes(run: RecordedRun, first: int) -> dict[str, _Changes]:
    """Return what changed from step `first` on; what held before is in the state that it begins with."""
    found: dict[str, _Changes] = {}
    for name, step, value in run.measurements.iter_rows():
        if is_hyperparameter(name) and step >= first:
            changes = found.setdefault(name, _Changes([], []))
            changes.steps.append(step)
            changes.values.append(value)
    return found


def _first_sentence(error: Exception) -> str:
    return str(error).partition(". ")[0].partition("\n")[0]
