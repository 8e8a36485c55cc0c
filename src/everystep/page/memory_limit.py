"""A memory limit for processes that open runs, which may be a stranger's.

A program of a few bytes can allocate tensors of any size. On Linux, a process gets a share of the
machine's memory at most: beyond it, it reports an error and continues, and no other process is ended.
"""

from __future__ import annotations

import os
from contextlib import suppress

__all__ = ["limit_memory", "memory_message"]

#: The share of the machine's memory that one process may take.
SHARE = 0.75


def limit_memory(limit: int | None = None) -> None:
    """Limit the memory of this process, and of those that it starts.

    limit: bytes; default: a share of the machine's memory.
    """
    # Counted are private pages that can be written, not address space: CUDA reserves much of that.
    with suppress(ImportError, AttributeError, ValueError, OSError):  # the system has no such limit
        import resource

        wanted = limit or int(SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        known = [each for each in (soft, hard) if each != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_DATA, (min([wanted, *known]), hard))


def memory_message(error: Exception) -> str | None:
    """Return a message if an error says that memory was refused, else None."""
    if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
        return None
    return (
        "this takes more memory than a process of the page may use: three quarters of this machine's. "
        "The commands of everystep in a terminal have no such limit"
    )
