"""Files for the user, such as plots and pages: complete, or absent."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from everystep.errors import UsageError, exit_code_of
from everystep.recording.files import completed

__all__ = ["default_output", "write_file"]

#: Marks at the beginning of pages and plots, by which everystep knows that it wrote them.
_MARKS = (b'<meta name="generator" content="everystep">', b"Software\0everystep")
#: Bytes of a file in which its mark is.
_BEGINNING = 1_000


def default_output(name: str) -> Path:
    """Return the file of this name in the current directory, to write a page or a plot to.

    An earlier page or plot of everystep may be there, and is replaced. The name of a rank's run has
    slashes, which become hyphens.

    Raises:
        UsageError: something else is there.
    """
    path = Path(name.replace("/", "-"))
    if os.path.lexists(path) and not _is_own(path):
        raise UsageError(f"{path} exists, and everystep did not write it; name another file: -o FILE")
    return path


def _is_own(path: Path) -> bool:
    """Return whether everystep wrote an existing file."""
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        beginning = file.read(_BEGINNING)
    return any(mark in beginning for mark in _MARKS)


def write_file(path: str | Path, content: bytes | str) -> None:
    """Write a file that gets its name when it is complete; an existing file stays until then.

    Raises:
        UsageError: the file cannot be written.
    """
    place = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        # Another file takes the name, but not that of a link, a pipe or a device.
        is_plain = place.is_file() and not place.is_symlink()
        has_place = os.access(place.absolute().parent, os.W_OK)
        if has_place and (is_plain or not os.path.lexists(place)):
            with completed(place, f".everystep.{os.getpid()}.tmp") as temporary:
                temporary.write_bytes(data)
                if is_plain:
                    shutil.copymode(place, temporary)
        else:
            place.write_bytes(data)
    except OSError as error:
        is_nowhere = isinstance(error, FileNotFoundError) and not place.absolute().parent.is_dir()
        reason = f"the directory {place.parent} does not exist" if is_nowhere else error.strerror
        failed = UsageError(f"{path} cannot be written: {reason or error}")
        failed.exit_code = exit_code_of(error)
        raise failed from None
