"""Starts the command line: `everystep`, or `python -m everystep`."""

from __future__ import annotations

import gc
import os
import signal
import sys
from types import FrameType

__all__ = ["main"]

#: Objects allocated, less those freed, between two searches for garbage; Python: 700.
_ALLOCATIONS = 100_000


def main() -> None:
    """Import the commands, and run the one that was typed."""
    # Unless the caller ignores it, as a shell does for a command in the background.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)
    # Importing torch allocates many objects and drops few, and searching them takes a fifth of a second.
    gc.set_threshold(_ALLOCATIONS)
    gc.callbacks.append(_keep_imported)
    from everystep.cli import main as run

    try:
        run()
    finally:
        # The interpreter would search them all once more before it exits.
        gc.freeze()


def _interrupted(number: int, frame: FrameType | None) -> None:
    """Answer Ctrl-C: at once while a module is imported, else by KeyboardInterrupt, as Python does.

    Compiled modules swallow an exception while they are imported, or are left half initialized.
    """
    if _is_importing(frame):
        # Not `print`: a signal may come in the middle of one.
        os.write(2, b"\n")
        os._exit(130)
    raise KeyboardInterrupt


def _keep_imported(phase: str, details: dict[str, int]) -> None:
    """Leave what is there out of all searches for garbage, if one begins while a module is imported."""
    if phase == "start" and _is_importing(sys._getframe()):
        gc.freeze()


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


if __name__ == "__main__":
    main()
