"""Config and tags: what the user says of a run, as plain data."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from everystep.errors import Fault, UsageError
from everystep.recording.facts import LARGEST_CONFIG, LONGEST_TAG, MOST_TAGS

__all__ = ["facts_from"]


def facts_from(config: Any, tags: Iterable[str]) -> dict[str, Any]:
    """Return the facts of a run that the user gives: `config` and `tags`, without empty ones.

    Raises:
        UsageError: one cannot be kept; gives the reason.
    """
    found = {"config": _checked_config(config), "tags": _checked_tags(tags)}
    return {name: value for name, value in found.items() if value}


def _checked_config(config: Any) -> dict[str, Any]:
    """Return a config as JSON can hold it; what JSON cannot hold is its text.

    config: a mapping, a dataclass, an `argparse.Namespace`, or None for none.

    Raises:
        UsageError: it is none of these, or too large.
    """
    if isinstance(config, argparse.Namespace):
        config = vars(config)
    plain = _plain({} if config is None else config)
    if not isinstance(plain, dict):
        kind = type(config).__name__
        raise UsageError(f"config is a {kind}; pass a dict, a dataclass or an argparse.Namespace")
    if (size := len(json.dumps(plain))) > LARGEST_CONFIG:
        raise UsageError(f"config has {size:,} bytes as JSON; a run holds at most {LARGEST_CONFIG:,}")
    return plain


def _checked_tags(tags: Iterable[str]) -> tuple[str, ...]:
    """Return tags, each once and in one line.

    Raises:
        UsageError: lists each that a run cannot hold.
    """
    if isinstance(tags, str):
        raise UsageError(f"tags is a text; pass a list: tags=[{tags!r:.100}]")
    given = [*tags]
    faults = [
        Fault(f"tags[{place}]", f"must be a text of 1 to {LONGEST_TAG} characters, not {tag!r:.100}")
        for place, tag in enumerate(given)
        if not isinstance(tag, str) or not 0 < len(" ".join(tag.split())) <= LONGEST_TAG
    ]
    if faults:
        raise UsageError(faults, "the tags of the run")
    found = tuple(dict.fromkeys(" ".join(tag.split()) for tag in given))
    if len(found) > MOST_TAGS:
        raise UsageError(f"{len(found)} tags are too many; a run has at most {MOST_TAGS}")
    return found


def _plain(value: Any) -> Any:
    """Return a value as JSON can hold it. Numbers that are not finite become texts."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return str(value)
