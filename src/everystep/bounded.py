"""Limits: how many steps a run may have, and how much is read from files of a stranger."""

from __future__ import annotations

import errno
import json
import operator
import os
import stat
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import BaseModel, ConfigDict

from everystep.errors import UsageError

__all__ = [
    "MEMORY",
    "MOST_STEPS",
    "StrictModel",
    "check_steps",
    "decompressed",
    "free_memory",
    "open_regular",
    "parse_json",
    "read_regular",
]

#: The largest number of steps of a run.
MOST_STEPS = 100_000_000_000

#: Values that a JSON text may have; each takes 60 bytes or more in memory, however short its text.
_MOST_VALUES = 5_000_000


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return 2**40


#: Bytes of memory of this machine: a larger file cannot be read.
MEMORY = _memory()


def free_memory() -> int:
    """Return about how many bytes of memory this process can still take, also in a container."""
    found = [MEMORY]
    with suppress(OSError, ValueError, IndexError):
        # What the system can give without swapping: more than what is free, as caches can go.
        text = Path("/proc/meminfo").read_text()
        found.append(1024 * int(text.partition("MemAvailable:")[2].split()[0]))
    with suppress(OSError, ValueError):
        # The limit of a container, in which /proc/meminfo shows the whole machine; without one, the text
        # is "max".
        limit, used = (
            Path("/sys/fs/cgroup", f"memory.{name}").read_text() for name in ("max", "current")
        )
        found.append(max(0, int(limit) - int(used)))
    return min(found)


class StrictModel(BaseModel):
    """Data that a stranger may have written: no unknown keys, no conversions, no changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def check_steps(count: Any) -> int:
    """Return a number of steps; raise UsageError if it is none, or no run can have as many."""
    try:
        whole = int(operator.index(count))
    except TypeError:
        raise UsageError(f"steps is {count!r:.80}; pass a whole number of steps") from None
    if whole > MOST_STEPS:
        shown = f"{whole:,}" if whole < 10**30 else "more than 10^30"
        raise UsageError(f"{shown} steps are too many; a run has at most {MOST_STEPS:,}")
    return whole


def open_regular(path: Path, *, follows_links: bool = True) -> BinaryIO:
    """Open a file for reading; of a pipe or a device, reading might never end.

    Raises:
        OSError: it cannot be opened, or is not a regular file.
    """
    # Without O_NONBLOCK, opening a pipe would wait for its other end.
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    flags |= 0 if follows_links else getattr(os, "O_NOFOLLOW", 0)
    file = os.fdopen(os.open(path, flags), "rb")
    # Of the open file: a look at the path before might be of another one.
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return file


def read_regular(path: Path, limit: int, *, follows_links: bool = True) -> bytes:
    """Return the content of a file of at most `limit` bytes.

    Raises:
        OSError: it cannot be read, is not a regular file, or is larger.
    """
    with open_regular(path, follows_links=follows_links) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            reason = f"it has {size:,} bytes, more than the {limit:,} that it may have"
            raise OSError(errno.EFBIG, reason, str(path))
        return file.read(size)  # not `limit`, for which Python would reserve memory


def decompressed(content: bytes, limit: int) -> bytes:
    """Return the bytes, at most `limit`, that zlib compressed.

    A few bytes of a stranger's may unpack to more than the memory holds.

    Raises:
        ValueError: they are more, or zlib did not compress them.
    """
    machine = zlib.decompressobj()
    try:
        # One byte more than allowed shows that there are more.
        found = machine.decompress(content, limit + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if len(found) > limit or not machine.eof:
        raise ValueError("it is too long, or cut off")
    return found


def parse_json(text: bytes | str, **options: Any) -> Any:
    """Return the value of a text of JSON.

    Raises:
        ValueError: it is not JSON, is nested too deep, or has too many values.
    """
    # A value is preceded by one of these signs, mostly: to count them takes far less than to parse.
    marks = ("[", "{", ",") if isinstance(text, str) else (b"[", b"{", b",")
    if sum(map(text.count, marks)) > _MOST_VALUES:  # type: ignore[arg-type]
        raise ValueError(f"it has more than {_MOST_VALUES:,} values")
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
