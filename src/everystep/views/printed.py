"""What reaches a terminal: names and texts may be a stranger's, and must not steer it."""

from __future__ import annotations

import re

__all__ = ["clean", "one_line"]

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
