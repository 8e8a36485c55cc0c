"""Output of commands besides data: hints and problems on stderr, and files."""

from __future__ import annotations

import codecs
import io
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from everystep.errors import DamageWarning
from everystep.views.printed import clean

__all__ = ["damage_on_stderr", "hint", "print_in_any_encoding", "quoted", "say", "say_written", "tell"]

#: What stands for a character that the terminal's encoding lacks.
_PLAIN = {
    "\N{MULTIPLICATION SIGN}": "x",
    "\N{MIDDLE DOT}": "*",
    "\N{PARTIAL DIFFERENTIAL}": "d",
    "\N{MODIFIER LETTER CAPITAL T}": "^T",
    "\N{SUPERSCRIPT TWO}": "^2",
    "\N{HORIZONTAL ELLIPSIS}": ".",
}


def print_in_any_encoding() -> None:
    """Let stdout and stderr replace the characters that their encoding lacks, in place of an error."""

    def replaced(error: UnicodeError) -> tuple[str, int]:
        if not isinstance(error, UnicodeEncodeError):
            raise error
        lacking = error.object[error.start : error.end]
        plain = (_PLAIN.get(each, each) for each in lacking)
        return "".join(plain).encode("ascii", "backslashreplace").decode(), error.end

    codecs.register_error("everystep", replaced)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="everystep")


def say_written(path: Path) -> None:
    """Print the path of a file that was written, and its size."""
    size = path.stat().st_size
    hint(f"{path} ({size / 1000:,.0f} kB)" if size >= 1000 else f"{path} ({size} bytes)")


@contextmanager
def damage_on_stderr() -> Iterator[Callable[[], bool]]:
    """Print warnings of damaged runs as hints; yields what returns whether there were any."""
    said: list[str] = []

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if not issubclass(category, DamageWarning):
            showwarning(message, category, *place, **more)
        elif str(message) not in said:
            said.append(str(message))
            hint(f"everystep: {message}")

    with warnings.catch_warnings():
        showwarning = warnings.showwarning
        warnings.simplefilter("always", DamageWarning)
        warnings.showwarning = show
        yield lambda: bool(said)


def quoted(text: str) -> str:
    """Return a text as a shell takes it for one word, with as few quotes as possible."""
    if "'" in text and not set(text) & set('"\\$`!'):
        return f'"{text}"'
    return shlex.quote(text)


def tell(problems: list[str]) -> None:
    """Print the problems of a run as hints, not as errors."""
    for problem in problems:
        hint(f"everystep: {problem}")


def say(text: str, *, nl: bool = True) -> None:
    """Print data on stdout; nothing in it steers the terminal."""
    typer.echo(clean(text), nl=nl)


def hint(text: str) -> None:
    """Print a line on stderr; nothing in it steers the terminal."""
    typer.echo(clean(text), err=True)
