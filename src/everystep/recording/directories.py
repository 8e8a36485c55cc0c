"""Directories of runs: found, created, measured, removed, and followed while a run is written."""

from __future__ import annotations

import errno
import itertools
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from everystep.errors import ForeignDatabaseError, RecordingError, RunError, did_you_mean
from everystep.recording.connection import LOCK_NAME, SPARE_NAME
from everystep.recording.database import FILE_NAME, reading
from everystep.recording.files import BATCHES, CHANGES, PROGRAMS, SNAPSHOTS, files_in
from everystep.recording.lock import locked

__all__ = [
    "AWAITED",
    "RANKS",
    "RUNS",
    "SWEEP_FILE",
    "GoneError",
    "Home",
    "Space",
    "create_directory",
    "directory_of",
    "find_run",
    "find_runs",
    "is_run",
    "is_sweep",
    "name_of",
    "place_of",
    "rank_directory",
    "remove_run",
    "remove_unbegun",
    "spaces_of",
]

RUNS = Path("runs")
#: The folder within a run of those of other ranks.
RANKS = "ranks"
#: The file that marks a directory of runs as a sweep, with a word about it for whoever finds it.
SWEEP_FILE = "sweep.txt"
#: The folders of a run, and what their files are for: see `Space`.
_FOLDERS = {SNAPSHOTS: "snapshots", PROGRAMS: "programs", BATCHES: "batches", CHANGES: "batches"}
#: Files of a run outside of them, in addition to those of its database. A fork has several of each.
_DATA = re.compile(r"data(-\d+)?\.safetensors|experiment(-\d+)?\.toml")


def is_run(directory: Path) -> bool:
    """Return whether a directory has a run.

    Raises:
        RunError: it cannot be looked into.
    """
    try:
        return (directory / FILE_NAME).is_file()
    except OSError as error:
        raise RunError(f"{str(directory)!r:.200} cannot be read: {error.strerror}") from None


def is_sweep(directory: Path) -> bool:
    """Return whether a directory has the runs of a sweep."""
    return (directory / SWEEP_FILE).is_file()


#: While a sweep calls a function: its settings, and the place of its next run without a name.
AWAITED: dict[str, Any] = {}


def rank_directory(top: Path, rank: int, count: int = 0, since: int = 0) -> Path:
    """Return the directory of the run of one of several processes.

    top: of that of rank 0; rank: its number; count: how many they are; since: the state from which on
    they are as many, if the run began with others.
    """
    # e.g. `runs/net/ranks/1`, and `runs/net/ranks/1-of-4-from-101` where 4 continued what 2 began.
    name = f"{rank}-of-{count}-from-{since + 1}" if since else str(rank)
    return top / RANKS / name if rank else top


def name_of(directory: Path) -> str:
    """Return the name of a run's directory; bad bytes are replaced.

    Of a rank, it begins with that of the run; of a run of a sweep, with that of the sweep.
    """
    place = directory.resolve()
    # e.g. `net/ranks/1`, `lr-sweep/lr=0.1`, `net`.
    parts = 3 if place.parent.name == RANKS else 2 if is_sweep(place.parent) else 1
    name = "/".join(place.parts[-parts:])
    return name.encode("utf-8", "replace").decode()


def find_run(name: str | Path) -> Path:
    """Return the directory of a run: a path, or a name under `RUNS`.

    Raises:
        RunError: the run does not exist; the message names the most similar one.
    """
    for candidate in (Path(name), RUNS / name):
        if is_run(candidate):
            return candidate
    if any(map(is_sweep, (Path(name), RUNS / name))):
        raise RunError(
            f"{name} is a sweep: everystep runs {name} lists its runs, and the sweep that made it "
            f"continues them with --run {name} --resume"
        )
    if Path(name).exists():
        raise RunError(f"{name or 'an empty name'} is not a run: {FILE_NAME} is missing")
    known = [name_of(path) for path in find_runs()] if RUNS.is_dir() else []
    cure = f"{RUNS}/ has no runs; run `everystep train` first"
    if known:
        cure = did_you_mean(str(name), known) or "run `everystep runs` to list them"
    raise RunError(f"no run {str(name)!r:.200}; {cure}")


def directory_of(name: str | Path) -> Path | None:
    """Return a directory of runs, a path or a name in `RUNS`; None if there is none of that name."""
    places = (Path(name), RUNS / name)
    return next((p for p in places if not is_run(p) and any(p.glob(f"*/{FILE_NAME}"))), None)


def place_of(run: str | Path | None) -> Path | None:
    """Return the directory for a new run: of a name one under `RUNS`; all else is a path."""
    if run is None:
        return None
    is_name = isinstance(run, str) and run not in ("", "..") and Path(run).name == run
    return RUNS / run if is_name else Path(run)


