"""The operations of a step as lines of a table that fits the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from everystep.program.observed import Observed
from everystep.views.lines import Cell, number_cells, number_headings, table_lines, table_width, without
from everystep.views.mathematics import Line

__all__ = ["operation_lines"]


def operation_lines(operations: Sequence[Observed], lines: Sequence[Line], width: int) -> list[Text]:
    """Return a line for the headings, and one for each operation; aligned through the whole page.

    lines: the operations as mathematics; width: of the page; columns that do not fit are left out.
    """
    rows: list[list[Cell]] = [_headings()]
    for place, (seen, line) in enumerate(zip(operations, lines, strict=True)):
        shown = seen.operation.phase != "update"
        rows.append(
            [
                (f"#{place}", "dim", False),
                (_path(seen.operation.module) if shown else "", "cyan", False),
                (line.short if shown else "", "", False),
                *number_cells(next(iter(seen.made.values()), None) if shown else None),
                (seen.operation.operator if shown else "", "dim", False),
            ]
        )
    return table_lines(_fitting(rows, width))


def _headings() -> list[Cell]:
    names = [(name, "dim", False) for name in ("", "module", "formula")]
    return [*names, *number_headings(), ("operator", "dim", False)]


def _fitting(rows: list[list[Cell]], width: int) -> list[list[Cell]]:
    """Leave out columns, and the ends of long formulas, so that the rows fit."""
    for unneeded in (("operator",), ("min", "max"), ("std",)):
        if table_width(_with_formulas_cut(rows, width, 34)) > width:
            rows = without(rows, unneeded)
    return _with_formulas_cut(rows, width, 16)


def _with_formulas_cut(rows: list[list[Cell]], width: int, least: int) -> list[list[Cell]]:
    place = [cell[0] for cell in rows[0]].index("formula")
    longest = max(len(row[place][0]) for row in rows)
    length = max(longest - max(table_width(rows) - width, 0), least)
    return [[*r[:place], (_cut(r[place][0], length), *r[place][1:]), *r[place + 1 :]] for r in rows]


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip("….") + "…"


def _path(module: str | None, longest: int = 18) -> str:
    if module is None or len(module) <= longest:
        return module or ""
    return "…" + module[-longest + 1 :]
