"""The description of a run for the page: JSON, in which nan and infinities are strings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from everystep.errors import RunError
from everystep.page.columns import RunColumns
from everystep.page.run_index import names_of_ranks, shown_name
from everystep.recording.database import MeasurementEnds
from everystep.recording.facts import Facts, ModuleFacts, TrainingFacts
from everystep.recording.recorded_run import RecordedRun
from everystep.recording.settings_diff import flat
from everystep.views.facts_text import facts_data, shortest_name, state_data
from everystep.views.plain import metric_data, plain_data, plain_number

__all__ = ["about_data", "live_data"]

#: Prefixes of the classes of layers with a weight, and of activation functions.
_WITH_WEIGHTS = ("Linear", "Bilinear", "Conv", "Embedding", "LazyLinear", "LazyConv")
_ACTIVATIONS = ("ReLU", "LeakyReLU", "GELU")


def live_data(run: RecordedRun, columns: RunColumns, status: str) -> dict[str, Any]:
    """Return the data of a run that changes during training."""
    return state_data(run, columns.facts, status, columns.steps) | {
        "measurements": [_measurement(ends, columns.facts) for ends in columns.ends],
        **columns.landmarks,
    }


def about_data(
    name: str, run: RecordedRun, columns: RunColumns, forks: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return everything about a run except its numbers by step.

    Raises:
        RunError: it has no description.
    """
    facts, training = columns.facts, columns.facts.training
    settings, problem = _settings_of(run, training)
    return {
        **facts_data(facts),
        "name": name,
        **live_data(run, columns, run.status_by(facts)),
        "has_loss": facts.has_loss,
        "directory": _argument(run.directory),
        "parent": [facts.fork.parent, facts.fork.at] if facts.fork else None,
        "forks": forks,
        "ranks": names_of_ranks(name, training.ranks),
        "has_experiment": settings is not None,
        "experiment_problem": problem,
        "is_of_loop": training.loop is not None,
        "layers": _telling_layers(training.modules),
        "settings": settings or {},
        # Of this rank alone: a run shows what is sound, also where another rank is missing.
        "snapshots": [row.step for row in run.own_snapshot_rows()],
        # Looking for damage reads files: once for as long as the run does not change.
        "damage": columns.remembered("damage", lambda: run.damage),
    }


def _telling_layers(modules: Mapping[str, ModuleFacts]) -> dict[str, str | None]:
    """Return the paths of the first weight and of the first activation function, to suggest."""
    # The page writes them within quotes.
    inner = [(path, each.class_name) for path, each in modules.items() if path and "'" not in path]
    weight = next((f"{path}.weight" for path, name in inner if name.startswith(_WITH_WEIGHTS)), None)
    active = next((path for path, name in inner if name.startswith(_ACTIVATIONS)), None)
    return {"weight": weight, "active": active}


def _settings_of(run: RecordedRun, facts: TrainingFacts) -> tuple[dict[str, Any] | None, str | None]:
    """Return the settings of an experiment by path, as `--set` takes them, or its error.

    A run from Python objects has neither.
    """
    try:
        experiment = run.experiment(facts)
        return (None if experiment is None else _by_path(experiment)), None
    except RunError as error:
        return None, str(error)


def _argument(directory: Path) -> str:
    """Return a run as the argument of a command in the server's working directory."""
    here = Path.cwd()
    is_below = directory.is_relative_to(here)
    return shown_name(shortest_name(directory.relative_to(here) if is_below else directory))


def _measurement(ends: MeasurementEnds, facts: Facts) -> dict[str, Any]:
    first, last = (plain_number(math.nan if end is None else end) for end in (ends.first, ends.last))
    found = {"name": ends.name, "count": ends.values, "first": first, "last": last}
    return found | {"is_rate": facts.is_setting(ends.name), **metric_data(ends.name)}


def _by_path(experiment: dict[str, Any]) -> dict[str, Any]:
    """Return the values of an experiment by their paths; of lists of texts (layers), each text."""
    found: dict[str, Any] = {}
    for path, value in flat(experiment).items():
        is_of_texts = isinstance(value, list) and value and all(isinstance(each, str) for each in value)
        named = {f"{path}[{place}]": text for place, text in enumerate(value)} if is_of_texts else None
        found |= named or {path: plain_data(value)}
    return found
