"""The table of what an update did to each parameter."""

from __future__ import annotations

from everystep.replay.step import Update
from everystep.views.formula import Formula
from everystep.views.lines import Cell, grouped, norm

__all__ = ["update_headings", "update_row"]


def update_headings() -> list[Cell]:
    """Return the headings for `update_row`."""
    names = ("norm before", "norm after", "norm of change", "relative")
    return [("parameter", "dim", False), *((n, "dim", True) for n in names), ("by", "dim", False)]


def update_row(name: str, update: Update, formula: Formula | None) -> list[Cell]:
    """Return a parameter, how far it went, and the operations that took it there, if they are known."""
    norms = [grouped(norm(each)) for each in (update.before, update.after, update.change)]
    relative = f"{100 * update.relative_size:.3g}%"
    by = _numbers_text(formula.numbers) if formula else ""
    return [(name, "", False), *((text, "", True) for text in (*norms, relative)), (by, "dim", False)]


def _numbers_text(numbers: tuple[int, ...]) -> str:
    first, last = numbers[0], numbers[-1]
    if len(numbers) > 2 and last - first + 1 == len(numbers):
        return f"#{first} to #{last}"
    return " ".join(f"#{number}" for number in numbers)
