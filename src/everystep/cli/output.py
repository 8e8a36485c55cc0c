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
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from None
    hint(f"{path} ({path.stat().st_size / 1000:,.0f} kB)")


def tell(problems: list[str]) -> None:
    """Print the problems of a run as hints, not as errors."""
    for problem in problems:
        hint(f"everystep: {problem}")


def hint(text: str) -> None:
    """Print a line on stderr."""
    typer.echo(text, err=True)
