"""The batch of an opened step as plain data: its values besides tensors, the names of its classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from everystep.page.tensors import first_of, id_of_batch
from everystep.recording.facts import Facts, ModuleFacts
from everystep.replay.step import Batch, Step

__all__ = ["class_names", "of_classes", "plain_values", "targets"]

#: Plain values of a batch that are shown, items of a list, and characters of each.
MOST_VALUES, MOST_ITEMS, LONGEST_TEXT = 50, 64, 200


def class_names(facts: Facts) -> list[str] | None:
    """Return the names of the classes of a run's targets, by number; None: they are not known."""
    trained = facts.trained
    known: Sequence[Any] | None = ((trained and trained.preparation) or {}).get("classes")
    return [str(name) for name in known] if isinstance(known, list | tuple) and known else None


def targets(batch: Batch, names: list[str] | None) -> list[str] | None:
    """Return the class of each row as a text, where y is classes."""
    y = batch.tensors.get("y")
    if y is None or y.dim() != 1 or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        return None
    known = names or []
    numbers: list[int] = y.tolist()
    return [known[n] if 0 <= n < len(known) else str(n) for n in numbers]


def of_classes(
    step: Step, names: list[str] | None, modules: Mapping[str, ModuleFacts]
) -> dict[str, str]:
    """Return the ids of tensors that are about classes.

    `values`: their numbers are classes; `columns`: they have a column for each class: the output of a
    Sequential, and what its loss makes of it.
    """
    if names is None or targets(step.batch, names) is None:
        return {}
    shape = len(step.batch.tensors["y"]), len(names)
    last = [path for path in modules if path and "." not in path][-1:]
    outer = modules.get("")
    ends = last if outer is not None and outer.class_name == "Sequential" else []
    columns = {
        name
        for seen in step.operations
        if seen.operation.phase == "loss" or seen.operation.module in ends
        for name, tensor in seen.results.items()
        if tensor.shape == shape and tensor.is_floating_point()
    }
    found = {id_of_batch("y"): "values"}
    for path in ends:
        output = first_of(step.activations.get(path))
        if output is not None and output.shape == shape:
            found[f"activations/{path}"] = "columns"
    for number, seen in enumerate(step.operations):
        for role, given in (("inputs", seen.inputs), ("results", seen.results)):
            for name, tensor in given.items():
                if name == "y" and role == "inputs":
                    found[f"operations/{number}/{role}/{name}"] = "values"
                elif name in columns and tensor.shape == shape:
                    found[f"operations/{number}/{role}/{name}"] = "columns"
    return found


def plain_values(nested: Any) -> list[dict[str, Any]]:
    """Return what a batch has besides tensors: name, the first texts, and their count."""
    found = []
    for name, value in _plain(nested, ""):
        items = value if isinstance(value, list) else [value]
        texts = [_text(item) for item in items[:MOST_ITEMS]]
        found.append({"name": name or "batch", "texts": texts, "count": len(items)})
        if len(found) == MOST_VALUES:
            break
    return found


def _plain(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if value is None or isinstance(value, Tensor):
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _plain(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        if value and all(isinstance(item, str | int | float | bool) for item in value):
            yield path, list(value)
            return
        for index, item in enumerate(value):
            yield from _plain(item, f"{path}.{index}" if path else str(index))
    else:
        yield path, value


def _text(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}…"
