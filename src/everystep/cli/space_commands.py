"""Commands for the disk: what runs take, and how to remove them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from everystep.cli.output import hint, say, show, terminal_width
from everystep.cli.shared_options import JsonOption, RunsArgument
from everystep.errors import UsageError

__all__ = ["du", "rm"]


def du(
    directory: Annotated[Path, typer.Argument(metavar="[DIRECTORY|RUN]")] = Path("runs"),
    json: JsonOption = False,
) -> None:
    """Show what runs take on the disk, and for what.

    The largest run comes first. A file that several runs share, as forks do, counts once.

    Args:
        directory: A directory of runs, or a run.
    """
    from everystep.recording.directories import RUNS, find_runs, is_run
    from everystep.recording.space import spaces_of
    from everystep.views.lists import spaces_text
    from everystep.views.plain import as_json, plain_data

    run = next((each for each in (directory, RUNS / directory) if is_run(each)), None)
    found = spaces_of(iter([run]) if run is not None else find_runs(directory))
    if json:
        say(as_json(plain_data(list(found))))
    elif found:
        show(spaces_text(found, terminal_width()))
    else:
        hint(f"{directory} has no runs")


def rm(runs: RunsArgument, force: Annotated[bool, typer.Option("--force", "-f")] = False) -> None:
    """Remove runs.

    Forks of a run stay whole. Files in its directory that everystep did not write stay, too.

    Args:
        force: Do not ask.
    """
    from everystep.recording.directories import find_run
    from everystep.recording.space import remove_run, spaces_of
    from everystep.views.formatting import counted, size_text

    found = spaces_of(iter(dict.fromkeys(find_run(name) for name in runs)))
    total = size_text(sum(each.total for each in found))
    named = ", ".join(str(each.directory) for each in found)
    if not force:
        if not sys.stdin.isatty():
            raise UsageError(f"rm removes {named} ({total}) for good; pass --force to do so")
        question = f"Remove {counted(len(found), 'run')} ({named}, {total}) for good?"
        if not typer.confirm(question, err=True):
            raise typer.Exit(1)
    for each in found:
        left = remove_run(each.directory)
        hint(f"removed {each.directory} ({size_text(each.total)})")
        if left:
            hint(f"{each.directory} still has {', '.join(left[:5])}, which everystep did not write")
