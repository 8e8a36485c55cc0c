"""Python's garbage collector, which pauses while a step is written down.

Each call makes some twenty objects that stay until the step ends, so the collector would go through all
objects of the process again and again: with packed sequences, a fifth of the time.
"""

from __future__ import annotations

import gc

__all__ = ["CollectorPause"]


class CollectorPause:
    """A pause of the collector; the user may have disabled it, and then it stays so."""

    _is_on = False

    def begin(self) -> None:
        """Pause, unless that is so already."""
        if gc.isenabled():
            gc.disable()
            self._is_on = True

    def end(self) -> None:
        """Continue, if this has paused."""
        if self._is_on:
            self._is_on = False
            gc.enable()