def find_runs(directory: str | Path = RUNS) -> Iterator[Path]:
    """Yield the directories of all runs in `directory`, by name: digits-2 before digits-10.

    They are directly in it, or in a sweep that is.

    Raises:
        RunError: the directory does not exist, or is a run itself.
    """
    here = Path(directory)
    if is_run(here):
        around = here / ".." if here.name in ("", "..") else here.parent
        raise RunError(f"{directory} is a run; `everystep runs {around}` lists the runs next to it")
    if not here.is_dir() and is_sweep(RUNS / here):
        here = RUNS / here
    if not here.is_dir():
        cure = "`everystep train` creates the first run"
        if RUNS.is_dir():
            is_name = is_run(RUNS / directory)
            cure = f"it is a run in {RUNS}/" if is_name else f"everystep runs lists those in {RUNS}/"
        raise RunError(f"{directory} is not a directory; {cure}")
    places = [here, *(path.parent for path in here.glob(f"*/{SWEEP_FILE}"))]
    found = [path.parent for place in places for path in place.glob(f"*/{FILE_NAME}")]
    yield from sorted(found, key=lambda path: _in_order(str(path.relative_to(here))))


def _in_order(name: str) -> list[tuple[int, str]]:
    """Return a sort key: names by their words, and numbers in them by value."""
    return [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"(\d+)", name)]


def create_directory(directory: Path | None, name: str) -> Path:
    """Create a run's directory: that one, or the next free `runs/name-1`, `runs/name-2`, ...

    Raises:
        RunError: `directory` exists already, or cannot be a run's name.
        RecordingError: it cannot be created.
    """
    if directory is not None:
        _check_name(directory)
    name = name.replace("/", ",")  # of a fork of a run of a sweep
    candidates = [directory] if directory else (RUNS / f"{name}-{n}" for n in itertools.count(1))
    for candidate in candidates:
        try:
            candidate.parent.mkdir(parents=True, exist_ok=True)
            # It fails if the directory exists, so trainings that begin at the same time get different
            # ones.
            candidate.mkdir()
        except FileExistsError:
            if directory is not None and directory.exists():
                raise RunError(
                    f"{directory} already exists, and everystep never overwrites a run; choose "
                    "another directory, or omit it to use the next free one"
                ) from None
            if candidate.parent.is_dir():
                continue
            raise _cannot_create(candidate, f"{candidate.parent} is not a directory") from None
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise RunError(f"a run cannot be named {str(candidate)!r:.80}...: too long") from None
            raise _cannot_create(candidate, error.strerror) from None
        return candidate
    raise AssertionError("the count is endless")


def _check_name(directory: Path) -> None:
    """Check that commands take the name of a new run for a name."""
    for name in (directory.parts[:1] or ("",))[0], directory.name:
        # Bytes that the encoding of the file system cannot decode are surrogates.
        shown = "".join(sign for sign in name if not "\udc80" <= sign <= "\udcff")
        if name.startswith(("-", "~")) or not shown.isprintable():
            raise RunError(
                f"a run cannot be named {str(directory)!r:.80}: commands do not take {name!r:.80} for a "
                "name (an option begins with -, a home directory with ~); choose another name"
            )


def _cannot_create(directory: Path, reason: str | None) -> RecordingError:
    return RecordingError(
        f"cannot create the run's directory {directory}: {reason}; choose a writable place (--run, or "
        "run= in Python)"
    )


class Space(NamedTuple):
    """What a run takes on the disk, in bytes; a file that several runs share counts for the first.

    database: losses, measurements, facts and what differs from step to step; batches: by content, and
    what the loop changed between steps; data: the rows to train on; others: files that are not
    everystep's; keep: which steps the recording was asked to keep, None for all.
    """

    name: str
    directory: Path
    total: int = 0
    snapshots: int = 0
    batches: int = 0
    data: int = 0
    programs: int = 0
    database: int = 0
    others: int = 0
    keep: str | None = None


def spaces_of(directories: Iterable[Path]) -> list[Space]:
    """Return what each run takes, the largest first."""
    seen: set[tuple[int, int]] = set()
    return sorted((_space_of(each, seen) for each in directories), key=lambda each: -each.total)


def _space_of(directory: Path, seen: set[tuple[int, int]]) -> Space:
    """Return what a run takes. seen: files that were counted, by device and number."""
    sizes = dict.fromkeys(("snapshots", "batches", "data", "programs", "database", "others"), 0)
    for path, about in files_in(directory):
        key = about.st_dev, about.st_ino
        if stat.S_ISREG(about.st_mode) and key not in seen:
            seen.add(key)
            # In units of 512 bytes, on any file system; Windows does not have it.
            blocks = getattr(about, "st_blocks", None)
            kind = _kind(path.relative_to(directory))
            sizes[kind] += about.st_size if blocks is None else 512 * blocks
    keep = None
    with suppress(RunError), reading(directory / FILE_NAME) as database:
        keep = database.facts().keep
    return Space(name_of(directory), directory, sum(sizes.values()), **sizes, keep=keep)


