"""Output of commands: data on stdout, hints and problems on stderr, and files."""

from __future__ import annotations

import codecs
import errno
import io
import os
import re
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from everystep.errors import DamageWarning, EverystepError, size_text
from everystep.views.formatting import clean

if TYPE_CHECKING:
    from rich.text import Text

__all__ = [
    "OutputError",
    "answer",
    "drop_output",
    "hint",
    "hint_at_damage",
    "page_width",
    "prepare_streams",
    "quoted",
    "say",
    "say_lines",
    "say_written",
    "shortened",
    "show",
    "terminal_width",
]

#: The replacement of a character that the terminal's encoding lacks.
_PLAIN = {
    "\N{MULTIPLICATION SIGN}": "x",
    "\N{MIDDLE DOT}": "*",
    "\N{PARTIAL DIFFERENTIAL}": "d",
    "\N{MODIFIER LETTER CAPITAL T}": "^T",
    "\N{SUPERSCRIPT TWO}": "^2",
    "\N{HORIZONTAL ELLIPSIS}": ".",
}


# Apart from other errors of the system: `everystep losses RUN | head` is not a failed command.
class OutputError(EverystepError, OSError):
    """Stdout cannot be written: the disk is full, it is closed, or its reader has gone (`| head`)."""

    def __init__(self, error: OSError) -> None:
        reason = "stdout is closed" if error.errno == errno.EBADF else error.strerror
        super().__init__(f"the output cannot be written: {reason}")
        self.is_unread = error.errno == errno.EPIPE
        # The exit code of a command that SIGPIPE ends, as in a shell.
        self.exit_code = 141 if self.is_unread else 1


class _Stdout(io.FileIO):
    """Standard output; raises its own errors, distinct from those of other files and pipes."""

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except OSError as error:
            raise OutputError(error) from None


class _Stderr(io.FileIO):
    """Standard error; unwritable text is dropped, because it could not be reported anywhere."""

    def write(self, content: Any) -> int:
        with suppress(OSError):
            super().write(content)
        return len(content)


def prepare_streams() -> None:
    """Let stdout and stderr replace the characters that their encoding lacks; open closed ones.

    A file that is opened while stdout is closed would become stdout.
    """

    def replaced(error: UnicodeError) -> tuple[str, int]:
        if not isinstance(error, UnicodeEncodeError):
            raise error
        lacking = error.object[error.start : error.end]
        plain = (_PLAIN.get(each, each) for each in lacking)
        return "".join(plain).encode("ascii", "backslashreplace").decode(), error.end

    # A terminal without Unicode, such as LANG=C, gets plain signs instead of a traceback.
    codecs.register_error("everystep", replaced)
    for number, flags in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # the lowest free number; stdout fails where it is written
    sys.stdout = _own_stream(sys.stdout, sys.__stdout__, _Stdout(1, "w", closefd=False))
    sys.stderr = _own_stream(sys.stderr, sys.__stderr__, _Stderr(2, "w", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="everystep")


def _own_stream(now: Any, first: Any, raw: io.FileIO) -> Any:
    """Return a stream that writes to `raw`; or the present one, if it is a terminal, or replaced."""
    if now is not first or (now is not None and now.isatty()):
        return now
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=None if now is None else now.encoding,
        line_buffering=raw.fileno() == 2 or (now is not None and now.write_through),
    )


def say_written(path: Path) -> None:
    """Print the path of a file that was written, and its size."""
    hint(f"{path} ({size_text(path.stat().st_size)})")


def hint_at_damage() -> list[str]:
    """Let warnings of damaged runs be hints, each once; return the list that gathers them."""
    messages: list[str] = []
    show_others = warnings.showwarning

    def show_warning(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if not issubclass(category, DamageWarning):
            show_others(message, category, *place, **more)
        elif str(message) not in messages:  # Python compares the line of code that warns, too
            messages.append(str(message))
            hint(f"everystep: {message}")

    warnings.simplefilter("always", DamageWarning)
    warnings.showwarning = show_warning
    return messages


def quoted(text: str) -> str:
    """Return a text quoted as one word of a shell, with as few quotes as possible."""
    # gradients['0.weight'] is easier to read within double quotes than with each quote escaped.
    if "'" in text and not set(text) & set('"\\$`!'):  # which a shell reads within double quotes
        return f'"{text}"'
    return shlex.quote(text)


def answer(
    found: Any,
    json: bool = False,
    problems: Sequence[str] = (),
    *,
    is_yes: bool = True,
    text: Mapping[str, Any] | None = None,
    **options: Any,
) -> None:
    """Print an answer as JSON, or as lines with styles.

    problems: of the run, printed as hints; is_yes: for the exit code; options: of the data; text:
    additional ones for the lines.

    Raises:
        Exit: the answer is no.
    """
    from everystep.views.plain import as_json

    for problem in problems:
        hint(f"everystep: {problem}")
    if json:
        say(as_json(found.data(**options)))
    else:
        shown = found.view.shown(found, **options, **(text or {}))
        say(shown) if isinstance(shown, str) else show(shown)
    if not is_yes:
        raise typer.Exit(1)


def say(text: str, *, nl: bool = True) -> None:
    """Print data on stdout; nothing in it steers the terminal."""
    typer.echo(clean(text), nl=nl)


def terminal_width() -> int | None:
    """Return the columns of the terminal; None if stdout is not one."""
    from everystep.views.console import SafeConsole

    return SafeConsole().width if sys.stdout.isatty() else None


def page_width() -> int:
    """Return the columns of a page of text: those of the terminal, but not too few."""
    return max(terminal_width() or 100, 60)


def show(text: Text) -> None:
    """Print lines with styles on stdout, now; nothing in them steers the terminal."""
    from everystep.views.console import SafeConsole

    SafeConsole(highlight=False, soft_wrap=True).print(text, end="")
    sys.stdout.flush()


def shortened(message: str) -> str:
    """Return a message in which no name fills the terminal."""
    # Linux takes arguments of 128 kB, and messages repeat what was typed.
    return re.sub(r"\S{500,}", lambda name: f"{name[0][:80]}...", message)


def say_lines(text: str) -> None:
    """Print lines of a training on stdout; where that fails, the training continues without them."""
    try:
        say(text, nl=False)
    except OutputError as error:
        drop_output(error)


def drop_output(error: OutputError) -> None:
    """Report that stdout cannot be written, and discard the rest, which would fail again."""
    # Python flushes stdout when it exits, and would fail again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if not error.is_unread:
        hint(f"everystep: {error}")


def hint(text: str) -> None:
    """Print a line on stderr; nothing in it steers the terminal."""
    typer.echo(clean(text), err=True)
