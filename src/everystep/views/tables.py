"""Tables in the terminal: declared columns, rows of cells in aligned lines, and what prints them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from rich.cells import cell_len
from rich.console import Console
from rich.segment import Segment
from rich.text import Text

from everystep.views.texts import clean, one_line

__all__ = [
    "Cell",
    "Column",
    "SafeConsole",
    "fitted",
    "table_lines",
    "table_text",
    "table_width",
    "without",
]

#: A cell of a table: its text, its style, whether it is aligned to the right.
Cell = tuple[str, str, bool]
Row = TypeVar("Row")


@dataclass(frozen=True)
class Column(Generic[Row]):
    """A column of a table.

    header; value: its text in a row, or `Text` with styles; is_number: whether it is aligned to the
    right; rank: which column a narrow terminal does without first, the largest; 0: none.
    """

    header: str
    value: Callable[[Row], str | Text]
    is_number: bool = False
    rank: int = 0


def table_text(columns: Iterable[Column[Row]], rows: Sequence[Row]) -> list[str]:
    """Return a table as lines without styles: the headers, and a line for each row."""
    cells = [[each.header, *(str(each.value(row)) for row in rows)] for each in columns]
    widths = [max(map(len, column)) for column in cells]
    numbers = [each.is_number for each in columns]
    return [
        "  ".join(
            f"{cell:>{width}}" if is_number else f"{cell:<{width}}"
            for cell, width, is_number in zip(line, widths, numbers, strict=True)
        ).rstrip()
        for line in zip(*cells, strict=True)
    ]


def table_lines(rows: Sequence[Sequence[Cell]]) -> list[Text]:
    """Return rows of cells as lines, aligned; the first are headings."""
    cells = _used([[(one_line(text), style, right) for text, style, right in row] for row in rows])
    widths = [max(cell_len(cell[0]) for cell in column) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        line = Text()
        for place, ((text, style, right), width) in enumerate(zip(row, widths, strict=True)):
            space = " " * (width - cell_len(text))
            line.append("  " * bool(place) + (space if right else ""))
            line.append(text, style=style or None).append("" if right else space)
        line.rstrip()
        lines.append(line)
    return lines


def fitted(
    rows: Sequence[Sequence[Cell]], width: int, unneeded: Iterable[Collection[str]]
) -> Sequence[Sequence[Cell]]:
    """Return rows of cells that fit a width: columns under `unneeded` headings are left out in turn."""
    for headings in unneeded:
        if table_width(rows) > width:
            rows = without(rows, headings)
    return rows


def without(rows: Sequence[Sequence[Cell]], headings: Collection[str]) -> list[list[Cell]]:
    """Return rows of cells without the columns under these headings."""
    kept = [place for place, cell in enumerate(rows[0]) if cell[0] not in headings]
    return [[row[place] for place in kept] for row in rows]


def table_width(rows: Sequence[Sequence[Cell]]) -> int:
    """Return the width of a table of these rows."""
    widths = [max(cell_len(cell[0]) for cell in c) for c in zip(*_used(rows), strict=True)]
    return sum(widths) + 2 * (len(widths) - 1)


def _used(cells: Sequence[Sequence[Cell]]) -> list[list[Cell]]:
    used = [any(cell[0] for cell in column[1:]) for column in zip(*cells, strict=True)]
    return [[cell for cell, is_used in zip(row, used, strict=True) if is_used] for row in cells]


class SafeConsole(Console):
    """A console that cleans whatever it prints; colours and progress bars are its own."""

    def render(self, *given: Any, **named: Any) -> Iterator[Segment]:
        """Yield the pieces of something to print, cleaned."""
        for segment in super().render(*given, **named):
            is_text = segment.control is None
            yield segment._replace(text=clean(segment.text)) if is_text else segment
