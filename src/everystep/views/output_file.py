"""Files for the user, such as plots and pages: complete, or absent."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from everystep.errors import UsageError

__all__ = ["write_file"]


def write_file(path: str | Path, content: bytes | str) -> None:
    """Write a file that gets its name when it is complete; an existing file stays until then.

    Raises:
        UsageError: the file cannot be written.
    """
    place = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        if _can_be_replaced(place):
            _replace(place, data)
        else:
            place.write_bytes(data)
    except OSError as error:
        is_nowhere = isinstance(error, FileNotFoundError) and not place.absolute().parent.is_dir()
        reason = f"the directory {place.parent} does not exist" if is_nowhere else error.strerror
        raise UsageError(f"{path} cannot be written: {reason or error}") from None


def _can_be_replaced(path: Path) -> bool:
    """Return whether another file may take the name: not that of a link, a pipe or a device."""
    is_plain = path.is_file() and not path.is_symlink()
    return os.access(path.absolute().parent, os.W_OK) and (is_plain or not os.path.lexists(path))


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".everystep.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        if path.exists():
            shutil.copymode(path, temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
