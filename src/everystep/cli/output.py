"""Output of commands besides data: hints and problems on stderr, and files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import typer

from everystep.errors import UsageError

__all__ = ["hint", "tell", "write"]


def write(path: Path, make: Callable[[], object]) -> None:
    """Let `make` write a file; print its path and size.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        make()
    except OSError as error:
        is_nowhere = isinstance(error, FileNotFoundError) and not path.parent.exists()
        reason = f"the directory {path.parent} does not exist" if is_nowhere else error.strerror
        raise UsageError(f"{path} cannot be written: {reason or error}") from None
    hint(f"{path} ({path.stat().st_size / 1000:,.0f} kB)")


def tell(problems: list[str]) -> None:
    """Print the problems of a run as hints, not as errors."""
    for problem in problems:
        hint(f"everystep: {problem}")


def hint(text: str) -> None:
    """Print a line on stderr."""
    typer.echo(text, err=True)
