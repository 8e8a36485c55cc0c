"""Files of a run, by their names in the database: a name cannot refer to a file outside the run."""

from __future__ import annotations

from pathlib import Path

from everystep.errors import RunError

__all__ = ["own_path"]


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
