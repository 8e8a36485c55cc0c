"""Source lines: those of a user's code that called the operations of a program."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

from pydantic import Field

from everystep.bounded import StrictModel

__all__ = ["LONGEST_FILE", "LONGEST_LINE", "CodeLine", "SourceLine"]

#: Characters of the name of a file or a function, and of the text of a line.
LONGEST_FILE, LONGEST_LINE = 1000, 300
#: A line is shown in terminals, so it has no characters that control one.
_Text = Annotated[str, Field(max_length=LONGEST_LINE, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]
_Named = Annotated[str, Field(max_length=LONGEST_FILE, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]


class SourceLine(StrictModel):
    """A line in the table of a program.

    file: its path, from the working directory or the place of installed packages if it is in there;
    line: from 1; function: in which it is; text: of the line, empty if unknown; above: the place, in the
    table, of the line that called this function, None for the outermost; a smaller one.
    """

    file: _Named
    line: Annotated[int, Field(ge=1, le=2**31)]
    function: _Named
    text: _Text
    above: Annotated[int, Field(ge=0)] | None = None


class CodeLine(NamedTuple):
    """A line of code that called an operation, as it was when the step ran.

    file, line, function, text: as in `SourceLine`; callers: the lines that called it, the innermost
    first.
    """

    file: str
    line: int
    function: str
    text: str
    callers: tuple[CodeLine, ...] = ()

    @property
    def place(self) -> str:
        """File and line: `train.py:41`."""
        return f"{self.file}:{self.line}"

    def __str__(self) -> str:
        return f"{self.place}  {self.text}".rstrip()

    def data(self) -> dict[str, Any]:
        """Return it as plain data."""
        return self._asdict() | {"callers": [each.data() for each in self.callers]}
