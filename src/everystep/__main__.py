"""Starts the command line: `everystep`, or `python -m everystep`."""

from __future__ import annotations

import os
import signal
from types import FrameType

__all__ = ["main"]


def main() -> None:
    """Import the commands, and run the one that was typed."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)
    from everystep.cli import main as run

    run()


def _interrupted(number: int, frame: FrameType | None) -> None:
    """Answer Ctrl-C: at once while a module is imported, otherwise by KeyboardInterrupt, as Python does.

    Compiled modules swallow an exception while they are imported, or are left half initialized.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"\n")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
