"""What each row of a batch holds that is one value: columns of its table, targets, words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from everystep.experiment.preparation import CategoricalColumn, TablePreparation
from everystep.recording.facts import Facts
from everystep.replay.step import Batch
from everystep.views.batch import class_names, other_values, targets

__all__ = ["about_columns", "columns_of"]


def columns_of(batch: Batch, facts: Facts, count: int) -> list[tuple[str, list[Any]]]:
    """Return name and values of each column of a batch of `count` rows, those of its targets first.

    Of a table, the columns are in its own units: what was scaled is scaled back, and words are words
    (a missing one is blank). Whole numbers are texts.

    facts: of the run.
    """
    table = _table(facts)
    found = [*_targets(batch, facts, table, count)]
    for name, tensor in batch.tensors.items():
        if name == "x" and table is not None and tensor.shape == (count, len(table.x_names)):
            found += _of_table(tensor, table)
        elif name != "y" and tensor.dim() and len(tensor) == tensor.numel() == count:
            found.append((name, _values(tensor.reshape(count))))
    for name, value in other_values(batch.nested):
        if isinstance(value, list) and len(value) == count:
            found.append((name, list(map(str, value))))
    return found


def about_columns(facts: Facts) -> list[str]:
    """Return what to say of the columns of a run's table, in lines."""
    table = _table(facts)
    columns = [] if table is None else table.columns
    if all(isinstance(each, CategoricalColumn) or each.fill is None for each in columns):
        return []
    return ["columns: a missing number is shown as the mean that stands for it"]


def _table(facts: Facts) -> TablePreparation | None:
    preparation = facts.trained and facts.trained.preparation
    try:
        return TablePreparation.model_validate(preparation)
    except ValidationError:
        return None


def _targets(
    batch: Batch, facts: Facts, table: TablePreparation | None, count: int
) -> Iterator[tuple[str, list[Any]]]:
    y = batch.tensors.get("y")
    names = table.target if table is not None else ["y"]
    if (words := targets(batch, class_names(facts))) is not None:
        yield names[0], words
    elif y is not None and y.dim() in (1, 2) and y.numel() == count * len(names):
        columns = y.reshape(count, len(names)).unbind(1)
        yield from zip(names, map(_values, columns), strict=True)


def _of_table(x: Tensor, table: TablePreparation) -> Iterator[tuple[str, list[Any]]]:
    numbers = x.double().cpu()
    place = 0
    for column in table.columns:
        if isinstance(column, CategoricalColumn):
            flags = numbers[:, place : place + len(column.categories)].tolist()
            place += len(column.categories)
            yield column.name, [_word(row, column.categories) for row in flags]
            continue
        values = numbers[:, place]
        place += 1
        if scaling := column.scaling:
            values = values * scaling.deviation[0] + scaling.mean[0]
        yield column.name, _values(values)


def _word(flags: list[float], categories: list[str]) -> str:
    return next((word for flag, word in zip(flags, categories, strict=True) if flag), "")


def _values(numbers: Tensor) -> list[Any]:
    values: list[Any] = numbers.detach().tolist()
    return values if numbers.is_floating_point() else list(map(str, values))
