"""The bar of a training, or of anything that is counted."""

from __future__ import annotations

from importlib.util import find_spec

from rich import progress as columns
from rich.console import Console
from rich.text import Text

__all__ = ["bar_on"]


class _Speed(columns.ProgressColumn):
    def render(self, task: columns.Task) -> Text:
        # Slower ones would be 0/s.
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f}/s" if speed and speed >= 1 else "", style="dim")


def bar_on(
    console: Console, what: str, total: int, text: str, *, is_shown: bool = True
) -> columns.Progress:
    """Return a bar, which only a person sees: on a terminal, or in a notebook with ipywidgets."""
    # Without ipywidgets, rich warns below the cell, at each of its updates.
    has_place = console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)
    bar = columns.Progress(
        columns.TextColumn("{task.description:<8}"),
        columns.BarColumn(bar_width=32),
        # As wide from the first step as at the last one: the line does not move.
        columns.TextColumn("{task.completed:>{task.fields[width]}}/{task.total}"),
        columns.TextColumn("{task.fields[text]:<14}"),
        _Speed(),
        columns.TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        disable=not (is_shown and has_place),
    )
    bar.add_task(what, total=total, text=text, width=len(str(total)))
    return bar
