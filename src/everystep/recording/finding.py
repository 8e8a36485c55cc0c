"""Where runs are: a run by its name, and all runs in a directory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from everystep.errors import RunError, did_you_mean
from everystep.recording.database import FILE_NAME

__all__ = ["RUNS", "find_run", "find_runs"]

RUNS = Path("runs")


def find_run(name: str | Path, runs: Path = RUNS) -> Path:
    """Return the directory of a run: a path, or a name under `runs`.

    Raises:
        RunError: the run does not exist; the message names the most similar one.
    """
    for candidate in (Path(name), runs / name):
        if (candidate / FILE_NAME).is_file():
            return candidate
    if Path(name).exists():
        raise RunError(f"{name} is not a run: {FILE_NAME} is missing")
    known = [path.parent.name for path in runs.glob(f"*/{FILE_NAME}")]
    cure = (
        did_you_mean(str(name), known) if known else f"{runs}/ has no runs; run `everystep train` first"
    )
    raise RunError(f"no run {str(name)!r}; {cure or 'run `everystep runs` to list them'}")


def find_runs(directory: str | Path = RUNS) -> Iterator[Path]:
    """Yield the directories of all runs directly in `directory`, by name: digits-2 before digits-10.

    Raises:
        RunError: the directory does not exist, or is a run itself.
    """
    if not Path(directory).is_dir():
        is_name = (RUNS / directory / FILE_NAME).is_file()
        cure = f"it is a run in {RUNS}/" if is_name else "`everystep train` creates the first run"
        raise RunError(f"{directory} is not a directory; {cure}")
    if (Path(directory) / FILE_NAME).is_file():
        here = Path(directory)
        around = here / ".." if here.name in ("", "..") else here.parent
        raise RunError(f"{directory} is a run; `everystep runs {around}` lists the runs beside it")
    found = [path.parent for path in Path(directory).glob(f"*/{FILE_NAME}")]
    yield from sorted(found, key=lambda path: _in_order(path.name))


def _in_order(name: str) -> list[tuple[int, str]]:
    """Return what sorts names by their words, and numbers within them by value."""
    return [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"(\d+)", name)]
