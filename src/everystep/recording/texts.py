"""The texts that people see of facts: a model as torch prints it, a loss, optimizers, schedules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from everystep.recording.facts import LossFacts, ModuleFacts, OptimizerFacts, ScheduleFacts

__all__ = [
    "loss_text",
    "model_text",
    "module_text",
    "optimizer_parts",
    "optimizers_text",
    "schedule_text",
]


def model_text(modules: Mapping[str, ModuleFacts]) -> str:
    """Return a model as torch prints it.

    modules: by path, each before those within it.
    """
    text = ""
    within: dict[str, list[tuple[str, str]]] = {}
    for path, module in reversed(list(modules.items())):
        text = module_text(module, within.pop(path, [])[::-1])
        parent, _, name = path.rpartition(".")
        within.setdefault(parent, []).append((name, text))
    return text


def module_text(module: ModuleFacts, inner: list[tuple[str, str]]) -> str:
    """Return a module as torch prints it.

    inner: names and texts of the modules within it.
    """
    name, arguments = module.class_name, module.arguments
    if not inner and "\n" not in arguments:
        return f"{name}({arguments})"
    lines = arguments.split("\n") if arguments else []
    lines += _together(inner) if name == "ModuleList" else [f"({own}): {text}" for own, text in inner]
    indented = "".join(f"\n{line}" for line in lines).replace("\n", "\n  ")
    return f"{name}({indented}\n)"


def _together(inner: list[tuple[str, str]]) -> list[str]:
    """Return modules of a list, those that are alike and next to each other in one line."""
    lines, first = [], 0
    for last, (name, text) in enumerate(inner):
        if last + 1 == len(inner) or inner[last + 1][1] != text:
            count = last - first + 1
            several = f"({inner[first][0]}-{name}): {count} x {text}"
            lines.append(several if count > 1 else f"({name}): {text}")
            first = last + 1
    return lines


def loss_text(loss: LossFacts | None) -> str:
    """Return the loss: a module as torch prints it, or with how it reduces; a function by its name."""
    if loss is None:
        return "of your own loop"
    reduction = loss.settings.get("reduction")
    if loss.modules and isinstance(reduction, str):
        return f"{loss.class_name}(reduction={reduction!r})"
    return model_text(loss.modules) if loss.modules else loss.class_name


def optimizers_text(optimizers: Mapping[str, OptimizerFacts]) -> str:
    """Return each optimizer in a line with its name; an only one without."""
    texts = {name: _optimizer_text(each) for name, each in optimizers.items()}
    if len(texts) == 1:
        return next(iter(texts.values()))
    return "\n".join(f"{name}: {text}" for name, text in texts.items()) or "none"


def optimizer_parts(optimizers: Mapping[str, OptimizerFacts]) -> tuple[str, dict[str, str]]:
    """Return the class of the only optimizer, and its settings as text; of several, all in one text."""
    if len(optimizers) != 1:
        return optimizers_text(optimizers), {}
    (optimizer,) = optimizers.values()
    return optimizer.class_name, _settings_of(optimizer)


def _optimizer_text(optimizer: OptimizerFacts) -> str:
    settings = ", ".join(f"{key}={value}" for key, value in _settings_of(optimizer).items())
    text = f"{optimizer.class_name}({settings})"
    if not optimizer.is_torchs or optimizer.class_name != "GradientDescent" or not optimizer.groups:
        return text
    return f"{text}: parameter - gradient * {optimizer.groups[0].get('lr')}"


def _settings_of(optimizer: OptimizerFacts) -> dict[str, str]:
    """Return what the first param group says, but not what is off (None, False or 0)."""
    group = optimizer.groups[0] if optimizer.groups else {}
    return {key: _setting_text(value) for key, value in group.items() if value not in (None, False, 0)}


def _setting_text(value: Any) -> str:
    return str(tuple(value) if isinstance(value, list) else value)


def schedule_text(schedules: Mapping[str, ScheduleFacts]) -> str | None:
    """Return the schedule and how often it steps; None where there is none, or a loop decides."""
    texts = [f"{each.class_name}, every {each.every}" for each in schedules.values() if each.every]
    return "\n".join(texts) or None
