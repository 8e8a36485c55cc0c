"""A page of text for the terminal: lines, aligned tables, and tensor summaries."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from rich.cells import cell_len
from rich.text import Text
from torch import Tensor

from everystep.replay.step import statistics
from everystep.views.tables import Cell, fitted, table_lines
from everystep.views.texts import grouped, one_line

__all__ = [
    "ABSOLUTE",
    "ALL_VALUES",
    "TIMES",
    "Page",
    "norm",
    "number_cells",
    "number_headings",
    "shape_text",
    "statistics_text",
]

#: Of tensors with at most so many elements, all are printed; of larger ones, the edges.
ALL_VALUES = 1000

#: After the shape of a complex tensor: its statistics are of absolute values.
ABSOLUTE = "|z|"

#: Between the sizes of a shape.
TIMES = "\N{MULTIPLICATION SIGN}"

#: Columns that a narrow page does without, in this order.
_UNNEEDED = (("min", "max"), ("std",), ("norm before", "norm after"))

_LABEL = 10
_INDENT = 2
_EMPTY = ("", "", True)


class Page:
    """Text that grows line by line; its content is literal."""

    def __init__(self, width: int, values: bool) -> None:
        self.text = Text()
        self.width = width
        self.values = values

    def blank(self) -> None:
        """Add an empty line."""
        self.text.append("\n")

    def line(self, *parts: tuple[str, str], indent: int = 0) -> None:
        """Add a line of texts with their styles."""
        line = Text(" " * indent)
        for text, style in parts:
            line.append(one_line(text), style=style or None)
        line.rstrip()
        self.text.append(line).append("\n")

    def labelled(self, label: str, text: str, style: str = "") -> None:
        """Add a text with a label before its first line."""
        for place, each in enumerate(text.splitlines() or [""]):
            self.line((f"{'' if place else label:<{_LABEL}}", "dim"), (each, style))

    def wrapped(self, text: str, style: str, *, indent: int) -> None:
        """Add a text, wrapped if it is wider than the page."""
        whole = textwrap.wrap(one_line(text), self.width - indent, subsequent_indent="    ")
        for line in whole if cell_len(text) > self.width - indent else [text]:
            self.line((line, style), indent=indent)

    def heading(self, label: str, text: str = "") -> None:
        """Begin a section."""
        self.blank()
        self.line((f"{label:<{_LABEL}}", "bold"), (text, ""))

    def table(self, rows: Sequence[Sequence[Cell]], indent: int = 2) -> None:
        """Add rows of cells, the first of them headings.

        Empty columns are left out, and where the page is narrow what matters least.
        """
        for line in table_lines(fitted(rows, self.width - indent, _UNNEEDED)):
            self.text.append(" " * indent).append(line).append("\n")

    def numbers(self, tensor: Tensor, *, indent: int) -> None:
        """Add the numbers of a tensor."""
        for line in _numbers_text(tensor, self.width - indent).splitlines():
            self.line((line, ""), indent=indent)

    def tensors(self, named: Mapping[str, Tensor], title: str = "") -> None:
        """Add tensors with what their numbers are like, and their numbers where asked for."""
        if self.values:
            for name, tensor in named.items():
                self.line((f"{name}  ", "bold"), *statistics_text(tensor), indent=_INDENT)
                self.numbers(tensor, indent=2 * _INDENT)
            return
        rows: list[list[Cell]] = [[(title, "dim", False), ("", "dim", False), *number_headings()]]
        for name, tensor in named.items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            rows.append([(name, "", False), (dtype, "dim", False), *number_cells(tensor)])
        self.table(rows)


def norm(tensor: Tensor) -> float:
    """Return the 2-norm of a tensor."""
    magnitudes = (tensor.abs() if tensor.is_complex() else tensor).detach()
    floats = magnitudes if magnitudes.is_floating_point() else magnitudes.double()
    return float(torch.linalg.vector_norm(floats, dtype=torch.float64))


def shape_text(tensor: Tensor) -> str:
    """Return a shape as sizes multiplied, and `number` of one without dimensions."""
    return TIMES.join(f"{size:,}" for size in tensor.shape) if tensor.dim() else "number"


def _shape_of_numbers(tensor: Tensor) -> str:
    """Return a shape; for complex elements, with a sign that statistics are of absolute values."""
    return shape_text(tensor) + (f", {ABSOLUTE}" if tensor.is_complex() else "")


def number_headings() -> list[Cell]:
    """Return the headings for `number_cells`."""
    names = ("shape", "mean", "std", "min", "max", "zeros", "not finite")
    return [(name, "dim", name != "shape") for name in names]


def number_cells(tensor: Tensor | None) -> list[Cell]:
    """Return the shape of a tensor and its statistics; for a single number, the number.

    For complex elements, these are of their absolute values, and the shape says so.
    """
    if tensor is None:
        return [("", "", False), *[_EMPTY] * 6]
    seen = statistics(tensor)
    shape: Cell = (_shape_of_numbers(tensor), "", False)
    bad: Cell = (f"{seen.nonfinite:,}" if seen.nonfinite else "", "bold red", True)
    if tensor.numel() == 1:
        value = "" if seen.nonfinite else grouped(seen.mean)
        only = (
            grouped(float(tensor.abs() if tensor.is_complex() else tensor)) if seen.nonfinite else value
        )
        return [shape, (only, "bold red" if seen.nonfinite else "", True), *[_EMPTY] * 4, bad]
    texts = ["" if math.isnan(each) else grouped(each) for each in seen[:4]]
    zeros = f"{100 * seen.zeros:.3g}%" if seen.zeros > 0 else ""
    return [shape, *((text, "", True) for text in (*texts, zeros)), bad]


def statistics_text(tensor: Tensor, *, is_unset: bool = False) -> list[tuple[str, str]]:
    """Return the statistics of a tensor as a line of texts with their styles.

    is_unset: whether it is memory without numbers.
    """
    dtype = str(tensor.dtype).removeprefix("torch.")
    parts = [(f"{shape_text(tensor)} {dtype}", "")]
    if is_unset:
        return [*parts, ("  no numbers, only memory", "dim")]
    if tensor.is_complex():
        parts.append(("  absolute values:", "dim"))
    cells = number_cells(tensor)[1:]
    for (heading, *_), (text, style, _) in zip(number_headings()[1:], cells, strict=True):
        if text:
            label = "value" if tensor.numel() == 1 and heading == "mean" else heading
            parts += [(f"  {label} ", "dim"), (text, style)]
    return parts


def _numbers_text(tensor: Tensor, width: int) -> str:
    """Return the numbers of a tensor in six significant digits."""
    values = tensor.detach().cpu()
    if values.dtype.is_floating_point:
        values = values.double()
    elif values.is_complex():
        values = values.to(torch.complex128)
    return np.array2string(
        values.numpy(),
        max_line_width=max(width, 20),
        threshold=ALL_VALUES,
        separator=" ",
        formatter={
            "float_kind": lambda value: f"{value:>12.6g}",
            "complex_kind": lambda value: f"{value:>20.6g}",
        },
    )
