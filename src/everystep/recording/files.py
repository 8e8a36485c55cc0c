"""Files of a run: the one place that opens them.

Names stay within the run, no link is followed, only regular files are read, and no more of them than a
bound. Files are written as a whole, and digests tell changed ones.
"""

from __future__ import annotations

import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path, PurePath
from typing import BinaryIO, NamedTuple

import xxhash

from everystep.bounded import MEMORY, open_regular, read_regular
from everystep.errors import RunError

__all__ = [
    "FileRow",
    "check_writable_files",
    "has_own",
    "open_own",
    "own_path",
    "program_file",
    "read_file",
    "read_own",
    "row_of_file",
    "sweep",
    "take_file",
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


def program_file(number: int) -> str:
    """Return the name of the file of a program, by its number (from 1) in the run."""
    return f"programs/{number}.json"


def read_file(directory: Path, row: FileRow) -> bytes:
    """Return the content of a file of a run, as it was recorded.

    Raises:
        RunError: it is missing, or was changed.
    """
    content = read_own(directory, row.name, row.size)
    if row_of_file(row.name, content) != row:
        raise RunError(
            f"{directory / row.name} was changed after recording: its digest differs; restore it from "
            "a copy of the run"
        )
    return content


def read_own(directory: Path, name: str, limit: int) -> bytes:
    """Return the content of a file of a run. limit: bytes that it may have.

    Raises:
        RunError: it is missing, cannot be read, is larger, or is not one of the run.
    """
    path = own_path(directory, name)
    try:
        return read_regular(path, min(limit, MEMORY), follows_links=False)
    except OSError as error:
        raise _unreadable(path, error) from None


def open_own(directory: Path, name: str) -> BinaryIO:
    """Open a file of a run for reading.

    Raises:
        RunError: it is missing, cannot be read, or is not one of the run.
    """
    path = own_path(directory, name)
    try:
        return open_regular(path, follows_links=False)
    except OSError as error:
        raise _unreadable(path, error) from None


def has_own(directory: Path, name: str) -> bool:
    """Return whether a run has a file of this name.

    Raises:
        RunError: the name is not one of the run, as in `own_path`.
    """
    return own_path(directory, name).is_file()


def take_file(source: Path, name: str, target: Path, own_name: str | None = None) -> None:
    """Give a run a file of another run: a second name of it if the file system has such, or a copy.

    source, target: the directories of the runs; own_name: that of the file in the target.

    Raises:
        RunError: the file is missing, cannot be read, or is not one of the run.
        OSError: it cannot be written.
    """
    taken = own_path(target, own_name or name)
    taken.parent.mkdir(parents=True, exist_ok=True)
    with open_own(source, name) as file:
        with suppress(OSError):  # another file system, or one without hard links
            os.link(source / name, taken)
            if os.path.samestat(os.fstat(file.fileno()), taken.lstat()):
                return
            taken.unlink()  # it was exchanged meanwhile
        with taken.open("xb") as copy:
            shutil.copyfileobj(file, copy)
        shutil.copystat(source / name, taken, follow_symlinks=False)


def own_path(directory: Path, name: str) -> Path:
    """Return the path of something in a run's directory, which need not exist.

    Raises:
        RunError: the name leads out of the directory, by a link or by itself, or to what is neither a
            file nor a directory (reading a pipe or a device may never end); or it cannot be looked at.
    """
    given = PurePath(name)
    is_own = bool(given.parts) and not given.anchor and ".." not in given.parts
    place = directory
    try:
        for part in given.parts if is_own else ():
            place /= part
            mode = place.lstat().st_mode
            is_own &= stat.S_ISREG(mode) or stat.S_ISDIR(mode)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise _unreadable(place, error) from None
    except ValueError:  # a NUL in it
        is_own = False
    if not is_own:
        raise RunError(
            f"{directory} refers to what is a link, outside the run or not a regular file: {name!r:.200}"
        )
    return directory / name


def _unreadable(path: Path, error: OSError) -> RunError:
    return RunError(f"{path!s:.200} cannot be read: {error.strerror or error}")


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
                what = (
                    "has a second name (a hard link)" if is_shared else "is a link, or no regular file"
                )
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
