"""Commands for the disk: what runs take, and how to remove them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from everystep.cli import shared_options as shared
from everystep.cli.output import hint, say, show, terminal_width
from everystep.errors import UsageError, size_text

__all__ = ["du", "prune", "rm"]


def du(
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY|RUN")] = Path("runs"),
    json: shared.JsonOption = False,
) -> None:
    """Show what runs take on the disk, and for what.

    The largest run comes first. A file that several runs share, as forks do, counts once.

    Args:
        directory: A directory of runs, or a run.
    """
    from everystep.recording.directories import RUNS, find_runs, is_run, spaces_of
    from everystep.views.lists import spaces_text
    from everystep.views.plain import as_json, plain_data

    run = next((each for each in (directory, RUNS / directory) if is_run(each)), None)
    # Together, so that a file that runs share counts once.
    found = spaces_of(find_runs(directory) if run is None else [run])
    if json:
        say(as_json(plain_data(list(found))))
    elif found:
        show(spaces_text(found, terminal_width()))
    else:
        hint(f"{directory} has no runs")


def prune(
    run: shared.RunArgument,
    snapshots: Annotated[int | None, typer.Option(min=0, metavar="MB")] = None,
    batches: Annotated[int | None, typer.Option(min=0, metavar="MB")] = None,
    force: Annotated[bool, typer.Option("--force", "-f")] = False,
) -> None:
    """Make a run smaller.

    Prints what is removed and what can still be opened, and asks. Losses and measurements stay in any
    case, and so do the first and the last state. With fewer states, steps take longer to open.

    Args:
        snapshots: Maximum size of all states, in MB.
        batches: Maximum size of all batches, in MB; the oldest go first.
        force: Do not ask.
    """
    from everystep.recording.directories import find_run
    from everystep.recording.lock import locked
    from everystep.recording.prune import prune, pruning_of
    from everystep.recording.recorded_run import RecordedRun
    from everystep.views.lists import pruning_text

    if snapshots is None and batches is None:
        raise UsageError("name what to make smaller: --snapshots MB, --batches MB, or both")
    directory = find_run(run)
    RecordedRun(directory).check_alone("make such a run smaller")
    sizes = (None if each is None else 1_000_000 * each for each in (snapshots, batches))
    with locked(directory):  # a run that is being written is refused before anything is reported
        found = pruning_of(directory, *sizes)
    if not (found.states or found.files):
        hint(f"{directory} is within these sizes, or has nothing more to remove")
        return
    say(pruning_text(found))
    if not _is_sure(f"Remove this ({size_text(found.bytes)})", force):
        raise typer.Exit(1)
    prune(directory, found)
    hint(f"{directory} is smaller by {size_text(found.bytes)}")


def rm(runs: shared.RunsArgument, force: Annotated[bool, typer.Option("--force", "-f")] = False) -> None:
    """Remove runs.

    Forks of a run stay whole. Files in its directory that everystep did not write stay, too.

    Args:
        force: Do not ask.
    """
    from everystep.recording.directories import RANKS, find_run, name_of, remove_run, spaces_of
    from everystep.views.formatting import counted

    places = [*dict.fromkeys(find_run(name) for name in runs)]
    for place in places:
        name = name_of(place)
        if f"/{RANKS}/" in name:
            raise UsageError(
                f"{name} is a part of {name.partition('/')[0]}, which needs it; remove that run"
            )
    found = spaces_of(places)
    total = size_text(sum(each.total for each in found))
    named = ", ".join(str(each.directory) for each in found)
    if not _is_sure(f"Remove {counted(len(found), 'run')} ({named}, {total})", force):
        raise typer.Exit(1)
    for each in found:
        left = remove_run(each.directory)
        hint(f"removed {each.directory} ({size_text(each.total)})")
        if left:
            hint(f"{each.directory} still has {', '.join(left[:5])}, which everystep did not write")


def _is_sure(what: str, force: bool) -> bool:
    """Ask whether to do what cannot be undone."""
    if force:
        return True
    # A script must not wait for an answer that never comes.
    if not sys.stdin.isatty():
        raise UsageError(f"{what}? Nobody can answer, since stdin is not a terminal; pass --force")
    return typer.confirm(f"{what} for good?", err=True)
