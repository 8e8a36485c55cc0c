"""The body of a request, field by field; an invalid one raises UsageError."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, TypeGuard

from starlette.requests import Request

from everystep.errors import UsageError

__all__ = ["Field", "fields_of", "flag", "ints", "line", "maybe", "settings", "text", "whole"]

#: Characters of an expression, or of a value.
LONGEST_TEXT = 10_000
#: Bytes of a request.
MOST_BYTES = 1_000_000

#: Reads a field of a request, given its value (None if it is missing) and its name.
Field = Callable[[Any, str], Any]


async def fields_of(request: Request) -> dict[str, Any]:
    """Read the body of a request, up to `MOST_BYTES`.

    Raises:
        UsageError: it is longer, or not a JSON object.
    """
    body = bytearray()
    # In parts, so that a long body is refused before it is in memory.
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise UsageError(f"the request is longer than {MOST_BYTES:,} bytes; write it shorter")
    try:
        fields = json.loads(bytes(body) or b"{}")
    except (ValueError, RecursionError):
        raise UsageError("the request is not JSON") from None
    if not isinstance(fields, dict):
        raise UsageError("the request is not a JSON object")
    return fields


def maybe(read: Field, absent: Any = None) -> Field:
    """Return a reader of a field that may be missing. absent: the value of a missing one."""
    return lambda value, name: absent if value is None else read(value, name)


def text(value: Any, name: str, longest: int = LONGEST_TEXT) -> str:
    """Return a string that is not blank."""
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f"{name} is missing; write it as a string")
    if len(value) > longest:
        raise UsageError(f"{name} is longer than {longest:,} characters; write it shorter")
    return value


def whole(value: Any, name: str, least: int = 0) -> int:
    """Return an integer."""
    if not _is_whole(value, least):
        raise UsageError(f"{name} is {value!r:.80}; write a whole number from {least} on")
    return value


def ints(value: Any, name: str) -> list[int]:
    """Return whole numbers from 0 on, at least one."""
    if isinstance(value, list) and value and all(_is_whole(each) for each in value):
        return value
    raise UsageError(f"{name} are {value!r:.80}; write whole numbers from 0 on: [8123, 8124]")


def line(value: Any, name: str) -> str:
    """Return a text that may be blank."""
    if not isinstance(value, str) or len(value) > LONGEST_TEXT:
        raise UsageError(f"{name} must be a string of at most {LONGEST_TEXT:,} characters")
    return value


def flag(value: Any, name: str) -> bool:
    """Return true or false; false if it is missing."""
    value = False if value is None else value
    if not isinstance(value, bool):
        raise UsageError(f"{name} is {value!r:.80}; write true or false")
    return value


def settings(value: Any, name: str) -> dict[str, str]:
    """Return strings by path; none of them reads a file."""
    value = value or {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise UsageError(f"{name} must map paths to strings, as after --set")
    if not all(text.isprintable() for text in value.values()):
        raise UsageError(f"{name} must be strings of one line, as after --set")
    for path in value:
        keys = re.findall(r"[^.\[\]]+", path)
        if not keys or "=" in path:
            raise UsageError(f"{path!r:.80} is not a setting; write a path: optimizer.lr")
        # A path of a file in `data` would let the page read any file of the user.
        if keys[0].strip() == "data":
            raise UsageError(
                f"{path!r:.80} cannot be changed on the page, which reads no files; "
                "everystep fork RUN --at STEP --set does it"
            )
    return value


def _is_whole(value: Any, least: int = 0) -> TypeGuard[int]:
    # Not a bool; and above 2**53, a number of JavaScript is not exact.
    return type(value) is int and least <= value < 2**53
