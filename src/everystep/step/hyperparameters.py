"""The numbers in an optimizer's param groups that may change between steps, by recorded name.

`lr`, `momentum` and `beta1` belong to the first param group, `lr[1]` to the second; any other setting
has the name of its key: `optimizer.weight_decay`, `optimizer.betas.1[1]`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any

__all__ = [
    "changes_more_than_lr",
    "expected_to_change",
    "hyperparameters",
    "is_hyperparameter",
    "set_hyperparameter",
]

_NAME = re.compile(r"(lr|momentum|beta1|optimizer\.[^.\[\]]+(\.\d+)?)(\[\d+\])?")
Groups = Sequence[dict[str, Any]]
_SHORT = {("lr", None): "lr", ("momentum", None): "momentum", ("betas", 0): "beta1"}


def hyperparameters(groups: Groups) -> dict[str, float]:
    """Return the current numbers of param groups."""
    return {name: value for name, value, *_ in _numbers(groups)}


def changes_more_than_lr(scheduler: Any) -> bool:
    """Return whether a scheduler may change other settings of the optimizer, such as its momentum."""
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


def set_hyperparameter(groups: Groups, name: str, value: float) -> None:
    """Set a number by its name in `hyperparameters`; ignore a param group that does not exist."""
    for known, now, group, key, place in _numbers(groups):
        if known != name or now == value:
            continue
        there = group[key]
        if place is None:
            group[key] = _like(there, value)
        else:
            items = list(there)
            items[place] = _like(items[place], value)
            group[key] = type(there)(items)


def _numbers(groups: Groups) -> Iterator[tuple[str, float, dict[str, Any], str, int | None]]:
    """Yield the name and value of each number, its group and key, and its place in a tuple or list."""
    # e.g. ("lr[1]", 0.1, group, "lr", None), ("beta1", 0.9, group, "betas", 0)
    for index, group in enumerate(groups):
        for key, setting in [*group.items()]:
            # A scheduler notes there with which rate it began.
            if key in ("params", "initial_lr"):
                continue
            is_list = isinstance(setting, list | tuple)
            for place, item in enumerate(setting) if is_list else [(None, setting)]:
                name = _SHORT.get((key, place)) or f"optimizer.{key}{f'.{place}' if is_list else ''}"
                if (value := _number(item)) is not None:
                    yield f"{name}[{index}]" if index else name, value, group, key, place


def _number(value: Any) -> float | None:
    """Return a setting of a param group as a number, None if it is absent or not a number."""
    # Here, since commands that only read facts, which import this module, need no torch.
    from torch import Tensor

    if isinstance(value, dict):  # a number of NumPy's, in the data of a state
        value = value.get("value")
    is_one = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    return float(value) if is_one or isinstance(value, Real) else None


def _like(there: Any, value: float) -> Any:
    """Return a number with the type of another one; a tensor is filled with it."""
    if hasattr(there, "fill_"):
        return there.fill_(value)
    # A bool is an int, too; all values are recorded as floats.
    if isinstance(there, bool):
        return bool(value)
    return int(value) if isinstance(there, int) and value == int(value) else value
