"""The console that prints tables, steps and progress bars."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.segment import Segment

from everystep.views.texts import clean

__all__ = ["SafeConsole"]


class SafeConsole(Console):
    """A console that cleans whatever it prints; colours and progress bars are its own."""

    def render(self, *given: Any, **named: Any) -> Iterator[Segment]:
        """Yield the pieces of something to print, cleaned."""
        for segment in super().render(*given, **named):
            is_text = segment.control is None
            yield segment._replace(text=clean(segment.text)) if is_text else segment
