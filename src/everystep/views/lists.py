"""The lists of the terminal: runs in one line each, and losses with measurements; each also as JSON."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from rich.text import Text

from everystep.errors import size_text
from everystep.recording.directories import Space
from everystep.recording.prune import Pruning
from everystep.recording.summary import Summary
from everystep.recording.texts import shortest
from everystep.views.formatting import (
    counted,
    cut,
    measured_text,
    number,
    one_line,
    seconds_text,
    time_text,
)
from everystep.views.plain import as_json, metric_data, plain_data, plain_number
from everystep.views.terminal import Cell, Column, Page, Row, Styled, keyed, table_text

if TYPE_CHECKING:
    from everystep.answers.sweep import Sweep, SweepRun

__all__ = [
    "columns_data",
    "ended_text",
    "losses_text",
    "pruning_text",
    "runs_text",
    "spaces_text",
    "summary_data",
    "sweep_text",
]

#: Characters of a text.
_LONGEST_TEXT = 100


def summary_data(summary: Summary) -> dict[str, Any]:
    """Return a run in one line as plain data; losses have the fewest digits that give them back.

    validation: the newest metric on validation rows, with what its number means; problem: why the run
    cannot be read.
    """
    validation = summary.validation and {
        **{"name": summary.validation[0], "value": plain_number(summary.validation[1])},
        **metric_data(summary.validation[0]),
    }
    losses = {name: plain_number(getattr(summary, name)) for name in ("first_loss", "last_loss")}
    found: dict[str, Any] = plain_data(summary)
    return found | losses | {"validation": validation, "problem": None}


def losses_text(table: Mapping[str, Any], style: Literal["plain", "json"]) -> str:
    """Return a table of losses and measurements as text, every number in its own precision.

    table: `RecordedRun.table_columns`.
    """
    columns = []
    for column in table.values():
        # Numbers of float32 get its digits; those of float64, which would read back as others, do not.
        text = shortest if column.dtype.itemsize == 4 else repr
        values = column.tolist()
        is_json = style == "json"
        columns.append([plain_data(v) if is_json else "-" if v is None else text(v) for v in values])
    rows = [dict(zip(table, row, strict=True)) for row in zip(*columns, strict=True)]
    if style == "json":
        return as_json(rows) + "\n"
    return "\n".join([*table_text([keyed(name, is_number=True) for name in table], rows), ""])


def _status(run: Summary) -> Styled:
    # Yellow for what did not end as planned: killed, stopped, failed.
    if run.nonfinite_step is None and run.damage is None:
        return run.status, {"finished": "", "running": "green"}.get(run.status, "yellow")
    bad = "" if run.nonfinite_step is None else f", not finite at step {run.nonfinite_step:,}"
    return f"{run.status}{bad}{'' if run.damage is None else ', damaged'}", "red"


class ValueKind(NamedTuple):
    """What a column of the list of runs holds; the page's `runs/kinds.js` has the same kinds.

    text: the terminal's cell of a value that is not None, and of its run; options: of its column.
    """

    text: Callable[[Any, Summary], Cell]
    options: Mapping[str, Any] = MappingProxyType({"is_number": True})


#: The kinds of values, by name.
VALUE_KINDS = {
    "name": ValueKind(lambda name, run: str(name), {}),
    "status": ValueKind(
        lambda status, run: _status(run), {"least": len("finished, not finite"), "wraps": True}
    ),
    "steps": ValueKind(
        lambda steps, run: str(steps) if steps == run.planned else f"{steps}/{run.planned}"
    ),
    "loss": ValueKind(lambda loss, run: number(loss)),
    "picture": ValueKind(lambda value, run: ""),
    "measured": ValueKind(lambda measured, run: measured_text(*measured)),
    "rates": ValueKind(lambda rates, run: ", ".join(map(number, rates))),
    "whole": ValueKind(lambda count, run: f"{count:,}"),
    "duration": ValueKind(lambda seconds, run: seconds_text(seconds)),
    "time": ValueKind(lambda time, run: time_text(time), {}),
    "fork": ValueKind(lambda parent, run: "{}, step {}".format(*parent), {}),
    "words": ValueKind(lambda words, run: one_line(", ".join(words)), {"style": "dim"}),
    # A line break in a note is a space in the list.
    "text": ValueKind(
        lambda text, run: cut(one_line(text).replace("\ufffd", " "), _LONGEST_TEXT),
        {"style": "dim", "least": 16},
    ),
}


class ListedColumn(NamedTuple):
    """A column of the list of runs, for the terminal and the page.

    key: the field of `Summary` that it shows; header; kind: one of `VALUE_KINDS`; rank: where there is
    little room, the columns of the largest are omitted first, and those of rank 0 never; only: the one
    place that shows it; first: the order of the page's first click, None if the page does not sort by
    it; is_setting: whether the page marks values that differ from those of most runs; about: the page's
    explanation.
    """

    key: str
    header: str
    kind: str
    rank: int = 0
    only: Literal["terminal", "page"] | None = None
    first: Literal["ascending", "descending"] | None = "ascending"
    is_setting: bool = False
    about: str = ""


#: The columns of the list of runs.
LISTED = (
    ListedColumn("name", "run", "name"),
    ListedColumn("status", "status", "status"),
    ListedColumn("steps", "steps", "steps", 2, first="descending"),
    ListedColumn("first_loss", "first loss", "loss", 4, "terminal"),
    ListedColumn("last_loss", "last loss", "loss", 1),
    ListedColumn("picture", "loss", "picture", 2, "page", first=None),
    ListedColumn("validation", "validation", "measured", 4, "page", first="descending"),
    ListedColumn("optimizer", "optimizer", "text", 4, "page", is_setting=True),
    ListedColumn("lr", "lr", "rates", 4, "page", is_setting=True),
    ListedColumn(
        "batch_size", "batch", "whole", 5, "page", is_setting=True, about="rows (samples) in each step"
    ),
    ListedColumn("seconds", "duration", "duration", 6, "page", first="descending"),
    ListedColumn("started", "started", "time", 3, first="descending"),
    ListedColumn("parent", "fork of", "fork", 5, "terminal"),
    ListedColumn("tags", "tags", "words", 6, "terminal"),
    ListedColumn("note", "note", "text", 6, "terminal"),
)


def columns_data() -> list[dict[str, Any]]:
    """Return the columns of the page's list of runs as plain data."""
    return [plain_data(column) for column in LISTED if column.only != "terminal"]


