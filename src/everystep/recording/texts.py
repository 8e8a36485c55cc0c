"""Facts as text: a model as torch prints it, a loss, optimizers, schedulers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from everystep.recording.facts import Described, LossFacts, ModuleFacts, OptimizerFacts, SchedulerFacts
from everystep.step.hyperparameters import set_hyperparameter

__all__ = [
    "loss_text",
    "model_text",
    "number_text",
    "optimizer_parts",
    "optimizers_text",
    "processes_text",
    "scheduler_text",
    "shortest",
    "value_text",
    "whole_text",
]


#: Param groups of an optimizer with settings that are named.
_MOST_GROUPS = 4
#: A line of text, and its depth.
_Line = tuple[int, str]


def processes_text(count: int) -> str:
    """Return how many processes train together."""
    return "one process" if count == 1 else f"{count} processes"


def model_text(modules: Mapping[str, ModuleFacts]) -> str:
    """Return a model as torch prints it.

    modules: by path, each before those within it.
    """
    lines: list[_Line] = []
    within: dict[str, list[tuple[str, list[_Line]]]] = {}
    # From the last on: the lines of what is in a module are there when its turn comes.
    for path, module in reversed(list(modules.items())):
        lines = _lines(module, within.pop(path, [])[::-1], path.count(".") + bool(path))
        parent, _, name = path.rpartition(".")
        within.setdefault(parent, []).append((name, lines))
    return "\n".join("  " * depth + line for depth, line in lines)


def _lines(module: ModuleFacts, inner: list[tuple[str, list[_Line]]], depth: int) -> list[_Line]:
    """Return the lines of a module at some depth. inner: names and lines of the modules within it."""
    name, arguments = module.class_name, module.arguments
    if not inner and "\n" not in arguments:
        return [(depth, f"{name}({arguments})")]
    own = [(depth + 1, line) for line in arguments.split("\n")] if arguments else []
    named = [(f"({each}): ", lines) for each, lines in inner]
    # torch merges equal neighbours of a ModuleList alone: `(0-5): 6 x Block(...)`.
    for title, ((at, first), *others) in _together(inner) if name == "ModuleList" else named:
        own += [(at, f"{title}{first}"), *others]
    return [(depth, f"{name}("), *own, (depth, ")")]


def _together(inner: list[tuple[str, list[_Line]]]) -> list[tuple[str, list[_Line]]]:
    """Merge adjacent equal modules of a list, and return them with titles."""
    found, first = [], 0
    for last, (name, lines) in enumerate(inner):
        if last + 1 == len(inner) or inner[last + 1][1] != lines:
            count = last - first + 1
            title = f"({inner[first][0]}-{name}): {count} x " if count > 1 else f"({name}): "
            found.append((title, lines))
            first = last + 1
    return found


def loss_text(loss: LossFacts | None) -> str:
    """Return the loss: a module as torch prints it, or with how it reduces; a function by its name."""
    if loss is None:
        return "of your own loop"
    reduction = loss.settings.get("reduction")
    if loss.modules and isinstance(reduction, str):
        return f"{loss.class_name}(reduction={reduction!r})"
    return whole_text(loss)


def optimizers_text(optimizers: Mapping[str, OptimizerFacts]) -> str:
    """Return each optimizer in a line with its name; an only one without."""
    texts = {name: _optimizer_text(each) for name, each in optimizers.items()}
    if len(texts) == 1:
        return next(iter(texts.values()))
    return "\n".join(f"{name}: {text}" for name, text in texts.items()) or "none"


def optimizer_parts(
    optimizers: Mapping[str, OptimizerFacts], numbers: Mapping[str, float], *, is_known: bool
) -> tuple[str, dict[str, str]]:
    """Return the class of the only optimizer, and its settings as text; of several, their classes.

    numbers: by their names in `hyperparameters`, those that a step used instead; is_known: whether the
    step used all others as they were when the run began.
    """
    if len(optimizers) != 1:
        return "\n".join(f"{n}: {each.class_name}" for n, each in optimizers.items()) or "none", {}
    (optimizer,) = optimizers.values()
    groups = tuple(dict(group) for group in optimizer.groups)
    for name, value in numbers.items():
        set_hyperparameter(groups, name, value)
    found = _settings_of(optimizer.model_copy(update={"groups": groups}))
    begun = "" if is_known or optimizer.is_torchs else " (as the run began)"
    return optimizer.class_name, {k if k in numbers else f"{k}{begun}": v for k, v in found.items()}


def _optimizer_text(optimizer: OptimizerFacts) -> str:
    text = _call_text(optimizer)
    if not optimizer.is_torchs or optimizer.class_name != "GradientDescent" or not optimizer.groups:
        return text
    return f"{text}: parameter - gradient * {optimizer.groups[0].get('lr')}"


def _call_text(optimizer: OptimizerFacts) -> str:
    settings = ", ".join(f"{key}={value}" for key, value in _settings_of(optimizer).items())
    return f"{optimizer.class_name}({settings})"


def _settings_of(optimizer: OptimizerFacts) -> dict[str, str]:
    """Return the settings of the first param group, but those that are off (None, False or 0).

    Those of other groups that differ are `lr[1]`, ...; of many groups, their number.
    """
    # torch's AdamW is an Adam with this setting.
    implied = {"decoupled_weight_decay"} if optimizer.class_name == "AdamW" else set()
    found = {}
    for place, group in enumerate(optimizer.groups[:_MOST_GROUPS]):
        for key, value in group.items():
            is_off = value in (None, False, 0) or key in implied
            if not is_off if place == 0 else value != optimizer.groups[0].get(key):
                text = str(tuple(value) if isinstance(value, list) else value)
                found[f"{key}[{place}]" if place else key] = text
    more = {"param groups": str(len(optimizer.groups))}
    return found | (more if len(optimizer.groups) > _MOST_GROUPS else {})


def shortest(number: float) -> str:
    """Return the fewest digits that restore this float32 (or else float64)."""
    import numpy as np

    with np.errstate(over="ignore"):
        single = np.float32(number)
    # A loss of float32 is 0.1 here, not 0.10000000149011612, which float64 would show.
    return str(single) if float(single) == number or number != number else repr(number)


def number_text(value: float | complex) -> str:
    """Return a number in the fewest digits that give it back."""
    return shortest(value) if isinstance(value, float) else str(value)


def value_text(value: Any) -> str:
    """Return a setting as Python writes it; a list, which JSON has, as a tuple."""
    return repr(tuple(value) if isinstance(value, list) else value)


def whole_text(thing: Described) -> str:
    """Return an object in a line, as a call of its class; a loss with modules as torch prints it."""
    if isinstance(thing, LossFacts):
        return model_text(thing.modules) if thing.modules else thing.class_name
    if isinstance(thing, ModuleFacts):
        is_one_line = "\n" not in thing.arguments
        return f"{thing.class_name}({thing.arguments if is_one_line else '...'})"
    if isinstance(thing, OptimizerFacts):
        return _call_text(thing)
    settings = ", ".join(f"{key}={value_text(value)}" for key, value in thing.settings.items())
    every = f", every {thing.every}" if thing.every else ""
    return f"{thing.class_name}({settings}){every}"


def scheduler_text(schedulers: Mapping[str, SchedulerFacts]) -> str | None:
    """Return the scheduler and how often it steps; None without a scheduler, or if a loop decides."""
    texts = [f"{each.class_name}, every {each.every}" for each in schedulers.values() if each.every]
    return "\n".join(texts) or None
