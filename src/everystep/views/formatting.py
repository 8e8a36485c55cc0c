"""What all views write with: numbers, counts, labels, and texts that cannot steer a terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size

from everystep.errors import NAMED, named
from everystep.experiment.metrics import metric_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "about_numbers",
    "block",
    "clean",
    "counted",
    "cut",
    "dtype_text",
    "grouped",
    "labelled",
    "measured_text",
    "number",
    "one_line",
    "percent",
    "seconds_text",
    "several",
    "shape_text",
    "time_text",
]

#: Between the sizes of a shape.
TIMES = "\N{MULTIPLICATION SIGN}"

#: Characters of a label of an answer.
_WIDTH = 12

#: Control characters except line feed and tab (escape sequences begin with one), marks that change the
#: direction of text or are invisible, and halves of surrogate pairs.
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def clean(text: str) -> str:
    """Return a text with what would steer a terminal replaced."""
    return _STEERING.sub("\ufffd", text)


def one_line(text: str) -> str:
    """Return a text as part of a line: unprintable characters and line breaks are replaced."""
    # Nearly every text is, and this look is much quicker than one at each character.
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else "\ufffd" for each in text)


def cut(text: str, most: int) -> str:
    """Return a text of at most so many columns of the terminal; a longer one ends with an ellipsis."""
    # By columns: a Chinese character takes two.
    return text if cell_len(text) <= most else set_cell_size(text, most - 1).rstrip("….") + "…"


def measured_text(name: str, value: float) -> str:
    """Return the value of a measurement in four significant digits, of a share in percent."""
    metric = metric_of(name)
    # A loop may log an accuracy in percent, which is above 1.
    return percent(value, 4) if metric and metric.is_share and 0 <= value <= 1 else number(value)


def number(value: float | None) -> str:
    """Return a number in four significant digits, as every view shows it."""
    return "" if value is None else f"{value:.4g}"


def grouped(value: float) -> str:
    """Return a number in four significant digits, thousands apart."""
    text = number(value)
    # Only whole ones; 12345 has an exponent in four digits: 1.234e+04.
    return f"{int(text):,}" if text.lstrip("-").isdigit() else text


def percent(share: float, digits: int = 3) -> str:
    """Return a share in percent, in so many digits or more: only what is whole is shown as 100%."""
    value = 100 * share
    if math.isfinite(value) and abs(value) >= 999.5:
        return f"{value:,.0f}%"
    # A gradient with a few numbers that are not 0 must not show "100%" zeros.
    texts = (f"{value:.{each}g}" for each in range(digits, 18))
    return f"{next(text for text in texts if text != '100' or value == 100)}%"


def seconds_text(seconds: float) -> str:
    """Return a duration in three digits, a long one in whole seconds: `0.25 s`, `5,400 s`."""
    return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds:,.0f} s"


def shape_text(tensor: Tensor) -> str:
    """Return a shape as sizes multiplied, and `number` of one without dimensions."""
    return TIMES.join(f"{size:,}" for size in tensor.shape) if tensor.dim() else "number"


def dtype_text(tensor: Tensor) -> str:
    """Return the dtype of a tensor without torch's prefix: `float32`."""
    return str(tensor.dtype).removeprefix("torch.")


def time_text(time: datetime) -> str:
    """Return a time to the minute, where the reader is."""
    return f"{time.astimezone():%Y-%m-%d %H:%M}"


def counted(count: int, noun: str) -> str:
    """Return a number of things: `1 step`, `1,000 steps`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def several(noun: str, things: Sequence[object], most: int = NAMED) -> str:
    """Return things by number or name, and of many only the first: `row 3`, `rows 3, 5 and 2 more`."""
    return f"{noun}{'s' * (len(things) > 1)} {named(things, most)}"


def labelled(label: str, text: str, width: int = _WIDTH) -> str:
    """Return lines with a label before the first."""
    first, *rest = text.splitlines() or [""]
    return "\n".join([f"{label:<{width}}{first}", *(" " * width + line for line in rest)])


def block(lines: Iterable[tuple[str, str]], verdict: str) -> str:
    """Return an answer: labelled lines (those with a text), and below them the conclusion."""
    return "\n".join([*(labelled(*line) for line in lines if line[1]), "", verdict])


def about_numbers(source: str) -> str:
    """Return an explanation of row numbers; source: the name of their data, empty if unknown."""
    return f"row: its {f'number in {source}, counted from 0' if source else 'place in the batch'}"
