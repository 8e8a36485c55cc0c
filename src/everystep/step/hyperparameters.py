"""The numbers in an optimizer's param groups that may change between steps, by recorded name.

`lr`, `momentum` and `beta1` belong to the first param group, `lr[1]` to the second; any other setting
has the name of its key: `optimizer.weight_decay`, `optimizer.betas.1[1]`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from numbers import Real
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

__all__ = [
    "changes_more_than_lr",
    "expected_to_change",
    "hyperparameters",
    "is_hyperparameter",
    "set_hyperparameter",
]

_NAME = re.compile(r"(lr|momentum|beta1|optimizer\.([^.\[\]]+)(?:\.(\d+))?)(?:\[(\d+)\])?")
_SHORT = {("lr", None): "lr", ("momentum", None): "momentum", ("betas", 0): "beta1"}
_PLACES = {name: place for place, name in _SHORT.items()}


class HasGroups(Protocol):
    """An optimizer, or another object with param groups."""

    param_groups: list[dict[str, Any]]


def hyperparameters(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return the current numbers."""
    found: dict[str, float] = {}
    for index, group in enumerate(optimizer.param_groups):
        for key, place, value in _numbers(group):
            name = _SHORT.get((key, place)) or f"optimizer.{key}" + (
                "" if place is None else f".{place}"
            )
            found[f"{name}[{index}]" if index else name] = value
    return found


def changes_more_than_lr(scheduler: Any) -> bool:
    """Tell whether a scheduler may change other settings of the optimizer, such as its momentum."""
    inner = getattr(scheduler, "_schedulers", ())
    is_known = type(scheduler).__module__.startswith("torch.")
    own = not is_known or getattr(scheduler, "cycle_momentum", False)
    return own or any(map(changes_more_than_lr, inner))


def expected_to_change(name: str, *, more_than_lr: bool) -> bool:
    """Return whether a scheduler is expected to change a number at every step.

    more_than_lr: whether the scheduler changes the momentum as well.
    """
    short = name.partition("[")[0]
    return short == "lr" or (more_than_lr and short in ("momentum", "beta1"))


def is_hyperparameter(name: str) -> bool:
    """Return whether a measurement is a hyperparameter, by its name."""
    return _NAME.fullmatch(name) is not None


def set_hyperparameter(optimizer: HasGroups, name: str, value: float) -> None:
    """Set a number by its name in `hyperparameters`; ignore a param group that does not exist."""
    match = _NAME.fullmatch(name)
    index = int(match[4] or 0) if match else 0
    if match is None or index >= len(optimizer.param_groups):
        return
    group: dict[str, Any] = optimizer.param_groups[index]
    place = None if match[3] is None else int(match[3])
    key, place = _PLACES.get(match[1], (match[2] or "", place))
    there = group.get(key)
    if place is None:
        _set(group, key, value)
    elif isinstance(there, list | tuple) and place < len(there):
        items = list(there)
        _set(items, place, value)
        group[key] = type(there)(items)


def _numbers(group: dict[str, Any]) -> Iterator[tuple[str, int | None, float]]:
    """Yield the numbers of a param group: key, place within a tuple or list, value."""
    for key, value in group.items():
        if key in ("params", "initial_lr"):
            continue
        if isinstance(value, list | tuple):
            for place, item in enumerate(value):
                if (number := _number(item)) is not None:
                    yield key, place, number
        elif (number := _number(value)) is not None:
            yield key, None, number


def _number(value: Any) -> float | None:
    """Return a setting of a param group as a number, None if it is absent or not a number."""
    from torch import Tensor

    is_one = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    return float(value) if is_one or isinstance(value, Real) else None


def _set(target: Any, key: Any, value: float) -> None:
    """Set a number, keeping its type, unless it has that value already."""
    from torch import Tensor

    there = target.get(key) if isinstance(target, dict) else target[key]
    if _number(there) == value:
        return
    if isinstance(there, Tensor):
        there.fill_(value)
    elif isinstance(there, bool):
        target[key] = bool(value)
    elif isinstance(there, int) and value == int(value):
        target[key] = int(value)
    elif there is not None:
        target[key] = value
