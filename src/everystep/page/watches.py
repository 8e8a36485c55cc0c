"""Watched directories: the file system reports changes."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any, NamedTuple

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


class Watches:
    """Watches directories, each once, while there are listeners; used from one event loop."""

    def __init__(self) -> None:
        self._observer: BaseObserver | None = None
        self._watched: dict[Path, _Watched] = {}

    def add(self, directory: Path, changed: asyncio.Event) -> bool:
        """Have an event set when a run in a directory, or a directory in it, changes.

        Returns:
            whether that is possible: the directory is there, and the system lets us watch it.
        """
        if directory not in self._watched:
            handler = _Handler(asyncio.get_running_loop())
            try:
                place = _place(directory)
                watch = self._started().schedule(handler, str(directory), event_filter=_EVENTS)
            except OSError:  # it has gone, or the system's limit of watches is reached
                return False
            self._watched[directory] = _Watched(watch, place, handler)
        self._watched[directory].handler.wanted.add(changed)
        return True

    def remove(self, directory: Path, changed: asyncio.Event) -> None:
        """Take back one `add`."""
        watched = self._watched[directory]
        watched.handler.wanted.discard(changed)
        if not watched.handler.wanted:
            del self._watched[directory]
            self._started().unschedule(watched.watch)
        if not self._watched:
            self.close()

    def holds(self, directory: Path) -> bool:
        """Return whether a watched directory is still the one at its path: it may have been replaced."""
        try:
            return directory in self._watched and _place(directory) == self._watched[directory].place
        except OSError:
            return False

    def close(self) -> None:
        """Watch nothing any more."""
        if self._observer is not None:
            self._observer.stop()
            self._observer.join()
        self._observer = None
        self._watched = {}

    def _started(self) -> BaseObserver:
        if self._observer is None:
            # It reports events of a directory that was just released as errors.
            logging.getLogger("watchdog").setLevel(logging.CRITICAL)
            self._observer = Observer()
            self._observer.start()
        return self._observer


class _Handler(FileSystemEventHandler):
    """Passes on, from the observer's thread, what matters."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.wanted: set[asyncio.Event] = set()
        self._loop = loop

    def on_any_event(self, event: FileSystemEvent) -> None:
        """Set the events of the listeners."""
        names = {Path(str(path)).name for path in (event.src_path, event.dest_path)}
        # Reading a run touches its other files (the lock, the shared memory), which is not a change.
        is_made_by_looking = not event.is_directory and not names & {FILE_NAME, f"{FILE_NAME}-wal"}
        if not is_made_by_looking and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._tell)

    def _tell(self) -> None:
        for changed in self.wanted:
            changed.set()


class _Watched(NamedTuple):
    watch: ObservedWatch
    place: tuple[Any, ...]
    handler: _Handler


def _place(directory: Path) -> tuple[int, int]:
    stat = directory.stat()
    return stat.st_dev, stat.st_ino
