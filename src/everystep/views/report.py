"""A run as HTML: one self-contained page to share, with the page's own plot and table; a few lines."""

from __future__ import annotations

import base64
import posixpath
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from markupsafe import Markup

from everystep.errors import size_text
from everystep.recording.recorded_run import RecordedRun
from everystep.signature import checked
from everystep.views.facts_text import facts_data, facts_in_order, landmarks, state_data
from everystep.views.formatting import number
from everystep.views.loss_table import loss_table, rendered
from everystep.views.output_file import write_file
from everystep.views.reduction import curve_of, sparkline

__all__ = ["Report", "report_html", "summary_html"]

#: Rows of the table, which are also the points of the plot.
ROWS = 50_000

#: The page's modules; the one that draws a report; how modules name each other.
_STATIC = Path(__file__).parent.parent / "page" / "static"
_FIRST = "report/report.js"
# e.g. "./plot.js" in `import { draw } from "./plot.js";`
_IMPORT = re.compile(r'(?<=")\.{1,2}/[\w/.-]+\.js(?=")')


class Report(str):
    """A run as a complete page of HTML; it shows in a notebook."""

    _name: str

    def __new__(cls, html: str, name: str) -> Report:
        """Return the page of the run of that name."""
        report = super().__new__(cls, html)
        report._name = name
        return report

    def __reduce__(self) -> tuple[type[Report], tuple[str, str]]:
        return Report, (str(self), self._name)

    def __repr__(self) -> str:
        return f"<report of {self._name}: {size_text(len(self))} of HTML; save(path) writes it>"

    def _repr_html_(self) -> str:
        return (
            # In a frame of its own: styles and scripts of the page do not reach the notebook, nor the
            # reverse.
            f'<iframe srcdoc="{escape(str(self))}" sandbox="allow-scripts allow-downloads" '
            f'title="{escape(f"report of {self._name}")}" '
            'style="width: 100%; height: 45rem; border: 1px solid #8886"></iframe>'
        )

    @checked
    def save(self, path: str | Path) -> None:
        """Write the page.

        Raises:
            UsageError: the file cannot be written.
        """
        write_file(path, self)


def report_html(run: RecordedRun, opened: Markup | None = None, modules: Sequence[str] = ()) -> str:
    """Return a run as a complete page: its facts, a plot to zoom into, and the table of its losses.

    For a run of more than 50,000 steps, it holds the excerpt of `loss_table`, with a note.

    opened: a section of opened steps; modules: of the page, which the section loads first.
    """
    table = loss_table(run, rows=ROWS)
    facts = run.facts
    losses = table.frame.select("step", "loss") if facts.has_loss else curve_of(run)
    return rendered(
        "report.html",
        name=run.name,
        **state_data(run, facts, run.status, table.total),
        **facts_data(facts),
        **landmarks(losses["step"].to_numpy(), losses["loss"].to_numpy()),
        opened=opened,
        first=_FIRST,
        modules={"imports": _inlined((_FIRST, *modules))},
        **table.content(),
    )


def summary_html(run: RecordedRun) -> str:
    """Return a run as a small table of facts and a picture of the loss: a piece of HTML, no scripts."""
    facts, losses = run.facts, curve_of(run)
    ends = [losses["loss"].item(0), losses["loss"].item(-1)] if len(losses) else []
    return rendered(
        "summary.html",
        name=run.name,
        damage=run.damage,
        **state_data(run, facts, run.status, run.newest_step()),
        ends=[(number(loss), str(loss)) for loss in ends],
        rows=facts_in_order(facts),
        line=sparkline(losses),
    )


def _inlined(first: Sequence[str]) -> dict[str, str]:
    """Return modules of the page and all their imports, by bare names, each as a data: address."""
    found: dict[str, str] = {}
    # Each module becomes one data: address in the page's import map, e.g. of report/report.js:
    #   {"report/report.js": "data:text/javascript;...", "plot/plot.js": "data:text/javascript;...", ...}
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
