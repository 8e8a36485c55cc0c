"""Runs in one line each: as tables for the terminal, and as JSON."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from everystep.recording.summary import Summary
from everystep.views.printed import one_line
from everystep.views.terminal import json_number, number

__all__ = ["runs_json", "runs_tables"]

#: A column of notes has at least so many characters, or it is left out.
_NARROWEST_NOTES = 16

#: Seconds from one part of a list of runs to the next.
_MOMENT = 0.25
#: Columns of the list of runs.
_HEADINGS = tuple(
    Text(name) for name in ("run", "status", "steps", "first loss", "last loss", "started", "fork of")
)
_STATUS = 1
#: The status is wrapped to this width before a column is left out.
_STATUS_WIDTH = len("finished, not finite")
#: What a narrow terminal does without, in this order: fork of, first loss, started, steps, last loss.
_UNNEEDED = (6, 3, 5, 2, 4)


def runs_json(runs: Iterable[Summary]) -> Iterator[str]:
    """Yield the pieces of a JSON array of the runs, as they come."""
    mark = "["
    for run in runs:
        found = {
            "name": run.name,
            "directory": str(run.directory),
            "status": run.status,
            "steps": run.steps,
            "planned_steps": run.planned,
            "first_loss": json_number(run.first_loss),
            "last_loss": json_number(run.last_loss),
            "started": run.started.isoformat(),
            "parent": None if run.parent is None else {"run": run.parent[0], "at": run.parent[1]},
            "note": run.note,
            "damage": run.damage,
        }
        yield f"{mark}\n{json.dumps(found, indent=1)}"
        mark = ","
    yield "[]\n" if mark == "[" else "\n]\n"


class _Columns(NamedTuple):
    """Which columns a list of runs shows, their widths, and that of the notes (0: none)."""

    shown: tuple[int, ...]
    widths: tuple[int, ...]
    notes: int


def runs_tables(runs: Iterable[Summary], width: int | None = None) -> Iterator[Table]:
    """Yield the list of runs as tables, one below the other, as the runs come: the first within moments.

    Columns only grow from one to the next; one with other columns repeats the headings.
    """
    before = None
    for some in _in_moments(runs):
        table, columns = _runs_table(some, width, before)
        table.show_header = before is None or (before.shown, before.notes) != (
            columns.shown,
            columns.notes,
        )
        before = columns
        yield table


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
    runs: list[Summary], width: int | None, before: _Columns | None = None
) -> tuple[Table, _Columns]:
    """before: the columns of the table above it."""
    cells = [_HEADINGS, *map(_run_cells, runs)]
    notes = [_note_text(run) for run in runs]
    columns = _runs_columns(cells, notes, width, before)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for place in columns.shown:
        is_number = place in (2, 3, 4)
        table.add_column(
            _HEADINGS[place],
            justify="right" if is_number else "left",
            no_wrap=place != _STATUS and place != 0,
            overflow="fold",
            min_width=0 if place == _STATUS and before is None else columns.widths[place],
        )
    if columns.notes:
        table.add_column(Text("note"), no_wrap=True, overflow="ellipsis", max_width=columns.notes)
    for place, row in enumerate(cells[1:]):
        note = notes[place : place + 1] if columns.notes else []
        table.add_row(*(row[column] for column in columns.shown), *note)
    return table, columns


def _runs_columns(
    cells: Sequence[tuple[Text, ...]], notes: Sequence[Text], width: int | None, before: _Columns | None
) -> _Columns:
    """Return the columns that show these cells, the first of which are the headings."""
    places = range(len(_HEADINGS))
    least = before.widths if before else (0,) * len(places)
    widths = [max(least[place], *(row[place].cell_len for row in cells)) for place in places]
    had = before.shown if before else ()
    shown = [p for p in places if p in had or any(row[p].plain for row in cells[1:])]
    left = math.inf if width is None else width - sum(widths[place] + 2 for place in shown)
    widths[_STATUS] = min(widths[_STATUS], _STATUS_WIDTH)
    for unneeded in _UNNEEDED:
        if width is not None and sum(widths[p] + 2 for p in shown) - 2 > width and unneeded in shown:
            shown.remove(unneeded)
    is_noted = left >= _NARROWEST_NOTES and any(note.plain for note in notes)
    most = (100 if width is None else int(left)) if is_noted else 0
    return _Columns(tuple(shown), tuple(widths), most)


def _run_cells(run: Summary) -> tuple[Text, ...]:
    """Return the cells of a run, in the order of `_HEADINGS`."""
    status = Text(run.status, style={"finished": "", "running": "green"}.get(run.status, "yellow"))
    if run.nonfinite_step is not None:
        status.append(f", not finite at step {run.nonfinite_step:,}", style="red")
    if run.damage is not None:
        status.append(", damaged", style="red")
    return (
        Text(run.name),
        status,
        Text(str(run.steps) if run.steps == run.planned else f"{run.steps}/{run.planned}"),
        Text(number(run.first_loss)),
        Text(number(run.last_loss)),
        Text(f"{run.started.astimezone():%Y-%m-%d %H:%M}"),
        Text("" if run.parent is None else f"{run.parent[0]}, step {run.parent[1]}"),
    )


def _note_text(run: Summary) -> Text:
    return Text(one_line(run.note or "").replace("\ufffd", " "), style="dim")
