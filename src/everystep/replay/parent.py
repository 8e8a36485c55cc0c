"""Processes that end with the one that started them, however that one was ended."""

from __future__ import annotations

import os
import select
import signal
import time
from multiprocessing.connection import Connection, wait
from threading import Thread

__all__ = ["end_with", "end_with_stdin"]

#: Seconds that a process which is asked to stop has to keep what it has done.
_PATIENCE = 60.0


def end_with(parent: Connection) -> None:
    """End this process once the other end of a pipe, through which nothing is sent, has closed."""

    def watch() -> None:
        wait([parent])
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def end_with_stdin(*, in_order: bool = False) -> None:
    """End this process once the other end of its stdin has closed, whatever it computes.

    in_order: stop it as Ctrl-C does, and end it a minute later.

    Where the system cannot watch a pipe that is read as well (Windows), the next read ends it.
    """

    def watch() -> None:
        found = select.poll()
        found.register(0, 0)  # only its end, not what is to be read
        found.poll()
        if in_order:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(_PATIENCE)
        os._exit(1)

    if hasattr(select, "poll"):
        Thread(target=watch, daemon=True).start()
