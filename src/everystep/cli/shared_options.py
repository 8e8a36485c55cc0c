"""Arguments and options that several commands share, and what the shell offers for them on Tab.

What it offers imports no torch. Where a function returns nothing that fits, the shell offers files and
directories.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from everystep.errors import RunError, UsageError

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
    "experiment_names",
    "experiments_and_files",
    "measurement_names",
    "one_of",
    "open_run",
    "operation_numbers",
    "row_numbers",
    "run_names",
]


def run_names() -> list[str]:
    """Return the names of the runs in runs/ and of those in the current directory."""
    from everystep.recording.database import FILE_NAME
    from everystep.recording.directories import RUNS

    found = [path.parent.name for place in (RUNS, Path()) for path in place.glob(f"*/{FILE_NAME}")]
    return sorted(set(found))


def experiment_names() -> list[str]:
    """Return the names of the built-in experiments."""
    from everystep.experiment.specification import built_in

    return list(built_in())


def experiments_and_files() -> list[str]:
    """Return the built-in experiments, and the TOML files in the current directory."""
    files = sorted(path.name for path in Path().glob("*.toml") if path.name != "pyproject.toml")
    return [*experiment_names(), *files]


def one_of(*names: str) -> Callable[[], list[str]]:
    """Return what offers these names."""
    return lambda: list(names)


def operation_numbers(ctx: typer.Context) -> list[tuple[str, str]]:
    """Return the operations of a step, except those of an optimizer, which opening it finds out.

    Each with its operator, which zsh and fish show.
    """
    from everystep.recording.directories import find_run
    from everystep.recording.files import program_file
    from everystep.recording.recorded_run import RecordedRun

    try:
        name, step, *_ = _arguments(ctx, "run")
        run = RecordedRun(find_run(name))
        (row,) = run.repeats(int(step), int(step))
        operations = json.loads(run.read_file(program_file(row.program or 0)))["operations"]
        operations = [each for each in operations if not each["operator"].startswith("optim.")]
        return [(str(number), each["operator"]) for number, each in enumerate(operations)]
    except (RunError, ValueError, LookupError, TypeError):
        return []


def measurement_names(ctx: typer.Context) -> list[str]:
    """Return the measurements that can be drawn of the runs typed so far."""
    from everystep.recording.directories import find_run
    from everystep.recording.recorded_run import RecordedRun

    found: set[str] = set()
    for run in _arguments(ctx, "runs"):
        try:
            found.update(RecordedRun(find_run(run), may_be_cut=True).measurement_names)
        except RunError:
            continue
    return sorted(found)


def _arguments(ctx: typer.Context, name: str) -> list[str]:
    """Return what was typed for an argument before an option with its value still to come.

    Parsing stops at that option, because its value is missing; the arguments are then left as typed.
    """
    found = ctx.params.get(name)
    return ctx.args if not found else [found] if isinstance(found, str) else list(found)


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
