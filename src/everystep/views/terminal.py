"""The layout of the terminal: tables of declared columns, and pages of text."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Generic, TypeVar

from rich.cells import cell_len
from rich.text import Text

from everystep.views.formatting import cut, labelled, one_line

__all__ = ["Cell", "Column", "Page", "Styled", "keyed", "table_lines", "table_text"]

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
    first omits the columns of the largest rank, and never those of rank 0; style: of cells without one;
    least: cells are cut to so many characters before other columns are omitted; 0: they are never cut;
    wraps: cells continue in the next line, and are not cut.
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


def table_lines(
    columns: Sequence[Column[Row]], rows: Sequence[Row], width: float = math.inf
) -> Iterator[list[Styled]]:
    """Yield rows in aligned columns: the headings, if there are any, and the lines of each row.

    A column without a text in any row is left out.

    width: of the lines, reached by cutting cells and omitting columns.
    """
    # All cells first: the widest one of each column decides what fits.
    filled = [_Filled(column, [column.cell(row) for row in rows]) for column in columns]
    shown = _fitting([each for each in filled if each.has_text or not rows], width)
    is_narrow = any(each.width < each.widest for each in shown)
    headings = [one_line(each.column.header) for each in shown]
    if any(headings):
        yield _line(shown, [(heading, "dim") for heading in headings])
    for row in zip(*(each.cells for each in shown), strict=True):
        # Only a cut cell needs folding, and most tables are not cut.
        if is_narrow:
            folded = (each.folded(cell) for each, cell in zip(shown, row, strict=True))
            yield from (_line(shown, line) for line in zip_longest(*folded, fillvalue=("", "")))
        else:
            yield _line(shown, row)


def table_text(columns: Sequence[Column[Row]], rows: Sequence[Row]) -> list[str]:
    """Return a table as lines without styles: the headings, and a line for each row."""
    return ["".join(text for text, _ in line).rstrip() for line in table_lines(columns, rows)]


class _Filled:
    """A column with its cells, and with the width that it has in the table."""

    def __init__(self, column: Column[Any], cells: list[Styled]) -> None:
        self.column = column
        self.cells = cells
        self.width = self.widest = max(
            map(_width, [one_line(column.header), *(text for text, _ in cells)])
        )
        self.has_text = any(text for text, _ in cells)

    def folded(self, cell: Styled) -> list[Styled]:
        """Return a cell as the lines that it takes: one, cut where it must be, or several."""
        text, style = cell
        if self.column.wraps:
            return [(line, style) for line in textwrap.wrap(text, self.width)]
        return [(cut(text, self.width), style)]


def _fitting(columns: list[_Filled], width: float) -> list[_Filled]:
    """Return the columns that a table of this width shows; cuts those that may be cut."""
    # A column is left out only where cutting all that may be cut is not enough.
    for rank in sorted({each.column.rank for each in columns} - {0}, reverse=True):
        if _total(min(each.width, each.column.least or each.width) for each in columns) > width:
            columns = [each for each in columns if each.column.rank != rank]
    # From the right, so that the first columns, by which a reader finds a row, are cut last.
    for each in reversed(columns):
        excess = _total(other.width for other in columns) - width
        if each.column.least and excess > 0:
            each.width -= min(int(excess), max(each.width - _NARROWEST, 0))
    return columns


def _line(columns: Sequence[_Filled], cells: Iterable[Styled]) -> list[Styled]:
    line: list[Styled] = []
    for each, (text, style) in zip(columns, cells, strict=True):
        space = " " * (each.width - _width(text))
        before, after = (space, "") if each.column.is_number else ("", space)
        line += [("  " * bool(line) + before, ""), (text, style), (after, "")]
    return line


def _width(text: str) -> int:
    """Return how many characters wide a terminal shows a text."""
    return len(text) if text.isascii() else cell_len(text)  # the first is much quicker


def _total(widths: Iterable[int]) -> int:
    return sum(width + 2 for width in widths) - 2


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
        # The padding of the last column would wrap in a narrow terminal.
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
        for line in table_lines(columns, rows, self.width - indent):
            self.line(*line, indent=indent)


_LABEL = 10
