"""Batches of everystep's own steps, from the data of a run."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor

from everystep.errors import DataError, RunError
from everystep.experiment.batches import Batches, RowsOf
from everystep.experiment.data import Data, reopened
from everystep.experiment.prepared_rows import PreparedRows
from everystep.experiment.source_files import check_may_be_read
from everystep.experiment.specification import load
from everystep.program.precision import Precision
from everystep.recording.facts import TrainingFacts
from everystep.recording.files import check_data
from everystep.recording.recorded_run import RecordedRun
from everystep.training.dataset import DatasetBatches, length_of, read_rows

__all__ = ["batch_source", "batches_of", "stored_data"]


# Where the rows of a step come from:
#   in the run          small data: a file, checked by its digest
#   in files            large data of an experiment: read from there again, if their digests are the same
#   passed by the user  everystep.open(run, data=...): checked by the digest of all rows
#   made again          data that an experiment draws: checked in the same way
#   a Dataset           read again; recorded steps have their batches by content, and need it not
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
        share=None if facts.ranks is None else (facts.ranks.rank, facts.ranks.count),
    )


def batch_source(
    run: RecordedRun,
    facts: TrainingFacts,
    data: Any,
    device: torch.device,
    conversion: Precision | None = None,
) -> RowsOf | DatasetBatches:
    """Return the batches: rows of the run's data, or a Dataset that is read.

    data: what the caller passed, for a run that does not hold its data.

    Raises:
        RunError: the data is missing or unreadable, or is not the run's; reports a fix.
    """
    batches = batches_of(facts)
    if not facts.data.lazy:
        given_x, given_y = _rows_of(run, facts, data)
        x, y = given_x.to(device), given_y.to(device)
        if not (x.ndim and y.ndim and len(x) == len(y)):
            raise RunError(f"the data of {run.name} does not have a target for each row")
        if conversion is not None:
            convert, y = partial(conversion.tensor, "x"), conversion.tensor("y", y)
            x = x.converted(convert) if isinstance(x, PreparedRows) else convert(x)
        count = len(x)
    elif data is None or isinstance(data, tuple | list):
        raise RunError(
            f"{run.name} was trained on a Dataset that everystep read at every step, so the run has "
            "no rows; open it with everystep.open(run, data=dataset)"
        )
    else:
        count = length_of(data)
    if count != batches.rows:
        raise RunError(
            f"{run.name} was trained on {batches.rows:,} rows of data, but the data has {count:,}"
        )
    if facts.data.lazy:
        return DatasetBatches(data, batches, device)
    # As in the training, where steps of a Dataset see new tensors, at other places in memory.
    return batches.of(x, y, is_read=facts.data.source == "dataset")


def _rows_of(run: RecordedRun, facts: TrainingFacts, given: Any) -> tuple[Tensor | PreparedRows, Tensor]:
    fact = facts.data_file
    if fact is None:
        raise RunError(f"{run.name} has no data yet; training has only just started")
    if given is not None and fact.sources:
        raise RunError(f"the data of {run.name} is checked by its files: open the run without data=")
    # First what the run holds: it need not be compared with anything.
    if (stored := stored_data(run, facts)) is not None:
        return stored.x, stored.y
    if given is not None:
        if not isinstance(given, tuple | list):
            given = read_rows(given, sys.maxsize, lambda done, total: None)
        x, y = (torch.as_tensor(part) for part in given)
        check_data({"x": x, "y": y}, fact, "the given data")
        return x, y
    if (experiment := run.experiment(facts)) is None:
        raise RunError(
            f"the data of {run.name} ({fact.bytes / 1e6:,.0f} MB) was too large to store in the run; "
            "open it with everystep.open(run, data=(x, y))"
        )
    from everystep.training.from_experiment import experiment_job

    # Drawn on the CPU, whatever the device of the training: as it was.
    made = experiment_job(load(experiment), torch.device("cpu")).data
    assert made is not None
    check_data(made.tensors(), fact, f"the data that the experiment of {run.name} names")
    return made.x, made.y


def stored_data(run: RecordedRun, facts: TrainingFacts) -> Data | None:
    """Return the data that a run holds, or that stayed in its files; None for other data.

    Raises:
        RunError: it cannot be read, or a file is not as it was.
        DataError: it is in files that this user has not named.
    """
    fact = facts.data_file
    if fact is not None and fact.sources:
        return _data_in_files(run, facts, fact.sources)
    if fact is None or not fact.stored:
        return None
    tensors = run.data(fact)
    if not {"x", "y"} <= tensors.keys():
        raise RunError(f"{fact.file} of {run.name} has no x and y: the run was changed")
    has_validation = {"validation_x", "validation_y"} <= tensors.keys()
    validation = (tensors["validation_x"], tensors["validation_y"]) if has_validation else None
    return Data(tensors["x"], tensors["y"], validation, numbering=facts.data.numbering)


def _data_in_files(run: RecordedRun, facts: TrainingFacts, digests: tuple[str, ...]) -> Data:
    experiment = run.experiment(facts)
    if experiment is None:
        raise RunError(f"the data of {run.name} is in files that its experiment names, but it has none")
    given = load(experiment)
    # The experiment may be a stranger's, who may name any file of this user.
    check_may_be_read(given.data)
    try:
        return reopened(given, facts.preparation or {}, digests)
    except DataError as error:
        states = ", ".join(f"{row.step:,}" for row in run.snapshot_rows()[:4])
        raise RunError(
            f"{error}; if it was moved, put a link there\n(without the data, steps of "
            f"{run.name} do not open; its losses, table and plot do, and the parameters of the states "
            f"on the disk: {states}, ...)"
        ) from None
    except ValueError:  # of the preparation
        raise RunError(f"the preparation of the data of {run.name} was changed") from None
