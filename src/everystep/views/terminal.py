"""The layout of the terminal: tables of declared columns, pages of text, and what prints them."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Generic, TypeVar

from rich.cells import cell_len
from rich.console import Console
from rich.segment import Segment
from rich.text import Text

from everystep.views.formatting import clean, cut, labelled, one_line

__all__ = ["Cell", "Column", "Page", "SafeConsole", "Styled", "TextTable", "keyed", "table_text"]

#: A text and its style.
Styled = tuple[str, str]
#: A cell of a table: its text, perhaps with a style.
Cell = str | Styled
Row = TypeVar("Row")

#: Characters that a cut cell keeps.
_NARROWEST = 16


@dataclass(frozen=True)
class Column(Generic[Row]):
    """A column of a table.

    header; value: the cell of a row; is_number: whether it is aligned to the right; rank: a narrow table
    omits the columns with the largest first; 0: never; style: of cells without one; least: before other
    columns are left out, its cells are cut to so many characters; 0: they are never cut; wraps: its
    cells continue in the next line, and are not cut.
    """

    header: str
    value: Callable[[Row], Cell]
    is_number: bool = False
    rank: int = 0
    style: str = ""
    least: int = 0
    wraps: bool = False

    def cell(self, row: Row) -> Styled:
        """Return the cell of a row, in one line."""
        found = self.value(row)
        text, style = (found, self.style) if isinstance(found, str) else found
        return one_line(text), style


def keyed(key: str, header: str | None = None, **options: Any) -> Column[Mapping[str, Cell]]:
    """Return a column of rows that are mappings; a row without the key has an empty cell."""
    return Column(key if header is None else header, lambda row: row.get(key, ""), **options)


class TextTable(Generic[Row]):
    """Rows in aligned columns. A column without a text in any row is left out.

    width: of the lines, reached by cutting cells and omitting columns; None: any.
    """

    def __init__(self, columns: Sequence[Column[Row]], width: int | None = None) -> None:
        self._columns = columns
        self._width = math.inf if width is None else width
        self._headers = [one_line(each.header) for each in columns]
        self._widths = list(map(cell_len, self._headers))
        self._used: set[int] = set()
        self._shown: dict[int, int] = {}

    def lines(self, rows: Sequence[Row]) -> Iterator[list[Styled]]:
        """Yield the headings and a line for each row.

        Called again, it continues the table: columns only grow, and headings are repeated where another
        column is shown.
        """
        cells = [[column.cell(row) for row in rows] for column in self._columns]
        for place, column in enumerate(cells):
            self._widths[place] = max([self._widths[place], *(_width(text) for text, _ in column)])
            if not rows or any(text for text, _ in column):
                self._used.add(place)
        before, self._shown = self._shown, self._fitting()
        headers = [(self._headers[place], "dim") for place in self._shown]
        if before.keys() != self._shown.keys() and any(text for text, _ in headers):
            yield self._line(headers)
        if not any(self._columns[place].wraps for place in self._shown):
            yield from map(
                self._line, zip(*[self._cells(p, cells[p]) for p in self._shown], strict=True)
            )
            return
        for row in zip(*cells, strict=True):
            folded = [self._folded(place, *row[place]) for place in self._shown]
            yield from map(self._line, zip_longest(*folded, fillvalue=("", "")))

    def _fitting(self) -> dict[int, int]:
        """Return the columns that are shown, with their widths."""
        shown = {place: self._widths[place] for place in sorted(self._used)}
        for rank in sorted({column.rank for column in self._columns} - {0}, reverse=True):
            least = [min(width, self._columns[p].least or width) for p, width in shown.items()]
            if _width_of(least) > self._width:
                shown = {p: width for p, width in shown.items() if self._columns[p].rank != rank}
        for place in reversed(shown):
            excess = _width_of(shown.values()) - self._width
            if self._columns[place].least and excess > 0:
                shown[place] -= min(int(excess), max(shown[place] - _NARROWEST, 0))
        return shown

    def _cells(self, place: int, cells: list[Styled]) -> Iterable[Styled]:
        """Return the cells of a column, cut where they may be."""
        width = self._shown[place]
        return (
            ((cut(text, width), style) for text, style in cells) if self._columns[place].least else cells
        )

    def _folded(self, place: int, text: str, style: str) -> list[Styled]:
        """Return a cell as the lines that it takes."""
        column, width = self._columns[place], self._shown[place]
        if column.wraps:
            return [(line, style) for line in textwrap.wrap(text, width)]
        return [(cut(text, width) if column.least else text, style)]

    def _line(self, cells: Iterable[Styled]) -> list[Styled]:
        line: list[Styled] = []
        for (place, width), (text, style) in zip(self._shown.items(), cells, strict=True):
            space = " " * (width - _width(text))
            before, after = (space, "") if self._columns[place].is_number else ("", space)
            line += [("  " * bool(line) + before, ""), (text, style), (after, "")]
        return line


def _width(text: str) -> int:
    """Return how many characters wide a terminal shows a text."""
    return len(text) if text.isascii() else cell_len(text)


def _width_of(widths: Collection[int]) -> int:
    return sum(widths) + 2 * (len(widths) - 1)


def table_text(columns: Sequence[Column[Row]], rows: Sequence[Row]) -> list[str]:
    """Return a table as lines without styles: the headings, and a line for each row."""
    return ["".join(text for text, _ in line).rstrip() for line in TextTable(columns).lines(rows)]


class Page:
    """Text that grows line by line; its content is literal."""

    def __init__(self, width: int = 100) -> None:
        self.text = Text()
        self.width = width

    def blank(self) -> None:
        """Add an empty line."""
        self.text.append("\n")

    def line(self, *pieces: Styled, indent: int = 0) -> None:
        """Add a line."""
        line = Text(" " * indent)
        for text, style in pieces:
            line.append(one_line(text), style=style or None)
        line.rstrip()
        self.text.append(line).append("\n")

    def labelled(self, label: str, text: str, style: str = "") -> None:
        """Add a text with a label before its first line."""
        for place, each in enumerate(text.splitlines() or [""]):
            self.line((labelled("" if place else label, "", _LABEL), "dim"), (each, style))

    def wrapped(self, text: str, style: str = "", *, indent: int) -> None:
        """Add a text, wrapped if it is wider than the page."""
        whole = textwrap.wrap(one_line(text), self.width - indent, subsequent_indent="    ")
        for line in whole if cell_len(text) > self.width - indent else [text]:
            self.line((line, style), indent=indent)

    def heading(self, label: str, text: str = "") -> None:
        """Begin a section."""
        self.blank()
        self.line((labelled(label, "", _LABEL), "bold"), (text, ""))

    def table(self, columns: Sequence[Column[Row]], rows: Sequence[Row], indent: int = 2) -> None:
        """Add a table that fits the page."""
        for line in TextTable(columns, self.width - indent).lines(rows):
            self.line(*line, indent=indent)


_LABEL = 10


class SafeConsole(Console):
    """A console that sanitizes its output, except its own colours and progress bars."""

    def render(self, *given: Any, **named: Any) -> Iterator[Segment]:
        """Yield the pieces of something to print, cleaned."""
        for segment in super().render(*given, **named):
            is_text = segment.control is None
            yield segment._replace(text=clean(segment.text)) if is_text else segment
