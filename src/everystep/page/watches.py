"""Watched directories: the file system reports changes."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from watchdog.events import (
    DirCreatedEvent,
    DirDeletedEvent,
    DirMovedEvent,
    FileDeletedEvent,
    FileModifiedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver, ObservedWatch

from everystep.recording.database import FILE_NAME

__all__ = ["Watches"]

#: Events that show that a run was written to, or that a directory was created or deleted.
_EVENTS: list[type[FileSystemEvent]] = [
    DirCreatedEvent,
    DirDeletedEvent,
    DirMovedEvent,
    FileDeletedEvent,
    FileModifiedEvent,
    FileMovedEvent,
]


class Watches(FileSystemEventHandler):
    """Sets an event when a run in one of some directories, or a directory in them, changes.

    Used from one event loop.
    """

    def __init__(self, changed: asyncio.Event) -> None:
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._observer: BaseObserver | None = None
        self._watched: dict[Path, tuple[ObservedWatch, tuple[int, int]]] = {}

    def watch(self, directories: set[Path]) -> bool:
        """Watch exactly these directories; a new one counts as changed: it may have been, just now.

        Returns:
            whether that is possible: all are there, and the system lets us watch them.
        """
        if self._observer is None:
            # It reports events of a directory that was just released as errors.
            logging.getLogger("watchdog").setLevel(logging.CRITICAL)
            self._observer = Observer()
            self._observer.start()
        for directory, (watch, place) in list(self._watched.items()):
            # Another directory may have replaced the one at its path.
            if directory not in directories or _place(directory) != place:
                del self._watched[directory]
                self._observer.unschedule(watch)
        for directory in directories - self._watched.keys():
            place_now = _place(directory)
            try:
                watch = self._observer.schedule(self, str(directory), event_filter=_EVENTS)
            except OSError:  # it has gone, or the system's limit of watches is reached
                continue
            if place_now is not None:
                self._watched[directory] = watch, place_now
                self._changed.set()
        return self._watched.keys() == directories

    def close(self) -> None:
        """Watch nothing any more."""
        if self._observer is not None:
            self._observer.stop()
            self._observer.join()
        self._observer = None
        self._watched = {}

    def on_any_event(self, event: FileSystemEvent) -> None:
        """Set the event, from the thread of the observer."""
        names = {Path(str(path)).name for path in (event.src_path, event.dest_path)}
        # Reading a run touches its other files (the lock, the shared memory), which is not a change.
        is_made_by_looking = not event.is_directory and not names & {FILE_NAME, f"{FILE_NAME}-wal"}
        if not is_made_by_looking and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._changed.set)


def _place(directory: Path) -> tuple[int, int] | None:
    """Return what tells a directory from another one at its path; None if there is none."""
    try:
        stat = directory.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino
