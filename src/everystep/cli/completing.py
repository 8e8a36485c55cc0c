"""Completion in the shell. Imports no torch.

If a function returns nothing that fits, the shell offers files and directories.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import typer

from everystep.errors import RunError

__all__ = [
    "experiment_names",
    "experiments_and_files",
    "measurement_names",
    "one_of",
    "operation_numbers",
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
    from everystep.recording.run import RecordedRun

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
    from everystep.recording.run import RecordedRun

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
