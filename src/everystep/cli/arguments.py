"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from everystep.cli.completing import run_names
from everystep.errors import UsageError

if TYPE_CHECKING:
    from everystep.run import Run

__all__ = [
    "BudgetOption",
    "JsonOption",
    "PageOption",
    "ProcessesOption",
    "QuietOption",
    "RunArgument",
    "RunsArgument",
    "SettingsOption",
    "StepArgument",
    "open_run",
    "row_numbers",
]

RunArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="A run's directory, or its name in runs/.", autocompletion=run_names
    ),
]
RunsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN...", help="Run directories, or their names in runs/.", autocompletion=run_names
    ),
]
StepArgument = Annotated[int, typer.Argument(metavar="STEP", help="Step, from 1, or from the end: -1.")]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Override a value: optimizer.lr=1e-3. Repeatable."),
]
BudgetOption = Annotated[
    int, typer.Option(min=1, metavar="MB", help="Maximum size of all snapshots, in MB.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print only warnings and errors.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON; nan and inf as strings.")]
ProcessesOption = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Number of processes that replay; default: one per core."),
]
PageOption = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        metavar="FILE",
        help="The page to write (.html); default: RUN-losses.html or RUN-report.html here.",
    ),
]


def open_run(name: str) -> Run:
    """Return the run in a directory, or of that name in runs/.

    Raises:
        RunError: there is none, or it cannot be read.
    """
    from everystep import api

    return api.open(name)


def row_numbers(text: str | None) -> list[int]:
    """Return the rows in `8123,8124`; none in None.

    Raises:
        UsageError: it is not a list of whole numbers.
    """
    try:
        return [] if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{text!r:.80} is not a list of rows; write 8123,8124") from None
