"""Reopen: restores a recorded training, so that any of its steps can be replayed.

With programs, none of the run's code is needed: a skeleton of the training is enough. Steps other than
the recorded ones (of a what-if, or on the way to a state from which Python continues) need the model,
the loss and the optimizer themselves: from the run's experiment, or from the user.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from everystep.device import select
from everystep.errors import ExperimentError, RunError
from everystep.experiment.batches import Batches, RowsOf
from everystep.experiment.data import Data
from everystep.experiment.specification import load
from everystep.program.precision import Precision
from everystep.program.program import Program
from everystep.recording.data import check_data
from everystep.recording.facts import EAGERLY, TrainingFacts
from everystep.recording.run import RecordedRun, Stretch
from everystep.replay.columns import Setting
from everystep.replay.programs import read_built
from everystep.replay.stepper import TrainingStepper
from everystep.step.build import Built
from everystep.step.eager import BatchSource, Training
from everystep.step.generators import generators_preserved
from everystep.step.hyperparameters import is_hyperparameter
from everystep.step.programs import ProgramRule, Programs
from everystep.step.skeleton import make_skeleton
from everystep.training.dataset import length_of, read_rows
from everystep.training.dataset_batches import DatasetBatches
from everystep.training.objects import Objects

__all__ = ["batches_of", "reopen", "rule_of", "settings_of", "stored_data"]

#: Rules of programs that are read.
MOST_PROGRAMS = 1000


def reopen(
    run: RecordedRun,
    stretch: Stretch,
    objects: Objects,
    conversion: Precision | None = None,
    *,
    is_living: bool = False,
) -> TrainingStepper:
    """Restore the training of a stretch of a run, without loading a state.

    Torch's random generators keep their state. conversion: of its programs and its data; is_living: with
    its model, so that Python can take steps that no program takes.

    Raises:
        RunError: a file of the run is missing or unreadable; reports which, and a fix.
        ProgramError: the programs cannot be converted.
    """
    facts = stretch.facts
    device = select(facts.device)
    batches = batches_of(facts)
    engine = facts.engine or EAGERLY
    if len(engine.programs) > MOST_PROGRAMS:
        raise RunError(
            f"{run.name} claims more than {MOST_PROGRAMS:,} programs: the database was changed"
        )
    built = [(rule, read_built(run, rule.file)) for rule in engine.programs]
    if conversion is not None:
        built = [(rule, _converted(each, conversion)) for rule, each in built]
    with generators_preserved(device):
        batch = _batch(run, facts, objects, batches, device, conversion)
        if not isinstance(batch, DatasetBatches):
            _check_batch(run, batch, [each.program for _, each in built])
        training = _living(run, facts, objects, batch, device) if is_living else None
        if training is None and is_living:
            raise RunError(
                f"steps other than the recorded ones need the objects that trained {run.name}: "
                "everystep.open(run, model=..., loss=..., optimizer=...)"
            )
        if training is None:
            training = _skeleton(run, stretch, [b.program for _, b in built], batch, device)
    programs = Programs(training, first_step=stretch.first)
    for rule, each in built:
        programs.use(each, ProgramRule(0, rule.steps, rule.since), _rows_of(each.program))
    settings = settings_of(run, filter(is_hyperparameter, run.measurement_names), stretch.first)
    between = {
        step: partial(lambda name: run.change(name).tensors, name)
        for step, name in run.change_files().items()
    }
    return TrainingStepper(training, programs, engine.eager_from, batches, settings, between)


def rule_of(
    run: RecordedRun,
    stretch: Stretch,
    objects: Objects,
    conversion: Precision | None = None,
) -> RowsOf | None:
    """Return the batches of everystep's own steps, None where each step holds its batch.

    Raises:
        RunError: the data is missing or unreadable; reports a fix.
    """
    facts = stretch.facts
    if facts.loop is not None or facts.data.lazy:
        return None
    found = _batch(run, facts, objects, batches_of(facts), select(facts.device), conversion)
    assert isinstance(found, RowsOf)
    return found


def _converted(built: Built, conversion: Precision) -> Built:
    constants = conversion.contents(built.program, built.constants)
    return Built(conversion.program(built.program), constants)


def batches_of(facts: TrainingFacts) -> Batches:
    """Return which rows each step saw."""
    known = facts.batches
    numbers = facts.data.numbers()
    return Batches(
        facts.data.rows,
        known.batch_size,
        known.seed,
        known.drop_last,
        without=known.without,
        numbers=None if numbers is None else numbers[0],
        source=facts.data.file or "the data",
    )


def _batch(
    run: RecordedRun,
    facts: TrainingFacts,
    objects: Objects,
    batches: Batches,
    device: torch.device,
    conversion: Precision | None,
) -> BatchSource:
    """Return the batch source: rows of the run's data, or a Dataset that is read."""
    if not facts.data.lazy:
        x, y = (part.to(device) for part in _data(run, facts, objects))
        if not (x.ndim and y.ndim and len(x) == len(y)):
            raise RunError(f"the data of {run.name} does not have a target for each row")
        if conversion is not None:
            x, y = conversion.tensor("x", x), conversion.tensor("y", y)
        count = len(x)
    elif objects.data is None or isinstance(objects.data, tuple | list):
        raise RunError(
            f"{run.name} was trained on a Dataset that everystep read at every step, so the run has "
            "no rows; open it with everystep.open(run, data=dataset)"
        )
    else:
        count = length_of(objects.data)
    if count != batches.rows:
        raise RunError(
            f"{run.name} was trained on {batches.rows:,} rows of data, but the data has {count:,}"
        )
    if facts.data.lazy:
        return DatasetBatches(objects.data, batches, device)
    return batches.of(x, y, is_read=facts.data.source == "dataset")