def _cell(column: ListedColumn, run: Summary) -> Cell:
    value = getattr(run, column.key)
    return "" if value is None else VALUE_KINDS[column.kind].text(value, run)


def runs_text(runs: Sequence[Summary], width: int | None = None) -> Text:
    """Return the list of runs; width: of the terminal."""
    columns = [
        Column(each.header, partial(_cell, each), rank=each.rank, **VALUE_KINDS[each.kind].options)
        for each in LISTED
        if each.only != "page"
    ]
    return _list_text(columns, runs, width)


def sweep_text(sweep: Sweep, width: int | None = None) -> Text:
    """Return a sweep as a table, then why steps of runs are missing. width: of the terminal."""
    paths = list(sweep.cases[0].settings)
    # What is the same in all runs tells nothing about them.
    varied = [path for path in paths if len({str(each.settings[path]) for each in sweep.cases}) > 1]

    def setting(path: str) -> Column[SweepRun]:
        is_number = all(isinstance(each.settings[path], int | float) for each in sweep.cases)
        return Column(path, lambda each: str(each.settings[path]), is_number=is_number)

    def best(each: SweepRun) -> str:
        return "" if each.best is None else measured_text(sweep.metric or "", each.best)

    def status(each: SweepRun) -> Cell:
        is_known = each.summary is not None and each.summary.status == each.status
        return _status(each.summary) if is_known and each.summary else each.status

    def known(key: str) -> Column[SweepRun]:
        column = next(column for column in LISTED if column.key == key)

        def cell(each: SweepRun) -> Cell:
            return _cell(column, each.summary) if each.summary else ""

        return Column(column.header, cell, is_number=True)

    columns = [
        *map(setting, varied or paths),
        Column("status", status),
        *map(known, ("steps", "last_loss")),
        *([Column(f"best {sweep.metric}", best, is_number=True)] if sweep.metric else []),
        Column("run", lambda each: each.name, style="dim", rank=5),
    ]
    text = _list_text(columns, sweep.cases, width)
    for each in sweep.cases:
        if each.problem is not None:
            text.append(f"{ended_text(each)}\n", style="yellow")
    done = sum(each.status == "finished" for each in sweep.cases)
    return text.append(f"{done:,} of {counted(len(sweep.cases), 'run')} finished: {sweep.directory}\n")


def ended_text(case: SweepRun) -> str:
    """Return how a run of a sweep ended, in a line."""
    if case.problem is not None or case.summary is None:
        return ": ".join(filter(None, (case.name, case.status, case.problem)))
    loss = "" if case.summary.last_loss is None else f", loss {number(case.summary.last_loss)}"
    return f"{case.name}: {_status(case.summary)[0]}{loss}"


def _list_text(columns: Sequence[Column[Row]], rows: Sequence[Row], width: int | None) -> Text:
    # Piped, a list is never cut: another program reads it.
    page = Page(sys.maxsize if width is None else width)
    page.table(columns, rows, indent=0)
    return page.text


def _size(name: str, rank: int = 0) -> Column[Space]:
    def text(space: Space) -> str:
        size = getattr(space, name)
        # `0 bytes` in each second cell would hide the numbers.
        return size_text(size) if size else "0"

    return Column(name, text, is_number=True, rank=rank)


#: The columns of what runs take on the disk.
SPACES: tuple[Column[Space], ...] = (
    Column("run", lambda space: space.name),
    _size("total"),
    *(_size(name, 1) for name in ("snapshots", "batches", "data", "programs", "database")),
    _size("others", 2),
    Column("keep", lambda space: space.keep or "", rank=1),
)


def pruning_text(pruning: Pruning) -> str:
    """Return what is removed from a run, and what still opens."""
    lines = []
    if pruning.states:
        count = len(pruning.states) + len(pruning.kept)
        lines.append(
            f"{len(pruning.states):,} of {counted(count, 'state')} on disk are removed; opening a step "
            f"replays up to {counted(pruning.replayed, 'step')}"
        )
    if pruning.files:
        opens = "no step can be opened"
        if pruning.opens is not None:
            opens = f"steps from {pruning.opens:,} on can still be opened"
        lines.append(f"batches of steps 1 to {pruning.lost:,} are removed: {opens}")
    return "\n".join(lines)


def spaces_text(spaces: Sequence[Space], width: int | None = None) -> Text:
    """Return what runs take on the disk as a table, with a line for all of them together."""
    # A file that runs share counts once, so that the sums are true.
    numbers = [name for name in Space._fields if name not in ("name", "directory", "keep")]
    sums = {name: sum(getattr(each, name) for each in spaces) for name in numbers}
    whole = [Space("all", Path(), **sums)] if len(spaces) > 1 else []
    columns = SPACES if any(each.keep for each in spaces) else SPACES[:-1]
    return _list_text(columns, [*spaces, *whole], width)
