"""The console of the terminal, which nothing that is printed can steer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.segment import Segment

from everystep.views.formatting import clean

__all__ = ["SafeConsole"]


class SafeConsole(Console):
    """A console that sanitizes its output, except its own colours and progress bars."""

    def render(self, *given: Any, **named: Any) -> Iterator[Segment]:
        """Yield the pieces of something to print, cleaned."""
        for segment in super().render(*given, **named):
            # Control segments are rich's own, such as those that move a progress bar.
            is_text = segment.control is None
            yield segment._replace(text=clean(segment.text)) if is_text else segment
