"""Which tensors of an opened step are about classes, by their ids on the page."""

from __future__ import annotations

from collections.abc import Mapping

from everystep.page.tensors import first_of, id_of_batch
from everystep.recording.facts import ModuleFacts
from everystep.replay.step import Step
from everystep.views.batch import columns_of_classes, last_module, targets

__all__ = ["of_classes"]


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
    last = last_module(modules)
    columns = columns_of_classes(step, names, last)
    found = {id_of_batch("y"): "values"}
    output = None if last is None else first_of(step.activations.get(last))
    if output is not None and output.shape == shape:
        found[f"activations/{last}"] = "columns"
    for number, seen in enumerate(step.operations):
        for role, given in (("inputs", seen.inputs), ("results", seen.results)):
            for name, tensor in given.items():
                if name == "y" and role == "inputs":
                    found[f"operations/{number}/{role}/{name}"] = "values"
                elif name in columns and tensor.shape == shape:
                    found[f"operations/{number}/{role}/{name}"] = "columns"
    return found
