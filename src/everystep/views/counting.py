"""A bar in the terminal, of anything that is counted."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock

__all__ = ["counting"]

#: Held while a bar is shown.
_ON_SCREEN = Lock()


@contextmanager
def counting(
    what: str, total: int, wanted: bool | Callable[[int], None] = True
) -> Iterator[Callable[[int], None]]:
    """Show a bar for `total` steps; yield the function to call with the number of new steps.

    wanted: whether to show a bar; or the function to call instead. Its `begin_counting`, if it has one,
    is called first, with the counted things and the total.
    """
    if callable(wanted):
        if begin := getattr(wanted, "begin_counting", None):
            begin(what, total)
        yield wanted
        return
    if not wanted or not _is_watched():
        yield lambda steps: None
        return
    # Only where somebody may see it: what draws takes longer to import than most answers take.
    from everystep.views.bars import bar_on
    from everystep.views.console import SafeConsole

    is_alone = _ON_SCREEN.acquire(blocking=False)  # a bar within another would overwrite its line
    try:
        console = SafeConsole(stderr=True, highlight=False)
        with bar_on(console, what, total, "", is_shown=is_alone) as bar:
            yield lambda steps: bar.advance(bar.task_ids[0], steps)
    finally:
        if is_alone:
            _ON_SCREEN.release()


def _is_watched() -> bool:
    try:
        return sys.stderr.isatty() or "IPython" in sys.modules
    except (AttributeError, ValueError):  # it is closed, or replaced by something simpler
        return False
