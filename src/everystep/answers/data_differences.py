"""Where the data of two runs differs: in which rows and columns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from everystep.answers.operations import TensorDifference, rows_that_differ, tensor_difference
from everystep.errors import RunError
from everystep.experiment.preparation import TablePreparation
from everystep.recording.facts import TrainingFacts
from everystep.recording.recorded_run import RecordedRun
from everystep.step.state import same_bits

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
    files = [each.data_file for each in facts if each.data_file is not None and each.data_file.stored]
    if len(files) < 2 or files[0].digest == files[1].digest:
        return ()
    try:
        pair = one.data(files[0]), other.data(files[1])
    except RunError:  # the replay reports problems with it
        return ()
    both = ((name, tensor, pair[1].get(name)) for name, tensor in sorted(pair[0].items()))
    return tuple(
        _difference(name, tensor, its, facts)
        for name, tensor, its in both
        if its is not None and its.shape == tensor.shape and its.dtype == tensor.dtype and tensor.ndim
        if not same_bits(tensor, its)
    )


def _difference(name: str, one: Tensor, other: Tensor, facts: list[TrainingFacts]) -> DataDifference:
    rows = torch.nonzero(rows_that_differ(one, other)).flatten()
    numbers = facts[0].data.numbers()
    if numbers is not None:  # in the source of the data
        rows = numbers[1 if name.startswith("validation_") else 0][rows]
    columns = rows_that_differ(one.mT, other.mT) if one.ndim == 2 else rows.new_empty(0)
    names = _column_names(facts) if name.endswith("x") else []
    return DataDifference(
        tensor_difference(name, one, other),
        rows.tolist(),
        torch.nonzero(columns).flatten().tolist(),
        names if len(names) == len(columns) else [],
    )


def _column_names(facts: list[TrainingFacts]) -> list[str]:
    """Return the names of the columns of x, if both runs have a table with the same ones."""
    try:
        one, other = (TablePreparation.model_validate(each.preparation).x_names for each in facts)
    except ValidationError:
        return []
    return one if one == other else []
