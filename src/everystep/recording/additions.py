"""Additions to a finished run: its note, and measurements, as if they had been made during training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

from everystep.errors import RecordingError, UsageError
from everystep.recording.database import FILE_NAME, Database
from everystep.recording.facts import LONGEST_NOTE, MeasuredFacts
from everystep.recording.lock import locked, writer_here

__all__ = ["Additions", "adding", "write_note"]


class Additions:
    """Writes into a run that no other process is writing."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def measurements(
        self,
        rows: Sequence[tuple[str, int, float]],
        meanings: Mapping[str, MeasuredFacts] = MappingProxyType({}),
        replaced: Sequence[str] = (),
    ) -> None:
        """Write measurements (name, step, value), all or nothing.

        meanings: of names that are new; replaced: names to delete existing values of first.

        Raises:
            RecordingError: they cannot be written.
        """
        with self._database.transaction():
            for name in replaced:
                self._database.remove_measurement(name)
            if meanings:
                known = self._database.facts().measured
                self._database.write_facts({"measured": known | dict(meanings)})
            self._database.write_measurements(rows)

    def note(self, text: str | None) -> None:
        """Write the note; None: the run has none any more.

        Raises:
            RecordingError: it cannot be written.
        """
        with self._database.transaction():
            self._database.write_facts({"note": text})


def write_note(directory: Path, text: str | None) -> str | None:
    """Write the note of a run, and return it as written: one line. None, or a blank text, removes it.

    Raises:
        UsageError: it is too long.
        RunError: the run is still being trained, or another process is adding to it.
        RecordingError: it cannot be written to.
    """
    line = " ".join((text or "").split()) or None
    if line is not None and len(line) > LONGEST_NOTE:
        raise UsageError(
            f"the note has {len(line):,} characters; write at most {LONGEST_NOTE:,} characters"
        )
    with adding(directory) as additions:
        additions.note(line)
    return line


@contextmanager
def adding(directory: Path) -> Iterator[Additions]:
    """Open a run to add to it.

    Raises:
        RunError: it is still being trained, or another process is adding to it.
        RecordingError: it cannot be written to.
    """
    try:
        lock = locked(directory)
    except OSError as error:
        raise RecordingError(f"{directory} cannot be written to: {error.strerror}") from None
    try:
        database = Database.change(directory / FILE_NAME)
        try:
            with database.transaction():
                database.write_facts({"writer": writer_here()})
            yield Additions(database)
        finally:
            database.close()
    finally:
        lock.release()
