"""Plain data: settings as JSON holds them, and settings that are set again from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["plain", "update_plain"]


def plain(value: Any) -> Any:
    """Return the value as JSON can hold it; of what it cannot hold, the class."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    return type(value).__name__  # a user's object may count how often it is printed


def update_plain(target: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Set numbers, strings and lists of these; everything else was written only as text."""
    for key, value in saved.items():
        there = target.get(key)
        if isinstance(there, Mapping | Tensor) or callable(there):
            continue
        if isinstance(value, list):
            items = [*value, *there] if isinstance(there, list | tuple) else value
            if all(isinstance(item, bool | int | float | None) for item in items):
                target[key] = tuple(value) if isinstance(there, tuple) else value
        elif not isinstance(value, Mapping) and not (isinstance(value, str) and there != value):
            target[key] = value
