"""The network of an opened step, layer by layer, as the forward pass went through it."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, NamedTuple

from everystep.page.tensors import first_of
from everystep.replay.step import Step

__all__ = ["Module", "modules_of", "network"]

#: A line of torch's own text of a model: `  (0): Linear(in_features=4, ...)`, or `(0-3): 4 x Block(`.
_LINE = re.compile(r"(?P<indent> *)\((?P<name>[^()]*)\): (?:\d+ x )?(?P<text>(?P<type>\w+)\(.*)")
_ROOT = re.compile(r"(?P<text>(?P<type>\w+)\(.*)")
_REPEATED = re.compile(r"(\d{1,6})-(\d{1,6})")
#: Modules that a text stands for at most; it may be a stranger's.
_MOST_MODULES = 10_000
_VIEW = re.compile(r"~\d+$")
#: What an operation is given besides what comes from the layer before.
_OWN = ("parameter/", "buffer/")


class Module(NamedTuple):
    """A module as torch prints it: its class, the line of text, and whether others are within it."""

    type: str
    text: str
    is_container: bool


@lru_cache(maxsize=8)
def modules_of(text: str) -> dict[str, Module]:
    """Return the modules in the text that torch prints of a model, by path; of any other text, none."""
    root = _ROOT.match(text)
    if root is None:
        return {}
    found: dict[str, Module] = {}
    open_paths: list[tuple[int, list[str]]] = [(-1, [""])]
    _note(found, [""], root)
    for line in text.splitlines()[1:]:
        match = _LINE.match(line)
        if match is None:
            continue
        indent = len(match["indent"])
        while len(open_paths) > 1 and open_paths[-1][0] >= indent:
            open_paths.pop()
        parents, names = open_paths[-1][1], _names(match["name"])
        if len(found) + len(parents) * len(names) > _MOST_MODULES:
            continue
        paths = [f"{parent}.{name}" if parent else name for parent in parents for name in names]
        _note(found, paths, match)
        open_paths.append((indent, paths))
    containers = {path.rpartition(".")[0] for path in found if path}
    return {path: module._replace(is_container=path in containers) for path, module in found.items()}


def network(step: Step, text: str) -> list[dict[str, Any]]:
    """Return the layers in the order of execution, each with its shapes, parameters and operations.

    Modules that hold others are among them only where they have run operations of their own.

    Args:
        step: the opened step.
        text: of the model, as the facts of the run have it.
    """
    known = modules_of(text)
    operations: dict[str, list[int]] = {}
    backward: dict[str, list[int]] = {}
    root = known.get("")
    is_layer = root is not None and not root.is_container  # then operations are of no module within it
    for number, seen in enumerate(step.operations):
        module, phase = seen.operation.module, seen.operation.phase
        if module is None and is_layer:
            module = ""
        if module is not None and phase in ("forward", "backward"):
            by_module = operations if phase == "forward" else backward
            by_module.setdefault(module, []).append(number)
    parents = {path.rpartition(".")[0] for path in (*step.activations, *operations) if path}
    return [
        _layer(step, path, known.get(path), operations.get(path, []), backward.get(path, []))
        for path in _in_order(step, operations)
        if path in operations or not (path in parents or _is_container(known.get(path)))
    ]


def _in_order(step: Step, operations: dict[str, list[int]]) -> list[str]:
    """Return the paths of modules; one without operations comes after the one that gave before it."""
    places: dict[str, float] = {path: numbers[0] for path, numbers in operations.items()}
    last = -0.5
    for path in step.activations:
        if path in operations:
            last = operations[path][-1] + 0.5
        else:
            places[path] = last
    return sorted(places, key=lambda path: places[path])


def _layer(
    step: Step, path: str, module: Module | None, operations: list[int], backward: list[int]
) -> dict[str, Any]:
    output = first_of(step.activations.get(path))
    return {
        "path": path,
        "type": module.type if module else "",
        "text": module.text if module else "",
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
    """Return the shape of what comes in from outside the layer."""
    made: set[str] = set()
    for number in operations:
        seen = step.operations[number]
        for name, tensor in seen.inputs.items():
            if not name.startswith(_OWN) and _VIEW.sub("", name) not in made | {
                _VIEW.sub("", result) for result in seen.results
            }:
                return list(tensor.shape)
        made |= {_VIEW.sub("", name) for name in seen.results}
    return None


def _is_container(module: Module | None) -> bool:
    return module is not None and module.is_container


def _names(text: str) -> list[str]:
    repeated = _REPEATED.fullmatch(text)
    if repeated is None:
        return [text]
    first, last = int(repeated[1]), int(repeated[2])
    return [str(number) for number in range(first, last + 1)[: _MOST_MODULES + 1]]


def _note(found: dict[str, Module], paths: list[str], match: re.Match[str]) -> None:
    text = match["text"] if match["text"].endswith(")") else match["type"]
    for path in paths:
        found[path] = Module(match["type"], text, False)
