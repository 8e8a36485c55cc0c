"""What all views write with: numbers, counts, labels, and texts that cannot steer a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = [
    "NAMED",
    "about_numbers",
    "block",
    "clean",
    "counted",
    "grouped",
    "labelled",
    "named",
    "number",
    "one_line",
]

#: States, tensors, names and rows that are named before the rest is counted.
NAMED = 6

#: Characters of a label of an answer.
_WIDTH = 12

#: Control characters besides line feed and tab (escape sequences begin with one), marks that turn the
#: direction of text or hide in it, and halves of surrogate pairs.
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def clean(text: str) -> str:
    """Return a text with what would steer a terminal replaced."""
    return _STEERING.sub("\ufffd", text)


def one_line(text: str) -> str:
    """Return a text as part of a line: whatever is not printable is replaced, line breaks, too."""
    return "".join(each if each.isprintable() else "\ufffd" for each in text)


def number(value: float | None) -> str:
    """Return a number in four significant digits, as every view shows it."""
    return "" if value is None else f"{value:.4g}"


def grouped(value: float) -> str:
    """Return a number in four significant digits, thousands apart."""
    text = number(value)
    return f"{int(text):,}" if text.lstrip("-").isdigit() else text


def counted(count: int, noun: str) -> str:
    """Return a number of things: `1 step`, `1,000 steps`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def named(things: Sequence[Any], most: int = NAMED) -> str:
    """Return the first of some things by name, and how many more there are."""
    more = f" and {len(things) - most:,} more" if len(things) > most else ""
    return ", ".join(map(str, things[:most])) + more


def labelled(label: str, text: str, width: int = _WIDTH) -> str:
    """Return lines with a label before the first."""
    first, *rest = text.splitlines() or [""]
    return "\n".join([f"{label:<{width}}{first}", *(" " * width + line for line in rest)])


def block(lines: Iterable[tuple[str, str]], verdict: str) -> str:
    """Return an answer: lines with labels, where a text is not empty, and below them the conclusion."""
    return "\n".join([*(labelled(*line) for line in lines if line[1]), "", verdict])


def about_numbers(source: str) -> str:
    """Return what the numbers of rows are; source: what they are of, empty if they are unknown."""
    return f"row: its {f'number in {source}, counted from 0' if source else 'place in the batch'}"
