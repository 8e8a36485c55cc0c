"""Programs of a run: read with their digests, and checked."""

from __future__ import annotations

from everystep.errors import ProgramError
from everystep.program.program import Program
from everystep.recording.files import program_file
from everystep.recording.run import RecordedRun

__all__ = ["read_program"]


def read_program(run: RecordedRun, number: int) -> Program:
    """Read a program of a run, by its number.

    Raises:
        RunError: it cannot be read, was changed, or is not valid.
    """
    name = program_file(number)
    content = run.read_file(name)
    try:
        return Program.from_json(content)
    except ProgramError as error:
        raise ProgramError(f"{run.directory / name}: {error}") from None
