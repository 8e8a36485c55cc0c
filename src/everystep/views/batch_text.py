"""Contents of a batch other than tensors: plain values, classes, columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from everystep.experiment.preparation import CategoricalColumn, TablePreparation
from everystep.recording.facts import Facts, ModuleFacts
from everystep.replay.opened_step import Batch, Step

__all__ = [
    "MOST_VALUES",
    "about_columns",
    "class_names",
    "classes_of_tensors",
    "classes_text",
    "columns_of",
    "first_of",
    "other_values",
    "plain_values",
    "targets",
]

#: Plain values of a batch that are shown, items of a list, and characters of each.
MOST_VALUES, MOST_ITEMS, LONGEST_TEXT = 50, 64, 200


def class_names(facts: Facts) -> list[str] | None:
    """Return the names of the classes of a run's targets, by number; None if unknown."""
    trained = facts.trained
    known: Sequence[Any] | None = ((trained and trained.preparation) or {}).get("classes")
    return [str(name) for name in known] if isinstance(known, list | tuple) and known else None


def targets(batch: Batch, names: list[str] | None) -> list[str] | None:
    """Return the class of each row as a text, where y is classes."""
    y = batch.tensors.get("y")
    # Whole numbers, one for each row: what torch's losses take for classes.
    if y is None or y.dim() != 1 or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        return None
    known = names or []
    numbers: list[int] = y.tolist()
    # -100, for example, is a class that the loss ignores.
    return [known[n] if 0 <= n < len(known) else str(n) for n in numbers]


def classes_text(batch: Batch, names: list[str] | None) -> str | None:
    """Return how many rows each class has, by name; None: the classes have no names."""
    of_rows = None if names is None else targets(batch, names)
    if names is None or of_rows is None:
        return None
    counts = Counter(of_rows)
    # First in the order of the classes, then those without a name.
    order = dict.fromkeys([*names, *counts])
    return ", ".join(f"{name} ({counts[name]:,})" for name in order if counts[name])


def classes_of_tensors(
    step: Step, names: list[str] | None, modules: Mapping[str, ModuleFacts]
) -> dict[str, str]:
    """Return the ids of tensors that are about classes.

    `values`: their numbers are classes; `columns`: they have a column for each class: the output of a
    Sequential, and tensors that its loss derives from it.
    """
    if names is None or targets(step.batch, names) is None:
        return {}
    shape = len(step.batch.tensors["y"]), len(names)
    found = {"batch.y": "values"}
    # Only of a Sequential is it certain that its last module makes the output.
    is_sequential = "" in modules and modules[""].class_name == "Sequential"
    # Its own modules, not those within them.
    inner = [path for path in modules if is_sequential and path and "." not in path]
    last = inner[-1] if inner else None  # it makes the output
    output = None if last is None else first_of(step.activations.get(last))
    if output is not None and output.shape == shape:
        found[f"activations/{last}"] = "columns"
    columns = {
        name
        for seen in step.operations
        if seen.operation.phase == "loss" or (last is not None and seen.operation.module == last)
        for name, tensor in seen.results.items()
        if tensor.shape == shape and tensor.is_floating_point()
    }
    for number, seen in enumerate(step.operations):
        for role, given in (("inputs", seen.inputs), ("results", seen.results)):
            for name, tensor in given.items():
                if name == "y" and role == "inputs":
                    found[f"operations/{number}/{role}/{name}"] = "values"
                elif name in columns and tensor.shape == shape:
                    found[f"operations/{number}/{role}/{name}"] = "columns"
    return found


def plain_values(nested: Any, *, whole: bool = False) -> list[dict[str, Any]]:
    """Return the plain values of a batch: name, texts, and their count.

    whole: all names and texts; by default the first of them, cut.
    """
    found = []
    for name, value in islice(other_values(nested), None if whole else MOST_VALUES):
        items = value if isinstance(value, list) else [value]
        texts = [str(item) for item in items[: None if whole else MOST_ITEMS]]
        if not whole:
            texts = [each if len(each) <= LONGEST_TEXT else f"{each[:LONGEST_TEXT]}…" for each in texts]
        found.append({"name": name, "texts": texts, "count": len(items)})
    return found


def other_values(nested: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the plain values of a batch, by path: a value, or a list of values."""
    is_list = isinstance(nested, list | tuple)
    items: Iterable[tuple[Any, Any]]
    if nested is None or isinstance(nested, Tensor):
        return
    if isinstance(nested, Mapping):
        items = nested.items()
    # A list of plain values is one value for each row, such as the names of files.
    elif is_list and not (nested and all(isinstance(item, str | int | float) for item in nested)):
        items = enumerate(nested)
    else:
        yield path or "batch", list(nested) if is_list else nested
        return
    for key, item in items:
        yield from other_values(item, f"{path}.{key}" if path else str(key))


def columns_of(batch: Batch, facts: Facts, count: int) -> list[tuple[str, list[Any]]]:
    """Return name and values of each column of a batch of `count` rows, those of its targets first.

    Columns of a table are in its own units: scaling is undone, and categories are words (a missing one
    is blank). Integers are texts.

    facts: of the run.
    """
    table = _table(facts)
    found = [*_targets(batch, facts, table, count)]
    for name, tensor in batch.tensors.items():
        # An x of another shape is not the table's, and its columns are unknown.
        if name == "x" and table is not None and tensor.shape == (count, len(table.x_names)):
            found += _of_table(tensor, table)
        elif name != "y" and tensor.dim() and len(tensor) == tensor.numel() == count:
            found.append((name, _values(tensor.reshape(count))))
    for name, value in other_values(batch.nested):
        if isinstance(value, list) and len(value) == count:
            found.append((name, list(map(str, value))))
    return found


def about_columns(facts: Facts) -> list[str]:
    """Return explanations of the columns of a run's table, in lines."""
    table = _table(facts)
    columns = [] if table is None else table.columns
    if all(isinstance(each, CategoricalColumn) or each.fill is None for each in columns):
        return []
    return ["columns: a missing number is shown as the mean that replaces it"]


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
    widths = [len(column.x_names) for column in table.columns]
    for column, numbers in zip(
        table.columns, x.double().cpu().split_with_sizes(widths, dim=1), strict=True
    ):
        if isinstance(column, CategoricalColumn):
            yield column.name, [_word(row, column.categories) for row in numbers.tolist()]
        # Back to the units of the file: the inverse of (value - mean) / deviation.
        elif scaling := column.scaling:
            yield column.name, _values(numbers[:, 0] * scaling.deviation[0] + scaling.mean[0])
        else:
            yield column.name, _values(numbers[:, 0])


def _word(flags: list[float], categories: list[str]) -> str:
    return next((word for flag, word in zip(flags, categories, strict=True) if flag), "")


def _values(numbers: Tensor) -> list[Any]:
    values: list[Any] = numbers.detach().tolist()
    return values if numbers.is_floating_point() else list(map(str, values))


def first_of(given: Any) -> Tensor | None:
    """Return the output of a module; the first of several tensors."""
    found: Tensor | None = given[0] if isinstance(given, tuple | list) and given else given
    return found
