"""Files of a run: paths that stay within it, and files that are written as a whole."""

from __future__ import annotations

import os
from pathlib import Path

from everystep.errors import RunError

__all__ = ["own_path", "sweep", "write_whole"]


def own_path(directory: Path, name: str) -> Path:
    """Return the path of something in a run's directory, which need not exist.

    Raises:
        RunError: the name leads out of the directory, or to what is neither a file nor a directory
            (reading a pipe or a device may never end).
    """
    path = directory / name
    try:
        is_within = path.resolve().is_relative_to(directory.resolve())
        is_readable = not path.exists() or path.is_file() or path.is_dir()
    except (OSError, RuntimeError, ValueError):  # links that go in circles, a NUL in it
        is_within = is_readable = False
    if not (is_within and is_readable):
        raise RunError(
            f"{directory} refers to a file that is outside the run or not a regular file: {name!r:.200}"
        )
    return path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is complete from the moment it exists, also after the power has failed.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def sweep(folder: Path) -> None:
    """Remove the temporary files that a killed process left in a directory."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
