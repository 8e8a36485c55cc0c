"""Arguments and options that several commands share, and what the shell offers for them on Tab.

The help of those without one is in the docstrings of the commands.

What it offers imports no torch. Where a function returns nothing that fits, the shell offers files and
directories.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from everystep.errors import RunError, UsageError

__all__ = [
    "BudgetOption",
    "CountOption",
    "FileOption",
    "JsonOption",
    "ProcessesOption",
    "QuietOption",
    "RankOption",
    "RelabelOption",
    "RowsOption",
    "RunArgument",
    "RunsArgument",
    "SettingsOption",
    "StepArgument",
    "StepOption",
    "experiment_names",
    "experiments_and_files",
    "measurement_names",
    "of_rank",
    "row_numbers",
    "run_names",
    "targets",
]


def run_names() -> list[str]:
    """Return the names of the runs in runs/ and of those in the current directory."""
    from everystep.recording.directories import RUNS, find_runs, is_run, name_of

    # Within a run, the current directory holds no runs but files of one.
    places = [place for place in (RUNS, Path()) if place.is_dir() and not is_run(place)]
    return sorted({name_of(path) for place in places for path in find_runs(place)})


def experiment_names() -> list[str]:
    """Return the names of the built-in experiments."""
    from everystep.experiment.specification import built_in

    return list(built_in())


def experiments_and_files() -> list[str]:
    """Return the built-in experiments, and the TOML files in the current directory."""
    # pyproject.toml is a TOML file, but never an experiment.
    files = sorted(path.name for path in Path().glob("*.toml") if path.name != "pyproject.toml")
    return [*experiment_names(), *files]


def measurement_names(ctx: typer.Context) -> list[str]:
    """Return the measurements that can be drawn of the runs typed so far."""
    from everystep.recording.directories import find_run
    from everystep.recording.recorded_run import RecordedRun

    found: set[str] = set()
    # Parsing stops at the option, because its value is missing; the arguments are then left as typed.
    for run in ctx.params.get("runs") or ctx.args:
        try:
            found.update(RecordedRun(find_run(run)).measurement_names)
        except RunError:
            continue
    return sorted(found)


RunArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="A run's directory, or its name in runs/.", autocompletion=run_names
    ),
]
RunsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN", help="Run directories, or their names in runs/.", autocompletion=run_names
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
FileOption = Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE")]
RowsOption = Annotated[str | None, typer.Option(metavar="ROWS")]
RelabelOption = Annotated[list[str] | None, typer.Option(metavar="ROW=TARGET")]
RankOption = Annotated[
    int | None,
    typer.Option(min=0, metavar="N", help="Of several processes that trained together, number N."),
]
#: A place among the steps.
StepOption = Annotated[int | None, typer.Option(metavar="STEP")]
#: How many.
CountOption = Annotated[int, typer.Option(min=1, metavar="N")]


def row_numbers(text: str | None) -> list[int]:
    """Return the rows in `8123,8124`; none in None.

    Raises:
        UsageError: it is not a list of whole numbers.
    """
    try:
        return [] if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{text!r:.80} is not a list of rows; write 8123,8124") from None


def targets(texts: Sequence[str] | None) -> dict[int, float]:
    """Return the target of each row in `8123=4`, ...; none in None.

    Raises:
        UsageError: one is not a pair of numbers.
    """
    found = {}
    for text in texts or ():
        row, _, target = text.partition("=")
        try:
            found[int(row)] = float(target)
        except ValueError:
            raise UsageError(
                f"--relabel {text}: write ROW=TARGET, two numbers: --relabel 8123=4"
            ) from None
    return found


def of_rank(run: str, rank: int | None) -> str:
    """Return the directory of a rank of a run; the run itself if none is asked for.

    Raises:
        UsageError: it has no such rank.
    """
    if rank is None:
        return run
    from everystep.recording.directories import find_run
    from everystep.recording.recorded_run import RecordedRun

    found = RecordedRun(find_run(run))
    if rank >= len(ranks := found.ranks):
        known = f"its ranks are 0 to {len(ranks) - 1}" if ranks[1:] else "one process trained it"
        raise UsageError(f"{found.name} has no rank {rank}; {known}")
    # As the user typed it, if possible: hints repeat this name.
    is_first = found.known_ranks is None or found.known_ranks.rank == 0
    return str(Path(run) / ranks[rank].within if is_first else ranks[rank].directory)
