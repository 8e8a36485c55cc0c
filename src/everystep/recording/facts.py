"""What the facts of a run look like: read from a database that a stranger may have written.

Whoever reads a fact may rely on its shape. A fact that is missing is looked after where it is used: a
run that has just begun has but few.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from everystep.errors import RunError

__all__ = ["read_facts"]


class _Time:
    """Stands for a time with its zone, as ISO 8601 writes it."""


_SHAPE: dict[str, Any] = {
    "name": str,
    "status": str,
    "reason": (str, None),
    "steps": int,
    "seed": (int, None),
    "device": str,
    "started": _Time,
    "finished": (_Time, None),
    "seconds": (float, None),
    "data": {"rows": int},
    "batches": {"batch_size": (int, None), "drop_last": bool, "seed": int, "steps_per_epoch": int},
    "model": {"text": str, "parameters": int},
    "loss": {"text": str},
    "loss.dtype": str,
    "optimizer": {"text": str},
    "schedule": (str, None),
    "clip_norm": (float, None),
    "evaluate_every": (int, None),
    "preparation": (dict, None),
    "numerics": {"threads": int, "processor": str, "device": str},
    "versions": dict,
    "engine": (
        {
            "asked": str,
            "folded": bool,
            "programs": [{"file": str}],
            "checks": int,
            "verified_to": int,
            "eager_from": (int, None),
            "reason": (str, None),
        },
        None,
    ),
    "loop": ({"parts": dict, "optimizers": dict, "programs": int, "unseen": list}, None),
    "batches.lost_to": int,
    "data.file": {"stored": bool, "bytes": int, "digest": str},
    "experiment.file": str,
    "experiment.digest": str,
    "fork": {"parent": str, "directory": str, "at": int, "changed": dict},
    "measured": dict,
    "nonfinite_step": int,
}


def read_facts(rows: Iterable[tuple[Any, Any]], path: Path) -> dict[str, Any]:
    """Return facts from the rows of a run's database, each with the shape that everystep writes.

    Raises:
        RunError: one has another, so that the database was changed.
    """
    facts: dict[str, Any] = {}
    for key, text in rows:
        try:
            facts[key] = json.loads(text)
            json.dumps(facts[key], ensure_ascii=False).encode()  # half a surrogate pair is no text
        except (ValueError, TypeError, RecursionError):
            raise _changed(path, key) from None
    _check(facts, path)
    return facts


def _check(facts: dict[str, Any], path: Path) -> None:
    for key, value in facts.items():
        if key in _SHAPE and not _fits(value, _SHAPE[key]):
            raise _changed(path, key)
    earlier = facts.get("earlier", [])
    if not _fits(earlier, [{"last": int, "facts": dict}]):
        raise _changed(path, "earlier")
    for stretch in earlier:
        _check(stretch["facts"], path)


def _fits(value: Any, shape: Any) -> bool:
    if isinstance(shape, tuple):
        return any(_fits(value, each) for each in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(_fits(item, shape[0]) for item in value)
    if isinstance(shape, dict):
        keys = isinstance(value, dict) and shape.keys() <= value.keys()
        return keys and all(_fits(value[key], inner) for key, inner in shape.items())
    if shape is None:
        return value is None
    if shape is _Time:
        return _is_time(value)
    if shape is int:
        return type(value) is int and abs(value) < 2**64  # a seed has 64 bits
    return type(value) in (int, float) if shape is float else isinstance(value, shape)


def _is_time(value: Any) -> bool:
    try:
        time = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return False
    return time.tzinfo is not None and 1970 <= time.year <= 9000


def _changed(path: Path, key: Any) -> RunError:
    return RunError(
        f"{path} says of {str(key)[:80]!r} what everystep never writes there: the database was changed"
    )
