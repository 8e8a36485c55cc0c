"""The network of an opened step, layer by layer, as the forward pass went through it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from everystep.recording.facts import ModuleFacts
from everystep.replay.opened_step import Step
from everystep.views.batch_text import first_of

__all__ = ["network"]

#: Inputs of an operation other than the output of the previous layer.
_OWN = ("parameter/", "buffer/")


def network(step: Step, modules: Mapping[str, ModuleFacts]) -> list[dict[str, Any]]:
    """Return the layers in the order of execution, each with its shapes, parameters and operations.

    A module with submodules is included only if it ran operations of its own.

    Args:
        step: the opened step.
        modules: of the model, by path.
    """
    containers = {path.rpartition(".")[0] for path in modules if path}
    operations: dict[str, list[int]] = {}
    backward: dict[str, list[int]] = {}
    is_layer = "" in modules and "" not in containers  # then operations are of no module within it
    for number, seen in enumerate(step.operations):
        module, phase = seen.operation.module, seen.operation.phase
        if module is None and is_layer:
            module = ""
        if module is not None and phase in ("forward", "backward"):
            by_module = operations if phase == "forward" else backward
            by_module.setdefault(module, []).append(number)
    parents = {path.rpartition(".")[0] for path in (*step.activations, *operations) if path}
    layers = [
        _layer(step, path, operations.get(path, []), backward.get(path, []))
        | _described(modules.get(path), path in containers)
        for path in _in_order(step, operations)
        if path in operations or path not in parents | containers
    ]
    for before, layer in pairwise(layers):
        layer["follows"] = _follows(step, before["operations"], layer["operations"])
    return layers


def _follows(step: Step, before: list[int], operations: list[int]) -> bool:
    """Return whether a layer uses the output of the previous one; True for one without operations."""
    if not before or not operations:
        return True
    reached: set[str] = set()
    for number in range(before[0], operations[-1] + 1):
        seen = step.operations[number]
        uses = not reached.isdisjoint(_bases(seen.inputs))
        if uses and number in operations:
            return True
        if uses or number in before:
            reached |= _bases(seen.results)
    return False


def _in_order(step: Step, operations: dict[str, list[int]]) -> list[str]:
    """Return the paths of modules; one without operations comes after the module before it."""
    places: dict[str, float] = {path: numbers[0] for path, numbers in operations.items()}
    last = -0.5
    for path in step.activations:
        if path in operations:
            last = operations[path][-1] + 0.5
        else:
            places[path] = last
    return sorted(places, key=lambda path: places[path])


def _described(module: ModuleFacts | None, is_container: bool) -> dict[str, str]:
    """Return a module's class, its printed settings, and both together."""
    name = module.class_name if module else ""
    if module is None or is_container or "\n" in module.arguments:
        return {"type": name, "arguments": "", "text": name}
    return {"type": name, "arguments": module.arguments, "text": f"{name}({module.arguments})"}


def _layer(step: Step, path: str, operations: list[int], backward: list[int]) -> dict[str, Any]:
    output = first_of(step.activations.get(path))
    return {
        "path": path,
        "depth": path.count("."),
        "input": _input_shape(step, operations),
        "output": None if output is None else list(output.shape),
        "activation": None if output is None else f"activations/{path}",
        "parameters": {
            name.rpartition(".")[2]: f"parameters/{name}"
            for name in step.parameters
            if name.rpartition(".")[0] == path
        },
        "operations": operations,
        "backward": backward,
    }


def _input_shape(step: Step, operations: list[int]) -> list[int] | None:
    """Return the shape of the input from outside the layer."""
    made: set[str] = set()
    for number in operations:
        seen = step.operations[number]
        made |= _bases(seen.results)
        for name, tensor in seen.inputs.items():
            if not name.startswith(_OWN) and _bases([name]).isdisjoint(made):
                return list(tensor.shape)
    return None


def _bases(names: Iterable[str]) -> set[str]:
    """Return the names of the tensors that these are views of, or are."""
    return {name.partition("~")[0] for name in names}
