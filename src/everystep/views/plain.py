"""Answers as plain data: what JSON can hold."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from typing import Any

from everystep.experiment.metrics import metric_of
from everystep.recording.texts import shortest

__all__ = ["DERIVED", "as_json", "metric_data", "plain_data", "plain_number"]

#: What answers, and their parts, derive from their fields and are shown with, by the name of the class.
DERIVED: dict[str, Callable[[Any], dict[str, Any]]] = {}


def as_json(data: Any) -> str:
    """Return plain data as JSON, in ASCII: names stay whole in any encoding, and steer no terminal."""
    # NaN is not JSON, and other programs refuse it: `plain_data` has made texts of it.
    return json.dumps(data, indent=1, allow_nan=False)


def plain_number(value: float | None) -> float | str | None:
    """Return a number in the fewest digits that give it back; nan, inf and -inf are texts."""
    if value is None or not math.isfinite(value):
        return value if value is None else str(value)
    # 0.1 of float32 is 0.10000000149011612 as a float of Python, which JSON would print.
    return float(shortest(value))


def metric_data(measurement: str) -> dict[str, Any]:
    """Return whether a high or a low value of a measurement is better, and whether it is a share."""
    metric = metric_of(measurement)
    return {"better": metric and metric.better, "is_share": metric is not None and metric.is_share}


def plain_data(value: Any) -> Any:
    """Return an answer as JSON can hold it: its fields and derived properties.

    NaN and infinities become texts, and so do whole numbers beyond 2**53, which most readers of JSON
    round, complex numbers, times and paths. A step becomes its number, an operation its operator, phase,
    module and line of code.
    """
    if value is None or isinstance(value, (str, int)):
        return str(value) if isinstance(value, int) and abs(value) > 2**53 else value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(key): plain_data(item) for key, item in value.items()}
    kind = type(value).__name__  # importing the classes would import torch, which lists do without
    if kind == "Step":
        return value.number
    if kind == "Observed":
        operation = value.operation
        found = {key: getattr(operation, key) for key in ("operator", "phase", "module")}
        return found | {"line": None if value.line is None else value.line.data()}
    names = None
    if is_dataclass(value):
        # Fields without a repr are the machinery behind an answer, such as its opened steps.
        names = [each.name for each in fields(value) if each.repr]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        names = list(value._fields)
    if names is not None:
        found = {name: getattr(value, name) for name in names}
        if kind in DERIVED:
            found |= DERIVED[kind](value)
        return {name: plain_data(item) for name, item in found.items()}
    if isinstance(value, list | tuple | set):
        return [plain_data(item) for item in value]
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat()
    # Tensors, and arrays and numbers of NumPy.
    return plain_data(value.tolist()) if hasattr(value, "tolist") else str(value)
