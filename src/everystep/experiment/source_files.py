"""Files that data is read from: who named them, whether they changed, and what they were converted to.

An experiment may come from a stranger, who may name any file. A file is read only if this user has named
it: by training on it, or in the environment. Which files were trained on is kept in the user's state
directory, as an empty file named by a digest of the path.

A digest takes a pass over the file. It is computed once: the cache directory has the digest of each file
that was read, with the size and the time of change that the file had then. The directory may be deleted
at any time.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from filelock import FileLock
from platformdirs import user_cache_path, user_state_path

from everystep.bounded import open_regular, read_regular
from everystep.errors import DataError
from everystep.experiment.prepared_rows import Reading
from everystep.experiment.specification import DataSpecification

__all__ = [
    "Conversion",
    "SourceFile",
    "check_may_be_read",
    "check_room",
    "converted",
    "note_named",
    "read_file",
    "source_file",
    "source_files",
]

#: Files that runs may read in addition to those that were trained on; separated as in PATH.
_ALLOWED = "EVERYSTEP_DATA"
#: Where caches and digests are, instead of the user's cache directory.
_PLACE = "EVERYSTEP_CACHE"
_PIECE = 16_000_000
#: Nanoseconds: if a file was changed more recently, a second change may have the same time.
_RECENT = 2_000_000_000

#: Files that were named in this process; the state directory may not be writable.
_named: set[str] = set()


def note_named(files: Iterable[str]) -> None:
    """Note that the user has named files, so that runs of theirs may read them."""
    for file in files:
        _named.add(file)
        with suppress(OSError):
            mark = _mark(file)
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()


def check_may_be_read(data: DataSpecification) -> None:
    """Raise DataError, with how to do it, unless the user has named the files that data is in."""
    given = os.environ.get(_ALLOWED, "").split(os.pathsep)
    allowed = _named | {str(Path(each).absolute()) for each in given if each}
    for file in data.files:
        with suppress(OSError):
            allowed |= {file} if _mark(file).is_file() else set()
        if file not in allowed:
            raise DataError(
                f"the data is outside of the run, in {file!r:.200}, and a run may come from a stranger; "
                "everystep reads only files that you have trained on. If you trust the run, allow it: "
                f"{_ALLOWED}={os.pathsep.join(data.files):.400}; in Python, "
                "everystep.open(run, data=(x, y)) takes the data"
            )


def _mark(file: str) -> Path:
    folder: Path = user_state_path("everystep") / "data"
    return folder / hashlib.sha256(os.fsencode(file)).hexdigest()


class SourceFile(NamedTuple):
    """A file: its absolute path, its bytes, and the XXH3 (128 bits) of all of them.

    status: of the file when it was read: its place, size and times; files: itself, or those of a
    directory; its digest is of their names, too.
    """

    path: str
    bytes: int
    digest: str
    status: tuple[int, ...]
    files: tuple[Path, ...]

    def check(self) -> None:
        """Raise DataError if the file that was read has changed, or is gone."""
        with suppress(OSError):
            if _status(self.files) == self.status:
                return
        raise DataError(f"{self.path} was changed while it was read; train again when it is complete")


def _status(files: Sequence[Path]) -> tuple[int, ...]:
    """Return the status of a file; of several, a digest of all, their bytes and their newest times."""
    found = [each.stat() for each in files]
    # The last of the times, too: a program can set the time of change back, but not this one.
    each = [(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in found]
    if len(each) == 1:
        return each[0]
    _, _, sizes, *times = zip(*each, strict=True)
    return xxhash.xxh3_128_intdigest(repr([files, each]).encode()), sum(sizes), *map(max, times)


def source_files(paths: Mapping[Path, Sequence[Path]], progress: Reading) -> tuple[SourceFile, ...]:
    """Return files, or directories with their files, with their digests.

    progress: called with how many MB were read, and of all.

    Raises:
        DataError: one cannot be read.
    """
    found = list[SourceFile]()
    total = sum(read_file(each, each.stat).st_size for files in paths.values() for each in files)

    def note(done: int) -> None:
        before = sum(each.bytes for each in found)
        progress((before + done) // 10**6, total // 10**6, "MB")

    for path, files in paths.items():
        found.append(read_file(files[0], partial(source_file, path, note, files)))
    note(0)
    return tuple(found)


def source_file(path: Path, progress: Callable[[int], None], files: Sequence[Path] = ()) -> SourceFile:
    """Return a file with its digest. progress: called with the bytes read; files: of a directory.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    files = tuple(files or [path])
    note = _cache() / "digests" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()}.json"
    began = time.time_ns()
    # Before it is read: what is changed meanwhile has another status afterwards.
    *_, size, changed, noticed = known = _status(files)
    with suppress(OSError, ValueError, TypeError):
        *noted, digest = json.loads(read_regular(note, 1000))
        if tuple(noted) == known and isinstance(digest, str):
            return SourceFile(str(path), size, digest, known, files)
    found, read = xxhash.xxh3_128(), 0
    for each in files:
        # Of a directory, the names are digested, too: a class of images is the name of its folder.
        found.update(b"" if each == path else os.fsencode(each.relative_to(path)) + b"\0")
        with open_regular(each) as file:
            while piece := file.read(_PIECE):
                found.update(piece)
                read += len(piece)
                progress(read)
    if began - max(changed, noticed) > _RECENT:
        with suppress(OSError):  # the directory may not be writable
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(json.dumps([*known, found.hexdigest()]))
    return SourceFile(str(path), size, found.hexdigest(), known, files)


