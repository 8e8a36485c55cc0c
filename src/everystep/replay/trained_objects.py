"""What trained a run: its arguments, its data, and the objects that continue it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from everystep import numerics
from everystep.errors import EverystepError, RunError, TrainingError
from everystep.recording.facts import EAGERLY, TrainingFacts
from everystep.recording.recorded_run import RecordedRun
from everystep.replay.living import Living
from everystep.replay.recorded_batches import stored_data
from everystep.replay.recorded_columns import settings_of
from everystep.replay.run_replay import Replay
from everystep.replay.without_objects import reason_against
from everystep.step.generators import generators_preserved
from everystep.step.state import State
from everystep.training.dataset import DEFAULT_DATASET_LIMIT
from everystep.training.objects import Objects

__all__ = [
    "check_alone",
    "iteration_of",
    "objects_from",
    "prepared",
    "recorded_hyperparameters",
    "state_to_continue",
    "torchs_errors",
    "with_data",
]


def objects_from(given: Mapping[str, Any], known: Objects | None) -> tuple[Objects | None, bool]:
    """Return the objects that continue a run, and whether they are those that trained it.

    given: arguments of `fork` or `resume`, None if absent; known: the objects that trained the run in
    this process. Without objects, None: only the run's programs can continue.
    """
    is_own = all(given[name] is None for name in ("model", "loss", "optimizer"))
    objects = known if is_own else Objects(given["model"], given["loss"], given["optimizer"])
    if objects is None or objects.model is None:
        return None, is_own
    others = {
        name: given[name]
        for name in ("data", "scheduler", "validation", "metrics")
        if given[name] is not None
    }
    if "scheduler" in others:
        others["scheduler_every"] = given["scheduler_every"]
    return replace(objects, **others), is_own


def check_alone(run: RecordedRun, call: str, reason: str | None = None) -> None:
    """Check that the programs of a run can continue it alone.

    call: the beginning of the user's call; reason: why they cannot, if already known.

    Raises:
        RunError: they cannot.
    """
    reason = reason_against(run) or reason
    if reason is None:
        return
    cure = f"pass the objects: {call}model=..., loss=..., optimizer=...)"
    if (lost := run.lost_experiment(run.facts.training)) is not None:
        what, cure = f"{lost.name} of {run.name} is missing", f"put the file back, or {cure}"
    else:
        what = f"{run.name} was trained from Python objects, which the run does not hold"
    raise RunError(f"{what}, and its programs cannot continue it alone: {reason}; {cure}")


def state_to_continue(replay: Replay, number: int, objects: Objects | None) -> State:
    """Return a state from which Python can continue.

    A replay of steps that Python took restores tensors only; for everything else that objects hold (a
    counter, a scheduler's rate), Python repeats the steps since the last snapshot.

    Args:
        replay: of the run.
        number: the step before the state.
        objects: those that trained it, if it has no experiment.

    Raises:
        RunError: a needed file is missing or unreadable.
    """
    run = replay.run
    stretch = replay.stretches[replay.stretch_of(number)]
    engine = stretch.facts.engine
    turn = None if engine is None else engine.eager_from
    if turn is None or turn > number or number in run.snapshots:
        return replay.state(number)
    begin = run.state_near(number, after=stretch.first - 2) or replay.state(stretch.first - 1)
    with replay.in_force(number):
        stepper = Living(run, stretch, objects or Objects(), begin, "eager")
        losses = stepper.run(number)
        first = begin.step + 1
        replay.compare(first, losses, replay.recorded_losses(first, number))
        return stepper.capture()


def with_data(objects: Objects, run: RecordedRun, facts: TrainingFacts, call: str) -> Objects:
    """Return objects with the run's data, if they have none; checked.

    Raises:
        RunError: the run does not hold its data.
        ExperimentError: an object is invalid; lists every error.
    """
    if objects.data is None:
        stored = stored_data(run, facts)
        if stored is None:
            raise RunError(f"the data of {run.name} is not in the run; pass it: {call}data=(x, y))")
        validation = stored.validation if objects.validation is None else objects.validation
        objects = replace(objects, data=(stored.x, stored.y), validation=validation)
    objects = replace(objects, dataset_limit=DEFAULT_DATASET_LIMIT)
    objects.check()
    return objects


@contextmanager
def prepared(threads: int | None, device: torch.device) -> Iterator[None]:
    """Compute as a training does, and restore the process afterwards."""
    numerics.prepare()
    with numerics.in_force(threads), generators_preserved(device):
        yield


@contextmanager
def torchs_errors(what: str) -> Iterator[None]:
    """Report an error of torch, where no code but torch's has run.

    Raises:
        TrainingError: torch failed.
    """
    try:
        yield
    except EverystepError:
        raise
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        raise TrainingError(f"{what} failed: {reason}") from error


def recorded_hyperparameters(run: RecordedRun, at: int) -> dict[str, float]:
    """Return the lr and similar settings as last recorded up to a step."""
    settings = settings_of(run, run.facts.training, 0)
    return {name: value for name, each in settings.items() if (value := each.at(at)) is not None}


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
