"""Additions: measurements of a finished run, written as if they had been made during training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from everystep.errors import RecordingError, RunError
from everystep.recording.database import FILE_NAME, LOCK_NAME, Database
from everystep.recording.facts import MeasuredFacts

__all__ = ["Additions", "adding"]


class Additions:
    """Writes measurements into a run that no other process is writing."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def measurements(self, rows: Sequence[tuple[str, int, float]]) -> None:
        """Write measurements (name, step, value).

        Raises:
            RecordingError: they cannot be written.
        """
        with self._database.transaction():
            self._database.write_measurements(rows)

    def begin_measurement(self, name: str, meaning: MeasuredFacts, *, replacing: bool) -> None:
        """Note what a measurement means; `replacing`: delete existing values of that name.

        Raises:
            RecordingError: it cannot be written.
        """
        with self._database.transaction():
            if replacing:
                self._database.remove_measurement(name)
            known = self._database.facts().measured
            self._database.write_facts({"measured": known | {name: meaning}})


@contextmanager
def adding(directory: Path) -> Iterator[Additions]:
    """Open a run to add to it.

    Raises:
        RunError: it is still being trained, or another process is adding to it.
        RecordingError: it cannot be written to.
    """
    lock = FileLock(directory / LOCK_NAME)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(
            f"{directory} is being written (by its training, or by a measurement in another process); "
            "wait until that ends"
        ) from None
    except OSError as error:
        raise RecordingError(f"{directory} cannot be written to: {error.strerror}") from None
    try:
        database = Database.change(directory / FILE_NAME)
        try:
            yield Additions(database)
        finally:
            database.close()
    finally:
        lock.release()