def _check_batch(run: RecordedRun, batch: BatchSource, programs: list[Program]) -> None:
    """Check that the rows of the data are what the programs read.

    Raises:
        RunError: they have another shape or dtype.
    """
    for name, rows in zip("xy", batch(1), strict=True):
        specs = [program.tensors[name] for program in programs if name in program.tensors]
        if any((*each.shape[1:], each.torch_dtype) != (*rows.shape[1:], rows.dtype) for each in specs):
            raise RunError(
                f"{run.name} has a program for another {name} than the rows of its data: the run was "
                "changed"
            )


def _data(run: RecordedRun, facts: TrainingFacts, objects: Objects) -> tuple[Tensor, Tensor]:
    fact = facts.data_file
    if fact is None:
        raise RunError(f"{run.name} has no data yet; training has only just started")
    if (stored := stored_data(run, facts)) is not None:
        return stored.x, stored.y
    if objects.data is not None:
        given = objects.data
        if not isinstance(given, tuple | list):
            given = read_rows(given, given.__getitem__, sys.maxsize, lambda done, total: None)
        x, y = (torch.as_tensor(part) for part in given)
        check_data({"x": x, "y": y}, fact, "the given data")
        return x, y
    size = f"{fact.bytes / 1e6:,.0f} MB"
    if (experiment := run.experiment(facts)) is None:
        raise RunError(
            f"the data of {run.name} ({size}) was too large to store in the run; open it with "
            "everystep.open(run, data=(x, y))"
        )
    from everystep.training.from_experiment import experiment_job

    data = experiment_job(load(experiment), run.name, torch.device("cpu")).data
    assert data is not None
    tensors = {"x": data.x, "y": data.y}
    if data.validation is not None:
        tensors["validation_x"], tensors["validation_y"] = data.validation
    check_data(tensors, fact, f"the data that the experiment of {run.name} names")
    return data.x, data.y


def stored_data(run: RecordedRun, facts: TrainingFacts) -> Data | None:
    """Return the data that a run holds, or None.

    Raises:
        RunError: it cannot be read.
    """
    fact = facts.data_file
    if fact is None or not fact.stored:
        return None
    tensors = run.data(fact)
    if not {"x", "y"} <= tensors.keys():
        raise RunError(f"{fact.file} of {run.name} has no x and y: the run was changed")
    has_validation = {"validation_x", "validation_y"} <= tensors.keys()
    validation = (tensors["validation_x"], tensors["validation_y"]) if has_validation else None
    return Data(tensors["x"], tensors["y"], validation, numbering=facts.data.numbering)


def _rows_of(program: Program) -> int:
    """Return how many rows the batches of a program have."""
    shape = program.tensors["x"].shape
    return shape[0] if shape else 0


def _living(
    run: RecordedRun, facts: TrainingFacts, objects: Objects, batch: BatchSource, device: torch.device
) -> Training | None:
    """Return the training with its model, from the user or from the experiment, if there is one."""
    if objects.model is not None:
        return _from_objects(facts, objects, batch, device)
    # Without its file, a run is still replayed as far as its programs go.
    experiment = None if run.lost_experiment(facts) else run.experiment(facts)
    if experiment is None:
        return None
    from everystep.training.from_experiment import experiment_job

    try:
        # Data that the run holds is not read from its source, which may be gone, or named by a stranger.
        training = experiment_job(load(experiment), run.name, device, stored_data(run, facts)).training
    except ExperimentError as error:
        raise RunError(f"the experiment of {run.name} cannot be used: {error}") from None
    return replace(training, batch=batch, schedule=None)


def _from_objects(
    facts: TrainingFacts, objects: Objects, batch: BatchSource, device: torch.device
) -> Training:
    objects.check_complete()
    own = objects.copied()
    assert own.model is not None and own.loss is not None and own.optimizer is not None
    own.model.to(device)
    return Training(own.model, own.loss, own.optimizer, batch, device, clip_norm=facts.clip_norm)


def _skeleton(
    run: RecordedRun, stretch: Stretch, programs: list[Program], batch: BatchSource, device: torch.device
) -> Training:
    if not programs:
        raise RunError(f"{run.name} has no program for its steps: the database was changed")
    problems: list[str] = []
    # Any state says what the optimizer is like; from the first of the stretch it is quickest to go on.
    state = run.state_near(stretch.first, on_problem=problems.append)
    for row in run.snapshot_rows():
        if state is None and row.step > stretch.first:
            state = run.state_near(row.step, after=row.step - 1, on_problem=problems.append)
    if state is None:
        raise RunError(
            f"{run.name} has no readable snapshot to start from: "
            f"{'; '.join(problems) or 'the run has none'}"
        )
    if "optimizer" not in state.settings:
        raise RunError(f"state {state.step} of {run.name} has no optimizer: the run was changed")
    return make_skeleton(programs, state, batch, device, stretch.facts.clip_norm)


def settings_of(run: RecordedRun, names: Iterable[str], first: int) -> dict[str, Setting]:
    """Return what changed from step `first` on; what held before is in the state that it begins with.

    names: of measurements that are settings.
    """
    found = {}
    for name in names:
        values = {step: value for step, value in run.measured(name).items() if step >= first}
        if values:
            found[name] = Setting(values)
    return found