def read_file(path: Path, read: Callable[[], Any]) -> Any:
    """Return what a function reads from a file.

    Raises:
        DataError: it is not there, or cannot be read.
    """
    try:
        open_regular(path).close()  # a pipe or a device might never end
        return read()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; data.path is relative to the experiment file") from None
    except Exception as error:  # each format has its own
        raise DataError(f"{path} cannot be read as {path.suffix[1:]}: {error}") from None


def _cache() -> Path:
    given = os.environ.get(_PLACE)
    return Path(given).expanduser().absolute() if given else Path(user_cache_path("everystep"))


class Conversion(NamedTuple):
    """What files are converted to: x and y of so many rows, in parts, and what they are, as JSON."""

    rows: int
    parts: Iterable[tuple[np.ndarray, np.ndarray]]
    about: dict[str, Any]


def converted(
    name: str,
    sources: tuple[SourceFile, ...],
    convert: Callable[[Path], Conversion],
    progress: Reading,
    **asked: Any,
) -> tuple[np.ndarray, np.ndarray, dict[str, Any], Path]:
    """Return x and y, mapped from the cache directory, what they are, and where in it they are.

    Args:
        name: of the directory; each thing that was `asked` for has its own.
        sources: the files.
        convert: converts them; may write into the directory that it is given.
        progress: called with how many rows are converted, and of all.

    Raises:
        DataError: the disk does not have enough room for the cache, or fails.
    """
    # Of what was asked for, not of the files: when these change, the new cache takes the old one's
    # place.
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]
    place = _cache() / f"{name}-{key}"
    digests = [each.digest for each in sources]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        # Two trainings that begin together convert the data once.
        with FileLock(f"{place}.lock"):
            about = _about(place)
            # They are converted if they are not there, or of other files, or have been changed.
            if about.get("sources") != digests or about.get("files") != _files(place):
                unfinished = place.with_name(f".{place.name}.tmp")
                for old in (place, unfinished):  # of a process that was killed
                    shutil.rmtree(old, ignore_errors=True)
                unfinished.mkdir()
                try:
                    conversion = convert(unfinished)
                    _write(unfinished, conversion, progress)
                    for source in sources:
                        source.check()
                    about = conversion.about | {"sources": digests, "files": _files(unfinished)}
                    (unfinished / "about.json").write_text(json.dumps(about))
                    unfinished.rename(place)
                finally:
                    shutil.rmtree(unfinished, ignore_errors=True)
            x, y = (np.load(place / f"{each}.npy", mmap_mode="r") for each in "xy")
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{place}: {reason}; {_PLACE} sets another place") from None
    return x, y, about, place


def _about(folder: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        found = json.loads((folder / "about.json").read_text())
        return found if isinstance(found, dict) else {}
    return {}


def _files(folder: Path) -> list[list[Any]]:
    """Return the sizes and times that show whether the files of the cache are as they were written."""
    found = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.suffix != ".json"]
    return [[name, status.st_size, status.st_mtime_ns] for name, status in found]


def _write(folder: Path, conversion: Conversion, progress: Reading) -> None:
    rows, end = conversion.rows, 0
    with (folder / "x.npy").open("wb") as x, (folder / "y.npy").open("wb") as y:
        for pair in conversion.parts:
            # The first part shows how many bytes a row has.
            if not x.tell():
                row = sum(each.dtype.itemsize * math.prod(each.shape[1:]) for each in pair)
                check_room(folder, rows * row)
            for file, part in zip((x, y), pair, strict=True):
                if not file.tell():
                    dtype = np.lib.format.dtype_to_descr(part.dtype)
                    about = {"descr": dtype, "fortran_order": False, "shape": (rows, *part.shape[1:])}
                    # A file of NumPy's, written in parts: the shape is known before the numbers are.
                    np.lib.format.write_array_header_1_0(file, about)
                part.tofile(file)
            end += len(pair[0])
            progress(end, rows)
        for file in (x, y):  # what is in the cache is whole after a loss of power, too
            file.flush()
            os.fsync(file.fileno())


def check_room(folder: Path, needed: int) -> None:
    """Raise DataError unless the disk has room for so many bytes of the cache."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"the data is converted to a cache of {needed / 1e9:.1f} GB in {folder.parent}, which has "
            f"{free / 1e9:.1f} GB free; {_PLACE} sets another place"
        )
