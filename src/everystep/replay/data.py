"""Where the data of two runs differs: in which rows and columns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from everystep.errors import RunError
from everystep.experiment.preparation import TablePreparation
from everystep.recording.facts import TrainingFacts
from everystep.recording.run import RecordedRun
from everystep.replay.operations import TensorDifference, tensor_difference
from everystep.step.check import as_integers, same_bits

__all__ = ["DataDifference", "data_differences"]


class DataDifference(NamedTuple):
    """How a tensor of the data differs.

    tensor: the numbers; rows: those that differ, by their numbers in the first run's data; columns:
    those that differ, by number, of data with two dimensions; names: of all columns, if the data is a
    table.
    """

    tensor: TensorDifference
    rows: list[int]
    columns: list[int]
    names: list[str]


def data_differences(one: RecordedRun, other: RecordedRun) -> tuple[DataDifference, ...]:
    """Return the tensors of the data that differ, if both runs hold it, and those of the same shape."""
    facts = [run.facts.training for run in (one, other)]
    files = [each.data_file for each in facts]
    if files[0] is None or files[1] is None or files[0].digest == files[1].digest:
        return ()
    if not (files[0].stored and files[1].stored):
        return ()
    try:
        pair = one.data(files[0]), other.data(files[1])
    except RunError:  # the replay says what it needs of it
        return ()
    found = []
    for name, tensor in sorted(pair[0].items()):
        its = pair[1].get(name)
        if its is None or its.shape != tensor.shape or its.dtype != tensor.dtype or not tensor.ndim:
            continue
        if same_bits(tensor, its):
            continue
        differs = as_integers(tensor) != as_integers(its)
        rows = differs.reshape(len(tensor), -1).any(1)
        columns = differs.any(0) if differs.ndim == 2 else torch.zeros(0, dtype=torch.bool)
        names = _column_names(facts) if name.endswith("x") else []
        found.append(
            DataDifference(
                tensor_difference(name, tensor, its),
                _numbers(facts[0], name, torch.nonzero(rows).flatten()),
                torch.nonzero(columns).flatten().tolist(),
                names if len(names) == len(columns) else [],
            )
        )
    return tuple(found)


def _numbers(facts: TrainingFacts, name: str, places: Tensor) -> list[int]:
    """Return the numbers of rows of a tensor in the source of the data."""
    numbers = facts.data.numbers()
    if numbers is None:
        return places.tolist()
    return numbers[1 if name.startswith("validation_") else 0][places].tolist()


def _column_names(facts: list[TrainingFacts]) -> list[str]:
    """Return the names of the columns of x, if both runs have a table with the same ones."""
    try:
        one, other = (TablePreparation.model_validate(each.preparation).x_names for each in facts)
    except ValidationError:
        return []
    return one if one == other else []
