"""The served runs. A name from the page is looked up among them; it is never used as a path."""

from __future__ import annotations

import math
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from everystep.errors import RunError, did_you_mean
from everystep.recording.connection import fingerprint
from everystep.recording.database import FILE_NAME
from everystep.recording.directories import is_sweep
from everystep.recording.facts import RanksFacts
from everystep.recording.recorded_run import RecordedRun
from everystep.recording.summary import Summary
from everystep.views.lists import summary_data

__all__ = ["RunIndex", "Summaries", "names_of_ranks", "shown_name"]

#: Between the name of a run and the number of one of its ranks: a name has no slash here.
_RANK = " rank "


class Summaries(NamedTuple):
    """Runs in one line each, by name, in the order of the names; unread: how many more there are."""

    runs: dict[str, dict[str, Any]]
    unread: int


class RunIndex:
    """The runs in a directory, and those of sweeps in it, by name."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._known: dict[str, tuple[tuple[int, ...] | None, dict[str, Any]]] = {}
        self._lock = threading.Lock()

    def run(self, name: str) -> RecordedRun:
        """Return the run of that name.

        Raises:
            RunError: there is none, or it cannot be read.
        """
        return RecordedRun(self.place(name))

    def place(self, name: str) -> Path:
        """Return the directory of the run of that name, without reading it.

        Raises:
            RunError: there is none.
        """
        # Where the directory is a sweep, its runs are also called by its name.
        directory = self.folder(name) or self.folder(name.removeprefix(f"{self.directory.name}/"))
        if directory is None or not (directory / FILE_NAME).is_file():
            known = list(self.directories())
            cure = did_you_mean(name, known) or "the list of runs shows the existing ones"
            raise RunError(f"no run {name!r:.80} in {self.directory}; {cure}")
        return directory

    def directories(self) -> dict[str, Path]:
        """Return the directories of all runs, by name, in the order of the names."""
        return {
            name: directory
            for name, directory in self.folders().items()
            if (directory / FILE_NAME).is_file()
        }

    def folder(self, name: str) -> Path | None:
        """Return the folder of a run of that name, which may be `NAME rank 1`; None if there is none."""
        folders = self.folders()
        if name in folders:
            return folders[name]
        top, _, rank = name.rpartition(_RANK)
        if top not in folders or not rank.isdecimal():
            return None
        with suppress(RunError, IndexError):
            return RecordedRun(folders[top]).ranks[int(rank)].directory
        return None

    def folders(self) -> dict[str, Path]:
        """Return all folders by name; one that is not a run yet may become one."""
        try:
            folders = _folders_in(self.directory)
            for sweep in filter(is_sweep, [*folders.values()]):
                folders |= {f"{sweep.name}/{n}": path for n, path in _folders_in(sweep).items()}
        except OSError:  # the directory is gone, and with it all runs
            return {}
        return {shown_name(name): folders[name] for name in sorted(folders)}

    def summaries(self, seconds: float = math.inf) -> Summaries:
        """Return a summary of every run; only changed ones are read again.

        seconds: to spend on unread runs, at least one; the next call reads more, and changed runs once
        none is left.
        """
        directories = self.directories()
        began = time.monotonic()
        new = [name for name in directories if name not in self._known]
        for place, name in enumerate(new):
            # At least one: repeated calls come to an end, however slow the disk is.
            if place and time.monotonic() - began > seconds:
                with self._lock:
                    known = {name: self._known[name][1] for name in directories if name in self._known}
                return Summaries(known, len(new) - place)
            self._summary(name, directories[name])
        return Summaries({name: self._summary(name, path) for name, path in directories.items()}, 0)

    def forks(self, name: str, seconds: float = math.inf) -> tuple[list[dict[str, Any]], int]:
        """Return the forks of a run: name, and the last step that is the parent's; and how many runs
        were not looked at within these seconds.
        """
        summaries = self.summaries(seconds)
        forks = [
            {"name": fork, "at": summary["parent"][1]}
            for fork, summary in summaries.runs.items()
            if summary["parent"] and summary["parent"][0] in (name, f"{self.directory.name}/{name}")
        ]
        return forks, summaries.unread

    def _summary(self, name: str, directory: Path) -> dict[str, Any]:
        now: tuple[int, ...] | None = None
        try:
            now = fingerprint(directory)
            with self._lock:
                before, summary = self._known.get(name, (None, {}))
            # When the process of a run is killed, none of its files changes.
            if before == now and summary["status"] not in ("running", None):
                return summary
            summary = summary_data(RecordedRun(directory).summary())
            summary |= {"name": name, "directory": shown_name(str(directory))}
        except (RunError, OSError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            # It was removed meanwhile, or a stranger made it: the list shows all others.
            summary = dict.fromkeys(Summary._fields) | {"name": name, "problem": str(error)}
        with self._lock:
            self._known[name] = now, summary
        return summary


def names_of_ranks(name: str, ranks: RanksFacts | None) -> list[str]:
    """Return the names of all ranks of a run. name: of one; ranks: which, None if it is alone."""
    if ranks is None:
        return []
    top = name.removesuffix(f"{_RANK}{ranks.rank}")
    return [f"{top}{_RANK}{rank}" if rank else top for rank in range(ranks.count)]


def _folders_in(directory: Path) -> dict[str, Path]:
    with os.scandir(directory) as entries:
        return {entry.name: directory / entry.name for entry in entries if entry.is_dir()}


def shown_name(name: str) -> str:
    """Return the name of a folder for the page, with undecodable bytes escaped."""
    return name.encode("utf-8", "backslashreplace").decode()
