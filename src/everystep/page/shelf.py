"""The runs that are served. A name from the page is looked up among them; it is never a path."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from everystep.errors import RunError, did_you_mean
from everystep.page.about import summary_data
from everystep.recording.database import FILE_NAME
from everystep.recording.numbers import fingerprint
from everystep.recording.run import RecordedRun

__all__ = ["Shelf", "shown_name"]


class Shelf:
    """The runs directly in a directory, by name."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._known: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {}
        self._lock = threading.Lock()

    def run(self, name: str) -> RecordedRun:
        """Return the run of that name.

        Raises:
            RunError: there is none, or it cannot be read.
        """
        directory = self.folders().get(name)
        if directory is None or not (directory / FILE_NAME).is_file():
            known = list(self.directories())
            cure = did_you_mean(name, known) or "the list of runs shows those that there are"
            raise RunError(f"no run {_shortened(name)!r} in {self.directory}; {cure}")
        return RecordedRun(directory)

    def directories(self) -> dict[str, Path]:
        """Return the directories of all runs, by name, in the order of the names."""
        return {
            name: directory
            for name, directory in self.folders().items()
            if (directory / FILE_NAME).is_file()
        }

    def folders(self) -> dict[str, Path]:
        """Return all folders by name; one that is not a run yet may become one."""
        try:
            with os.scandir(self.directory) as entries:
                names = sorted(entry.name for entry in entries if entry.is_dir())
        except OSError:  # the directory is gone, and with it all runs
            return {}
        return {shown_name(name): self.directory / name for name in names}

    def summaries(self) -> dict[str, dict[str, Any]]:
        """Return every run in one line, by name; only what has changed is read again."""
        return {name: self._summary(name, path) for name, path in self.directories().items()}

    def forks(self, name: str) -> list[dict[str, Any]]:
        """Return the forks of a run: name, and the last step that is the parent's."""
        return [
            {"name": fork, "at": summary["parent"][1]}
            for fork, summary in self.summaries().items()
            if summary["parent"] and summary["parent"][0] == name
        ]

    def _summary(self, name: str, directory: Path) -> dict[str, Any]:
        try:
            now = fingerprint(directory)
            with self._lock:
                before, summary = self._known.get(name, (None, {}))
            # Of a run whose process is killed no file changes.
            if before == now and summary["status"] != "running":
                return summary
            summary = summary_data(name, RecordedRun(directory, may_be_cut=True).summary())
        except (RunError, OSError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            return summary_data(name, None, problem=str(error))
        with self._lock:
            self._known[name] = now, summary
        return summary


def shown_name(name: str) -> str:
    """Return the name of a folder as the page has it: bytes in it that are no text are written out."""
    return name.encode("utf-8", "backslashreplace").decode()


def _shortened(name: str) -> str:
    return name if len(name) <= 80 else f"{name[:80]}..."
