"""A run in one line, as lists of runs show it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from everystep.experiment.metrics import METRICS, VALIDATION
from everystep.recording.blocks import LOSS
from everystep.recording.database import Database
from everystep.recording.facts import Facts, TrainingFacts

__all__ = ["Summary", "in_own_precision", "summary_of"]


class Summary(NamedTuple):
    """A run in one line. Losses are None if the run has no steps, or its loop logs no loss.

    nonfinite_step: the first with a loss that is not finite; seconds: how long it took; optimizer: class
    names; lr: the learning rates at the beginning; batch_size: rows of a step, None where unknown;
    validation: the newest metric on validation rows, with its name; parent: for a fork, the
    name of its parent and the last step taken from it; note, config, tags: the user's own; damage: what
    is missing or altered, as far as it shows without reading all numbers.
    """

    name: str
    directory: Path
    status: str
    steps: int
    planned: int
    first_loss: float | None
    last_loss: float | None
    started: datetime
    nonfinite_step: int | None = None
    seconds: float | None = None
    optimizer: str | None = None
    lr: tuple[float, ...] = ()
    batch_size: int | None = None
    validation: tuple[str, float] | None = None
    parent: tuple[str, int] | None = None
    note: str | None = None
    config: Mapping[str, Any] = MappingProxyType({})
    tags: tuple[str, ...] = ()
    damage: str | None = None


def summary_of(name: str, facts: Facts, status: str, damage: str | None, database: Database) -> Summary:
    """Return a run in one line; its database is open for reading."""
    count, trained = database.newest_step(), facts.trained
    # A step without a loss has NaN in the table, which is not a loss to show.
    newest = count if facts.has_loss else 0
    # Two numbers, not all losses: lists show many runs.
    losses = (database.series(LOSS, step, step)[1].tolist() for step in (min(1, newest), newest))
    first, last = (next(iter(loss), None) for loss in losses)
    groups = [g for o in trained.optimizers.values() for g in o.groups] if trained else []
    rates = [rate for group in groups if isinstance(rate := group.get("lr"), int | float)]
    return Summary(
        name=name,
        directory=database.directory,
        status=status,
        steps=count,
        planned=count if facts.steps is None else facts.steps,
        first_loss=first,
        last_loss=last,
        # A run that is just being created has no start time yet.
        started=facts.started or datetime.fromtimestamp(database.path.stat().st_mtime, UTC),
        nonfinite_step=facts.nonfinite_step,
        seconds=facts.seconds,
        optimizer=", ".join(o.class_name for o in trained.optimizers.values()) if trained else None,
        lr=tuple(dict.fromkeys(rates)),
        batch_size=_batch_size(trained),
        validation=_validation(database),
        parent=(facts.fork.parent, facts.fork.at) if facts.fork else None,
        note=facts.note,
        config=facts.config,
        tags=facts.tags,
        damage=damage,
    )


def _batch_size(trained: TrainingFacts | None) -> int | None:
    """Return how many rows each step saw; unknown for your own loop."""
    if trained is None or trained.loop is not None:
        return None
    return trained.batches.batch_size or trained.data.rows


def _validation(database: Database) -> tuple[str, float] | None:
    """Return the newest value of the first metric on validation rows, with the name of the metric."""
    for name in METRICS:
        value = database.last_measured(f"{VALIDATION}{name}")
        if value is not None:
            return name, value
    return None


def in_own_precision(losses: NDArray[np.float64], facts: Facts) -> NDArray[Any]:
    """Return losses in the precision that the run computes them in: at least float32."""
    if facts.loss_dtype == "float64":
        return losses
    # A changed database may have larger numbers than float32.
    with np.errstate(over="ignore"):
        return losses.astype(np.float32)