def _kind(path: Path) -> str:
    """Return what a file of a run is for. path: in the run."""
    first = path.parts[0]
    if first == RANKS and len(path.parts) > 2:
        return _kind(Path(*path.parts[2:]))
    if len(path.parts) > 1:
        return _FOLDERS.get(first, "others")
    if first.startswith(FILE_NAME) or first in (LOCK_NAME, SPARE_NAME):
        return "database"
    return "data" if _DATA.fullmatch(first) else "others"


def remove_run(directory: Path) -> list[str]:
    """Remove the files of a run that everystep wrote; return the names of those that are left.

    Forks stay whole: they have all files that they need.

    Raises:
        RunError: another process is writing the run, it is a link, or another program's database.
        RecordingError: a file cannot be removed.
    """
    if directory.is_symlink():
        raise RunError(
            f"{directory} is a link; remove {directory.resolve()}, or the link itself with rm"
        )
    try:
        with reading(directory / FILE_NAME):
            pass
    except RunError as error:  # a damaged run can be removed
        if isinstance(error, ForeignDatabaseError):
            raise
    try:
        with locked(directory):
            # Without its database it is not a run, whatever happens next.
            for path in sorted(
                directory.iterdir(), key=lambda path: not path.name.startswith(FILE_NAME)
            ):
                if path.name in _FOLDERS and path.is_dir():
                    shutil.rmtree(path)
                elif path.name == RANKS and path.is_dir():
                    whole = [remove_run(each) for each in path.iterdir() if is_run(each)]
                    if not any(whole) and not any(path.iterdir()):
                        path.rmdir()
                # The lock is held until all else is removed.
                elif path.name != LOCK_NAME and _kind(Path(path.name)) != "others":
                    path.unlink()
        (directory / LOCK_NAME).unlink(missing_ok=True)
        left = sorted(path.name for path in directory.iterdir())
        if not left:
            directory.rmdir()
    except OSError as error:
        raise RecordingError(f"{error.filename} cannot be removed: {error.strerror}") from None
    return left


def remove_unbegun(directory: Path) -> bool:
    """Return whether a run has not begun: it does not exist, or has neither a step nor a state.

    Such a directory is removed if everystep created everything in it.

    Raises:
        RunError: another process is writing the run, its database cannot be read, or has no step of
            those that left states on disk.
        RecordingError: it cannot be removed.
    """
    if not directory.is_dir():
        return not directory.exists()
    if (directory / FILE_NAME).exists():
        with reading(directory / FILE_NAME) as database:
            if database.newest_step() or database.snapshots():
                return False
    names = {path.name for path in directory.iterdir()}
    # Data and experiments may be the user's.
    own = {RANKS, *_FOLDERS}
    if any(name not in own and _kind(Path(name)) != "database" for name in names):
        return True  # creating the run there reports that the directory exists
    try:
        with locked(directory):
            # A copy without its database, or without the log of it, began and must not be removed.
            states = [path.name for path in directory.glob(f"**/{SNAPSHOTS}/[0-9]*")]
            if step := max((int(name) for name in states if name.isdecimal()), default=0):
                raise RunError(
                    f"{directory} has a state after step {step:,}, but no {FILE_NAME} with the steps "
                    f"before it; copy {FILE_NAME} and {FILE_NAME}-wal there from where the run was "
                    "written, or remove the directory to begin again"
                )
            shutil.rmtree(directory)
    except OSError as error:
        raise RecordingError(f"{directory} cannot be written to: {error.strerror}") from None
    return True


class GoneError(RecordingError):
    """The directory of a run that is being written is gone."""


class Home:
    """A directory that stays the same if it is moved, or if the working directory changes.

    directory: as the caller wrote it; here: where it is now.
    """

    def __init__(self, directory: Path) -> None:
        self.here = directory.absolute()
        self._given = directory
        # Device and number stay with a directory when it gets another name.
        found = self.here.stat()
        self._key = found.st_dev, found.st_ino
        # An open directory can be asked for its name, on Linux.
        self._handle = os.open(self.here, os.O_RDONLY) if hasattr(os, "O_DIRECTORY") else None

    @property
    def directory(self) -> Path:
        """The directory as the caller wrote it, as long as that leads to it."""
        return self._given if self._is_at(self._given) else self.here

    def follow(self) -> bool:
        """Look where the directory is; return whether it has moved.

        Raises:
            GoneError: it is gone.
        """
        if self._is_at(self.here):
            return False
        moved = self.here
        with suppress(OSError):  # no such files but on Linux
            moved = Path(f"/proc/self/fd/{self._handle}").readlink()
        if not self._is_at(moved):
            raise GoneError(
                f"the run's directory {self.here} was removed, or moved out of reach, while it was "
                "being written, so the training stops; train again, and leave the directory where it is"
            )
        self.here = moved
        return True

    def close(self) -> None:
        """Forget the directory."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _is_at(self, path: Path) -> bool:
        try:
            found = path.stat()
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == self._key
