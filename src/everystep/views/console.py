"""What prints on a terminal: a console, and bars."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from rich import progress as bars
from rich.console import Console
from rich.segment import Segment
from rich.text import Text

from everystep.views.formatting import clean

__all__ = ["SafeConsole", "bar_on"]


class SafeConsole(Console):
    """A console that sanitizes its output, except its own colours and progress bars."""

    def render(self, *given: Any, **named: Any) -> Iterator[Segment]:
        """Yield the pieces of something to print, cleaned."""
        for segment in super().render(*given, **named):
            # Control segments are rich's own, such as those that move a progress bar.
            is_text = segment.control is None
            yield segment._replace(text=clean(segment.text)) if is_text else segment


class _Speed(bars.ProgressColumn):
    def render(self, task: bars.Task) -> Text:
        # Slower ones would be 0/s.
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f}/s" if speed and speed >= 1 else "", style="dim")


def bar_on(
    console: Console, what: str, total: int, text: str, *, is_shown: bool = True
) -> bars.Progress:
    """Return a bar, which only a person sees: on a terminal, or in a notebook with ipywidgets."""
    # Without ipywidgets, rich warns below the cell, at each of its updates.
    has_place = console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)
    bar = bars.Progress(
        bars.TextColumn("{task.description:<8}"),
        bars.BarColumn(bar_width=32),
        # As wide from the first step as at the last one: the line does not move.
        bars.TextColumn("{task.completed:>{task.fields[width]}}/{task.total}"),
        bars.TextColumn("{task.fields[text]:<14}"),
        _Speed(),
        bars.TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        disable=not (is_shown and has_place),
    )
    bar.add_task(what, total=total, text=text, width=len(str(total)))
    return bar
