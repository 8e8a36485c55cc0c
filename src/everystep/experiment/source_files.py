"""Files that data is read from while a network trains on it: which they are, and whether they changed.

A digest takes a pass over the file. It is computed once: the cache directory has the digest of each file
that was read, with the size and the time of change that the file had then.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import xxhash
from platformdirs import user_cache_path

from everystep.bounded import open_regular, read_regular
from everystep.errors import DataError

__all__ = ["SourceFile", "cache_directory", "source_file"]

#: Where caches and digests are, instead of the user's cache directory.
_PLACE = "EVERYSTEP_CACHE"
_PIECE = 16_000_000
#: Nanoseconds: of a file that was changed a shorter time ago, another change may have the same time.
_RECENT = 2_000_000_000


class SourceFile(NamedTuple):
    """A file: its absolute path, its bytes, and the XXH3 (128 bits) of all of them.

    status: of the file when it was read: its place, size and times.
    """

    path: str
    bytes: int
    digest: str
    status: tuple[int, ...] = ()

    def check(self) -> None:
        """Check that the file is still the one that was read.

        Raises:
            DataError: it has changed, or is gone.
        """
        with suppress(OSError):
            if _status(Path(self.path).stat()) == self.status:
                return
        raise DataError(f"{self.path} was changed while it was read; train again when it is complete")


def _status(status: os.stat_result) -> tuple[int, ...]:
    times = status.st_mtime_ns, status.st_ctime_ns  # the second cannot be set
    return status.st_dev, status.st_ino, status.st_size, *times


def cache_directory() -> Path:
    """Return the directory of caches: it may be deleted at any time."""
    given = os.environ.get(_PLACE)
    return Path(given).expanduser().absolute() if given else Path(user_cache_path("everystep"))


def source_file(path: Path, progress: Callable[[int], None]) -> SourceFile:
    """Return a file with its digest. progress: called with the bytes read.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    note = cache_directory() / "digests" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()}.json"
    began = time.time_ns()
    with open_regular(path) as file:
        status = os.fstat(file.fileno())
        known = _status(status)
        with suppress(OSError, ValueError, TypeError):
            *noted, digest = json.loads(read_regular(note, 1000))
            if tuple(noted) == known and isinstance(digest, str):
                return SourceFile(str(path), status.st_size, digest, known)
        found, read = xxhash.xxh3_128(), 0
        while piece := file.read(_PIECE):
            found.update(piece)
            read += len(piece)
            progress(read)
    if began - max(status.st_mtime_ns, status.st_ctime_ns) > _RECENT:
        with suppress(OSError):  # the directory may not be writable
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(json.dumps([*known, found.hexdigest()]))
    return SourceFile(str(path), status.st_size, found.hexdigest(), known)
