"""Recorded steps: what repeats each step of a run: its program, its numbers and its inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress
from hashlib import sha256
from typing import Any, NamedTuple

from torch import Tensor

from everystep.bounded import decompressed
from everystep.device import select
from everystep.errors import ProgramError, RunError
from everystep.experiment.batches import RowsOf
from everystep.ops.arguments import DTYPES
from everystep.program.interpreter import Interpreter
from everystep.program.memory import bytes_at_once, check_memory, copy_on_cpu
from everystep.program.precision import Precision
from everystep.program.sizes import resized
from everystep.program.step_program import MOST_BYTES, Program
from everystep.recording.contents import (
    PROGRAM,
    SIZES,
    Given,
    Inputs,
    StoredPiece,
    as_tensor,
    inputs_of,
    joined,
    unpacked,
)
from everystep.recording.database import Repeat, cut
from everystep.recording.files import program_file
from everystep.recording.keep import kept_text
from everystep.recording.recorded_run import RecordedRun, Stretch
from everystep.replay.opened_step import of_kind

__all__ = [
    "INPUT",
    "NotReplayedError",
    "ProgramKey",
    "RecordedSteps",
    "check_kept",
    "described",
    "read_program",
]

#: Prefix of the names of what a step has from outside.
INPUT = "input/"
#: Rows of the database, and losses, to read at once.
BLOCK = 256
#: Steps to look ahead: to bind their program, and to read their inputs at once.
LOOK_AHEAD = 64
#: Bytes of contents that stay in memory, because later steps may need them again.
KEPT_BYTES = 64_000_000
#: Bytes of contents to read ahead at once.
AHEAD_BYTES = 16_000_000
#: Steps with their inputs decoded.
KEPT_STEPS = 512
#: Programs in memory, of a run with many; and those from which others are made, by other sizes.
KEPT_PROGRAMS, KEPT_SHARED = 256, 64


class NotReplayedError(RunError):
    """A step that cannot be replayed; the message gives the reason."""


class ProgramKey(NamedTuple):
    """What a program is read from: its number in the run, and what the inputs of a step have of it.

    content: the program itself, None if a file has it; sizes: where they are not those of the program.
    """

    number: int
    content: Given | None = None
    sizes: Given | None = None


class RecordedSteps:
    """The recorded data that repeats each step of a stretch.

    rule: returns the batches of everystep's own steps, None if each row holds its batch; conversion: of
    the programs and their inputs, None for none.

    Raises:
        RunError: from any method, if it needs what the run does not have, or cannot read.
    """

    #: Whether something differs from the recording, and a learning rate other than the recorded ones.
    is_changed = False
    lr: float | None = None
    #: The last step that is about to run.
    until = 0

    def __init__(
        self,
        run: RecordedRun,
        stretch: Stretch,
        rule: RowsOf | None,
        conversion: Precision | None = None,
    ) -> None:
        self.run = run
        self.first = stretch.first
        self.last = run.newest_step() if stretch.last is None else stretch.last
        self.facts = stretch.facts
        self.rule = rule
        self.device = select(stretch.facts.device)
        self.conversion = conversion
        #: As they run, and as recorded.
        self._programs: dict[ProgramKey, tuple[Interpreter, Program]] = {}
        #: Those of programs with tensors that move, where they lie in the last steps.
        self._placed: dict[tuple[ProgramKey, bytes | None], Interpreter] = {}
        #: Programs that steps of other sizes share, and what stands for them.
        self._shared: dict[tuple[int, Given | None], tuple[Program, bytes]] = {}
        self._rows: dict[int, Repeat] = {}
        self._losses: dict[int, float] = {}
        self._given: dict[bytes | None, Inputs] = {}
        #: Pieces of inputs by number. Steps share them: the rows of a batch return in each epoch.
        #: They are read once, for many steps together, up to `KEPT_BYTES`.
        self._pieces: dict[int, StoredPiece] = {}
        self._bytes = 0
        if conversion is not None:
            for number in self.facts.programs:
                self.program(number)  # each determines what else is converted

    def row(self, number: int) -> Repeat:
        """Return the data that repeats a step."""
        if number not in self._rows:
            last = number + BLOCK - 1
            rows = cut(self.run.repeats(number, last), number, last)
            steps = ((row, step) for row in rows for step in range(row.step, row.last + 1))
            # One row for each step, whatever they share, so that callers need no ranges.
            self._rows = {step: row._replace(step=step, count=1) for row, step in steps}
        if number not in self._rows:
            check_kept(self.run, number)
            raise NotReplayedError(
                f"{self.run.name} has no record of step {number}: the database was changed"
            )
        return self._rows[number]

    def key_of(self, row: Repeat) -> ProgramKey:
        """Return what the program of a step is read from.

        Raises:
            NotReplayedError: it has none.
        """
        if row.program is None:
            check_kept(self.run, row.step)
            raise NotReplayedError(
                f"step {row.step} of {self.run.name} cannot be replayed: it did something that a "
                "program cannot hold, as a notice reported when it was recorded"
            )
        given = self.given(row).given
        return ProgramKey(row.program, given.get(PROGRAM), given.get(SIZES))

    def ahead(self, first: int) -> list[Repeat]:
        """Return the rows of the steps from `first` that are about to run, as far as they were read."""
        steps = range(first, min(self.until, first + LOOK_AHEAD) + 1)
        return [self._rows[step] for step in steps if step in self._rows]

    def program_of(self, row: Repeat) -> Interpreter:
        """Return the program of a step."""
        known = self.key_of(row)
        program = self.program(*known)
        if not program.program.moves:
            return program
        key = known, row.numbers
        if key not in self._placed:
            if len(self._placed) >= KEPT_STEPS:
                self._placed.clear()
            # A window of a text moves in each step: the same program, with its tensors at other places.
            self._placed[key], _ = program.at(self.all_numbers(row))
        return self._placed[key]

    def program(
        self, number: int, content: Given | None = None, sizes: Given | None = None
    ) -> Interpreter:
        """Return a program; see `ProgramKey`.

        Raises:
            ProgramError: it needs more memory than is free.
        """
        key = ProgramKey(number, content, sizes)
        if key not in self._programs:
            if len(self._programs) >= KEPT_PROGRAMS:
                self._programs.clear()
            program = recorded = self._read_program(key)
            if self.conversion is not None:
                program = self.conversion.program(program)
            # A stranger's program of many results could take all memory of the machine.
            check_memory(bytes_at_once(program), self.device)
            self._programs[key] = Interpreter(program, self.device), recorded
        return self._programs[key][0]

    def _read_program(self, key: ProgramKey) -> Program:
        number, content, sizes = key
        if content is None and sizes is None:
            return read_program(self.run, number)
        shared = number, content
        if shared not in self._shared:
            if len(self._shared) >= KEPT_SHARED:
                self._shared.clear()
            self._shared[shared] = self._read_shared(number, content)
        program, digest = self._shared[shared]
        if sizes is None:
            return program
        packed = bytes(self._content(sizes, f"an input of {self.run.name}", SIZES))
        return resized(program, packed, digest)

    def _read_shared(self, number: int, given: Given | None) -> tuple[Program, bytes]:
        """Return a program that steps share, and what stands for it."""
        if given is None:
            content = self.run.read_file(program_file(number))
            return read_program(self.run, number), sha256(content).digest()
        packed = self._content(given, f"an input of {self.run.name}", PROGRAM)
        try:
            text = decompressed(bytes(packed), MOST_BYTES)
        except ValueError as error:
            raise ProgramError(f"a program of {self.run.name} cannot be read: {error}") from None
        return Program.from_json(text), sha256(text).digest()

    def numbers(self, row: Repeat) -> list[int | float]:
        """Return the numbers of the operations of a step."""
        moves = () if row.program is None else self.program(*self.key_of(row)).program.moves
        return self.all_numbers(row)[len(moves) :]

    def all_numbers(self, row: Repeat) -> list[int | float]:
        """Return where the tensors of a step lie that move, and the numbers of its operations."""
        found = unpacked(row.numbers, f"step {row.step} of {self.run.name}") or []
        if not isinstance(found, list) or not all(type(each) in (int, float, bool) for each in found):
            raise NotReplayedError(
                f"step {row.step} of {self.run.name} has invalid numbers: the database was changed"
            )
        return found

    def loss(self, number: int) -> float:
        """Return the recorded loss of a step, NaN if there is none."""
        if number not in self._losses:
            recorded = self.run.losses_between(number, number + BLOCK - 1)
            self._losses = dict(enumerate(recorded, start=number))
        return self._losses.get(number, math.nan)

    def unknown_in(self, number: int) -> str | None:
        """Return what Python may have read that the recording does not have, and no program computes."""

    def change_files(self) -> dict[int, str]:
        """Return the files of what code changed after steps, by step."""
        files = self.run.change_files()
        if self.facts.loop is not None:
            return files
        # A snapshot of everystep's own steps has what changed after its step.
        return {step: file for step, file in files.items() if step >= self.first}

    def digested_before(self, number: int) -> int:
        """Return the last step before one with digests of the state, 0 if there is none."""
        # Digests were taken after steps 1, 2, 4, 8 and so on, where there was time for them.
        earlier = [2**power for power in range(number.bit_length()) if 2**power < number]
        rows = ((step, row) for step in reversed(earlier) for row in self.run.repeats(step, step))
        return next((step for step, row in rows if self.given(row).digests), 0)

    def given(self, row: Repeat) -> Inputs:
        """Return the inputs of a step without their contents."""
        if row.inputs not in self._given:
            if len(self._given) >= KEPT_STEPS:
                self._given.clear()
            # By the bytes in the database: steps with the same inputs decode them once.
            self._given[row.inputs] = inputs_of(row.inputs, described(self.run, row.step))
        return self._given[row.inputs]

    def brought_later(self, steps: range) -> str | None:
        """Return the name of a tensor from outside that a step after the first one is the first to read.

        None if there is none. Data from outside is read before, or is cut out of a tensor that was: what
        is new may follow from what the steps have done.
        """

        def read_in(rows: Iterable[Repeat]) -> dict[Any, tuple[str, Given]]:
            pairs = (pair for row in rows for pair in self.given(row).given.items())
            return {each.content: (name, each) for name, each in pairs if name.startswith(INPUT)}

        known = read_in([self.row(steps[0])])
        new = {n: each for n, each in read_in(map(self.row, steps[1:])).items() if n not in known}
        if not new:
            return None
        earlier = {
            number
            for row in self.run.repeats(1, steps[0])
            for each in self.given(row).given.values()
            for number in each.numbers()
        }
        asked = {number for _, each in new.values() for number in each.numbers()}
        index = self.run.located(earlier | asked)

        def contents(number: int) -> set[bytes | int]:
            """Return the digest of a piece, and that of the data that it was cut out of."""
            row = index.of(number)
            numbers = (number,) if row is None or row.source is None else (number, row.source)
            rows = ((each, index.of(each)) for each in numbers)
            return {each if r is None else r.digests_from(each, each + 1)[0] for each, r in rows}

        data = {content for number in earlier for content in contents(number)}
        names = (
            n for n, each in new.values() if any(data.isdisjoint(contents(k)) for k in each.numbers())
        )
        found = next(names, None)
        return None if found is None else found.removeprefix(INPUT)

    def inputs(self, row: Repeat) -> dict[str, Tensor]:
        """Return the inputs of a step by `batch/name` and `input/name`, on the CPU: the caller's own."""
        tensors = self.stored(row)
        if (rule := self.rule_for(row)) is not None:
            rows = zip("xy", rule(row.step), strict=True)
            tensors |= {f"batch/{name}": copy_on_cpu(part) for name, part in rows}
        if self.conversion is not None and row.program is not None:
            # How an input is converted follows from what its program reads it as.
            self.program(*self.key_of(row))
            _, recorded = self._programs[self.key_of(row)]
            cast = self.conversion.contents(recorded, of_kind(tensors, "input"))
            tensors = {name: self.conversion.tensor(name, tensor) for name, tensor in tensors.items()}
            tensors |= {f"input/{name}": content for name, content in cast.items()}
        return tensors

    def rule_for(self, row: Repeat) -> RowsOf | None:
        """Return the rule that finds the rows of a step, None if the run has its batch by content."""
        return None if "batch/x" in self.given(row).given else self.rule

    def stored(self, row: Repeat, *, with_program: bool = False) -> dict[str, Tensor]:
        """Return the inputs of a step that the run holds by content, as recorded.

        with_program: also its program and its sizes, if they are among its inputs.
        """
        found = {}
        needed = self.given(row).opens_with.items()
        wanted = {n: each for n, each in needed if with_program or n not in (PROGRAM, SIZES)}
        self._read(wanted.values(), row.step)
        for name, given in wanted.items():
            content = self._content(given, described(self.run, row.step), name)
            tensor = as_tensor(given, content)
            # The bytes of memory may have been stored in rows; a program takes them as (bytes,).
            found[name] = tensor.flatten() if name.startswith("input/") else tensor
        return found

    def _content(self, given: Given, what: str, name: str) -> bytearray:
        """Return the bytes of an input. what, name: for an error."""
        self._read([given])
        content = joined(given, self._pieces)
        if content is None and self.run.facts.batches_lost_to is None:
            raise NotReplayedError(f"{what} is missing ({name}): the database was changed")
        if content is None:
            raise NotReplayedError(
                f"{what} was dropped ({name}), because the batches exceeded the budget (batch_budget of "
                "everystep.record); later steps may still open"
            )
        return content

    def _read(self, given: Iterable[Given], step: int | None = None) -> None:
        """Read the contents that are not in memory, in one look into the database.

        step: which needs them; then those of the steps that are about to run after it are read, too.
        """
        wanted = [*given]
        if all(number in self._pieces for each in wanted for number in each.numbers()):
            return
        if step is not None:
            with suppress(RunError):  # of a later step, which reports it itself
                more = wanted.copy()
                for row in self.ahead(step + 1):
                    if sum(map(_size, more)) > AHEAD_BYTES:
                        break
                    more += self.given(row).opens_with.values()
                self._read(more)
                return
        if self._bytes > KEPT_BYTES:
            self._pieces.clear()
            self._bytes = 0
        found = self.run.pieces(wanted, self._pieces)
        self._pieces |= found
        self._bytes += sum(len(piece.content) for piece in found.values())


def check_kept(run: RecordedRun, step: int) -> None:
    """Raise `NotReplayedError` if the recording was not to keep a step."""
    facts = run.facts
    for each in facts.not_kept:
        if each.first <= step <= each.last:
            raise NotReplayedError(
                f"step {step:,} of {run.name} was not kept (keep: {each.keep}); "
                f"{kept_text(facts, run.newest_step())}, and the losses of all steps"
            )


def read_program(run: RecordedRun, number: int) -> Program:
    """Read a program of a run with its digest, by its number.

    Raises:
        RunError: it cannot be read, was changed, or is not valid.
    """
    name = program_file(number)
    content = run.read_file(name)
    try:
        return Program.from_json(content)
    except ProgramError as error:
        raise ProgramError(f"{run.directory / name}: {error}") from None


def _size(given: Given) -> int:
    """Return the bytes of an input; 0 where its dtype is unknown, which reading it reports."""
    return math.prod(given.shape) * DTYPES[given.dtype].itemsize if given.dtype in DTYPES else 0


def described(run: RecordedRun, step: int) -> str:
    """Name the input of a step in a message."""
    return f"the input of step {step} of {run.name}"
