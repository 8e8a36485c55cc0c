"""Files of a run: names stay within it, files are written as a whole, digests tell changed ones."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import NamedTuple

import xxhash

from everystep.errors import RunError

__all__ = [
    "FileRow",
    "check_writable_files",
    "constants_of",
    "own_path",
    "read_file",
    "row_of_file",
    "sweep",
    "write_whole",
]

#: Files that are changed in place: a second name of one would be another run's file.
_CHANGED = ("run.sqlite", "run.sqlite-wal", "run.sqlite-shm", "run.sqlite-journal", "run.lock")


class FileRow(NamedTuple):
    """A file as the database knows it: its name within the run, its size, and XXH3 (128 bits) of it."""

    name: str
    size: int
    digest: bytes


def row_of_file(name: str, content: bytes) -> FileRow:
    """Return the row of a file with this content."""
    return FileRow(name, len(content), xxhash.xxh3_128_digest(content))


def constants_of(program: str) -> str:
    """Return the name of the file with the constants of a program, by that of the program."""
    return f"{program.removesuffix('.json')}.safetensors"


def read_file(directory: Path, row: FileRow) -> bytes:
    """Return the content of a file of a run, as it was recorded.

    Raises:
        RunError: it is missing, or was changed.
    """
    path = own_path(directory, row.name)
    try:
        with path.open("rb") as file:
            content = file.read(row.size + 1)
    except (OSError, ValueError, OverflowError) as error:
        raise RunError(f"{path} cannot be read: {error}") from None
    if row_of_file(row.name, content) != row:
        raise RunError(
            f"{path} was changed after recording: its digest differs; restore it from a copy of the run"
        )
    return content


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


def check_writable_files(directory: Path) -> None:
    """Check that writing into a run changes nothing outside of it: it has no links.

    Raises:
        RunError: it has one; names it.
    """
    for folder, folders, files in os.walk(directory):
        for name in (*folders, *files):
            path = Path(folder, name)
            status = path.lstat()
            is_plain = stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)
            is_file = stat.S_ISREG(status.st_mode)
            is_shared = is_file and name in _CHANGED and status.st_nlink > 1
            if not is_plain or is_shared:
                what = "has a second name elsewhere" if is_shared else "is a link, or no regular file"
                raise RunError(
                    f"{path} {what}, so everystep does not write into this run; copy the run "
                    "(cp -rL) and use the copy"
                )


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
