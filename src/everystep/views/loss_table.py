"""The losses as a browsable table, with DataTables; self-contained.

DataTables comes with itables. The page uses DataTables directly, because itables' own page is three
times as large and cannot sort blanks, NaN and infinities apart from numbers.
"""

from __future__ import annotations

import gzip
import shlex
from base64 import b64encode
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from everystep.recording.recorded_run import RecordedRun
from everystep.signature import checked
from everystep.views.output_file import write_file
from everystep.views.reduction import extremes

__all__ = ["LossTable", "loss_table", "rendered", "shortest_texts"]

#: Rows in the page as plain HTML, for viewers without scripts.
STATIC_ROWS = 10


@dataclass(frozen=True, repr=False, eq=False)
class LossTable:
    """The losses and measurements of a run, as a table; it shows in a notebook.

    name: of the run; frame: the rows of the table: step, loss (unless the run logs none), and a column
    for each measurement, null if it has none; total: rows of the whole table; excerpt: which of them
    `frame` has, None if all; damage: which data of the run is missing.
    """

    name: str
    frame: pl.DataFrame
    total: int
    excerpt: str | None
    damage: str | None = None

    def __repr__(self) -> str:
        return f"{self.caption()}\n{self.frame}"

    def _repr_html_(self) -> str:
        return self.fragment()

    def caption(self) -> str:
        """Return a sentence about the rows, and how to get all if they are an excerpt."""
        if self.damage is not None:
            return self.damage
        if self.excerpt is None:
            return f"{self.total:,} rows, complete"
        return f"{self._excerpt_sentence()}; all: {self.command}"

    def fragment(self) -> str:
        """Return the table as HTML to embed in another page, more than once if needed."""
        return rendered("table_fragment.html", **self.content())

    def content(self) -> dict[str, Any]:
        """Return the content for a template: texts, the rows as data, and DataTables."""
        # Numbers as texts: JavaScript would write other digits.
        steps, *numbers = self.frame.get_columns()
        columns = [steps.to_list(), *map(shortest_texts, numbers)]
        return {
            "damage": self.damage,
            "excerpt": self.excerpt and self._excerpt_sentence(),
            "command": self.command,
            "titles": self.frame.columns,
            "total": len(self.frame),
            "static": list(zip(*(column[:STATIC_ROWS] for column in columns), strict=True)),
            "data": {"name": self.name, "titles": self.frame.columns, "columns": columns},
            "datatables": _datatables(),
        }

    def html(self) -> str:
        """Return a complete page."""
        is_whole = self.excerpt is None and self.damage is None
        lead = "The loss of every step" if is_whole else "The losses"
        return rendered("table.html", name=self.name, lead=lead, fragment=Markup(self.fragment()))

    @checked
    def save(self, path: str | Path) -> None:
        """Write a complete page.

        Raises:
            UsageError: the file cannot be written.
        """
        write_file(path, self.html())

    def _excerpt_sentence(self) -> str:
        return f"{len(self.frame):,} of {self.total:,} rows: {self.excerpt}"

    @property
    def command(self) -> str:
        """What to type for all rows."""
        return f"everystep losses {shlex.quote(self.name)} --csv"


def loss_table(run: RecordedRun, rows: int = 100_000) -> LossTable:
    """Return the losses and measurements of a run as a table.

    rows: maximum number of rows, at least 100. For a longer run, the table is an excerpt, with a note:
    evenly spaced steps, the extremes of the steps between them, the first, the last.
    """
    frame = run.table_frame()
    total = len(frame)
    if total <= rows:
        return LossTable(run.name, frame, total, None, run.damage)
    names = frame.columns[1:]
    # A bucket keeps its step, and at most three rows of each column; 4 leaves room for the ends.
    # Round numbers, so that the excerpt's steps are easy to read: every 500th.
    widths = (leading * 10**power for power in count() for leading in (1, 2, 5))
    width = next(each for each in widths if each >= total * (1 + 4 * len(names)) / rows)
    kept = [frame.filter(pl.col("step") % width == 0)["step"]]
    kept += [extremes(frame.select("step", name).drop_nulls(), width, name)["step"] for name in names]
    some = frame.filter(pl.col("step").is_in(pl.concat(kept).unique().implode()))
    of_each = "loss and value of each measurement" if "loss" in names else "value of each measurement"
    excerpt = (
        f"every {width:,}th step; of each {width:,} steps the smallest and the largest "
        f"{of_each if names[1:] else names[0]}, and the first that is not finite; the first and the "
        "last step"
        if names  # else the run has logged nothing
        else f"one step of each {width:,}"
    )
    return LossTable(run.name, some, total, excerpt, run.damage)


def shortest_texts(values: pl.Series) -> list[str]:
    """Return each number in the fewest digits that give it back; null becomes an empty text.

    Float64 numbers that are float32 values, as most measurements are, get the digits of float32.
    """
    numbers = values.to_numpy()
    with np.errstate(over="ignore"):
        single = numbers.astype(np.float32)
    # NaN equals nothing, and has one text in both precisions.
    is_single = (single == numbers) | np.isnan(single)
    texts = [
        str(short) if fits else repr(long)
        for short, long, fits in zip(single, numbers.tolist(), is_single.tolist(), strict=True)
    ]
    if values.null_count():
        for row in np.flatnonzero(values.is_null().to_numpy()):
            texts[row] = ""
    return texts


def rendered(template: str, **values: Any) -> str:
    """Return a template as text; everything passed to it is escaped."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    found = Environment(
        loader=PackageLoader("everystep.views"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # One of everystep's style sheets or scripts, or a vendored one.
    found.globals["asset"] = lambda name: Markup((Path(__file__).parent / name).read_text("utf-8"))
    # `tojson` escapes <, > and & for use in a script element; NaN is not JSON.
    found.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return found


@cache
def _datatables() -> str:
    """Return DataTables, with its buttons, as itables bundles it: gzip in base64, for table.js."""
    import itables.options

    bundle = Path(itables.options.dt_bundle).read_bytes()
    # Without the time, so that the same table is the same file.
    return b64encode(gzip.compress(bundle, mtime=0)).decode("ascii")
