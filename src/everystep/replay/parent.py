"""Processes that end with the one that started them, even if that one was killed."""

from __future__ import annotations

import os
import select
import signal
import time
from multiprocessing.connection import Connection, wait
from threading import Thread

__all__ = ["end_with", "end_with_stdin"]

#: Seconds that a stopped process has to save its results.
_PATIENCE = 60.0


def end_with(parent: Connection) -> None:
    """End this process when the other end of a pipe without data closes."""

    def watch() -> None:
        wait([parent])
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def end_with_stdin(*, in_order: bool = False) -> None:
    """End this process when the other end of its stdin closes, even during a computation.

    in_order: stop it as Ctrl-C does, and end it a minute later.

    If the system cannot watch a pipe that is also read (Windows), the next read ends it.
    """

    def watch() -> None:
        found = select.poll()
        found.register(0, 0)  # only its end, not its data
        found.poll()
        if in_order:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(_PATIENCE)
        os._exit(1)

    if hasattr(select, "poll"):
        Thread(target=watch, daemon=True).start()
