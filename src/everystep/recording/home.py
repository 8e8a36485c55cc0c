"""The directory of a run that is being written, which may be moved or removed meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

from everystep.errors import RecordingError

__all__ = ["GoneError", "Home"]


class GoneError(RecordingError):
    """The directory of a run that is being written is gone."""


class Home:
    """A directory, by itself and not by its name; the working directory may change meanwhile.

    directory: as the caller wrote it; here: where it is now.
    """

    def __init__(self, directory: Path) -> None:
        self.here = directory.absolute()
        self._given = directory
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
        moved = None if self._handle is None else _name_of(self._handle)
        if moved is None or not self._is_at(moved):
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


def _name_of(handle: int) -> Path | None:
    """Return the current path of an open directory, where the system tells."""
    try:
        return Path(f"/proc/self/fd/{handle}").readlink()
    except OSError:
        return None
