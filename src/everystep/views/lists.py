"""The lists of the terminal: runs in one line each, and losses with measurements; each also as JSON."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from rich.table import Table
from rich.text import Text

from everystep.recording.summary import Summary
from everystep.recording.texts import shortest
from everystep.views.plain import as_json, plain_data
from everystep.views.tables import Column, table_text
from everystep.views.texts import number, one_line

__all__ = ["losses_text", "runs_json", "runs_tables", "summary_data"]

#: A column of notes has at least so many characters, or it is left out.
_NARROWEST_NOTES = 16
#: Seconds from one part of a list of runs to the next.
_MOMENT = 0.25
#: The status is wrapped to this width before a column is left out.
_STATUS_WIDTH = len("finished, not finite")


def summary_data(summary: Summary) -> dict[str, Any]:
    """Return a run in one line as plain data; losses have the fewest digits that give them back.

    problem: why it cannot be read.
    """
    found: dict[str, Any] = plain_data(summary)
    for name in ("first_loss", "last_loss"):
        loss = getattr(summary, name)
        if loss is not None and math.isfinite(loss):
            found[name] = float(shortest(loss))
    return found | {"problem": None}


def runs_json(runs: Iterable[Summary]) -> Iterator[str]:
    """Yield the pieces of a JSON array of the runs, as they come."""
    mark = "["
    for run in runs:
        yield f"{mark}\n{as_json(summary_data(run))}"
        mark = ","
    yield "[]\n" if mark == "[" else "\n]\n"


def losses_text(table: Mapping[str, Any], style: Literal["plain", "json"]) -> str:
    """Return a table of losses and measurements as text, every number in full precision.

    table: `RecordedRun.table_columns`.
    """
    values = {name: c if isinstance(c, list) else c.tolist() for name, c in table.items()}
    count = len(next(iter(values.values()), []))
    if style == "json":
        plain = {name: plain_data(column) for name, column in values.items()}
        rows = [{name: column[place] for name, column in plain.items()} for place in range(count)]
        return json.dumps(rows, indent=1) + "\n"

    def text(column: list[Any], name: str, place: int) -> str:
        value = column[place]
        return "-" if value is None else str(value) if name == "step" else shortest(value)

    columns = [
        Column(name, lambda place, c=column, n=name: text(c, n, place), is_number=True)  # type: ignore[misc]
        for name, column in values.items()
    ]
    return "\n".join([*table_text(columns, range(count)), ""])


def _status_text(run: Summary) -> Text:
    status = Text(run.status, style={"finished": "", "running": "green"}.get(run.status, "yellow"))
    if run.nonfinite_step is not None:
        status.append(f", not finite at step {run.nonfinite_step:,}", style="red")
    if run.damage is not None:
        status.append(", damaged", style="red")
    return status


def _parent_text(run: Summary) -> str:
    return "" if run.parent is None else f"{run.parent[0]}, step {run.parent[1]}"


def _note_text(run: Summary) -> Text:
    return Text(one_line(run.note or "").replace("\ufffd", " "), style="dim")


#: Columns of the list of runs, besides the notes.
COLUMNS: tuple[Column[Summary], ...] = (
    Column("run", lambda run: run.name),
    Column("status", _status_text),
    Column(
        "steps",
        lambda run: str(run.steps) if run.steps == run.planned else f"{run.steps}/{run.planned}",
        is_number=True,
        rank=2,
    ),
    Column("first loss", lambda run: number(run.first_loss), is_number=True, rank=4),
    Column("last loss", lambda run: number(run.last_loss), is_number=True, rank=1),
    Column("started", lambda run: f"{run.started.astimezone():%Y-%m-%d %H:%M}", rank=3),
    Column("fork of", _parent_text, rank=5),
)
_STATUS = 1


class _Shown(NamedTuple):
    """Which columns a list of runs shows, their widths, and that of the notes (0: none)."""

    columns: tuple[int, ...]
    widths: tuple[int, ...]
    notes: int


def runs_tables(runs: Iterable[Summary], width: int | None = None) -> Iterator[Table]:
    """Yield the list of runs as tables, one below the other, as the runs come: the first within moments.

    Columns only grow from one to the next; one with other columns repeats the headings.
    """
    before = None
    for some in _in_moments(runs):
        rows = [[_as_text(column.value(run)) for column in COLUMNS] for run in some]
        notes = [_note_text(run) for run in some]
        shown = _shown(rows, notes, width, before)
        has_headings = before is None or before._replace(widths=()) != shown._replace(widths=())
        yield _runs_table(rows, notes, shown, is_first=before is None, has_headings=has_headings)
        before = shown


def _as_text(cell: str | Text) -> Text:
    return cell if isinstance(cell, Text) else Text(cell)


def _in_moments(runs: Iterable[Summary]) -> Iterator[list[Summary]]:
    """Yield what comes within a moment, together."""
    some: list[Summary] = []
    began = time.monotonic()
    for run in runs:
        some.append(run)
        if time.monotonic() - began > _MOMENT:
            yield some
            some, began = [], time.monotonic()
    if some:
        yield some


def _runs_table(
    rows: list[list[Text]], notes: list[Text], shown: _Shown, *, is_first: bool, has_headings: bool
) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", show_header=has_headings)
    for place in shown.columns:
        table.add_column(
            Text(COLUMNS[place].header),
            justify="right" if COLUMNS[place].is_number else "left",
            no_wrap=place not in (0, _STATUS),
            overflow="fold",
            min_width=0 if place == _STATUS and is_first else shown.widths[place],
        )
    if shown.notes:
        table.add_column(Text("note"), no_wrap=True, overflow="ellipsis", max_width=shown.notes)
    for row, note in zip(rows, notes, strict=True):
        table.add_row(*(row[place] for place in shown.columns), *([note] if shown.notes else []))
    return table


def _shown(
    rows: Sequence[Sequence[Text]], notes: Sequence[Text], width: int | None, before: _Shown | None
) -> _Shown:
    """Return the columns that show these cells; before: those of the table above."""
    places = range(len(COLUMNS))
    least = before.widths if before else (0,) * len(COLUMNS)
    widths = [
        max(least[place], len(COLUMNS[place].header), *(row[place].cell_len for row in rows))
        for place in places
    ]
    had = before.columns if before else ()
    shown = [p for p in places if p in had or any(row[p].plain for row in rows)]
    left = math.inf if width is None else width - sum(widths[place] + 2 for place in shown)
    widths[_STATUS] = min(widths[_STATUS], _STATUS_WIDTH)
    for place in sorted((p for p in shown if COLUMNS[p].rank), key=lambda p: -COLUMNS[p].rank):
        if width is not None and sum(widths[p] + 2 for p in shown) - 2 > width:
            shown.remove(place)
    is_noted = left >= _NARROWEST_NOTES and any(note.plain for note in notes)
    most = (100 if width is None else int(left)) if is_noted else 0
    return _Shown(tuple(shown), tuple(widths), most)
