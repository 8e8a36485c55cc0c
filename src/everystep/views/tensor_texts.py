"""Tensors in the terminal: what their numbers are like, as columns or in a line, and the numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from everystep.replay.opened_step import statistics
from everystep.views.formatting import dtype_text, grouped, percent, shape_text
from everystep.views.terminal import Cell, Column, Page, Styled, keyed

__all__ = ["ABSOLUTE", "NUMBERS", "numbers_of", "statistics_text", "write_numbers"]

#: Tensors with at most so many elements are printed whole, larger ones by their edges.
ALL_VALUES = 1000

#: After the shape of a complex tensor: its statistics are of absolute values.
ABSOLUTE = "|z|"

#: Statistics of a tensor: columns of `numbers_of`.
NUMBERS: tuple[Column[Mapping[str, Cell]], ...] = (
    keyed("shape"),
    keyed("mean", is_number=True),
    keyed("std", is_number=True, rank=2),
    keyed("min", is_number=True, rank=3),
    keyed("max", is_number=True, rank=3),
    keyed("zeros", is_number=True),
    keyed("not finite", is_number=True, style="bold red"),
)


def numbers_of(tensor: Tensor) -> dict[str, Cell]:
    """Return the shape of a tensor and its statistics; for a single number, the number as its mean.

    Statistics of complex elements are of absolute values, as noted in the shape.
    """
    seen = statistics(tensor)
    found: dict[str, Cell] = {
        "shape": shape_text(tensor) + (f", {ABSOLUTE}" if tensor.is_complex() else "")
    }
    if tensor.numel() != 1:
        values = zip(("mean", "std", "min", "max"), seen[:4], strict=True)
        found |= {name: "" if math.isnan(value) else grouped(value) for name, value in values}
        found["zeros"] = percent(seen.zeros) if seen.zeros > 0 else ""
    # Statistics are of finite numbers, and this one is not.
    elif seen.nonfinite:
        found["mean"] = grouped(float(tensor.abs() if tensor.is_complex() else tensor)), "bold red"
    else:
        found["mean"] = grouped(seen.mean)
    return found | {"not finite": f"{seen.nonfinite:,}" if seen.nonfinite else ""}


def statistics_text(tensor: Tensor, *, is_unset: bool = False) -> list[Styled]:
    """Return the statistics of a tensor as a line.

    is_unset: whether it is memory without numbers.
    """
    line = [(f"{shape_text(tensor)} {dtype_text(tensor)}", "")]
    if is_unset:
        return [*line, ("  no numbers, only memory", "dim")]
    if tensor.is_complex():
        line.append(("  absolute values:", "dim"))
    found = numbers_of(tensor)
    for column in NUMBERS[1:]:
        text, style = column.cell(found)
        if text:
            label = "value" if tensor.numel() == 1 and column.header == "mean" else column.header
            line += [(f"  {label} ", "dim"), (text, style)]
    return line


def write_numbers(page: Page, tensor: Tensor, *, indent: int) -> None:
    """Add the numbers of a tensor, in six significant digits."""
    # NumPy has no bfloat16: all floating-point numbers become float64, in which they are exact.
    values = tensor.detach().cpu()
    if values.dtype.is_floating_point:
        values = values.double()
    elif values.is_complex():
        values = values.to(torch.complex128)
    text = np.array2string(
        values.numpy(),
        max_line_width=max(page.width - indent, 20),
        threshold=ALL_VALUES,
        separator=" ",
        formatter={
            "float_kind": lambda value: f"{value:>12.6g}",
            "complex_kind": lambda value: f"{value:>20.6g}",
        },
    )
    for line in text.splitlines():
        page.line((line, ""), indent=indent)
