"""Where runs are: a run by its name, and all runs in a directory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from everystep.errors import RunError, did_you_mean
from everystep.recording.database import FILE_NAME

__all__ = ["RUNS", "find_run", "find_runs", "is_run"]

RUNS = Path("runs")


def is_run(directory: Path) -> bool:
    """Return whether a directory has a run.

    Raises:
        RunError: it cannot be looked into.
    """
    try:
        return (directory / FILE_NAME).is_file()
    except OSError as error:
        raise RunError(f"{str(directory)!r:.200} cannot be read: {error.strerror}") from None


def find_run(name: str | Path, runs: Path = RUNS) -> Path:
    """Return the directory of a run: a path, or a name under `runs`.

    Raises:
        RunError: the run does not exist; the message names the most similar one.
    """
    for candidate in (Path(name), runs / name):
        if is_run(candidate):
            return candidate
    if Path(name).exists():
        raise RunError(f"{name} is not a run: {FILE_NAME} is missing")
    known = [path.parent.name for path in runs.glob(f"*/{FILE_NAME}")]
    cure = (
        did_you_mean(str(name), known) if known else f"{runs}/ has no runs; run `everystep train` first"
    )
    raise RunError(f"no run {str(name)!r:.200}; {cure or 'run `everystep runs` to list them'}")


def find_runs(directory: str | Path = RUNS) -> Iterator[Path]:
    """Yield the directories of all runs directly in `directory`, by name: digits-2 before digits-10.

    Raises:
        RunError: the directory does not exist, or is a run itself.
    """
    here = Path(directory)
    if is_run(here):
        around = here / ".." if here.name in ("", "..") else here.parent
        raise RunError(f"{directory} is a run; `everystep runs {around}` lists the runs next to it")
    if not here.is_dir():
        is_name = is_run(RUNS / directory)
        cure = f"it is a run in {RUNS}/" if is_name else "`everystep train` creates the first run"
        raise RunError(f"{directory} is not a directory; {cure}")
    found = [path.parent for path in here.glob(f"*/{FILE_NAME}")]
    yield from sorted(found, key=lambda path: _in_order(path.name))


def _in_order(name: str) -> list[tuple[int, str]]:
    """Return what sorts names by their words, and numbers within them by value."""
    return [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"(\d+)", name)]
