"""A run as one self-contained page to share: facts, and the page's own plot and table."""

from __future__ import annotations

import base64
import posixpath
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl
from markupsafe import Markup

from everystep.views.facts import details, ending, facts_in_order, going_on, seed, times
from everystep.views.output_file import write_file
from everystep.views.table import environment, loss_table, shortest_texts
from everystep.views.texts import number

if TYPE_CHECKING:
    from everystep.recording.run import RecordedRun

__all__ = ["Report", "report_html"]

#: Rows of the table, which are also the points of the plot.
ROWS = 50_000

#: The page's modules; the one that draws a report; how modules name each other.
_STATIC = Path(__file__).parent.parent / "page" / "static"
_FIRST = "report/report.js"
_IMPORT = re.compile(r'(?<=")\.{1,2}/[\w/.-]+\.js(?=")')


class Report(str):
    """A run as a complete page of HTML; it shows in a notebook."""

    _name: str

    def __new__(cls, html: str, name: str) -> Report:
        """Return the page of the run of that name."""
        report = super().__new__(cls, html)
        report._name = name
        return report

    def __repr__(self) -> str:
        return f"<report of {self._name}: {len(self) / 1000:,.0f} kB of HTML; save(path) writes it>"

    def _repr_html_(self) -> str:
        return (
            f'<iframe srcdoc="{escape(str(self))}" sandbox="allow-scripts allow-downloads" '
            f'title="{escape(f"report of {self._name}")}" '
            'style="width: 100%; height: 45rem; border: 1px solid #8886"></iframe>'
        )

    def save(self, path: str | Path) -> None:
        """Write the page.

        Raises:
            UsageError: the file cannot be written.
        """
        write_file(path, self)


def report_html(run: RecordedRun, opened: Markup | None = None, modules: Sequence[str] = ()) -> str:
    """Return a run as a complete page: its facts, a plot to zoom into, and the table of its losses.

    Of a run of more than 50,000 steps it holds the excerpt that `loss_table` makes, and says so.

    Args:
        opened: a section of opened steps.
        modules: of the page that the section begins with.
    """
    table = loss_table(run, rows=ROWS)
    facts = run.facts
    steps = table.frame.filter(pl.col("step") > 0)["step"]
    count = int(steps[-1]) if len(steps) else 0
    losses = table.frame.select("step", "loss").drop_nulls() if facts.has_loss else pl.DataFrame()
    status = run.status
    early = ending(run, facts, status, count)
    return (
        environment()
        .get_template("report.html")
        .render(
            name=run.name,
            status=status,
            ending=early,
            going_on=early and going_on(run, facts),
            steps=count,
            planned=facts.steps,
            landmarks=_landmarks(losses),
            nonfinite=_first_nonfinite(losses),
            rows=[*facts_in_order(facts), ("seed", seed(facts))],
            details=details(facts),
            times=times(facts),
            opened=opened,
            first=_FIRST,
            modules={"imports": _inlined((_FIRST, *modules))},
            styles=[
                Markup((_STATIC / name).read_text(encoding="utf-8"))
                for name in ("plot/plot.css", "table/table.css")
            ],
            **table.content(),
        )
    )


def _landmarks(losses: pl.DataFrame) -> list[tuple[str, int, str, str]]:
    """Return the first, the last and the smallest loss: what, step, four digits, all digits."""
    if losses.is_empty():
        return []
    found = [("first", losses.head(1)), ("last", losses.tail(1))]
    finite = losses.filter(pl.col("loss").is_finite())
    if len(finite):
        found.append(("smallest", finite.filter(pl.col("loss") == finite["loss"].min()).head(1)))
    return [
        (what, row["step"].item(), number(row["loss"].item()), shortest_texts(row["loss"])[0])
        for what, row in found
    ]


def _first_nonfinite(losses: pl.DataFrame) -> tuple[int, str] | None:
    """Return the step and the loss, in words, of the first loss that is not finite."""
    rows = losses.filter(~pl.col("loss").is_finite()).head(1) if len(losses) else losses
    return None if rows.is_empty() else (rows["step"].item(), str(rows["loss"].item()))


def _inlined(first: Sequence[str]) -> dict[str, str]:
    """Return modules of the page and all that they import, by bare names, each as a data: address."""
    found: dict[str, str] = {}
    due = [*first]
    while due:
        name = due.pop()
        if name in found:
            continue
        source = (_STATIC / name).read_text(encoding="utf-8")
        due += [_bare(name, each[0]) for each in _IMPORT.finditer(source)]
        inlined = _IMPORT.sub(lambda each, of=name: _bare(of, each[0]), source)  # type: ignore[misc]
        content = base64.b64encode(inlined.encode()).decode("ascii")
        found[name] = f"data:text/javascript;charset=utf-8;base64,{content}"
    return found


def _bare(module: str, imported: str) -> str:
    """Return the name of a module that another imports: in a data: address, "./" means nothing."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(module), imported))
