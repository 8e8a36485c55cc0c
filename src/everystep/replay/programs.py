"""Programs of a run: read with their digests, checked, and with their constants."""

from __future__ import annotations

from everystep.errors import ProgramError, RunError
from everystep.program.program import Program
from everystep.recording.files import constants_of, program_file
from everystep.recording.run import RecordedRun
from everystep.step.build import Built

__all__ = ["read_built", "read_loop_program", "read_program"]


def read_program(run: RecordedRun, name: str) -> Program:
    """Read a program of a run, by its name within the run.

    Raises:
        RunError: it cannot be read, was changed, or is not valid.
    """
    content = run.read_file(name)
    try:
        return Program.from_json(content)
    except ProgramError as error:
        raise ProgramError(f"{run.directory / name}: {error}") from None


def read_built(run: RecordedRun, name: str) -> Built:
    """Read a program of a run, and its constants.

    Raises:
        RunError: it cannot be read, or is not valid.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as load_tensors

    program, constants = read_program(run, name), constants_of(name)
    if not program.of_kind("constant"):
        return Built(program, {})
    try:
        return Built(program, load_tensors(run.read_file(constants)))
    except SafetensorError as error:
        raise RunError(f"{run.directory / constants} cannot be read: {error}") from None


def read_loop_program(run: RecordedRun, number: int) -> Program:
    """Read a program of a recorded loop, by its number.

    Raises:
        RunError: it cannot be read, or is not valid.
    """
    name = program_file(number)
    program = read_program(run, name)
    if not program.is_plain:
        raise RunError(f"{run.directory / name} is not the program of a loop: the run was changed")
    return program
