"""The clock by which everystep decides how often to check, to take snapshots and to pause.

One place, so that a test can set it: no test may depend on the speed of a machine or its disk. Times
shown to a user come from the system.
"""

import time

__all__ = ["now", "worked"]


def now() -> float:
    """Return seconds since an arbitrary moment."""
    return time.perf_counter()


def worked() -> float:
    """Return the seconds that the processor has spent on this thread."""
    return time.thread_time()
