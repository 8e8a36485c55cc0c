"""Python's garbage collector, which runs less often while a step is written down.

Each call makes some twenty objects that stay until the step ends, so the collector would go through all
objects of the process again and again: with packed sequences, a fifth of the time.
"""

from __future__ import annotations

import gc

__all__ = ["CollectorPause"]

#: New objects between two collections. It is not disabled: a long step of the user's may leave much to
#: collect, the user may disable it in the step, and a process that is forked there lives longer.
_OBJECTS = 100_000


class CollectorPause:
    """A pause of the collector, which changes its threshold alone."""

    _usual: tuple[int, int, int] | None = None

    def begin(self) -> None:
        """Pause, unless that is so already."""
        usual = gc.get_threshold()
        if 0 < usual[0] < _OBJECTS:  # 0: it does not run by itself
            self._usual = usual
            gc.set_threshold(_OBJECTS, *usual[1:])

    def end(self) -> None:
        """Run as before, if this has paused; the user may have set other thresholds since."""
        usual, self._usual = self._usual, None
        if usual is not None and gc.get_threshold() == (_OBJECTS, *usual[1:]):
            gc.set_threshold(*usual)
