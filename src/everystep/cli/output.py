"""What commands print besides data: hints and problems on stderr, and files they write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import typer

from everystep.errors import UsageError

__all__ = ["hint", "tell", "write"]


def write(path: Path, make: Callable[[], object]) -> None:
    """Let `make` write a file, and say where it is and how large.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        make()
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from None
    hint(f"{path} ({path.stat().st_size / 1000:,.0f} kB)")


def tell(problems: list[str]) -> None:
    """Print what is wrong with a run, but no error."""
    for problem in problems:
        hint(f"everystep: {problem}")


def hint(text: str) -> None:
    """Print a line on stderr."""
    typer.echo(text, err=True)
