"""Progress of trainings in the terminal, on stderr."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from everystep.recording.facts import Facts
from everystep.recording.texts import shortest
from everystep.training.job import Progress
from everystep.views.bars import bar_on
from everystep.views.console import SafeConsole
from everystep.views.counting import counting
from everystep.views.facts_text import header
from everystep.views.formatting import clean, number
from everystep.views.lists import ended_text

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from everystep.answers.sweep import SweepRun

__all__ = ["Silent", "TerminalProgress", "line_for_each"]


#: Set by Jupyter for everything that a cell starts; the number of lines that a training prints there.
_IN_NOTEBOOK, _LINES_IN_NOTEBOOK = "JPY_PARENT_PID", 20


class Silent(Progress):
    """Watches a training, and prints only notices."""

    def notice(self, message: str) -> None:
        """Print a notice on stderr."""
        print(clean(f"everystep: {message}"), file=sys.stderr)


class TerminalProgress(Silent):
    """Watches a training: the header, then a bar; lines of `step<TAB>loss` if piped.

    lines: prints the lines; everything else goes to stderr.
    """

    def __init__(self, *, show_header: bool, lines: Callable[[str], None] | None) -> None:
        self._console = SafeConsole(stderr=True, highlight=False, soft_wrap=True)
        self._show_header = show_header
        self._lines = lines
        self._bar: Bar | None = None
        self._every, self._last = 1, 0

    def reading(self, done: int, total: int, unit: str = "rows") -> None:
        """Show how much data has been read."""
        if self._bar is None:
            self._start("reading", total, f"[dim]{unit}")
        self._update(done)
        if done >= total:
            self.end()

    def begin(self, directory: Path, facts: Facts) -> None:
        """Show the header and start the bar."""
        if self._show_header:
            self._console.print(header(facts), markup=False)
            self._console.print()
        self._start("training", facts.steps or 0, "")
        if _IN_NOTEBOOK in os.environ:  # hundreds of lines below a cell are too many
            self._last = facts.steps or 0
            self._every = max(self._last // _LINES_IN_NOTEBOOK, 1)

    def advance(self, first_step: int, losses: Sequence[float]) -> None:
        """Move the bar; write the lines."""
        if self._lines is not None:
            text = "".join(
                f"{step}\t{shortest(loss)}\n"
                for step, loss in enumerate(losses, first_step)
                # `_every` is 1 except in a notebook.
                if step in (1, self._last) or step % self._every == 0
            )
            self._lines(text)
        self._update(first_step + len(losses) - 1, text=f"loss {number(losses[-1])}")

    def notice(self, message: str) -> None:
        """Print a notice above the bar."""
        self._console.print(Text(f"everystep: {message}", style="yellow"))

    def end(self) -> None:
        """Leave the bar on the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _start(self, what: str, total: int, text: str) -> None:
        self._bar = bar_on(self._console, what, total, text)
        self._bar.start()

    def _update(self, completed: int, **fields: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=completed, **fields)


@contextmanager
def line_for_each(
    directory: Path, total: int, left: int, how: str, *, is_shown: bool
) -> Iterator[Callable[[SweepRun, Sequence[str]], None]]:
    """Show a bar for the runs of a sweep; yield what to call with each that ended, and its notices.

    directory, total: of the sweep; left: runs to train, and how: in words; is_shown: show the bar and a
    line for each run; what went wrong is printed in any case.
    """
    if is_shown and left:
        # To watch it, from another terminal.
        runs = f"{left:,} of {total:,} runs, {how}"
        print(clean(f"{runs}: everystep view {shlex.quote(str(directory))}"), file=sys.stderr)
    with counting("runs", left, is_shown) as advance:

        def ended(run: SweepRun, notices: Sequence[str]) -> None:
            lines = [f"  {notice}" for notice in notices]
            if is_shown or run.problem is not None:
                lines.insert(0, ended_text(run))
            for line in lines:
                print(clean(line), file=sys.stderr)
            advance(1)

        yield ended
