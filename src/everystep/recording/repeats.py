"""Repeats: what repeats watched steps, as the database has it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from everystep.recording.contents import Contents, Given, packed
from everystep.recording.database import Database, Repeat

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Repeats", "Taken"]


class Taken(NamedTuple):
    """Watched steps, as they are written: `count` of them, from `step` on.

    program: its number, None if nothing repeats the steps; numbers: of its operators, and those that
    Python read; inputs: of each step, on the CPU, by name; nesting: the nesting of its batch; bytes: of
    new inputs; digests: of the state afterwards, by name, if computed, of a single step only.
    """

    step: int
    program: int | None
    numbers: list[int | float] | None
    inputs: dict[str, Tensor]
    nesting: Any
    bytes: int
    digests: dict[str, str]
    count: int = 1  # type: ignore[assignment]  # the method of tuples is not needed


class Repeats:
    """The one writer of what repeats steps.

    Args:
        directory: of the run.
        database: of the run.
        budget: maximum bytes of batches and other inputs.
        recorded: the newest step that the run has.

    lost_to: the last step that needs dropped inputs.
    """

    def __init__(self, directory: Path, database: Database, budget: float, recorded: int) -> None:
        self.lost_to = 0
        self._database = database
        self._contents = Contents(directory, budget, database.all_contents(), recorded)
        self._packed_key: Any = None
        self._packed = b""

    def write(
        self, rows: Sequence[Taken], compare: Callable[[list[Repeat]], list[Repeat]] | None
    ) -> None:
        """Write steps. compare: compares those that the run has already, and returns the others.

        Raises:
            RunError: a step is not the recorded one.
            RecordingError: they cannot be written.
        """
        found: list[Repeat] = []
        for row in rows:
            given = self._contents.add(row.step + row.count - 1, row.inputs)
            digests = {"digests": row.digests} if row.digests else {}
            inputs = self._packed_inputs(row.nesting, given, digests)
            numbers = packed(row.numbers) if row.numbers else None
            now = Repeat(row.step, row.program, numbers, inputs, row.count)
            before = found[-1] if found else None
            # Steps with batches by rule often have everything in common.
            is_joined = before is not None and not given and not digests and before.last + 1 == now.step
            if before is not None and is_joined and before[1:4] == now[1:4]:
                found[-1] = before._replace(count=before.count + now.count)
            else:
                found.append(now)
        new = found if compare is None else compare(found)
        with self._database.transaction():
            self._contents.commit(self._database)
            self._database.write_repeats(new)
            if self._contents.lost_to > self.lost_to:
                self.lost_to = self._contents.lost_to
                self._database.write_facts({"batches_lost_to": self.lost_to})

    def move(self, directory: Path) -> None:
        """Go on in another place: the run's directory was moved."""
        self._contents.move(directory)

    def close(self) -> None:
        """Close the files."""
        self._contents.close()

    def _packed_inputs(self, nesting: Any, given: dict[str, Given], digests: dict[str, Any]) -> bytes:
        """Return the inputs of a step in database form; pack repeated ones only once."""
        key = repr(nesting), given, digests
        if key != self._packed_key:
            listed = {name: each.to_json() for name, each in given.items()}
            self._packed_key = key
            self._packed = packed({"nesting": nesting, "given": listed} | digests)
        return self._packed
